"""The examples: each runs with tiny weights, is short, and rejects what makes no sense."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(p for p in EXAMPLES.glob("*.py") if 'if __name__ == "__main__"' in p.read_text())
NAMES = [script.stem for script in SCRIPTS]
SEVERAL = "wan22_multi_gpu"
"""Runs under torchrun."""

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def run(monkeypatch, name: str, *arguments: object) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_all_are_here() -> None:
    wanted = "cogvideox flux hunyuan_video ltx_video qwen_image sd35 wan21 wan22_14b wan22_5b"
    assert [*wanted.split(), SEVERAL] == NAMES


def test_a_dry_run_on_two_ranks(tmp_path) -> None:
    out = tmp_path / "out.gif"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--dry-run", "--out", str(out), "--recall", "0.9", "--warm-up", "0.99"]
    command = [*torchrun, str(EXAMPLES / f"{SEVERAL}.py"), *options]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    printed = found.stdout
    assert out.stat().st_size > 0
    assert printed.count(f"wrote {out}") == printed.count("attention nodes") == 1
    assert "rank 1" in printed


@pytest.mark.parametrize("name", [name for name in NAMES if name != SEVERAL])
def test_a_dry_run(name: str, monkeypatch, tmp_path, capsys) -> None:
    video = "frames" in (EXAMPLES / f"{name}.py").read_text()
    out = tmp_path / f"{name}.{'gif' if video else 'png'}"
    run(monkeypatch, name, "--dry-run", "--out", out, "--recall", 0.9, "--warm-up", 0.99)
    assert out.stat().st_size > 0
    printed = capsys.readouterr().out
    assert f"wrote {out}" in printed
    assert "attention nodes" in printed
    assert "planned" in printed


@pytest.mark.parametrize("name", NAMES)
def test_they_are_short_and_say_how_to_run_them(name: str) -> None:
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert len(lines) < 40
    assert any(f"examples/{name}.py --dry-run" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recall", "1.5"], "must be in (0, 1], got 1.5"),
        (["--warm-up", "0"], "must be in (0, 1], got 0"),
        (["--steps", "0"], "must be at least 1, got 0"),
        (["--steps", "two"], "invalid"),
        (["--out", "/no/such/folder/a.gif"], "no folder /no/such/folder"),
    ],
)
def test_wrong_arguments_are_rejected_before_any_work(
    arguments, words, monkeypatch, capsys
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "wan21", "--dry-run", *arguments)
    assert words in capsys.readouterr().err

"""``cef-compile calibrate``, and ``demo --policy`` with its files, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import cef_compile
from cef_compile import cli, load_policy, save_policy
from cef_compile.demo.data import data_folder, load_clip
from cef_compile.demo.latents import unshuffle
from cef_compile.demo.sampler import add_noise
from cef_compile.demo.settings import Settings
from cef_compile.policy import Balanced, NodePolicy, Schedule

QUICK = "--candidates 0.9 --min-kv-len 64 --device cpu"
CLIP = "--size 64 --frames 2 --steps 1"
"""128 tokens: seconds."""
TINY_WAN = data_folder() / "tiny-wan"


def typed(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cef_compile.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def calls(levels: tuple[float | None, ...] = (0.5,)) -> list[tuple[float | None, dict]]:
    """Calls of the tiny Wan as somebody would have recorded them."""
    video, text = load_clip(1, 2, 64)
    return [
        (
            level,
            {
                "hidden_states": add_noise(unshuffle(video)[None], 3, level or 0.5),
                "timestep": torch.tensor([1000 * (level or 0.5)]),
                "encoder_hidden_states": text,
                "return_dict": False,
            },
        )
        for level in levels
    ]


def test_the_embedded_model(tmp_path: Path) -> None:
    result = typed("calibrate", "--max-error", "0.05", *CLIP.split(), *QUICK.split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("error 0.0")
    assert "of the allowed 0.0500 over 2 calls" in lines[0]
    assert lines[-1] == "wrote policy.json"
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]
    policy = load_policy(tmp_path / "policy.json")
    assert isinstance(policy, NodePolicy)
    assert policy.model == "WanTransformer3DModel"
    assert policy.calibration.chosen.error <= 0.05
    assert {round(node.noise_level, 6) for node in policy.calibration.nodes} == {0.7}
    # And the demo takes it.
    settings = Settings.resolve(device="cpu", policy=tmp_path / "policy.json", out=tmp_path)
    assert settings.recall is None
    assert settings.make_policy().nodes == policy.nodes


def test_a_folder_and_recorded_calls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fresh_dynamo: None
) -> None:
    torch.save(calls((None,)), tmp_path / "calls.pt")
    out = tmp_path / "mine.json"
    files = [str(TINY_WAN), "--inputs", str(tmp_path / "calls.pt"), "--out", str(out)]
    assert cli.main(["calibrate", *files, "--max-error", "0.05", *QUICK.split(), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["max_error"] == 0.05
    assert printed["chosen"]["error"] <= 0.05
    assert printed["calls"] == 1
    policy = load_policy(out)
    assert {len(entry.bands) for entry in policy.nodes} == {1}  # it depends on no level


def test_demo_with_a_policy_by_noise_level(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fresh_dynamo: None,
) -> None:
    """The level is told before each step: without it, a schedule raises.

    Without Inductor, whose compilations take minutes.
    """
    monkeypatch.chdir(tmp_path)
    compile_ = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda model, backend="eager", mode=None, **options: compile_(model, backend=backend),
    )
    monkeypatch.setattr(
        cef_compile, "backend", partial(cef_compile.backend, inner="eager", min_kv_len=64)
    )
    schedule = Schedule({0.6: None, 0.0: Balanced(0.9)})
    save_policy(schedule, tmp_path / "schedule.json")
    options = "--steps 2 --size 64 --frames 2 --device cpu --policy schedule.json --out out"
    assert cli.main(["demo", *options.split()]) == 0
    assert "policy schedule.json, float32 on cpu" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["policy"] == "schedule.json"
    assert report["settings"]["recall"] is None
    # The first step is at 0.7, dense; the second, at 0.55, is filtered.
    assert [p["step"] for p in report["passes"]] == ["2", "2"]
    assert all(node["audit"]["calls"] == 2 for node in report["nodes"] if node["audit"])
    assert any(node["audit"] for node in report["nodes"])


MISTAKES = {
    "--max-error 2": "max_error must be in (0, 1], got 2",
    "--max-error 0.1 --candidates 1.5": "a candidate must be in (0, 1], got 1.5",
    "--max-error 0.1 --out .": ". is a folder; --out names the file to write",
    "--max-error 0.1 --out no/where.json": "cannot write to the folder no: No such file",
    "--max-error 0.1 --steps 0": "steps must be at least 1, got 0",
    "--max-error 0.1 --clip 2": "clip must be from 0 to 1, got 2",
    "--max-error 0.1 --inputs calls.pt": "name its folder too",
    "--max-error 0.1 {wan} --clip 1": "--clip is of the tiny Wan's clip",
    "--max-error 0.1 {wan}": "--inputs is missing",
    "--max-error 0.1 {wan} --inputs nothing.pt": "cannot read nothing.pt: No such file",
    "--max-error 0.1 {wan} --inputs text.pt": "text.pt is no file of torch.save",
    "--max-error 0.1 {wan} --inputs dict.pt": "dict.pt must hold a list of calls, got dict",
    "--max-error 0.1 {wan} --inputs pair.pt": "pair.pt: call 0 must be a pair of noise level",
    "--max-error 0.1 {wan} --inputs level.pt": "level.pt: call 0: its noise level must be",
    "--max-error 0.1 {wan} --inputs code.pt": "code.pt is no file of torch.save",
    "--max-error 0.1 . --inputs calls.pt": "cannot read config.json: [Errno 2]",
    "--max-error 0.1 other --inputs calls.pt": "'Nothing' is no model of diffusers",
    "--max-error 0.1 empty --inputs calls.pt": "cannot load empty: ",
    "--max-error 0.1 {wan} --inputs wrong.pt": "the model fails on wrong.pt: ",
    "--max-error 0.1 --size 32 --frames 1": "no attention node of this model can be filtered",
    "--max-error 0.1 --checkpoint text.pt --size 64 --frames 8": "text.pt",
    "": "the following arguments are required: --max-error",
}


class Code:
    """Would be run by loading it."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("hello")
    torch.save({}, tmp_path / "dict.pt")
    torch.save([3], tmp_path / "pair.pt")
    torch.save([(-1.0, calls()[0][1])], tmp_path / "level.pt")
    torch.save([(0.5, {"hidden_states": Code()})], tmp_path / "code.pt")
    torch.save([(0.5, {"hidden_states": torch.zeros(3)})], tmp_path / "wrong.pt")
    torch.save(calls(), tmp_path / "calls.pt")
    for name, class_ in (("other", "Nothing"), ("empty", "WanTransformer3DModel")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"_class_name": class_}))
    return tmp_path


@pytest.mark.parametrize("options", MISTAKES)
def test_mistakes_end_with_one_line_and_code_2(
    folder: Path, options: str, capsys: pytest.CaptureFixture[str], fresh_dynamo: None
) -> None:
    before = sorted(folder.iterdir())
    try:
        code = cli.main(["calibrate", *options.format(wan=TINY_WAN).split()])
    except SystemExit as exit_:  # argparse leaves by itself
        code = exit_.code
    assert code == cli.USAGE_ERROR
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.splitlines()[-1]
    assert line.startswith("cef-compile calibrate: error: ")
    assert MISTAKES[options] in line
    assert sorted(folder.iterdir()) == before  # no policy of a failed calibration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--policy nothing.json", "cannot read nothing.json: No such file"),
        ("--policy text.pt", "text.pt"),
        ("--policy text.pt --recall 0.9", "not allowed with argument"),
    ],
)
def test_the_demo_refuses_what_is_no_policy(
    folder: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["demo", *options.split()])
    except SystemExit as exit_:
        code = exit_.code
    assert code == cli.USAGE_ERROR
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["calibrate", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for needed in ("--max-error", "policy.json", "calls.pt", "docs/calibration.md", "examples:"):
        assert needed in text

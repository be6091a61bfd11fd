"""The docs: every code block runs, every link leads somewhere, every table is that of its data."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from models import Stack, tokens
from PIL import Image

import cef_compile
import cef_compile.report
from cef_compile.cli import make_parser

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples" / "tiny-wan" / "README.md",
]
"""All of them: a new page under docs/ is one of these by itself."""
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
SHELL_COMMANDS = ("cef-compile", "make", "pip", "python", "torchrun")


def blocks(page: Path, language: str) -> list[str]:
    """Code blocks of a language, in their order."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [code for name, code in found if name == language]


def ids(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


with_python = [page for page in PAGES if blocks(page, "python")]
with_shell = [page for page in PAGES if blocks(page, "sh")]


@pytest.mark.parametrize("page", with_python, ids=ids(with_python))
def test_python_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None
) -> None:
    """A page's blocks in their order, as one program, on a small model.

    Behind the backend stands "eager" in place of Inductor, which is what takes the time, and the
    small model's few tokens are enough to filter.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    alone = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in alone.items():  # as torchrun sets them
        monkeypatch.setenv(name, str(value))
    for name in ("dense.png", "filtered.png"):
        Image.new("RGB", (4, 4)).save(name)
    quick = partial(cef_compile.backend, inner="eager", min_kv_len=0)
    monkeypatch.setattr(cef_compile, "backend", quick)
    calibrate = partial(cef_compile.calibrate, min_kv_len=0, progress=False)
    monkeypatch.setattr(cef_compile, "calibrate", calibrate)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 256, 16)
    names = {
        "cef_compile": cef_compile,
        "torch": torch,
        "model": Stack(depth=2).eval(),
        "args": (tokens(256),),
        "query": query,
        "key": key,
        "value": value,
    }
    with warnings.catch_warnings():
        # A model without training may favour Balanced, which calibrate warns of.
        warnings.filterwarnings("ignore", "the calibrated policy is no better", UserWarning)
        for code in blocks(page, "python"):
            exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize("page", with_shell, ids=ids(with_shell))
def test_commands_exist(page: Path) -> None:
    """Each line parses: commands with their options, targets of the Makefile, scripts."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in "".join(blocks(page, "sh")).splitlines():
        command, *rest = shlex.split(line, comments=True)
        assert command in SHELL_COMMANDS, line
        if command == "cef-compile":
            assert make_parser().parse_args(rest).run
        elif command == "make":
            assert rest[0] in targets
        elif command in ("python", "torchrun"):
            script = next(argument for argument in rest if argument.endswith(".py"))
            assert (ROOT / script).is_file()


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_blocks_are_of_known_languages(page: Path) -> None:
    languages = {name for name, _ in BLOCK.findall(page.read_text(encoding="utf-8"))}
    assert languages <= {"", "python", "sh"}  # without one: output


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_tables_are_those_of_the_measurements() -> None:
    script = ROOT / "docs" / "figures" / "tables.py"
    run = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_figure_is_shown_and_made() -> None:
    """By its file name, in a page and in the script."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    script = (ROOT / "docs" / "figures" / "make.py").read_text(encoding="utf-8")
    figures = sorted((ROOT / "docs" / "figures").glob("*.png"))
    assert figures
    for figure in figures:
        assert f"figures/{figure.name}" in text
        assert figure.name in script


def test_recalls_are_of_the_demo() -> None:
    """The row that the demo computes too, by default."""
    rows = json.loads((ROOT / "docs" / "figures" / "recalls.json").read_text())
    (row,) = (r for r in rows if (r["clip"], r["recall"], r["dense_steps"]) == (0, 0.9, 0))
    shown = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"recall {row['achieved']:.3f}, density {row['density']:.3f}" in shown
    assert re.search(rf"filtered +{row['psnr_db']:.1f} +{row['ssim']:.4f}", shown)

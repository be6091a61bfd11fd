"""The pages on policies and calibration: their blocks run in their order, their links lead on."""

from __future__ import annotations

import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from models import Stack, tokens

import cef_compile

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("policies", "calibration")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page: str, tmp_path: Path, monkeypatch, fresh_dynamo: None) -> None:
    """On a small model, with "eager" behind the backend and few tokens enough to filter."""
    monkeypatch.chdir(tmp_path)
    quick = partial(cef_compile.backend, inner="eager", min_kv_len=0)
    monkeypatch.setattr(cef_compile, "backend", quick)
    calibrate = partial(cef_compile.calibrate, min_kv_len=0, progress=False)
    monkeypatch.setattr(cef_compile, "calibrate", calibrate)
    torch.manual_seed(0)
    names = {
        "cef_compile": cef_compile,
        "torch": torch,
        "model": Stack(depth=2).eval(),
        "args": (tokens(256),),
    }
    blocks = BLOCK.findall((DOCS / f"{page}.md").read_text(encoding="utf-8"))
    assert blocks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a random model may favour Balanced
        for code in blocks:
            exec(compile(code, page, "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall((DOCS / f"{page}.md").read_text(encoding="utf-8")):
        assert target.startswith("https://") or (DOCS / target).exists(), target

"""Transformers of diffusers, class by class: right at recall 1, filtered, and said why not."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from cef_compile.report import Report, ReportedBreak

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import census  # noqa: E402
import census_models  # noqa: E402

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

REPRESENTATIVE = [
    "AceStepTransformer1DModel",  # windows and grouped queries
    "AnyFlowFARTransformer3DModel",  # flex_attention
    "AuraFlowTransformer2DModel",
    "ConsisIDTransformer3DModel",  # softmax spelled out
    "Cosmos3OmniTransformer",  # causal and full attention on one path
    "DiTTransformer2DModel",
    "ErnieImageTransformer2DModel",  # a mask per graph
    "GlmImageTransformer2DModel",  # a graph break
    "HeliosTransformer3DModel",
    "HiDreamImageTransformer2DModel",  # many graph breaks
    "HunyuanVideo15Transformer3DModel",  # masks of padded keys and queries
    "HunyuanVideoFramepackTransformer3DModel",  # blocks in graphs of their own
    "Kandinsky5Transformer3DModel",
    "LatteTransformer3DModel",  # frames as a batch
    "LTX2VideoTransformer3DModel",  # six attentions a block
    "Lumina2Transformer2DModel",  # item()
    "MochiTransformer3DModel",  # nonzero()
    "PRXTransformer2DModel",
    "QwenImageTransformer2DModel",  # a padding mask
    "SanaTransformer2DModel",  # linear attention
    "WanAnimateTransformer3DModel",
    "ZImageTransformer2DModel",
]
CLOSE = 0.1
"""Change of the output's norm at recall 0.9: a tenth of the energy is dropped at most."""


def check(name: str) -> census.Row:
    row = census.examine(name)
    assert not census.problems(row)
    assert row.whole.report.nodes
    for run in (row.whole, row.regional, *row.healed.values()):
        if run is None:
            continue
        assert (run.change > 0) == bool(run.filtered)
        assert run.change <= CLOSE
        for node in run.filtered:
            assert node.density is not None
            assert node.density < 1 or node.estimated_recall == pytest.approx(1)
    return row


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_third_of_the_classes(name: str) -> None:
    check(name)


# All of them take three minutes on a core: each is compiled twice, or five times if it breaks.
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(census_models.RECIPES) - set(REPRESENTATIVE)))
def test_the_other_classes(name: str) -> None:
    check(name)


def test_breaks_are_said_with_what_heals_them() -> None:
    row = check("MochiTransformer3DModel")
    assert row.whole.breaks > 0
    assert "capture_dynamic_output_shape_ops = True" in row.whole.report.breaks[0].remedy
    assert row.healed["capture_dynamic_output_shape_ops"].breaks == 0
    assert len(row.healed["capture_dynamic_output_shape_ops"].filtered) == 2  # of unknown length
    text = census.table([row], {"Other": "why"})
    assert f"{row.name}: {row.whole.graphs} graphs. The graph of {row.name} breaks at" in text
    assert "`capture_dynamic_output_shape_ops = True` leaves 1: 3 attention nodes seen" in text
    assert "- Other: why" in text


def test_the_page_lists_every_class() -> None:
    text = (ROOT / "docs" / "models.md").read_text()
    listed = re.findall(r"^\| (\w+) \| +\d", text, re.MULTILINE)
    assert listed == sorted(census_models.RECIPES)
    assert len(listed) >= 45
    missing = re.findall(r"^- (\w+): (?!\d+ graphs?\.)", text, re.MULTILINE)
    assert sorted([*listed, *missing]) == census.classes()


def test_the_readme_has_the_rows_of_the_page() -> None:
    page, readme = ((ROOT / name).read_text() for name in ("docs/models.md", "README.md"))
    place = census.PLACE.search(readme)
    assert place is not None
    assert place[0] == place[1] + census.readme_table(page) + place[2]
    assert len(census.FAMILIES) >= 10
    for family in census.FAMILIES:
        assert f"| {family} |" in place[0]


def test_graphs_without_a_break_in_the_report_are_a_problem() -> None:
    run = census.Run(2, 0, Report("p", []), error=0.0, change=0.0, finite=True)
    assert census.problems(census.Row("A", run)) == [
        "whole: 2 graphs, and the report names no break"
    ]
    run.report = Report("p", [], breaks=[ReportedBreak("A", "a.py:1", "item", "Set this.")])
    assert not census.problems(census.Row("A", run))


def test_a_setting_that_dynamo_fails_with_is_said() -> None:
    row = check("QwenImage21Transformer2DModel")
    assert row.refused == ["capture_scalar_outputs"]
    page = census.table([row], {})
    assert "With `capture_scalar_outputs = True` Dynamo raises an error." in page


def test_a_class_without_a_recipe_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["census.py", "--only", "NoSuchModel"])
    with pytest.raises(SystemExit):
        census.main()
    assert "no recipe for NoSuchModel" in capsys.readouterr().err

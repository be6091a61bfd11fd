"""Graph breaks: said in the report with what heals them, and no reason to lose a node's name."""

from __future__ import annotations

import contextlib
from typing import Any

import models
import pytest
import torch
from report_cases import FILTERED
from torch import Tensor, nn

import cef_compile
from cef_compile.report import Report, ReportedBreak
from cef_compile.report.record import RecordError, check, join
from cef_compile.report.words import sentences

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

CONFIG = "torch._dynamo.config"
# float32 rounding through a few layers, relative to the largest output.
FP32 = 1e-5


class Cut(nn.Module):
    """Two attentions with something between them that Dynamo may not trace."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.first, self.second = models.Attention(), models.Attention()
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        if self.between == "item":
            x = x * x[0, 0, 0].item()
        if self.between == "nonzero":
            x = x + x[0].new_ones(4).nonzero().sum()
        if self.between == "boolean index":
            x = x + x[x > 0].mean()
        if self.between == "branch" and x.sum() > 1e9:
            x = x + 1
        if self.between == "graph_break":
            torch._dynamo.graph_break()
        return x + self.second(x)


def compiled_report(model: nn.Module, *args: Any) -> Report:
    backend = cef_compile.backend(recall=1.0, inner="eager", min_kv_len=0)
    with torch.no_grad():
        expected = model(*args)
        got = torch.compile(model, backend=backend)(*args)
        assert (got - expected).abs().max() <= FP32 * expected.abs().max()
    return backend.report


@pytest.mark.parametrize(
    ("between", "setting"),
    [
        ("item", "capture_scalar_outputs"),
        ("nonzero", "capture_dynamic_output_shape_ops"),
        ("boolean index", "capture_dynamic_output_shape_ops"),
    ],
)
def test_a_break_is_said_with_the_setting_that_heals_it(between: str, setting: str) -> None:
    report = compiled_report(Cut(between), models.tokens())
    (found,) = report.breaks
    assert found.model == "Cut"
    assert found.place.startswith("test_breaks.py:")
    assert found.place.endswith("in forward")
    assert f"{CONFIG}.{setting} = True" in found.remedy
    assert [node.path for node in report.filtered] == ["first", "second"]
    torch._dynamo.reset()
    with torch._dynamo.config.patch({setting: True}):
        healed = compiled_report(Cut(between), models.tokens())
    assert not healed.breaks
    assert [node.path for node in healed.filtered] == ["first", "second"]


@pytest.mark.parametrize(
    ("between", "words"),
    [("branch", "pass a number in place of the tensor"), ("graph_break", "graph_break")],
)
def test_a_break_that_no_setting_heals(between: str, words: str) -> None:
    report = compiled_report(Cut(between), models.tokens())
    (found,) = report.breaks
    assert words in found.remedy
    assert f"{CONFIG}." not in found.remedy
    assert [node.path for node in report.filtered] == ["first", "second"]


def test_layers_in_graphs_of_their_own() -> None:
    class Loop(models.Stack):
        def forward(self, x: Tensor) -> Tensor:
            with contextlib.suppress(ZeroDivisionError):
                for block in self.blocks:
                    x = x + block(x)
                    torch._dynamo.graph_break()
            return x

    report = compiled_report(Loop(), models.tokens())
    assert [node.path for node in report.filtered] == ["blocks.0", "blocks.1", "blocks.2"]
    (found,) = report.breaks
    assert (found.model, found.place) == ("Loop", "Loop.forward")
    assert found.reason == "its layers have graphs of their own"
    assert f"{CONFIG}.capture_scalar_outputs = True" in found.remedy
    assert "TORCH_LOGS=graph_breaks" in found.remedy


@torch.no_grad()
def test_whole_models_and_repeated_blocks_are_not_broken() -> None:
    class Parallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any) -> Any:
            return torch.compiler.disable(self.module.__call__, recursive=False)(*args)

    x = models.tokens()
    assert not compiled_report(models.Stack(), x).breaks
    wrapped = compiled_report(Parallel(models.Stack()), x)
    assert [node.path for node in wrapped.filtered] == ["blocks.0", "blocks.1", "blocks.2"]
    assert not wrapped.breaks
    model, backend = models.Stack(), cef_compile.backend(recall=1.0, inner="eager", min_kv_len=0)
    for block in model.blocks:
        block.compile(backend=backend)
    model(x)
    assert len(backend.report.filtered) == 3
    assert not backend.report.breaks
    wan, inputs = models.wan()
    wan.compile_repeated_blocks(backend=backend)
    wan(**inputs)
    assert not backend.report.breaks


class Piecewise(nn.Module):
    """Attention in a piece of code that holds no parameter, as after hooks at every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.project(x)
        torch._dynamo.graph_break()
        q, k, v = qkv.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.other = Piecewise(), Piecewise()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.other(x + self.attn(x))


class Pieces(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.last = Piecewise()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


PATHS = [f"layers.{i}.{name}" for i in range(3) for name in ("attn", "other")]


@torch.no_grad()
@pytest.mark.parametrize("regional", [False, True])
def test_pieces_without_parameters_are_named_by_the_module_that_runs(regional: bool) -> None:
    """One piece of code serves all of them, and each has its recall."""
    paths = PATHS if regional else [*PATHS, "last"]
    recalls = {path: 0.3 + 0.1 * i for i, path in enumerate(paths)} | {"layers.1.attn": None}
    rules = {path: r and cef_compile.Uniform(r) for path, r in recalls.items()}
    backend = cef_compile.backend(policy=cef_compile.Rules(rules), inner="eager", min_kv_len=0)
    model, x = Pieces(), models.tokens()
    call = model
    if regional:
        for layer in model.layers:
            layer.compile(backend=backend)
    else:
        call = torch.compile(model, backend=backend)
    for _ in range(2):
        call(x)
    report = backend.report
    nodes = {node.path: node for node in report.nodes}
    assert len(nodes) == len(report.nodes)
    assert sorted(nodes) == sorted(paths)
    for path, recall in recalls.items():
        assert nodes[path].recall == (recall and pytest.approx(recall))
        assert nodes[path].calls == (2 if recall else 0)
    filtered = [nodes[path] for path in paths if nodes[path].calls]
    for node in filtered:
        assert node.estimated_recall >= node.recall
    # Each went by its own recall: what is estimated rises with it.
    estimates = [node.estimated_recall for node in filtered]
    assert estimates == sorted(estimates)


def test_a_function_of_no_module_is_unnamed_and_one_node() -> None:
    q, k, v = torch.randn(3, 1, 2, 256, 16)
    backend = cef_compile.backend(recall=0.9, inner="eager", min_kv_len=0)
    function = torch.compile(nn.functional.scaled_dot_product_attention, backend=backend)
    for _ in range(2):
        function(q, k, v)
    (node,) = backend.report.nodes
    assert (node.model, node.path, node.calls) == ("(unnamed)", "", 2)


# --- in words ------------------------------------------------------------------------------------

BREAKS = [
    ReportedBreak("Wan", "a.py:1, in f", "item", "Set this."),
    ReportedBreak("Wan", "a.py:9, in g", "item", "Set this."),
    ReportedBreak("Wan", "a.py:9, in g", "item", "Set this."),
    ReportedBreak("Flux", "b.py:2, in h", "item", "Set this."),
]
SENTENCES = [
    "The graph of Wan breaks at a.py:1, in f, and at 1 more: item. Set this.",
    "The graph of Flux breaks at b.py:2, in h: item. Set this.",
]


def test_breaks_are_in_the_text_the_data_and_the_page() -> None:
    for nodes in ([], [FILTERED]):
        report = Report("p", nodes, breaks=BREAKS)
        assert all(sentence in str(report) for sentence in SENTENCES)
        data = report.to_dict()
        assert [ReportedBreak(**found) for found in data["breaks"]] == BREAKS
        assert [s for s in sentences(join(data, None)) if s.startswith("The graph")] == SENTENCES
    assert "graph of" not in str(Report("p", [FILTERED]))


def test_breaks_of_a_saved_report_are_checked() -> None:
    data = Report("p", [FILTERED], breaks=BREAKS).to_dict()
    assert check(data)["breaks"] == data["breaks"]
    del data["breaks"][1]["remedy"]
    with pytest.raises(RecordError, match=r"breaks\[1\] has no 'remedy'"):
        check(data)
    del data["breaks"]
    assert check(data)["breaks"] == []

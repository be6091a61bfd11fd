"""What the backend finds of an attention's tokens, and that no order changes what it computes."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import cef_compile
from cef_compile import Decision, explain

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OP = torch.ops.cef.attention.default
# float32 rounding through a few layers, relative to the largest output.
FP32 = 1e-5
VIDEO = (4, 16, 16)


class Layouts:
    """An inner compiler that runs graphs as they are and keeps the layouts in them."""

    def __init__(self) -> None:
        self.found: list[list[Any]] = []
        self.graphs = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Any:
        self.graphs += 1
        self.found += [node.args[-1] for node in gm.graph.nodes if node.target is OP]
        return gm.forward


def compiled(model: nn.Module, **options: Any) -> tuple[Any, Any, Layouts]:
    inner = Layouts()
    backend = cef_compile.backend(**{"recall": 1.0, **options}, inner=inner, min_kv_len=0)
    return torch.compile(model, backend=backend), backend, inner


def assert_agrees(got: Tensor, wanted: Tensor) -> None:
    assert (got - wanted).abs().max() <= FP32 * wanted.abs().max()


@pytest.mark.parametrize(
    ("name", "grid", "segments", "layouts"),
    [
        ("wan", VIDEO, (), [[0, *VIDEO, 0]] * 2),
        ("ltx", VIDEO, (), [[0, *VIDEO, 0]]),
        ("cogvideox", VIDEO, (8, 1024), [[8, *VIDEO, 0]] * 2),
        ("hunyuan_video", VIDEO, (1024, 12), [[0, *VIDEO, 12]] * 2),
        ("sd3", (1, 32, 32), (1024, 20), [[0, 1, 32, 32, 20], [0, 1, 32, 32, 0]]),
    ],
)
def test_the_graph_shows_grid_and_text(
    name: str, grid: tuple[int, ...], segments: tuple[int, ...], layouts: list[list[int]]
) -> None:
    model, inputs = getattr(models, name)()
    run, backend, inner = compiled(model)
    with torch.no_grad():
        assert_agrees(run(**inputs)[0], model(**inputs)[0])
    nodes = [node for node in backend.report.filtered if node.q_len > 100 and node.kind != "cross"]
    assert {node.grid for node in nodes} == {grid}
    assert {node.grid_source for node in nodes} == {"graph"}
    assert segments in {node.segments for node in nodes}
    for layout in layouts:
        assert layout in inner.found
    words = " x ".join(map(str, grid))
    assert " + ".join(words if n == 1024 else str(n) for n in segments or [1024]) in str(
        backend.report
    )


def flux_inputs(height: int, width: int) -> dict[str, Any]:
    """Flux's positions: a row (0, y, x) for each packed token, zeros for text."""
    _, inputs = models.flux()
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    text = torch.zeros_like(inputs["txt_ids"])
    return {**inputs, "img_ids": ids.view(-1, 3), "txt_ids": text}


def test_positions_of_packed_latents_are_a_grid() -> None:
    model, _ = models.flux()
    inputs = flux_inputs(16, 64)
    run, backend, inner = compiled(model)
    with torch.no_grad():
        assert_agrees(run(**inputs)[0], model(**inputs)[0])
        assert inner.found == [[16, 1, 16, 64, 0]] * 2
        assert {node.grid_source for node in backend.report.filtered} == {"call"}
        assert "from the call that was compiled" in str(backend.report)
        # Another grid of as many tokens runs in the same graph, and as right.
        other = flux_inputs(32, 32)
        assert_agrees(run(**other)[0], model(**other)[0])
        assert inner.graphs == 1


def test_positions_without_a_raster_are_none() -> None:
    model, inputs = models.flux()  # random positions
    run, backend, inner = compiled(model)
    with torch.no_grad():
        run(**inputs)
    assert inner.found == [[16, 1, 1, 1024, 0]] * 2, "text is exact all the same"
    assert {node.grid for node in backend.report.filtered} == {None}
    assert "give backend(grid=(frames, height, width))" in str(backend.report)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "flux"])
def test_regional_graphs_are_told_by_the_call(name: str) -> None:
    model, inputs = getattr(models, name)()
    if name == "flux":
        inputs = flux_inputs(32, 32)
    grid = (1, 32, 32) if name == "flux" else VIDEO
    with torch.no_grad():
        wanted = model(**inputs)[0]
        inner = Layouts()
        backend = cef_compile.backend(recall=1.0, inner=inner, min_kv_len=0)
        for blocks in (v for v in model.children() if isinstance(v, nn.ModuleList)):
            for block in blocks:
                block.compile(backend=backend)
        assert_agrees(model(**inputs)[0], wanted)
    nodes = [n for n in backend.report.filtered if n.kind != "cross" and n.kv_len > 100]
    assert nodes
    assert {node.grid for node in nodes} == {grid}
    assert {node.grid_source for node in nodes} == {"call"}


def test_a_block_alone_takes_the_grid_that_is_given() -> None:
    block, x = models.Attention(), models.tokens(640)
    run, backend, inner = compiled(block)
    with torch.no_grad():
        assert_agrees(run(x), block(x))
        assert inner.found == [[]]
        assert "no grid of tokens was found" in str(backend.report)
        torch._dynamo.reset()
        run, backend, inner = compiled(block, grid=(5, 8, 16))
        assert_agrees(run(x), block(x))
        assert inner.found == [[0, 5, 8, 16, 0]]
        (node,) = backend.report.nodes
        assert (node.grid, node.grid_source) == ((5, 8, 16), "given")


def test_a_grid_of_another_size_is_an_error() -> None:
    block, x = models.Attention(), models.tokens(640)
    run, _, inner = compiled(block, grid=(5, 8, 15))
    with (
        torch.no_grad(),
        pytest.raises(Exception, match=r"600 tokens, but .* \(unnamed\)#0 has 640"),
    ):
        run(x)
    assert not inner.graphs
    torch._dynamo.reset()
    run, _, inner = compiled(
        block, grid=(5, 8, 15), recall=None, policy=lambda node: Decision(1.0, order="raster")
    )
    with torch.no_grad():
        assert_agrees(run(x), block(x))
    for wrong, error in (((5, 8), ValueError), ((0, 8, 8), ValueError), ("5x8", TypeError)):
        with pytest.raises(error, match="grid must be 3 integers"):
            cef_compile.backend(grid=wrong)


def test_a_policy_may_want_raster_order() -> None:
    model, inputs = models.wan()
    run, backend, inner = compiled(
        model, recall=None, policy=lambda n: Decision(0.5, order="raster") if n.grid else None
    )
    with torch.no_grad():
        run(**inputs)
        assert inner.found == [[]] * 2
        assert "4 x 16 x 16, raster" in str(backend.report)
        backend.set_policy(lambda n: 0.5 if n.grid else None)
    assert {node.reason for node in backend.report.nodes if node.kind == "self"} == {
        "the node was compiled dense"
    }, "another order needs another graph"


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_sizes_may_be_dynamic(name: str) -> None:
    model, inputs = getattr(models, name)()
    inner = Layouts()
    backend = cef_compile.backend(recall=1.0, inner=inner, min_kv_len=0)
    run = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for height, width in ((16, 24), (24, 32), (40, 16)):
            shape = (*inputs["hidden_states"].shape[:3], height, width)
            x = torch.randn(shape, generator=torch.Generator().manual_seed(height))
            assert_agrees(
                run(**{**inputs, "hidden_states": x})[0], model(**{**inputs, "hidden_states": x})[0]
            )
    # The models themselves take a second graph where the second size shows what is dynamic.
    assert inner.graphs <= 2
    for layout in inner.found:
        assert len(layout) == 5 or not layout  # the text refiner has no grid
        assert isinstance(layout[2], fx.Node) if layout else True


class Patched(nn.Module):
    """A video model as it may be written: patches, text beside them, one attention."""

    def __init__(self, way: str, text: str, dims: int) -> None:
        super().__init__()
        self.way, self.text, self.dims = way, text, dims
        conv = nn.Conv3d if dims == 3 else nn.Conv2d
        self.patch = conv(2, 16, kernel_size=2, stride=2)
        self.first = models.Attention(16)
        self.last = models.Attention(16)

    def tokens(self, x: Tensor) -> Tensor:
        """``[B, 2, (T,) H, W]`` to ``[B, L, 16]``."""
        if self.way == "unfold":  # cut into patches by hand
            parts = [n for size in x.shape[2:] for n in (size // 2, 2)]
            x = x.reshape(x.shape[0], 2, *parts)
            grid, inner = range(2, 2 + 2 * self.dims, 2), range(3, 3 + 2 * self.dims, 2)
            x = x.permute(0, *grid, 1, *inner)
            x = x.reshape(x.shape[0], -1, 2 * 2**self.dims)
            return F.pad(x, (0, 16 - x.shape[-1])) if x.shape[-1] < 16 else x
        x = self.patch(x)
        if self.way == "flatten":
            return x.flatten(2).transpose(1, 2)
        if self.way == "permute":
            return x.permute(0, *range(2, x.dim()), 1).reshape(x.shape[0], -1, 16)
        x = x.flatten(-2)  # height and width first, then the frames
        return x.flatten(2).mT

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Tokens out."""
        x = self.tokens(x)
        if self.text == "before":
            x = torch.cat((text, x), 1)
        if self.text == "after":
            x = torch.cat([x, text], dim=-2)
        if self.text == "both":
            x = torch.cat((text, x, text), 1)
        x = x + self.first(F.layer_norm(x, (16,)))
        if self.text == "before":  # as models do that treat them apart in between
            words, x = x[:, : text.shape[1]], x[:, text.shape[1] :]
            x = torch.cat((words, F.gelu(x)), 1)
        return x + self.last(x)


@settings(max_examples=12)
@given(
    way=st.sampled_from(["flatten", "permute", "unfold", "twice"]),
    text=st.sampled_from(["none", "before", "after", "both"]),
    grid=st.one_of(
        st.tuples(*(st.integers(2, 6) for _ in range(3))),
        st.tuples(st.integers(5, 16), st.integers(5, 16)),
    ),
    recall=st.sampled_from([0.3, 1.0]),
)
def test_grids_are_found_however_tokens_are_made(
    way: str, text: str, grid: tuple[int, ...], recall: float
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Patched(way, text, len(grid))
    x, words = torch.randn(2, 2, *(2 * n for n in grid)), torch.randn(2, 7, 16)
    run, backend, inner = compiled(model, recall=recall)
    with torch.no_grad():
        got, wanted = run(x, words), model(x, words)
    before, after = 7 * (text in ("before", "both")), 7 * (text in ("after", "both"))
    full = grid if len(grid) == 3 else (1, *grid)
    assert inner.found == [[before, *full, after]] * 2
    if recall == 1.0:
        assert_agrees(got, wanted)
    assert {node.decision for node in backend.report.nodes} == {"filtered"}


def test_explain_shows_the_text_of_a_joint_model() -> None:
    model, inputs = models.hunyuan_video()
    report = str(explain(model, min_kv_len=0, **inputs))
    assert "4 x 16 x 16 + 12" in report

"""Tile maps: the tiles that the compiled model kept, in a picture of bounded size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Attention, Stack, tokens
from torch import nn

import cef_compile
from cef_compile.report import TileMap
from cef_compile.report.tiles import MAX_CELLS
from cef_compile.tile_maps import tile_maps


def compiled(policy: object, model: nn.Module, x: torch.Tensor) -> cef_compile.Backend:
    """A backend that has run the model twice: once to find the shared threshold, once with it."""
    backend = cef_compile.backend(policy=policy, inner="eager", min_kv_len=0)
    fast = torch.compile(model, backend=backend)
    with torch.no_grad():
        fast(x)
        fast(x)
        fast(x)
    return backend


@pytest.mark.parametrize(
    "policy",
    [
        cef_compile.Balanced(0.8),
        cef_compile.Uniform(0.8),
        lambda node: cef_compile.Decision(0.8, rule="top_p"),
    ],
)
def test_density_is_what_the_compiled_model_measured(policy: object, fresh_dynamo: None) -> None:
    model, x = Stack(depth=2).eval(), tokens(640)
    backend = compiled(policy, model, x)
    # The map's own run filters the chosen nodes alone, so only the first sees the same input.
    (found,) = tile_maps(backend, model, x, nodes=["blocks.0"])
    node = next(node for node in backend.report.nodes if node.path == "blocks.0")
    assert (found.model, found.path, found.ordinal) == ("Stack", "blocks.0", 0)
    assert (found.q_tiles, found.kv_tiles) == (5, 10)
    assert found.panels[0].density == pytest.approx(node.density)
    assert 0 < found.panels[0].density < 1


def test_a_compiled_module_and_a_mask_are_taken(fresh_dynamo: None) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(1, 1, 1, 640, dtype=torch.bool)
            mask[..., :256] = True
            return self.attention(x, mask)

    model, x = Masked().eval(), tokens(640)
    backend = compiled(cef_compile.Uniform(0.9), model, x)
    (found,) = tile_maps(backend, torch.compile(model), x, nodes=["attention"])
    assert not found.panels[0].cells[:, 4:].any()
    assert found.panels[0].density == pytest.approx(backend.report.nodes[0].density)


class TestErrors:
    def test_unknown_node(self, fresh_dynamo: None) -> None:
        model, x = Stack(depth=1).eval(), tokens(256)
        backend = compiled(cef_compile.Uniform(0.9), model, x)
        with pytest.raises(ValueError, match=r"'blocks.7' is no node .* \['blocks.0'\]"):
            tile_maps(backend, model, x, nodes=["blocks.7"])

    def test_online(self, fresh_dynamo: None) -> None:
        model, x = Stack(depth=1).eval(), tokens(256)
        backend = compiled(cef_compile.Uniform(0.9, filter="online"), model, x)
        with pytest.raises(ValueError, match="filtered by 'online', rule 'share'"):
            tile_maps(backend, model, x, nodes=["blocks.0"])

    def test_no_module(self) -> None:
        with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got function"):
            tile_maps(cef_compile.backend(), tokens, nodes=[])


class TestPictures:
    @given(
        seed=st.integers(0, 2**31 - 1),
        shape=st.tuples(
            st.integers(1, 2), st.integers(1, 3), st.integers(1, 200), st.integers(1, 200)
        ),
    )
    def test_bounded_and_true_to_the_density(
        self, seed: int, shape: tuple[int, int, int, int]
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        kept = torch.rand(*shape, generator=draw) < 0.4
        visible = torch.ones(shape[0], shape[3], dtype=torch.bool)
        found = TileMap.of("M", "a", 0, kept, visible)
        mean = found.panels[0]
        assert tuple(mean.cells.shape) == tuple(min(n, MAX_CELLS) for n in shape[2:])
        assert mean.density == pytest.approx(kept.double().mean().item(), abs=1e-6)
        if max(shape[2:]) <= MAX_CELLS:  # cells stand for one pair each: their mean is the density
            shade = mean.cells.double().mean().item() / 255
            assert shade == pytest.approx(mean.density, abs=0.5 / 255 + 1e-6)
        assert len(found.panels) == (1 if shape[0] * shape[1] == 1 else 4)
        densities = [panel.density for panel in found.panels[1:]]
        assert densities == sorted(densities, reverse=True)

    def test_hidden_tiles_do_not_count(self) -> None:
        kept = torch.zeros(1, 1, 2, 4, dtype=torch.bool)
        kept[..., 0] = True
        visible = torch.tensor([[True, True, False, False]])
        assert TileMap.of("M", "a", 0, kept, visible).panels[0].density == 0.5

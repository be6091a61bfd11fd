"""Token order: a bijection that changes which tiles are kept, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from order_cases import LAYOUTS, layout_cases
from support import VARIANTS, Case, achieved, assert_attention, control, oracle, run, same_bits

from cef_compile.kernels import config as c
from cef_compile.kernels import reference as ref
from cef_compile.kernels.order import Layout, token_order


class TestOrder:
    @given(layout=LAYOUTS)
    def test_every_token_has_one_place(self, layout: Layout) -> None:
        order = token_order(layout)
        assert len(order) == layout.length
        assert torch.equal(order[order >= 0].sort().values, torch.arange(layout.tokens))
        assert layout.has_gap == bool((order < 0).any())

    @given(layout=LAYOUTS)
    def test_no_tile_holds_grid_and_text(self, layout: Layout) -> None:
        order = token_order(layout)
        text = (order < layout.before) | (order >= layout.before + layout.grid_tokens)
        starts = layout.exact_tiles or (layout.length, layout.length)
        for block, first in zip((c.BLOCK_M, c.BLOCK_N), starts, strict=True):
            for number, tile in enumerate(zip(order.split(block), text.split(block), strict=True)):
                inside = tile[1][tile[0] >= 0]
                assert torch.all(inside == (number >= first))
        tail = order[layout.exact_start :]
        assert torch.equal(tail, tail.sort().values), "text keeps its order"

    @pytest.mark.parametrize("grid", [(8, 12, 16), (1, 16, 24)])
    def test_a_tile_is_a_cube(self, grid: tuple[int, int, int]) -> None:
        layout = Layout(3, *grid, 2)
        places = torch.cartesian_prod(*(torch.arange(n) for n in grid))
        for tile in token_order(layout)[: layout.grid_tokens].split(c.BLOCK_N):
            inside = places[tile - 3]
            extent = inside.amax(0) - inside.amin(0) + 1
            assert tuple(extent.tolist()) == ((4, 4, 4) if grid[0] > 1 else (1, 8, 8))

    @given(
        edges=st.tuples(*(st.integers(1, 3) for _ in range(3))),
        axes=st.permutations(range(3)),
    )
    def test_axes_may_change_places(self, edges: tuple[int, int, int], axes: list[int]) -> None:
        """A video laid out along other axes has the same tiles: the same tokens share one."""
        grid = [4 * edge for edge in edges]
        tokens = torch.arange(math.prod(grid)).view(grid)
        turned = tokens.permute(axes)
        places = token_order(Layout(0, *turned.shape, 0))
        own, other = (
            {frozenset(tile.tolist()) for tile in order.split(c.BLOCK_N)}
            for order in (token_order(Layout(0, *grid, 0)), turned.flatten()[places])
        )
        assert own == other

    def test_a_line_stays_as_it_is(self) -> None:
        assert torch.equal(token_order(Layout(0, 1, 1, 300, 0)), torch.arange(300))

    @pytest.mark.parametrize(
        ("numbers", "message"),
        [
            ([0, 2, 3, 4, 0], "24 tokens, but there are 25 queries"),
            ([1, 2, 3], "layout must be"),
            ([25, 1, 0, 1, 0], "at least 1 x 1 x 1"),
            ([-1, 1, 1, 26, 0], "at least 1 x 1 x 1"),
        ],
    )
    def test_refuses(self, numbers: list[int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Layout.of(numbers, 25, 25)


class TestReference:
    @given(drawn=layout_cases(mask="none"))
    def test_is_the_filter_of_permuted_tokens(self, drawn: tuple[Layout, Case]) -> None:
        """Without text: what one gets by permuting q, k and v from outside, for every filter."""
        layout, case = drawn
        assume(not layout.has_exact)
        x = case.make()
        order = token_order(layout)
        moved = x.replace(q=x.q[:, :, order], k=x.k[:, :, order], v=x.v[:, :, order])
        for variant in VARIANTS:
            got = run(variant, x, control(0.8), layout=layout)
            wanted = run(variant, moved, control(0.8))
            assert torch.equal(got.kept, wanted.kept)
            assert same_bits(got.out[:, :, order], wanted.out)
            assert same_bits(got.lse[:, :, order], wanted.lse)
            assert same_bits(got.measures, wanted.measures)
            assert same_bits(got.histogram, wanted.histogram)

    @given(drawn=layout_cases())
    def test_recall_1_is_dense(self, drawn: tuple[Layout, Case]) -> None:
        layout, case = drawn
        x = case.make()
        for variant in ("planned", "planned top_p", "online mean", "online share"):
            got = run(variant, x, control(1.0), layout=layout)
            assert_attention(got.out, got.lse, oracle(x), x.v)

    @given(drawn=layout_cases())
    def test_text_is_exact_at_any_recall(self, drawn: tuple[Layout, Case]) -> None:
        layout, case = drawn
        assume(layout.has_exact)
        x = case.make()
        dense = oracle(x)
        text = torch.ones(layout.tokens, dtype=torch.bool)
        text[layout.before : layout.before + layout.grid_tokens] = False
        for variant in VARIANTS:
            got = run(variant, x, control(0.1), layout=layout)
            rows = type(dense)(*(t[:, :, text] for t in vars(dense).values()))
            assert_attention(got.out[:, :, text], got.lse[:, :, text], rows, x.v)
            seen = ref.Places.of(layout, x.q.device).put_mask(x.k, x.mask)
            live = torch.stack([part.any(-1) for part in seen.split(c.BLOCK_N, -1)], -1)
            live = live[:, None, None, layout.exact_tiles[1] :]
            assert torch.all(got.kept[..., layout.exact_tiles[1] :] == live)

    @given(drawn=layout_cases())
    def test_delivers_what_it_certifies(self, drawn: tuple[Layout, Case]) -> None:
        layout, case = drawn
        x = case.make()
        dense = oracle(x)
        got = run("online row", x, control(0.7), layout=layout)
        found = torch.where(dense.lse == -torch.inf, 1, achieved(got.lse, dense))
        assert torch.all(found >= 0.7 - 4 * dense.rounding - 1e-6)

    @given(drawn=layout_cases())
    def test_hidden_keys_never_matter(self, drawn: tuple[Layout, Case]) -> None:
        layout, case = drawn
        x = case.make()
        assume(x.mask is not None)
        spoilt = x.spoil_hidden()
        for variant in ("planned", "online mean"):
            got, wanted = (run(variant, y, control(0.6), layout=layout) for y in (spoilt, x))
            assert same_bits(got.out, wanted.out)
            assert torch.equal(got.kept, wanted.kept)

    def test_cubes_of_video_like_attention_need_fewer_tiles(self) -> None:
        """Attention that falls with the distance in space and time: fewer tiles at equal recall."""
        grid = (8, 16, 16)
        places = torch.cartesian_prod(*(torch.arange(n).double() for n in grid))
        # exp(-|a - b|^2 / 2 s^2) as a product of q and k: the norms move into a channel of k.
        k = torch.cat((places, -0.5 * places.square().sum(-1, keepdim=True)), -1)[None, None]
        q = torch.cat((places, torch.ones(len(places), 1)), -1)[None, None]
        options = {"scale": 1 / 8, "key_mask": None}
        v = torch.randn(k.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        cubes = ref.planned(q, k, v, control(0.9), layout=Layout(0, *grid, 0), **options)
        raster = ref.planned(q, k, v, control(0.9), **options)
        assert cubes.measures[c.MEASURE_DENSITY] < 0.8 * raster.measures[c.MEASURE_DENSITY]

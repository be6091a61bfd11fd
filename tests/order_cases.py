"""What the tests of the token order share: drawn layouts, and inputs with that many tokens."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from support import FAMILIES, MASKS, SEEDS, Case, Inputs

from cef_compile.kernels.order import Layout, token_order

TEXTS = st.sampled_from([0, 0, 1, 7, 64, 70])
GRIDS = st.one_of(
    st.sampled_from(
        [(1, 1, 1), (1, 16, 16), (1, 13, 7), (4, 8, 8), (5, 6, 7), (3, 11, 13), (2, 3, 29)]
    ),
    st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
)
LAYOUTS = st.builds(lambda before, grid, after: Layout(before, *grid, after), TEXTS, GRIDS, TEXTS)
"""Videos, images, ragged grids and primes, with text on either side or none."""


def layout_cases(
    layouts: st.SearchStrategy[Layout] = LAYOUTS, **given
) -> st.SearchStrategy[tuple[Layout, Case]]:
    """A layout, and a case with as many queries and keys as it has tokens."""
    drawn = {
        "batch": st.integers(1, 2),
        "kv_heads": st.integers(1, 2),
        "group": st.integers(1, 2),
        "family": st.sampled_from(FAMILIES),
        "mask": st.sampled_from(MASKS),
        "seed": SEEDS,
    }
    fields = st.fixed_dictionaries(drawn | {n: st.just(value) for n, value in given.items()})
    return st.builds(
        lambda layout, values: (
            layout,
            Case(q_len=layout.tokens, kv_len=layout.tokens, **values),
        ),
        layouts,
        fields,
    )


def permuted(layout: Layout, x: Inputs) -> tuple[Layout, Inputs, Inputs, torch.Tensor]:
    """The layout without its text, inputs of its grid alone, the same in its order, the order."""
    layout = Layout(0, *layout.grid, 0)
    n = layout.tokens
    x = x.replace(
        q=x.q[:, :, :n],
        k=x.k[:, :, :n],
        v=x.v[:, :, :n],
        mask=None if x.mask is None else x.mask[:, :n],
    )
    order = token_order(layout)
    moved = x.replace(
        q=x.q[:, :, order],
        k=x.k[:, :, order],
        v=x.v[:, :, order],
        mask=None if x.mask is None else x.mask[:, order],
    )
    return layout, x, moved, order

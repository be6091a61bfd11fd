"""What the kernels of the plan, in whatever language, return and are compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from cef_compile.kernels import config as c

ENERGY_FP16: Final = 512.0
"""Factor of an energy (a sum of at most 64 shares) before it is split into two fp16 numbers."""
LOWEST: Final = -3.0e38
"""Where a running maximum starts: finite, so that a score of -inf minus it is no NaN."""


@dataclass(frozen=True)
class Plan:
    """Rank and energy of every (query tile, key tile) pair.

    Attributes:
        bins: uint8 ``[B, H, Tm, Tn]``, bin of the largest share that a row of the query tile gives
            the key tile; the best key tile of each query tile is in the top bin, and so is every
            pair with exact tokens on either side. Unspecified for tiles without a visible key.
        energy: float32 ``[B, H, Tm, Tn]``, share summed over the rows looked at; None unless kept.
        histogram: int64 ``[2, RANK_BINS]``, energy (in units of 1 / ``ENERGY_UNIT``) and number of
            the visible pairs by bin. Integers, so that the order of the sum does not matter.
    """

    bins: Tensor
    energy: Tensor | None
    histogram: Tensor


def empty_plan(
    shape: tuple[int, int, int, int],
    histogram: Tensor | None,
    *,
    keep_energy: bool,
    device: torch.device,
) -> Plan:
    """Memory of a plan ``[B, H, Tm, Tn]``, with zeros for the histogram where none are given."""
    bins = torch.empty(shape, dtype=torch.uint8, device=device)
    energy = torch.empty(shape, device=device) if keep_energy else None
    if histogram is None:
        histogram = torch.zeros(2, c.RANK_BINS, dtype=torch.int64, device=device)
    return Plan(bins, energy, histogram)


def variance_factor(scale: float) -> float:
    """Factor that a plan expects in the variances: its term is ``scale * (a q^2) . s2``."""
    return 0.5 * scale / c.PLAN_SQUARE_FACTOR


def compiled_for(dim: int, *, keep_energy: bool, ordered: bool, exact: bool) -> dict[str, object]:
    """What every kernel of the plan is compiled for."""
    return {
        "DIM": dim,
        "BLOCK_M": c.BLOCK_M,
        "ROW_STRIDE": c.PLAN_ROW_STRIDE,
        "SQUARE": c.PLAN_SQUARE_FACTOR,
        "BINS_PER_OCTAVE": c.BINS_PER_OCTAVE,
        "OCTAVES": c.RANK_OCTAVES,
        "TOP_BIN": c.TOP_BIN,
        "ENERGY_UNIT": c.ENERGY_UNIT,
        "KEEP_ENERGY": keep_energy,
        "ORDERED": ordered,
        "EXACT": exact,
    }

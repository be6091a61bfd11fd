"""Launch configurations by architecture, dtype and head_dim: nothing is tuned at a first call.

Measured on an H100 80GB (SXM), torch 2.11, Triton 3.6; see bench/results/. Other architectures
have entries that fit their shared memory and registers, not measured ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Tuning:
    """How the kernels are launched.

    Attributes:
        architecture: least CUDA compute capability, 90 for Hopper; 0 fits all.
        wide: whether the entry is for fp32 inputs.
        max_dim: largest head_dim.
        attend_rows: query rows of a program of the attention over lists (and of the audit).
        attend_warps, attend_stages: its warps and pipeline stages.
        online_warps, online_registers: warps of the online filter, and registers of a thread.
        online_eager_stages, online_stages: its pipeline stages where values are fetched ahead, and
            where they are not.
        plan_group, plan_keys: query tiles per program of the plan, and key tiles per step.
        plan_warps, plan_stages: its warps and pipeline stages.
    """

    architecture: int
    wide: bool
    max_dim: int
    attend_rows: int
    attend_warps: int
    attend_stages: int
    online_warps: int
    online_registers: int | None
    online_eager_stages: int
    online_stages: int
    plan_group: int
    plan_keys: int
    plan_warps: int
    plan_stages: int


# On Hopper two programs of 4 warps share a multiprocessor where two stages of k and v fit twice:
# one computes weights while the other multiplies.
TUNINGS: Final = (
    Tuning(90, False, 64, 128, 4, 3, 4, None, 3, 3, 2, 64, 4, 2),
    Tuning(90, False, 128, 128, 4, 2, 8, 128, 2, 3, 2, 64, 4, 1),
    Tuning(90, False, 256, 128, 8, 2, 8, None, 2, 2, 1, 64, 4, 1),
    Tuning(90, True, 64, 128, 8, 1, 8, None, 1, 1, 1, 64, 4, 1),
    Tuning(90, True, 128, 64, 4, 1, 8, None, 1, 1, 1, 64, 8, 1),
    Tuning(0, False, 64, 128, 4, 2, 4, None, 2, 2, 1, 64, 4, 2),
    Tuning(0, False, 128, 128, 8, 1, 8, None, 1, 1, 1, 64, 4, 1),
    Tuning(0, False, 256, 32, 4, 1, 8, None, 1, 1, 1, 32, 4, 1),
    Tuning(0, True, 64, 64, 4, 1, 8, None, 1, 1, 1, 32, 4, 1),
    Tuning(0, True, 128, 32, 4, 1, 8, None, 1, 1, 1, 16, 4, 1),
)
"""The first that fits wins: newest architecture first, then smallest head_dim."""


def find_tuning(architecture: int, dim: int, *, wide: bool) -> Tuning | None:
    """The entry for a device, the larger head_dim of q and v, and fp32 or 16-bit inputs.

    None where there is none: fp32 above head_dim 128 does not fit into shared memory.
    """
    fits = (
        entry
        for entry in TUNINGS
        if architecture >= entry.architecture and wide == entry.wide and dim <= entry.max_dim
    )
    return next(fits, None)

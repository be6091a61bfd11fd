"""Launch configurations by architecture, dtype and head_dim: a table, so that nothing is tuned
at the first call.

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
        attend_warps, attend_stages: of the attention over lists.
        plan_group, plan_keys, plan_warps, plan_stages: query tiles per program of the plan, key
            tiles per step, warps, stages.
    """

    architecture: int
    wide: bool
    max_dim: int
    attend_warps: int
    attend_stages: int
    plan_group: int
    plan_keys: int
    plan_warps: int
    plan_stages: int


# First fit wins: newest architecture first, then smallest head_dim.
TUNINGS: Final = (
    Tuning(90, False, 64, 4, 3, 2, 64, 4, 2),
    Tuning(90, False, 128, 4, 2, 1, 64, 4, 2),
    Tuning(90, False, 256, 8, 2, 1, 64, 4, 1),
    Tuning(90, True, 64, 8, 2, 1, 64, 4, 2),
    Tuning(90, True, 128, 8, 2, 1, 64, 4, 1),
    Tuning(90, True, 256, 8, 1, 1, 32, 8, 1),
    Tuning(0, False, 64, 4, 3, 2, 64, 4, 2),
    Tuning(0, False, 128, 8, 2, 1, 64, 4, 2),
    Tuning(0, False, 256, 8, 1, 1, 32, 4, 1),
    Tuning(0, True, 64, 8, 1, 1, 32, 4, 1),
    Tuning(0, True, 128, 8, 1, 1, 32, 4, 1),
    Tuning(0, True, 256, 8, 1, 1, 16, 8, 1),
)

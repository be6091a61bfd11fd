"""What the filters share: tile sizes, rank bins, the control vector, sampling.

Both the PyTorch reference and the Triton kernels import this file and nothing of each other, so a
number that two of them must agree on lives here once. Importing it needs torch only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

BLOCK_M: Final = 128
"""Query rows of a tile: one list of key tiles serves so many rows."""
BLOCK_N: Final = 64
"""Keys of a tile: the unit that is kept or dropped."""

VIDEO_CUBE: Final = (4, 4, 4)
"""Frames, height and width of a cube of video tokens, the content of one key tile."""
IMAGE_CUBE: Final = (1, 8, 8)
"""The same where the grid has a single frame."""

PLAN_ROW_STRIDE: Final = 2
"""The plan ranks tiles by every second query row: half its cost, and neighbours attend alike."""

PLAN_SQUARE_FACTOR: Final = 1 / 16
"""The kernels store q^2 times this in the dtype of q: fp16 then holds it up to |q| = 1,023."""

ENERGY_UNIT: Final = 2**30
"""Fixed-point units of one row's energy in the kernels' histogram: integer sums do not depend on
their order, and 2^31 rows still fit int64."""

ONLINE_SUMS: Final = 5
"""Integers that the online kernels sum up: kept and visible tile pairs, recall of the rows in
``RECALL_UNIT``, rows that see a key, and rows that are NaN."""
JUDGED_WHOLE: Final = 2
"""What a kernel that only decides writes of a kept tile whose keys are all visible ..."""
JUDGED_PARTLY: Final = 1
"""... and of one with hidden keys. Of all others it writes 0."""
COUNT_BLOCK: Final = 16
"""Key tiles whose mask the online kernels look at in one step when they count visible tiles."""
RECALL_UNIT: Final = 2**30
"""Fixed-point units of one row's recall in a sum over rows, which then has no order."""

INT8_LIMIT: Final = 127
"""Largest integer of a query or key in 8 bits, either sign."""
INT8_LEAST: Final = 1e-9
"""A row of queries and a tile of keys are taken to have an element of this size at least: a unit
of 0 could not be divided by, and this one is below what bf16 scores tell apart."""

INT16_TILES: Final = 32767
"""Up to so many key tiles the kernels' lists are int16."""

DOT_PRECISION: Final = "tf32x3"
"""How the kernels multiply fp32 inputs: three tf32 products on tensor cores, about fp32's error."""
FP32_MAX_HEAD_DIM: Final = 128
"""The kernels' largest head_dim for fp32 inputs: more does not fit into shared memory."""
PLAN_PRECISION: Final = "tf32"
"""How the plan does: it ranks, and ranks as well as from fp16 inputs."""

BINS_PER_OCTAVE: Final = 16
"""Resolution of the cumulative-energy curve: a step of threshold is 2^(1/16), 4.4 %."""
RANK_OCTAVES: Final = 16
"""The smallest rank told apart is 2^-16, a 64th of an even share at 65,536 keys."""
RANK_BINS: Final = BINS_PER_OCTAVE * RANK_OCTAVES
"""256 bins, so that the rank of a tile pair is one byte."""
TOP_BIN: Final = RANK_BINS - 1

CONTROL_TARGET: Final = 0
"""control[0]: wanted recall (0..1], or the density for ``rule="top_k"``."""
CONTROL_LOG2_THRESHOLD: Final = 1
"""control[1]: log2 of the threshold, used where control[2] is 1."""
CONTROL_FIXED: Final = 2
"""control[2]: 1 where the threshold is given, 0 where the node reads its own off its histogram."""
CONTROL_SEED: Final = 3
"""control[3]: number of the call, the seed of the audit's sample."""
CONTROL_SIZE: Final = 4

MEASURE_DENSITY: Final = 0
"""measures[0]: kept tiles / visible tiles."""
MEASURE_ESTIMATE: Final = 1
"""measures[1]: recall by the filter's own account (an estimate; exact for ``online``, a lower bound
where it bounds energies)."""
MEASURE_RECALL: Final = 2
"""measures[2]: audited recall; NaN where this call was not audited."""
MEASURE_STDERR: Final = 3
"""measures[3]: standard error of measures[2]."""
MEASURE_LOG2_THRESHOLD: Final = 4
"""measures[4]: log2 of the threshold that was applied (NaN where a rule has none)."""
MEASURE_ERROR: Final = 5
"""measures[5]: audited error of the output, ||out - exact|| / ||exact||; NaN if not audited."""
MEASURE_ERROR_STDERR: Final = 6
"""measures[6]: standard error of measures[5]."""
MEASURE_NORM: Final = 7
"""measures[7]: mean square of a sampled row of exact output: the weight of a part's error."""
MEASURE_ENGINE: Final = 8
"""measures[8]: what computed the call, an index into ``ENGINES``; NaN where it was dense."""
MEASURE_SIZE: Final = 9

ENGINES: Final = ("reference", "triton", "hopper", "fa4", "hopper-int8")
"""PyTorch, the Triton kernels, and those that replace the attention over lists: the Gluon kernel,
FlashAttention-4, and the Gluon kernel with scores in 8 bits."""

AUDIT_FRACTION: Final = 0.005
"""Share of the query tiles whose exact attention an audit computes: its share of dense work."""
AUDIT_MIN_TILES: Final = 64
"""No fewer query tiles than this, so that the interval of one call means something ..."""
AUDIT_MAX_FRACTION: Final = 0.0075
"""... but for them no more than this share of dense work."""
AUDIT_SMALL_PAIRS: Final = 1920
"""Tile pairs that are looked at whatever share of a node they are: 2 % of three heads of 16,384
tokens, some microseconds of a GPU, and the whole of one head of 3,900 tokens."""
AUDIT_LEAST_TILES: Final = 2
"""A spread needs two."""
AUDIT_DRAW_BITS: Final = 16
"""Resolution of a draw: finer than any part has tiles, and small enough for 64-bit products."""

SCORES: Final = ("exact", "int8")
"""What the scores of kept tiles may be: of q and k as they are, or of both in 8 bits."""
PLANNED_RULES: Final = ("threshold", "top_k", "top_p")
ONLINE_RULES: Final = ("share", "lse", "max")
CERTIFICATES: Final = ("none", "mean", "row")

ONLINE_MAX_STRIDE: Final = 4.0
"""A certified tile takes at most so many times its even part of the budget that is left: without
a cap the first tiles would spend it all, whatever their share."""

MIN_KV_LEN: Final = {"cpu": 8 * BLOCK_N, "cuda": 4096}
"""kv_len below which a node stays dense, by device type. On the CPU, where nothing is faster, it
only says from when on there is something to choose from."""


@dataclass(frozen=True)
class Limits:
    """What the kernels of a device type can compute."""

    dtypes: tuple[torch.dtype, ...]
    head_dim_multiple: int
    max_head_dim: int
    max_head_dim_fp32: int


LIMITS: Final = {
    "cpu": Limits(
        (torch.float64, torch.float32, torch.bfloat16, torch.float16), 1, 1 << 16, 1 << 16
    ),
    "cuda": Limits((torch.bfloat16, torch.float16, torch.float32), 8, 256, FP32_MAX_HEAD_DIM),
}
"""By device type; a device that is not listed keeps its nodes dense."""


def tiles(length: int, block: int) -> int:
    """Number of tiles of ``block`` rows that cover ``length`` rows."""
    return -(-length // block)


def padded_dim(dim: int) -> int:
    """Width in which the kernels hold ``dim`` channels: a power of two, 16 at least."""
    return max(16, 1 << (dim - 1).bit_length())


def rank_bin(rank: Tensor) -> Tensor:
    """Bin of a share in [0, 1], uint8; NaN goes to the top bin, so that a NaN is never dropped.

    Bin ``b`` holds the ranks in ``[2^((b - 256) / 16), 2^((b - 255) / 16))``; smaller ones are in
    bin 0 and rank 1 is in the top bin.
    """
    steps = torch.floor((torch.log2(rank) + RANK_OCTAVES) * BINS_PER_OCTAVE)
    return steps.nan_to_num(nan=TOP_BIN).clamp(0, TOP_BIN).to(torch.uint8)


def log2_edge(bin_: Tensor) -> Tensor:
    """log2 of the lower edge of a bin."""
    return bin_.to(torch.float32) / BINS_PER_OCTAVE - RANK_OCTAVES


def edge_bin(log2_threshold: Tensor) -> Tensor:
    """First bin that lies wholly at or above a threshold given as log2; int64 in 0..255."""
    steps = torch.ceil((log2_threshold + RANK_OCTAVES) * BINS_PER_OCTAVE)
    return steps.clamp(0, TOP_BIN).to(torch.int64)


def threshold_bin(energy: Tensor, recall: Tensor) -> Tensor:
    """Highest bin from which on upwards the energy reaches ``recall``.

    Args:
        energy: energy by rank bin, ``[..., RANK_BINS]``, summing to 1 (all zero: nothing visible).
        recall: wanted share of the energy, a tensor that broadcasts against ``energy[..., 0]``.

    Returns:
        int64 bins ``[...]``. Bin 0 (keep everything) where recall is 1 or rounding leaves the whole
        curve below the target. No host synchronisation.
    """
    above = energy.flip(-1).cumsum(-1)
    reached = above >= recall[..., None].to(above.dtype)
    steps_down = torch.where(reached.any(-1), reached.to(torch.int8).argmax(-1), TOP_BIN)
    return torch.where(recall >= 1, torch.zeros_like(steps_down), TOP_BIN - steps_down)


def audit_samples(total: int, kv_tiles: int) -> int:
    """How many of a node's ``total`` query tiles an audit looks at, each with ``kv_tiles``.

    From three heads of 16,384 tokens on they are 2 % of dense work at most.
    """
    cheap = max(int(total * AUDIT_MAX_FRACTION), AUDIT_SMALL_PAIRS // max(kv_tiles, 1))
    wanted = max(round(total * AUDIT_FRACTION), min(AUDIT_MIN_TILES, cheap), AUDIT_LEAST_TILES)
    return min(total, wanted)


def audit_tiles(total: int, samples: int, seed: Tensor) -> Tensor:
    """Query tiles that an audit looks at: one drawn at random from each of ``samples`` equal parts.

    The parts are equal on the real line, where a tile may lie across two of them, so that every
    tile is equally likely whatever ``total`` is. The draw is a hash of (seed, part) on the device:
    it neither synchronises nor touches the caller's random numbers.

    Returns:
        int64 ``[samples]`` indices below ``total``, ascending; each tile once if all are wanted.
    """
    part = torch.arange(samples, device=seed.device, dtype=torch.int64)
    bits = seed.to(torch.int64) * 0x9E3779B1 + part * 0x85EBCA77 + 0xC2B2AE3D
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    within = (bits ^ (bits >> 16)) >> (32 - AUDIT_DRAW_BITS)
    return ((part << AUDIT_DRAW_BITS) + within) * total // (samples << AUDIT_DRAW_BITS)


def mask_strides(key_mask: Tensor | None) -> tuple[int, int]:
    """Strides of a key mask ``[B or 1, kv_len]``, 0 over a batch that shares it; 0, 0 of none."""
    if key_mask is None:
        return 0, 0
    return (0 if key_mask.shape[0] == 1 else key_mask.stride(0)), key_mask.stride(1)

"""The op ``cef::attention``: schema, fake kernel, and the only door to the kernels.

It imports torch alone; the Triton kernels are imported at the first call that needs them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels import reference
from cef_compile.kernels.order import Layout
from cef_compile.policy import AttentionNode, Decision, Reason

# What tests, benches and the run time need of the plan's layout, so that they need no kernel file.
RANK_BINS = c.RANK_BINS
MEASURE_SIZE = c.MEASURE_SIZE


class Phase(IntEnum):
    """What a call does; an input of compiled graphs, so that changing it never recompiles."""

    DENSE = 0
    FILTERED = 1
    AUDITED = 2


Z_95 = 1.959963984540054
"""Half width of a 95 % interval in standard errors."""


def interval_95(value: float, stderr: float, most: float = 1.0) -> tuple[float, float]:
    """95 % interval of a number between 0 and ``most``."""
    half = Z_95 * stderr
    return (max(value - half, 0.0), min(value + half, most))


@dataclass(frozen=True)
class Measures:
    """What one filtered call did.

    Attributes:
        density: kept tiles / visible tiles.
        estimate: recall by the filter's own account: an estimate for "planned", exact for "online",
            a lower bound where that bounds energies.
        recall: audited recall; NaN where the call was not audited. An exact ledger needs no audit.
        stderr: standard error of ``recall``.
        threshold: share at which a tile is kept; NaN where the rule has none.
        error: audited relative error of the output, ``||out - exact|| / ||exact||`` over the
            sampled rows; NaN where the call was not audited.
        error_stderr: standard error of ``error``.
    """

    density: float
    estimate: float
    recall: float
    stderr: float
    threshold: float
    error: float
    error_stderr: float

    @classmethod
    def of(cls, measures: Tensor) -> Measures:
        """Read the op's third output; synchronises with the device."""
        values = measures.double().tolist()
        return cls(
            density=values[c.MEASURE_DENSITY],
            estimate=values[c.MEASURE_ESTIMATE],
            recall=values[c.MEASURE_RECALL],
            stderr=values[c.MEASURE_STDERR],
            threshold=2.0 ** values[c.MEASURE_LOG2_THRESHOLD],
            error=values[c.MEASURE_ERROR],
            error_stderr=values[c.MEASURE_ERROR_STDERR],
        )


def pooled(parts: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Measures of a node of which several parts were computed apart, on other heads or rows.

    Args:
        parts: the op's third output for each part, independent of each other.
        rows: query rows of each.
    """
    stacked = torch.stack(list(parts)).double()
    weight = torch.tensor(rows, dtype=torch.float64, device=stacked.device)[:, None]
    weight = weight / weight.sum()
    whole = (weight * stacked).sum(0)
    whole[c.MEASURE_STDERR] = (weight * stacked)[:, c.MEASURE_STDERR].norm()
    # Squares of errors add up by the energy of the output that they are relative to.
    error, stderr = stacked[:, c.MEASURE_ERROR], stacked[:, c.MEASURE_ERROR_STDERR]
    energy = weight[:, 0] * stacked[:, c.MEASURE_NORM]
    energy = energy / energy.sum()
    wrong = torch.where(error == 0, 0, energy * error.square())
    whole[c.MEASURE_ERROR] = wrong.sum().sqrt()
    slope = torch.where(error == 0, 0, energy * error / whole[c.MEASURE_ERROR])
    whole[c.MEASURE_ERROR_STDERR] = (slope * stderr).norm()
    thresholds = stacked[:, c.MEASURE_LOG2_THRESHOLD]
    whole[c.MEASURE_LOG2_THRESHOLD] = torch.where(
        (thresholds == thresholds[0]).all(), thresholds[0], torch.nan
    )
    engines = stacked[:, c.MEASURE_ENGINE]
    whole[c.MEASURE_ENGINE] = torch.where((engines == engines[0]).all(), engines[0], torch.nan)
    return whole


def engine(measures: Tensor) -> str:
    """What computed a call: one of "reference" (PyTorch), "triton", "hopper", "fa4", "hopper-int8".

    Empty where it was dense, or its parts were computed by several. Synchronises with the device.
    """
    number = measures[c.MEASURE_ENGINE].item()
    return "" if math.isnan(number) else c.ENGINES[int(number)]


def new_control(decision: Decision, device: torch.device, seed: int = 0) -> Tensor:
    """The run-time numbers of a filtered node: ``[CONTROL_SIZE]``, float32.

    A node whose group has yet to find its threshold keeps everything: its plan fills the histogram
    that the threshold is read off, and the first, noisiest pass decides the composition.

    Args:
        decision: a decision that is not dense.
        device: where the node runs.
        seed: first seed of the audit's sample.
    """
    values = [0.0] * c.CONTROL_SIZE
    target = decision.density if decision.rule == "top_k" else decision.recall
    assert target is not None, "a dense node has no control"
    fixed = decision.log2_threshold
    if decision.group is not None and fixed is None:
        fixed = -math.inf  # a threshold of 0
    values[c.CONTROL_TARGET] = target
    values[c.CONTROL_LOG2_THRESHOLD] = fixed if fixed is not None else 0.0
    values[c.CONTROL_FIXED] = float(fixed is not None)
    values[c.CONTROL_SEED] = float(seed)
    return torch.tensor(values, dtype=torch.float32, device=device)


def mean_energy(histograms: list[Tensor]) -> Tensor:
    """The cumulative-energy curve of several nodes, mean over them: ``[RANK_BINS]``.

    Args:
        histograms: one ``[2, RANK_BINS]`` for each node, on one device.
    """
    return torch.stack([h[0] for h in histograms]).mean(0)


def shared_threshold(energy: Tensor, control: Tensor) -> Tensor:
    """The control of nodes that share one threshold: their mean recall is the target.

    Args:
        energy: their :func:`mean_energy`.
        control: a control of one of them, for the target and the seed.

    Returns:
        A new control with the threshold fixed. No host synchronisation.
    """
    bin_ = c.threshold_bin(energy, control[c.CONTROL_TARGET])
    shared = control.clone()
    shared[c.CONTROL_LOG2_THRESHOLD] = c.log2_edge(bin_)
    # Not by assignment, which would send the number from the host and wait for it.
    shared[c.CONTROL_FIXED].fill_(1.0)
    return shared


def density(measures: Tensor) -> Tensor:
    """The density in the op's third output, on its device."""
    return measures[c.MEASURE_DENSITY]


def fixed_threshold(control: Tensor) -> float | None:
    """The threshold that a control fixes; None where it has yet to be found. Synchronises."""
    values = control.tolist()
    threshold = 2.0 ** values[c.CONTROL_LOG2_THRESHOLD]
    return threshold if values[c.CONTROL_FIXED] and threshold else None


def set_controls(controls: list[Tensor], fresh: list[Tensor]) -> None:
    """Copy targets and thresholds, in place; the audit's seeds go on. No host synchronisation."""
    with torch.no_grad():
        torch._foreach_copy_(
            [control[: c.CONTROL_SEED] for control in controls],
            [control[: c.CONTROL_SEED] for control in fresh],
        )


def next_seeds(controls: list[Tensor]) -> None:
    """Advance the audit's seed of each control, in place and on its device."""
    torch._foreach_add_([control[c.CONTROL_SEED :] for control in controls], 1.0)


def kept_tiles(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    control: Tensor,
    *,
    scale: float,
    rule: str,
    layout: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The tile pairs that ``filter="planned"`` keeps, by the PyTorch reference on any device.

    Args:
        q, k, attn_mask: as the op's; planned head by head, to bound the workspace.
        control: with a fixed threshold, since the whole node's histogram is never made.
        scale, rule, layout: as the op's.

    Returns:
        kept bool ``[B, H, Tm, Tn]``, and bool ``[B, Tn]``: tiles with a visible key; of the token
        order, where there is one.
    """
    key_mask = _key_mask(attn_mask, q, k)
    group = q.shape[1] // k.shape[1]
    places = reference.Places.of(Layout.of(layout, q.shape[2], k.shape[2]), q.device)
    mask = places.put_mask(k, key_mask)
    heads = []
    for h in range(q.shape[1]):
        of_head = places.put(k[:, h // group : h // group + 1])
        planned = reference.plan(
            places.put(q[:, h : h + 1]),
            reference.centroids(of_head, mask),
            scale,
            real=places.real,
            exact=places.exact,
        )
        heads.append(reference.choose(planned, planned.histogram(), control, rule)[0])
    return torch.cat(heads, 1), planned.visible


def default_min_kv_len(device: torch.device) -> int:
    """kv_len below which filtering does not win on this kind of device."""
    return c.MIN_KV_LEN.get(_planned_for(device), 0)


def _planned_for(device: torch.device) -> str:
    """Device type whose limits count; a model on "meta" is being planned for a GPU."""
    return "cuda" if device.type == "meta" else device.type


def unsupported(node: AttentionNode) -> tuple[Reason, str] | None:
    """Why the op cannot compute ``node``, with a detail; None where it can."""
    if any(len(shape) != 4 for shape in (node.q_shape, node.k_shape, node.v_shape)):
        return Reason.LAYOUT, f"q is {len(node.q_shape)}-D"
    if node.requires_grad:
        return Reason.GRADIENT, "the filters have no backward pass"
    if node.dropout_p:
        return Reason.DROPOUT, f"dropout_p={node.dropout_p}"
    if node.is_causal:
        return Reason.CAUSAL, "is_causal=True"
    if node.mask not in ("none", "key_padding"):
        return Reason.MASK, f"{node.mask} mask"
    heads, kv_heads = node.q_shape[1], node.k_shape[1]
    if heads != kv_heads and not (node.enable_gqa and kv_heads > 0 and heads % kv_heads == 0):
        return Reason.HEADS, f"{heads} query heads, {kv_heads} key heads"
    if node.scale is not None and not 0 < node.scale < math.inf:
        detail = "it is computed in the graph" if math.isnan(node.scale) else f"scale={node.scale}"
        return Reason.SCALE, detail
    limits = c.LIMITS.get(_planned_for(node.device))
    if limits is None:
        return Reason.DEVICE, str(node.device)
    if node.dtype not in limits.dtypes:
        return Reason.DTYPE, _name(node.dtype)
    most = limits.max_head_dim
    if node.dtype == torch.float32:
        most = limits.max_head_dim_fp32
    for dim in (node.head_dim, node.v_shape[-1]):  # symbolic ones cannot be hashed
        if dim % limits.head_dim_multiple or not 0 < dim <= most:
            return Reason.HEAD_DIM, (
                f"head_dim {dim}; {node.device.type} takes multiples of"
                f" {limits.head_dim_multiple} up to {most} in {_name(node.dtype)}"
            )
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _key_mask(attn_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """``[B, kv_len]`` of a mask of key padding, which is the same for every head and query."""
    if attn_mask is None or not q.numel():
        return None
    return attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])[:, 0, 0]


def _kernels(q: Tensor) -> ModuleType:
    """The implementation for the device of ``q``."""
    if q.device.type == "cpu":
        return reference
    from cef_compile.kernels import launch

    return launch


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    control: Tensor,
    phase: int,
    scale: float,
    filter: str,
    rule: str,
    certify: str,
    bound: bool,
    compensate: bool,
    scores: str,
    layout: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    if phase == Phase.DENSE:
        # enable_gqa costs a check even where it is not needed.
        grouped = q.shape[1] != k.shape[1]
        dense = F.scaled_dot_product_attention(q, k, v, attn_mask, scale=scale, enable_gqa=grouped)
        out = reference.new_output(q, v)
        if dense.stride() != out.stride():
            dense = out.copy_(dense)
        return dense, control.new_zeros(2, RANK_BINS), control.new_full((MEASURE_SIZE,), torch.nan)
    options: dict[str, Any] = {
        "scale": scale,
        "key_mask": _key_mask(attn_mask, q, k),
        "rule": rule,
        "audited": phase == Phase.AUDITED,
        "layout": Layout.of(layout, q.shape[2], k.shape[2]),
    }
    if filter == "planned":
        options |= {"compensate": compensate, "scores": scores}
    else:
        options |= {"certify": certify, "bound": bound}
    result = getattr(_kernels(q), filter)(q, k, v, control, **options)
    return result.out, result.histogram, result.measures


attention = torch.library.custom_op("cef::attention", _attention, mutates_args=())


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    control: Tensor,
    phase: int,
    scale: float,
    filter: str,
    rule: str,
    certify: str,
    bound: bool,
    compensate: bool,
    scores: str,
    layout: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        reference.new_output(q, v),
        control.new_empty(2, RANK_BINS),
        control.new_empty(MEASURE_SIZE),
    )

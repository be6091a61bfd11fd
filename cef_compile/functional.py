"""Filtered attention as a function, for people without torch.compile."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cef_compile import ops
from cef_compile.graph.find import mask_kind
from cef_compile.policy import SCORES, AttentionNode, Decision, check_fraction, check_sizes


@dataclass(frozen=True)
class AttentionStats:
    """What one call did.

    Attributes:
        recall: achieved recall, mean over the query tiles that were looked at.
        interval: its 95 % interval.
        estimate: recall by the filter's own account: an estimate for "planned", exact for "online",
            a lower bound with ``bound=True``.
        density: kept tiles / visible tiles.
        threshold: share at which a tile was kept; NaN where the rule has none.
        error: relative error of the output, ``||out - exact|| / ||exact||``, over the same tiles.
        error_interval: its 95 % interval.
    """

    recall: float
    interval: tuple[float, float]
    estimate: float
    density: float
    threshold: float
    error: float
    error_interval: tuple[float, float]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    recall: float = 0.95,
    filter: str = "planned",
    rule: str = "",
    certify: str = "",
    bound: bool = False,
    threshold: float | None = None,
    density: float | None = None,
    compensate: bool = False,
    scores: str = SCORES[0],
    grid: tuple[int, int, int] | None = None,
    text: tuple[int, int] = (0, 0),
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """``scaled_dot_product_attention`` over the key tiles that carry the attention energy.

    Args:
        query: ``(B, H, q_len, head_dim)``, any strides; so are key and value.
        key: ``(B, Hk, kv_len, head_dim)``.
        value: ``(B, Hk, kv_len, value_dim)``.
        attn_mask: bool, true where a key takes part, the same for every query and head:
            ``(B, 1, 1, kv_len)`` or anything that broadcasts like it.
        dropout_p, is_causal: must be 0 and False: neither is filtered.
        scale: factor of the scores; None for ``head_dim ** -0.5``.
        enable_gqa: allow H to be a multiple of Hk.
        recall: wanted share of the attention energy, mean over all rows, in (0, 1].
        filter, rule, certify, bound, threshold, density, compensate, scores: see
            :class:`Decision`.
        grid: (frames, height, width) of the tokens of a video or image (1 frame), in raster order.
            Tiles are then cut as cubes of the grid, which need fewer of them for the same recall;
            the result is what it would be otherwise, up to which tiles are dropped.
        text: numbers of tokens before and after those of the grid. They have tiles of their own,
            which are kept for every query, and their queries attend to every key.
        return_stats: return what was done as well, the achieved recall measured on a sample.

    Returns:
        ``(B, H, q_len, value_dim)`` in the dtype of ``query`` and (B, q_len, H, value_dim) memory
        order; with ``return_stats`` an :class:`AttentionStats` beside it (synchronises).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range, contradicts
            another, or asks for what the filters cannot compute; raised before any work.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"query, key and value must agree in dtype and device; got {query.dtype} on"
                f" {query.device} and for {name} {tensor.dtype} on {tensor.device}"
            )
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor or None, got {type(attn_mask).__name__}")
    for name, number in (("scale", scale), ("dropout_p", dropout_p)):
        if number is not None and not isinstance(number, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(number).__name__} {number!r}")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale!r}")
    decision = Decision(
        check_fraction("recall", recall),
        filter,
        rule,
        certify,
        bound=bound,
        threshold=threshold,
        density=density,
        compensate=compensate,
        scores=scores,
    )
    node = AttentionNode(
        path="attention",
        ordinal=0,
        q_shape=tuple(query.shape),
        k_shape=tuple(key.shape),
        v_shape=tuple(value.shape),
        q_stride=query.stride(),
        k_stride=key.stride(),
        v_stride=value.stride(),
        dtype=query.dtype,
        device=query.device,
        scale=scale,
        is_causal=is_causal,
        dropout_p=dropout_p,
        enable_gqa=enable_gqa,
        mask=mask_kind(attn_mask),
        kind="self",
        requires_grad=torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in (query, key, value)),
    )
    problem = ops.unsupported(node) or _mismatch(node)
    if problem is not None:
        reason, detail = problem
        remedy = getattr(reason, "remedy", "")
        raise ValueError(f"cannot filter this attention: {reason} ({detail}). {remedy}".rstrip())
    if attn_mask is not None:
        _check_mask(attn_mask, node)
    layout = _layout(grid, text, node)
    control = ops.new_control(decision, query.device)
    out, _, measures = ops.attention(
        query,
        key,
        value,
        attn_mask,
        control,
        int(ops.Phase.AUDITED if return_stats else ops.Phase.FILTERED),
        float(node.head_dim) ** -0.5 if scale is None else float(scale),
        *decision.options,
        layout,
    )
    if not return_stats:
        return out
    read = ops.Measures.of(measures)
    return out, AttentionStats(
        recall=read.recall,
        interval=ops.interval_95(read.recall, read.stderr),
        estimate=read.estimate,
        density=read.density,
        threshold=read.threshold,
        error=read.error,
        error_interval=ops.interval_95(read.error, read.error_stderr, math.inf),
    )


def _mismatch(node: AttentionNode) -> tuple[str, str] | None:
    """Shapes that do not fit each other."""
    q, k, v = node.q_shape, node.k_shape, node.v_shape
    if not q[0] == k[0] == v[0]:
        return "batch sizes differ", f"query {q}, key {k}, value {v}"
    if k[1:3] != v[1:3]:
        return "key and value differ in heads or length", f"key {k}, value {v}"
    if q[3] != k[3]:
        return "query and key differ in head_dim", f"query {q}, key {k}"
    return None


def _layout(
    grid: tuple[int, int, int] | None, text: tuple[int, int], node: AttentionNode
) -> list[int]:
    """The op's layout for a grid and the text beside it."""
    before, after = check_sizes("text", text, 2, least=0)
    if grid is None and not before + after:
        return []
    if grid is None:  # a line: raster order, with the text apart
        grid = (1, 1, node.kv_len - before - after)
    frames, height, width = check_sizes("grid", grid, 3, least=1)
    tokens = before + frames * height * width + after
    if not tokens == node.q_len == node.kv_len:
        raise ValueError(
            f"grid {tuple(grid)} and text {tuple(text)} make {tokens} tokens, but there are"
            f" {node.q_len} queries and {node.kv_len} keys"
        )
    return [before, frames, height, width, after]


def _check_mask(mask: Tensor, node: AttentionNode) -> None:
    wanted = (*node.q_shape[:3], node.kv_len)
    try:
        fits = torch.broadcast_shapes(mask.shape, wanted) == wanted
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"attn_mask of shape {tuple(mask.shape)} does not broadcast to"
            f" (batch, heads, q_len, kv_len) = {wanted}"
        )
    if mask.device != node.device:
        raise ValueError(f"attn_mask is on {mask.device}, query on {node.device}")

"""The two filters on a GPU: the kernels of this package in order, behind one function each.

Same meaning as :mod:`cef_compile.kernels.reference`. Nothing here waits for the device, no shape
depends on data, and every call makes the same launches for the same shapes, so that a call can be
captured in a CUDA graph and replayed with another ``control``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels import ledger
from cef_compile.kernels import online as _online
from cef_compile.kernels.attend import attend
from cef_compile.kernels.audit import audit
from cef_compile.kernels.centroids import Centroids, arrange, centroids, in_order
from cef_compile.kernels.check import check
from cef_compile.kernels.descriptor import can_describe
from cef_compile.kernels.eight_bits import eight_bits
from cef_compile.kernels.engines import HOPPER_ENGINES, Call, find_engine
from cef_compile.kernels.judged import judged_lists
from cef_compile.kernels.lists import lists
from cef_compile.kernels.order import Layout
from cef_compile.kernels.plan import plan
from cef_compile.kernels.ranks import Plan, variance_factor
from cef_compile.kernels.schedule import Lists, heads_together
from cef_compile.kernels.streams import beside, event
from cef_compile.kernels.tuning import Tuning, find_tuning

_TMA_ARCHITECTURE = 90
"""Compute capability from which on GPUs have the tensor memory accelerator."""


@dataclass(frozen=True)
class Output:
    """What a filter returns.

    Attributes:
        out: ``[B, H, q_len, Dv]`` in the dtype of ``q``, in (B, q_len, H, Dv) memory order.
        lse: float32 ``[B, H, q_len]``, log of the kept energy; -inf where nothing is visible.
        histogram: float32 ``[2, RANK_BINS]``, energy and number of the visible tile pairs by rank
            bin, each summing to 1; zeros for the online filter.
        measures: float32 ``[MEASURE_SIZE]``.
        index: key tiles of each query tile, ``[B, H, Tm, Tn]``; the first ``count`` of a row are
            valid. None for the online filter. Tiles are those of the token order, where there is
            one.
        count: int32 ``[B, H, Tm]``, kept tiles of each query tile.
        row_recall: float32 ``[B, H, q_len]``, the online filter's ledger; None for the planned.
    """

    out: Tensor
    lse: Tensor
    histogram: Tensor
    measures: Tensor
    index: Tensor | None
    count: Tensor
    row_recall: Tensor | None = None


def _on_the_device_of_q(function: Callable[..., Output]) -> Callable[..., Output]:
    """Triton launches on the current device, which need not be the one of the inputs."""

    @functools.wraps(function)
    def call(q: Tensor, *args: object, **options: object) -> Output:
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            return function(q, *args, **options)

    return call


@_on_the_device_of_q
def planned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    control: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    rule: str = "threshold",
    compensate: bool = False,
    audited: bool = False,
    layout: Layout | None = None,
    scores: str = "exact",
    engine: str | None = None,
) -> Output:
    """Filter by a plan made from tile centroids, then attend to the listed tiles.

    Args:
        q: ``[B, H, q_len, D]``; k ``[B, Hk, kv_len, D]``; v ``[B, Hk, kv_len, Dv]``, ``H`` a
            multiple of ``Hk``; one dtype and head_dims within ``LIMITS["cuda"]``; any strides,
            honoured without a copy.
        control: float32 ``[CONTROL_SIZE]`` on the same device.
        scale: factor of the scores, above 0.
        key_mask: bool ``[B or 1, kv_len]``, true where a key takes part; any strides.
        rule: one of ``PLANNED_RULES``.
        compensate: put dropped tiles back as pseudo-tokens.
        audited: measure achieved recall and error on a sample of query tiles.
        layout: cut tiles in the order of these tokens, exact ones apart and always kept; None for
            the order in which they come. It takes a copy of k and v.
        scores: one of ``SCORES``; "int8" allows the engine "hopper-int8", which is chosen where it
            is faster.
        engine: one of ``LIST_ENGINES`` for the attention over the lists; None for the fastest that
            can compute the call and is part of this package.

    Raises:
        ValueError: for inputs outside these limits.
    """
    check(q, k, v, control, scale, key_mask)
    if rule not in c.PLANNED_RULES:
        raise ValueError(f"rule must be one of {c.PLANNED_RULES}, not {rule!r}")
    if scores not in c.SCORES:
        raise ValueError(f"scores must be one of {c.SCORES}, not {scores!r}")
    tuning = _tuning(q, v)
    given = _tiled(k, v, key_mask, layout, variance_factor(scale))
    cents = given.centroids or centroids(k, key_mask, variance_factor=variance_factor(scale))
    engine = _engine(engine, q, given, compensate=compensate, scores=scores)
    ranked = _rank(
        engine,
        q,
        cents,
        tuning,
        scale=scale,
        tokens=given.tokens,
        exact_tiles=given.exact_tiles,
        keep_energy=rule != "threshold",
    )
    ranked_at = None if given.tokens is None else event(v.device)
    listed, curve, measures = lists(
        ranked.bins,
        ranked.energy,
        cents.count,
        ranked.histogram,
        control,
        rule=rule,
        partial=given.partial,
        want_kept=compensate,
        exact_tiles=given.exact_tiles,
        together=heads_together(q.shape[1], given.k, given.v),
        engine=engine,
    )
    if given.tokens is not None:
        # Launched after the kernels of the lists, which would else wait for what it leaves free.
        with beside(v.device, ranked_at):
            in_order(v, given.tokens, given.v)
    out, lse = _attend(
        engine,
        q,
        given.k,
        given.v,
        listed,
        cents,
        tuning,
        scale=scale,
        key_mask=given.key_mask,
        tokens=given.tokens,
        compensate=compensate,
    )
    if audited:
        _audit(q, k, v, out, lse, control, measures, tuning, scale, key_mask)
    return Output(out, lse, curve, measures, listed.index, listed.count[0])


@dataclass(frozen=True)
class _Tiled:
    """Keys and values in the order in which tiles are cut.

    Attributes:
        k, v, key_mask: as they came; with a token order k and mask in it, and memory for v.
        tokens, exact_tiles: of the token order; None without.
        centroids: of k, where they came with the order; None without.
    """

    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    tokens: Tensor | None = None
    exact_tiles: tuple[int, int] | None = None
    centroids: Centroids | None = None

    @property
    def partial(self) -> bool:
        """Whether a key tile may be partly visible."""
        return self.key_mask is not None or self.k.shape[2] % c.BLOCK_N != 0


def _tiled(
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    layout: Layout | None,
    variance_factor: float | None = None,
) -> _Tiled:
    if layout is None:
        return _Tiled(k, v, key_mask)
    found = arrange(k, key_mask, layout, variance_factor=variance_factor)
    room = v.new_empty(*v.shape[:2], layout.length, v.shape[3])
    return _Tiled(found.k, room, found.key_mask, found.tokens, layout.exact_tiles, found.centroids)


def _engine(
    wanted: str | None,
    q: Tensor,
    given: _Tiled,
    *,
    compensate: bool = False,
    online: bool = False,
    bound: bool = False,
    certified: bool = False,
    scores: str = "exact",
) -> str:
    """The engine of a call."""
    call = Call(
        architecture=_architecture(q.device),
        dtype=q.dtype,
        dim=q.shape[3],
        value_dim=given.v.shape[3],
        described=_descriptors(given.k, given.v),
        masked=given.key_mask is not None,
        ordered=given.tokens is not None,
        compensate=compensate,
        online=online,
        bound=bound,
        certified=certified,
        scores=scores,
        q_len=q.shape[2],
        kv_len=given.k.shape[2],
    )
    return find_engine(call, wanted)


def _rank(
    engine: str,
    q: Tensor,
    known: Centroids,
    tuning: Tuning,
    *,
    scale: float,
    tokens: Tensor | None,
    exact_tiles: tuple[int, int] | None,
    keep_energy: bool,
) -> Plan:
    """The plan for an engine: in Gluon beside the attention in Gluon."""
    kernel: Callable[..., Plan] = functools.partial(
        plan,
        group_tiles=tuning.plan_group,
        block_keys=tuning.plan_keys,
        warps=tuning.plan_warps,
        stages=tuning.plan_stages,
    )
    if engine in HOPPER_ENGINES:
        from cef_compile.kernels import hopper_plan

        if hopper_plan.takes(q.shape[3]):
            kernel = hopper_plan.plan
    return kernel(
        q,
        known.stats,
        known.count,
        scale=scale,
        tokens=tokens,
        exact_tiles=exact_tiles,
        keep_energy=keep_energy,
        histogram=known.histogram,
    )


def _attend(
    engine: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    listed: Lists,
    known: Centroids,
    tuning: Tuning,
    *,
    scale: float,
    key_mask: Tensor | None,
    tokens: Tensor | None,
    compensate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention over the lists by one of ``LIST_ENGINES``; only the one that runs is imported."""
    if engine in HOPPER_ENGINES:
        from cef_compile.kernels import hopper

        int8 = None
        if engine == "hopper-int8":
            eight = eight_bits(q, k, known.stats, known.count, scale=scale, key_mask=key_mask)
            q, k = eight.q, eight.k
            int8 = (eight.row_scale, eight.row_shift, eight.key_scale)
        return hopper.attend(
            q, k, v, *listed.queued, scale=scale, key_mask=key_mask, tokens=tokens, int8=int8
        )
    if engine == "fa4":
        from cef_compile.kernels import fa4

        return fa4.attend(q, k, v, listed.index, listed.count, scale=scale)
    put_back = known if compensate else None
    return attend(
        q,
        k,
        v,
        listed.index,
        listed.count,
        listed.order,
        scale=scale,
        key_mask=key_mask,
        kept=listed.kept,
        k_mean=put_back.stats if put_back else None,
        v_mean=centroids(v, key_mask).stats if put_back else None,
        key_count=put_back.count if put_back else None,
        tokens=tokens,
        descriptors=_descriptors(k, v),
        rows=tuning.attend_rows,
        warps=tuning.attend_warps,
        stages=tuning.attend_stages,
    )


@_on_the_device_of_q
def online(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    control: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    rule: str = "share",
    certify: str = "mean",
    bound: bool = False,
    audited: bool = False,
    layout: Layout | None = None,
    engine: str | None = None,
) -> Output:
    """Filter in one pass over all key tiles, with a ledger of kept and dropped energy.

    Args:
        q, k, v, control, scale, key_mask: as for :func:`planned`.
        rule: one of ``ONLINE_RULES``.
        certify: one of ``CERTIFICATES``.
        bound: judge a tile by ``n_j * exp(its maximum)`` instead of its exact energy; the ledger
            is then a lower bound of the recall.
        audited: measure the error on a sample of query tiles, and where the ledger holds bounds
            the achieved recall too.
        layout: as for :func:`planned`.
        engine: one of ``ONLINE_ENGINES``; None for the fastest that can compute the call.

    Raises:
        ValueError: for inputs outside these limits.
    """
    check(q, k, v, control, scale, key_mask)
    if rule not in c.ONLINE_RULES:
        raise ValueError(f"rule must be one of {c.ONLINE_RULES}, not {rule!r}")
    if certify not in c.CERTIFICATES:
        raise ValueError(f"certify must be one of {c.CERTIFICATES}, not {certify!r}")
    tuning = _tuning(q, v)
    given = _tiled(k, v, key_mask, layout)
    if given.tokens is not None:
        in_order(v, given.tokens, given.v)
    engine = _engine(engine, q, given, online=True, bound=bound, certified=certify != "none")
    even = c.BLOCK_N / max(k.shape[2], 1)
    options: dict[str, Any] = {
        "scale": scale,
        "even": even,
        "key_mask": given.key_mask,
        "rule": rule,
        "certify": certify,
        "bound": bound,
        "tokens": given.tokens,
        "exact_tiles": given.exact_tiles,
    }
    if engine == "hopper":
        from cef_compile.kernels import hopper, hopper_judge

        judged, recall, kept, sums = hopper_judge.judge(q, given.k, control, **options)
        listed = judged_lists(
            judged,
            partial=given.partial,
            together=heads_together(q.shape[1], given.k, given.v),
        )
        out, lse = hopper.attend(
            q,
            given.k,
            given.v,
            *listed.queued,
            scale=scale,
            key_mask=given.key_mask,
            tokens=given.tokens,
        )
    else:
        out, lse, recall, kept, sums = _online.online(
            q,
            given.k,
            given.v,
            control,
            **options,
            descriptors=_descriptors(given.k, given.v),
            warps=tuning.online_warps,
            registers=tuning.online_registers,
            eager_stages=tuning.online_eager_stages,
            stages=tuning.online_stages,
        )
    measures = ledger.measures(
        sums, control, even, rule=rule, certify=certify, bound=bound, engine=engine
    )
    if audited:
        _audit(q, k, v, out, lse, control, measures, tuning, scale, key_mask, recall=bound)
    curve = torch.zeros(2, c.RANK_BINS, device=q.device)
    return Output(out, lse, curve, measures, None, kept, recall)


def _audit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    control: Tensor,
    measures: Tensor,
    tuning: Tuning,
    scale: float,
    key_mask: Tensor | None,
    recall: bool = True,
) -> None:
    """What is computed is attention to every key: launched as attention is."""
    audit(
        q,
        k,
        v,
        out,
        lse,
        control[c.CONTROL_SEED],
        measures,
        scale=scale,
        key_mask=key_mask,
        recall=recall,
        rows=tuning.attend_rows,
        warps=tuning.attend_warps,
        stages=tuning.attend_stages,
    )


def _tuning(q: Tensor, v: Tensor) -> Tuning:
    """Entry of the table for this device, the larger head_dim and the dtype."""
    dim = max(q.shape[3], v.shape[3])
    wide = q.dtype == torch.float32
    entry = find_tuning(_architecture(q.device), dim, wide=wide)
    if entry is None:
        raise ValueError(f"no kernel configuration for head_dim {dim} in {q.dtype} on {q.device}")
    return entry


@functools.cache
def _architecture(device: torch.device) -> int:
    """CUDA compute capability as one number (90: Hopper); 0 for the interpreter and AMD."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _descriptors(k: Tensor, v: Tensor) -> bool:
    """Whether the kernels read k and v by TMA: on Hopper or newer (and in the interpreter)."""
    capable = k.device.type == "cpu" or _architecture(k.device) >= _TMA_ARCHITECTURE
    return capable and can_describe(k) and can_describe(v)

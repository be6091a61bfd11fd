"""What the kernel tests share: the device, layouts, and what a kernel may differ by.

The same tests run on a GPU (``-m gpu``) and, where there is none, in Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from gluon_threads import load
from hypothesis import settings
from hypothesis import strategies as st
from support import Case, Inputs, by_element, cases, control, oracle, same_bits, visible_tiles
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels import launch
from cef_compile.kernels import reference as ref
from cef_compile.kernels.centroids import Centroids
from cef_compile.kernels.ranks import Plan

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
MARKS = [pytest.mark.gpu] if ON_GPU else []

# The interpreter's dot is wrong for bf16 (Triton 3.6 to 3.8), so bf16 is left to the GPU.
DTYPES = (torch.float16, torch.float32, torch.bfloat16)[: 3 if ON_GPU else 2]
LAYOUTS = ("bhsd", "bshd", "mixed", "expanded", "offset", "channels_first")

PROGRAMS = 3
"""Of the attention over lists on threads, which take query tiles from a queue."""

# The interpreter takes half a second where the reference takes a millisecond.
FEWER = settings(max_examples=max(10, settings.default.max_examples // 2))

# Each pair of widths is compiled once for every mask, dtype and layout: few of them on a GPU.
KERNEL_CASES = cases(
    q_len=st.sampled_from([1, 65, 128, 129, 200]),
    kv_len=st.sampled_from([1, 64, 65, 128, 200, 257]),
    head_dim=st.sampled_from([40] if ON_GPU else [8, 16, 24, 40]),
    value_dim=st.sampled_from([24] if ON_GPU else [8, 16, 24]),
)


def on_device(x: Inputs) -> Inputs:
    return x.replace(
        q=x.q.to(DEVICE),
        k=x.k.to(DEVICE),
        v=x.v.to(DEVICE),
        mask=None if x.mask is None else x.mask.to(DEVICE),
    )


def on_cpu(x: Inputs) -> Inputs:
    return x.replace(
        q=x.q.cpu(), k=x.k.cpu(), v=x.v.cpu(), mask=None if x.mask is None else x.mask.cpu()
    )


def laid_out(x: Inputs, layout: str) -> Inputs:
    """The same numbers behind other strides; what lies between them is NaN."""

    def bshd(t: Tensor) -> Tensor:
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    def offset(t: Tensor) -> Tensor:
        """Rows 3 elements wider than needed, 5 elements into a buffer of NaN."""
        batch, heads, length, dim = t.shape
        room = t.new_full((5 + batch * heads * length * (dim + 3),), torch.nan)
        view = room[5:].view(batch, heads, length, dim + 3)[..., :dim]
        return view.copy_(t)

    def expanded(t: Tensor) -> Tensor:
        return t[:, :1].expand_as(t)

    if layout == "bshd":
        return x.replace(q=bshd(x.q), k=bshd(x.k), v=bshd(x.v))
    if layout == "mixed":
        return x.replace(q=x.q.contiguous(), k=bshd(x.k), v=offset(x.v))
    if layout == "expanded":
        mask = None if x.mask is None else x.mask[:1].expand_as(x.mask)
        return x.replace(k=expanded(x.k), v=expanded(x.v), mask=mask)
    if layout == "offset":
        return x.replace(q=offset(x.q), k=offset(x.k), v=offset(x.v))
    if layout == "channels_first":
        return x.replace(
            q=x.q.mT.contiguous().mT, k=x.k.mT.contiguous().mT, v=x.v.mT.contiguous().mT
        )
    return x.replace(q=x.q.contiguous(), k=x.k.contiguous(), v=x.v.contiguous())


def listed(index: Tensor, count: Tensor, n_n: int) -> Tensor:
    """Lists as a mask ``[B, H, Tm, Tn]``; every number at most once and in range."""
    kept = torch.zeros(*count.shape, n_n, dtype=torch.bool)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in count.shape)).tolist():
        b, h, t = at
        tiles = index[b, h, t, : int(count[b, h, t])].long().cpu()
        assert len(tiles.unique()) == len(tiles), "a tile is listed twice"
        kept[b, h, t, tiles] = True
    return kept


def drawn_tiles(case: Case, x: Inputs, density: float) -> Tensor:
    """Visible tiles of which about so many are kept, bool ``[B, H, Tm, Tn]``."""
    seen = visible_tiles(x)[:, None, None]
    draw = torch.Generator().manual_seed(case.seed)
    shape = (case.batch, case.heads, c.tiles(case.q_len, c.BLOCK_M), seen.shape[3])
    return seen & (torch.rand(shape, generator=draw) < density)


def attend_on_threads(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, x: Inputs, **options
) -> tuple[Tensor, Tensor]:
    """Attention over lists by the kernel in Gluon, without a GPU: see ``gluon_threads``."""
    hopper = load("hopper")
    hopper._multiprocessors = lambda device: PROGRAMS
    return hopper.attend(q, k, v, *lists_of(kept, x), scale=x.scale, key_mask=x.mask, **options)


def lists_of(kept: Tensor, x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """index, count, order and queue: tiles whose every key is seen come first."""
    batch, n_n = kept.shape[0], kept.shape[3]
    mask = torch.ones(batch, x.k.shape[2], dtype=torch.bool) if x.mask is None else x.mask
    padded = torch.nn.functional.pad(mask.expand(batch, -1), (0, n_n * c.BLOCK_N - mask.shape[1]))
    whole = padded.view(batch, 1, 1, n_n, c.BLOCK_N).all(-1).expand_as(kept)
    key = torch.arange(n_n) + n_n * ~whole + 2 * n_n * ~kept
    index = key.argsort(-1).to(torch.int16)
    count = torch.stack([kept.sum(-1), (kept & whole).sum(-1)]).int()
    order = count[0].flatten().argsort(descending=True).int()
    return index, count, order, torch.zeros(1, dtype=torch.int32)


def spoilt(x: Inputs) -> Inputs:
    """Where keys are hidden they and their values are NaN."""
    return x if x.mask is None else x.spoil_hidden()


def low_precision(x: Inputs, seen: Tensor) -> Tensor:
    """Attention as a framework does it in the dtype of x: what a kernel's error is measured by.

    Args:
        x: inputs on the CPU.
        seen: bool ``[B, H, q_len, kv_len]``.
    """
    group = x.q.shape[1] // x.k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (x.k, x.v))
    if x.mask is not None:
        k = torch.where(x.mask[:, None, :, None], k, 0)
        v = torch.where(x.mask[:, None, :, None], v, 0)
    scores = (x.q.float() @ k.float().mT).to(x.q.dtype).float() * x.scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(nan=0.0)
    return (weights.to(x.q.dtype).float() @ v.float()).to(x.q.dtype)


def assert_audit(got: launch.Output, x: Inputs, seed: int) -> ref.Audited:
    """A kernel's audit is the reference's in float64, of the same output.

    Args:
        got: what the kernels returned.
        x: its inputs, on the CPU.
        seed: of the sample.

    Returns:
        the reference's audit.
    """
    y = x.to(torch.float64)
    out, lse = got.out.cpu().double(), got.lse.cpu().double()
    wanted = ref.audit(y.q, y.k, y.v, out, lse, torch.tensor(seed), **y.options)
    places = [c.MEASURE_RECALL, c.MEASURE_STDERR]
    places += [c.MEASURE_ERROR, c.MEASURE_ERROR_STDERR, c.MEASURE_NORM]
    recall, stderr, error, error_stderr, norm = got.measures.cpu()[places].tolist()
    dense = oracle(x)
    rounding = float(dense.rounding.max()) if x.q.numel() else 0.0
    assert recall == pytest.approx(wanted.recall.item(), abs=rounding + 1e-6)
    assert stderr == pytest.approx(wanted.stderr.item(), abs=rounding + 1e-6)
    # The exact output is computed as attention is: its weights are rounded to the inputs' dtype,
    # which moves a mean of values by that much of their size (as in assert_output).
    largest = float(x.v.nan_to_num(nan=0.0).abs().max()) if x.v.numel() else 0.0
    rows = math.prod(x.q.shape[:3])
    size = float(torch.where((dense.lse == -torch.inf)[..., None], 0, dense.out).norm())
    moved = (rounding + torch.finfo(x.q.dtype).eps) * largest * math.sqrt(rows * x.v.shape[3])
    seen_rows = max(int((dense.lse != -torch.inf).sum()), 1)
    slack = 2 * moved * (size + moved) / seen_rows
    assert norm == pytest.approx(wanted.norm.item(), rel=1e-5, abs=slack)
    if size > 0:
        assert error == pytest.approx(wanted.error.item(), rel=1e-5, abs=moved / size)
        assert error_stderr == pytest.approx(
            wanted.error_stderr.item(), rel=1e-2, abs=2 * moved / size
        )
    else:
        assert error == wanted.error.item() == 0
    return wanted


def assert_output(x: Inputs, kept: torch.Tensor, got: launch.Output, compensate: bool) -> None:
    """Error at most twice that of low precision on the same kept set, against float64."""
    exact = x.to(torch.float64)
    cents = ref.centroids(exact.k, x.mask) if compensate else None
    wanted, lse = ref.attend(exact.q, exact.k, exact.v, kept, x.scale, x.mask, cents)
    out = got.out.cpu()
    assert out.dtype == x.q.dtype
    assert out.transpose(1, 2).is_contiguous()
    seen = by_element(kept, x.q.shape[2], x.k.shape[2])
    if x.mask is not None:
        seen = seen & x.mask[:, None, None]
    plain = low_precision(x, seen)
    without = ref.attend(exact.q, exact.k, exact.v, kept, x.scale, x.mask)[0]
    eps = torch.finfo(x.q.dtype).eps
    largest = x.v.nan_to_num(nan=0.0).double().abs().max()
    size = x.scale * x.q.double().abs().amax((0, 1, 2)) @ x.k.double().abs().amax((0, 1, 2))
    fp32 = torch.finfo(torch.float32).eps * (size * x.q.shape[3] + x.k.shape[2]) * largest
    floor = eps * largest + fp32
    if compensate:  # pseudo-tokens are stored in the dtype of the inputs
        floor = floor + 2 * eps * size * largest
    error = (out.double() - wanted).abs().max()
    assert error <= 2 * (plain.double() - without).abs().max() + floor
    empty = lse == -torch.inf
    mine = got.lse.cpu()
    assert (mine == -torch.inf).equal(empty)
    off = (mine.double() - lse).masked_fill(empty, 0).abs().max()
    assert off <= torch.finfo(torch.float32).eps * (4 * size * x.q.shape[3] + x.k.shape[2] + 8)


def tie_margin(x: Inputs) -> float:
    """By how many bins a rank may differ from the formula's: centroids are stored in x's dtype.

    A score is a sum of products of rounded numbers, so it is off by at most the size of the largest
    |q| . |k| times the rounding; a log2 is BINS_PER_OCTAVE bins, and the row's total, of the same
    error, doubles it.
    """
    if not (x.q.numel() and x.k.numel()):
        return 0.0
    q, k = x.q.double(), x.k.nan_to_num(nan=0.0).double()
    dtype = torch.float16 if x.q.dtype == torch.float32 and ON_GPU else x.q.dtype  # tf32
    rounding = torch.finfo(dtype).eps
    products = x.scale * q.abs().amax((0, 1, 2)) @ k.abs().amax((0, 1, 2))
    squares = x.scale**2 / 2 * q.square().amax((0, 1, 2)) @ k.square().amax((0, 1, 2))
    return float(2 * c.BINS_PER_OCTAVE * 1.4427 * 2 * rounding * (products + squares)) + 1e-3


def assert_centroids(
    known: Centroids, k: Tensor, mask: Tensor | None, *, variance_factor: float
) -> None:
    """The reference's up to rounding, and zeros beside them."""
    wanted = ref.centroids(k, mask)
    dim = k.shape[3]
    eps = torch.finfo(k.dtype).eps
    size = k.float().abs().max()
    assert torch.equal(known.count.cpu().expand_as(wanted.count), wanted.count.int())
    mean, spread = known.stats.cpu().float().split(c.padded_dim(dim), -1)
    torch.testing.assert_close(mean[..., :dim], wanted.mean, rtol=eps, atol=1e-6 * size)
    tiny = 1e-6 * size**2 + torch.finfo(k.dtype).tiny
    variance = wanted.variance * variance_factor
    torch.testing.assert_close(spread[..., :dim], variance, rtol=eps + 1e-5, atol=float(tiny))
    assert not mean[..., dim:].any()
    assert not spread[..., dim:].any()


def assert_plan(x: Inputs, ranked: Plan) -> None:
    """Bins are the reference's within the tie margin; the histogram is that of the bins."""
    wanted = ref.plan(x.q, ref.centroids(x.k, x.mask), x.scale)
    seen = visible_tiles(x)[:, None, None].expand_as(wanted.bins)
    bins, energy = ranked.bins.cpu(), ranked.energy.cpu()
    margin = tie_margin(x)

    best = (wanted.bins == c.TOP_BIN) | (bins == c.TOP_BIN)  # which of near equals is the best
    off = (bins.int() - wanted.bins.int()).abs()[seen & ~best]
    assert not off.numel() or off.max() <= 1 + margin
    assert ((bins == c.TOP_BIN) & seen).any(-1).equal(seen.any(-1))

    rows = min(x.q.shape[2], c.BLOCK_M) // c.PLAN_ROW_STRIDE + 1
    slack = rows * min(1.0, 2 ** min(1.0, margin / c.BINS_PER_OCTAVE) - 1) + 1e-4
    torch.testing.assert_close(energy, wanted.energy.float(), rtol=0, atol=slack)

    curve, number = ranked.histogram.cpu()
    assert number.sum() == seen.sum()
    assert torch.equal(number, bins[seen].int().bincount(minlength=c.RANK_BINS))
    sums = torch.zeros(c.RANK_BINS, dtype=torch.float64)
    sums.index_add_(0, bins[seen].int(), energy[seen].double())
    # Two fp16 parts carry an energy to 2^-21, fp32 sums a little less.
    torch.testing.assert_close(curve.double() / c.ENERGY_UNIT, sums, rtol=3e-6, atol=3e-6 * rows)


def assert_same_bits(got: launch.Output, wanted: launch.Output) -> None:
    assert same_bits(got.out, wanted.out)
    assert same_bits(got.lse, wanted.lse)


def assert_nan_row_keeps_to_itself(x: Inputs, run: Callable[[Inputs], launch.Output]) -> None:
    """A NaN query makes its own row NaN, where it sees anything, and no other."""
    x.q[0, 0, 0] = torch.nan
    out = run(x).out.cpu()
    spoilt = torch.zeros(out.shape[:3], dtype=torch.bool)
    spoilt[0, 0, 0] = bool(visible_tiles(on_cpu(x))[0].any())
    assert out.isnan().any(-1).equal(spoilt)


def assert_replays(run: Callable[[Tensor], launch.Output]) -> None:
    """A replay of a CUDA graph with other numbers computes what a plain call does."""
    numbers = control(0.9).to(DEVICE)
    run(numbers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run(numbers)
    for recall in (0.5, 0.8):
        numbers.copy_(control(recall))
        graph.replay()
        assert_same_bits(recorded, run(numbers))


__all__ = [
    "DEVICE",
    "DTYPES",
    "FEWER",
    "KERNEL_CASES",
    "LAYOUTS",
    "MARKS",
    "ON_GPU",
    "Case",
    "assert_audit",
    "assert_centroids",
    "assert_nan_row_keeps_to_itself",
    "assert_output",
    "assert_plan",
    "assert_replays",
    "assert_same_bits",
    "attend_on_threads",
    "drawn_tiles",
    "laid_out",
    "listed",
    "low_precision",
    "on_cpu",
    "on_device",
    "spoilt",
    "tie_margin",
]

"""What the tests of the attention share: drawn cases, the float64 oracle, bounds of rounding.

A case is a shape, a family of data and a seed, never the elements of a tensor: so hypothesis
shrinks to a small shape of simple data in place of a tensor full of zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cef_compile.kernels import config as c
from cef_compile.kernels import reference as ref

FAMILIES = ("gaussian", "spiky", "constant", "integers", "deep_negative", "banded")
MASKS = ("none", "lengths", "random", "one_row_empty")
LENGTHS = (1, 63, 64, 65, 127, 128, 129, 200, 257)
LONG_LENGTHS = (65, 200, 257, 384, 577)

SEEDS = st.integers(0, 2**32 - 1)
RECALLS = st.one_of(st.floats(0.02, 0.999), st.sampled_from([0.5, 0.75, 0.9, 0.95]))


@dataclass(frozen=True)
class Inputs:
    """The arguments of a filter, made from a case."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    mask: Tensor | None

    @property
    def options(self) -> dict:
        return {"scale": self.scale, "key_mask": self.mask}

    def replace(self, **changes) -> Inputs:
        return Inputs(**{**self.__dict__, **changes})

    def to(self, dtype: torch.dtype) -> Inputs:
        return self.replace(q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def spoil_hidden(self) -> Inputs:
        """The same with NaN for the keys and values that a mask hides; there is one."""
        hidden = ~self.mask[:, None, :, None]
        k, v = (t.masked_fill(hidden, torch.nan) for t in (self.k, self.v))
        return self.replace(k=k, v=v)


@dataclass(frozen=True)
class Case:
    """A shape, a family of data and a seed."""

    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    q_len: int = 200
    kv_len: int = 257
    head_dim: int = 8
    value_dim: int = 8
    family: str = "gaussian"
    mask: str = "none"
    seed: int = 0
    gain: float = 1.0
    heads: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", self.kv_heads * self.group)

    def make(self, dtype: torch.dtype = torch.float64) -> Inputs:
        draw = torch.Generator().manual_seed(self.seed)
        q_shape = (self.batch, self.heads, self.q_len, self.head_dim)
        k_shape = (self.batch, self.kv_heads, self.kv_len, self.head_dim)
        q, k = FAMILY[self.family](q_shape, k_shape, draw)
        v = torch.randn(*k_shape[:3], self.value_dim, generator=draw, dtype=torch.float64)
        scale = self.gain * self.head_dim**-0.5
        return Inputs(q.to(dtype), k.to(dtype), v.to(dtype), scale, self._key_mask(draw))

    def _key_mask(self, draw: torch.Generator) -> Tensor | None:
        if self.mask == "none":
            return None
        if self.mask == "random":
            return torch.rand(self.batch, self.kv_len, generator=draw) < 0.6
        lengths = torch.randint(0, self.kv_len + 1, (self.batch,), generator=draw)
        if self.mask == "one_row_empty":
            lengths[-1] = 0
        return torch.arange(self.kv_len) < lengths[:, None]


def cases(**given) -> st.SearchStrategy[Case]:
    """Cases with some fields given, as a value or as a strategy."""
    drawn = {
        "batch": st.integers(1, 2),
        "kv_heads": st.integers(1, 2),
        "group": st.integers(1, 2),
        "q_len": st.sampled_from(LENGTHS),
        "kv_len": st.sampled_from(LONG_LENGTHS + LENGTHS),
        "head_dim": st.sampled_from([8, 11, 40]),
        "value_dim": st.sampled_from([8, 13]),
        "family": st.sampled_from(FAMILIES),
        "mask": st.sampled_from(MASKS),
        "seed": SEEDS,
        "gain": st.sampled_from([1.0, 0.7, 1.6]),
    }
    for name, value in given.items():
        drawn[name] = value if isinstance(value, st.SearchStrategy) else st.just(value)
    return st.builds(Case, **drawn)


def _normal(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def _gaussian(q_shape, k_shape, draw):
    return 2 * _normal(q_shape, draw), 2 * _normal(k_shape, draw)


def _spiky(q_shape, k_shape, draw):
    """A few keys are many times as long as the others."""
    size = (1.2 * _normal((*k_shape[:3], 1), draw)).exp()
    return 2 * _normal(q_shape, draw), size * _normal(k_shape, draw)


def _constant(q_shape, k_shape, draw):
    """All queries are one vector, and so are all keys."""
    q, k = _normal((1, 1, 1, q_shape[-1]), draw), _normal((1, 1, 1, k_shape[-1]), draw)
    return q.expand(q_shape).clone(), k.expand(k_shape).clone()


def _integers(q_shape, k_shape, draw):
    """Small integers: exact sums and many ties."""
    return (
        torch.randint(-1, 2, q_shape, generator=draw).double(),
        torch.randint(-2, 3, k_shape, generator=draw).double(),
    )


def _deep_negative(q_shape, k_shape, draw):
    """Every score is below -1e4."""
    q, k = _normal(q_shape, draw), _normal(k_shape, draw)
    q[..., 0], k[..., 0] = 400, -400
    return q, k


def _banded(q_shape, k_shape, draw):
    """Like video: a query attends to its neighbours, in time and a frame away."""
    dim = q_shape[-1]
    pairs = dim // 2
    rates = torch.logspace(-2, 0, pairs, dtype=torch.float64)

    def features(shape):
        angle = torch.linspace(0, 40, max(shape[2], 2), dtype=torch.float64)[: shape[2], None]
        waves = torch.cat(((angle * rates).cos(), (angle * rates).sin()), -1)
        return F.pad(3 * waves, (0, dim - 2 * pairs)) + 0.3 * _normal(shape, draw)

    return features(q_shape), features(k_shape)


FAMILY = {
    "gaussian": _gaussian,
    "spiky": _spiky,
    "constant": _constant,
    "integers": _integers,
    "deep_negative": _deep_negative,
    "banded": _banded,
}


def control(
    recall: float = 0.9, *, threshold: float | None = None, log2: float | None = None, seed: int = 0
) -> Tensor:
    """The run-time numbers of a call; a threshold as it is or as its log2."""
    values = torch.zeros(c.CONTROL_SIZE)
    values[c.CONTROL_TARGET] = recall
    values[c.CONTROL_SEED] = seed
    if threshold is not None:
        log2 = float(torch.tensor(threshold, dtype=torch.float64).log2())
    if log2 is not None:
        values[c.CONTROL_LOG2_THRESHOLD] = log2
        values[c.CONTROL_FIXED] = 1
    return values


VARIANTS = {
    "planned": (ref.planned, {}),
    "planned top_k": (ref.planned, {"rule": "top_k"}),
    "planned top_p": (ref.planned, {"rule": "top_p"}),
    "online mean": (ref.online, {"certify": "mean"}),
    "online row": (ref.online, {"certify": "row"}),
    "online mean bound": (ref.online, {"certify": "mean", "bound": True}),
    "online row bound": (ref.online, {"certify": "row", "bound": True}),
    "online share": (ref.online, {"certify": "none"}),
    "online lse": (ref.online, {"rule": "lse", "certify": "none"}),
    "online max": (ref.online, {"rule": "max", "certify": "none"}),
    "online max bound": (ref.online, {"rule": "max", "certify": "none", "bound": True}),
}
"""Every way to choose tiles."""
CERTIFIED = ("online mean", "online row", "online mean bound", "online row bound")


def run(variant: str, x: Inputs, numbers: Tensor, **more) -> ref.Result:
    """Filter ``x`` in one of the ways."""
    function, options = VARIANTS[variant]
    return function(x.q, x.k, x.v, numbers, **x.options, **options, **more)


def target(numbers: Tensor) -> float:
    """The recall as the filter sees it: rounded to float32."""
    return float(numbers[c.CONTROL_TARGET])


@dataclass(frozen=True)
class Dense:
    """Attention in float64 over some of the keys.

    Attributes:
        out: ``[B, H, q_len, Dv]``.
        lse: log of the energy, ``[B, H, q_len]``; -inf where nothing is visible.
        scores: ``[B, H, q_len, kv_len]``, -inf where a key takes no part.
        rounding: how far a sum in the dtype of the inputs may be off, ``[B, H, q_len]``: of a
            log-energy as it is, of an output in units of the largest |v|.
    """

    out: Tensor
    lse: Tensor
    scores: Tensor
    rounding: Tensor


def oracle(x: Inputs, kept: Tensor | None = None) -> Dense:
    """SDPA's math in float64, over the visible keys, or over the kept tiles of them."""
    q, k, v = x.q.double(), x.k.double(), x.v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    shape = (*q.shape[:3], k.shape[2])
    seen = torch.ones(shape, dtype=torch.bool) if x.mask is None else x.mask[:, None, None]
    seen = seen.expand(shape)
    if kept is not None:
        seen = seen & by_element(kept, *shape[2:])
    if x.mask is not None:  # a product with a hidden NaN is a NaN, whatever its weight
        k = torch.where(x.mask[:, None, :, None], k, 0)
        v = torch.where(x.mask[:, None, :, None], v, 0)
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, k, v, seen, scale=x.scale)
    scores = (x.scale * (q @ k.mT)).masked_fill(~seen, -torch.inf)
    # |fl(q.k) - q.k| <= (D + 2) eps |q|.|k| for any order of summation; exp makes an absolute error
    # of a score a relative one of a weight, which enters the numerator and the denominator, and
    # each of these two is a sum of kv_len terms. A running maximum rescales once a tile.
    eps = torch.finfo(ref.work_dtype(x.q)).eps
    size = (abs(x.scale) * (q.abs() @ k.abs().mT)).masked_fill(~seen, 0)
    size = size.amax(-1) if size.shape[-1] else size.sum(-1)
    rounding = eps * (2 * (q.shape[-1] + 4) * size + 2 * k.shape[2] + 16)
    return Dense(out, scores.logsumexp(-1), scores, rounding)


def by_element(tiles: Tensor, q_len: int, kv_len: int) -> Tensor:
    """``[..., Tm, Tn]`` spread to ``[..., q_len, kv_len]``."""
    spread = tiles.repeat_interleave(c.BLOCK_M, -2).repeat_interleave(c.BLOCK_N, -1)
    return spread[..., :q_len, :kv_len]


def by_query_tile(rows: Tensor) -> list[Tensor]:
    """``[..., q_len]`` cut into the rows of each query tile."""
    return list(rows.split(c.BLOCK_M, -1))


def visible_tiles(x: Inputs) -> Tensor:
    """Tiles with a visible key, bool ``[B, Tn]``."""
    if x.mask is None:
        return torch.ones(x.k.shape[0], c.tiles(x.k.shape[2], c.BLOCK_N), dtype=torch.bool)
    parts = x.mask.split(c.BLOCK_N, -1)
    return torch.stack([part.any(-1) for part in parts], -1)


def achieved(lse: Tensor, dense: Dense) -> Tensor:
    """Recall of each row, from outside: kept energy over all energy; NaN where nothing is seen."""
    return (lse.double() - dense.lse).exp()


def assert_attention(out: Tensor, lse: Tensor, wanted: Dense, v: Tensor) -> None:
    """An output and its lse are the oracle's, within the rounding of their dtype."""
    largest = v.nan_to_num(nan=0.0).abs().amax().double() if v.numel() else 0.0
    stored = torch.finfo(out.dtype).eps * wanted.out.abs()  # the output is rounded to its dtype
    allowed = largest * wanted.rounding[..., None] + stored
    error = (out.double() - wanted.out).abs()
    assert torch.all(error <= allowed), f"{(error - allowed).max():.3g} beyond the rounding"
    empty = wanted.lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    off = (lse.double() - wanted.lse).masked_fill(empty, 0).abs()
    bound = wanted.rounding + torch.finfo(lse.dtype).eps * wanted.lse.masked_fill(empty, 0).abs()
    assert torch.all(off <= bound), f"lse off by {off.max():.3g}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit that counts: NaN equals NaN."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and (torch.equal(a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0)))
    )


def estimated_shares(x: Inputs, row_stride: int = c.PLAN_ROW_STRIDE) -> Tensor:
    """Share of each tile for each row that a plan looks at, by the formula, in float64.

    ``[B, H, rows, Tn]``; -1 for tiles that nobody sees.
    """
    q, k = x.q.double()[:, :, ::row_stride], x.k.double()
    batch, heads, group = q.shape[0], q.shape[1], q.shape[1] // k.shape[1]
    n_n = c.tiles(k.shape[2], c.BLOCK_N)
    logits = torch.full((*q.shape[:3], n_n), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for j, keys in enumerate(k[b, h // group].split(c.BLOCK_N)):
                if x.mask is not None:
                    keys = keys[x.mask[b, j * c.BLOCK_N : (j + 1) * c.BLOCK_N]]
                if len(keys):
                    spread = keys.var(0, correction=0)
                    logits[b, h, :, j] = (
                        torch.tensor(float(len(keys)), dtype=torch.float64).log()
                        + x.scale * (q[b, h] @ keys.mean(0))
                        + x.scale**2 / 2 * (q[b, h].square() @ spread)
                    )
    hidden = ~visible_tiles(x)[:, None, None].expand_as(logits)
    return logits.softmax(-1).masked_fill(hidden, -1)


def near_edge(rank: Tensor, margin: float = 1e-7) -> Tensor:
    """Ranks so close to the edge of a bin that rounding may put them on either side."""
    steps = (rank.clamp_min(1e-300).log2() + c.RANK_OCTAVES) * c.BINS_PER_OCTAVE
    return (steps - steps.round()).abs() < margin

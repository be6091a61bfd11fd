"""Which planned filter gives the best video for its density: every knob of it, one at a time.

    python bench/variants.py [--only NAME ...] [--out bench/results/variants.json]

The trained tiny Wan is sampled in full, with a planned filter in plain PyTorch for its self
attention. It has knobs that the product does not have to have: how rows and tiles are ranked, where
the shared threshold comes from, what happens to dropped tiles. A row has PSNR against dense, the
exact recall (of a sample of rows in every call) and the density; no times. Setting, scenes and
token order are those of ``bench/quality.py``. Rows that the output holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from quality import Scene, add_setting, sample, scenes
from token_order import cubes, reordered
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from cef_compile.demo.data import load_model
from cef_compile.demo.metrics import psnr
from cef_compile.kernels import config as c
from cef_compile.report.environment import environment

BRANCHES = 2
"""Passes of a guided step: with the text and without."""
TRIAL_SEED = 1000
"""Of the noise of the videos that tell where compensation helps: none of the study has it."""
PROBED_ROWS = 256
"""Rows of each head whose exact energy every call computes."""


@dataclass(frozen=True)
class Variant:
    """A planned filter.

    Attributes:
        recall: target.
        source: where a call's threshold comes from: "own" histogram, all nodes' in the "previous"
            pass, the pass before that ("branch": the same branch of guidance one step ago), or the
            mean of "both".
        first: what a pass without any history does: "own" threshold, or "dense".
        power: rank of a tile: the power mean of its shares over the rows; infinite: the largest.
        stride: every so many-th row takes part.
        piece: keys to a centroid.
        tile: keys to a tile.
        exact: energies of the keys themselves in place of those of centroids.
        values: rank by share times the distance of the tile's mean value from the mean value.
        compensate: dropped tiles come back as pseudo-tokens in heads where at least this part of
            their estimated energy is the pseudo-tokens' own (0: always; None: never).
        calibrated: they come back in the heads whose output errs less for it in other videos.
        share: the second branch of guidance attends to the tiles of the first.
        dither: ranks are multiplied by random numbers up to 2 to this power, new in each call.
        skew: the branch without text has a threshold higher by so many octaves, half of them taken
            from the branch with text.
        dense_above: noise level above which attention is dense.
    """

    recall: float
    source: str = "previous"
    first: str = "own"
    power: float = math.inf
    stride: int = c.PLAN_ROW_STRIDE
    piece: int = c.BLOCK_N
    tile: int = c.BLOCK_N
    exact: bool = False
    values: bool = False
    compensate: float | None = None
    calibrated: bool = False
    share: bool = False
    dither: float = 0.0
    skew: float = 0.0
    dense_above: float = 1.0


BASE = Variant(0.9)
CHANGES: dict[str, dict[str, Any]] = {
    "first pass by own thresholds": {},
    "own threshold of each node": {"source": "own"},
    "first pass dense": {"first": "dense"},
    "threshold of the same branch": {"source": "branch", "first": "dense"},
    "mean of the last two passes": {"source": "both", "first": "dense"},
    "all rows": {"stride": 1, "first": "dense"},
    "every 4th row": {"stride": 4, "first": "dense"},
    "every 8th row": {"stride": 8, "first": "dense"},
    "rank by the mean": {"power": 1.0, "first": "dense"},
    "rank by the power mean, 2": {"power": 2.0, "first": "dense"},
    "rank by the power mean, 4": {"power": 4.0, "first": "dense"},
    "rank by the power mean, 8": {"power": 8.0, "first": "dense"},
    "centroids of 32 keys": {"piece": 32, "first": "dense"},
    "centroids of 16 keys": {"piece": 16, "first": "dense"},
    "exact energies": {"exact": True, "first": "dense"},
    "tiles of 128 keys": {"tile": 128, "first": "dense"},
    "tiles of 32 keys": {"tile": 32, "piece": 32, "first": "dense"},
    "value-aware rank": {"values": True, "first": "dense"},
    "compensated": {"compensate": 0.0, "first": "dense"},
    "compensated, gate .5": {"compensate": 0.5, "first": "dense"},
    "compensated, gate .7": {"compensate": 0.7, "first": "dense"},
    "compensated, gate .8": {"compensate": 0.8, "first": "dense"},
    "compensated, gate .9": {"compensate": 0.9, "first": "dense"},
    "compensated, heads by calibration": {"calibrated": True, "first": "dense"},
    "mean rank, compensated": {"compensate": 0.0, "power": 1.0, "first": "dense"},
    "power 4, compensated": {"compensate": 0.0, "power": 4.0, "first": "dense"},
    "one set of tiles for both branches": {"share": True, "first": "dense"},
    "dithered by up to 2": {"dither": 1.0, "first": "dense"},
    "dithered by up to 8": {"dither": 3.0, "first": "dense"},
    "text favoured by an octave": {"skew": 1.0, "first": "dense"},
    "text favoured by two octaves": {"skew": 2.0, "first": "dense"},
    "no text favoured by an octave": {"skew": -1.0, "first": "dense"},
    "dense above .86": {"dense_above": 0.86},
    "dense above .95": {"dense_above": 0.95},
}
"""By name: what differs from the base."""
RECALLS = (0.95, 0.9, 0.86)
AttendCall = tuple[Tensor, Tensor, Tensor, Tensor, float]
"""q, k, v, kept and scale of :func:`attend`."""


class Filter(TorchFunctionMode):
    """Computes self attention over ``tokens`` by a variant; what it did is kept in lists.

    Args:
        variant: the filter.
        tokens: length by which self attention is known; other calls go through.
        nodes: self attentions of a pass.
    """

    def __init__(self, variant: Variant, tokens: int, nodes: int) -> None:
        super().__init__()
        self.variant, self.tokens, self.nodes = variant, tokens, nodes
        self.recalls: list[Tensor] = []
        self.densities: list[Tensor] = []
        self.level = 0.0
        self.compensated: Tensor | None = None  # bool [nodes, heads], of a calibrated variant
        self.reset()

    def reset(self) -> None:
        """Forget the history, as before another video."""
        self._calls = 0
        self._passes: list[list[Tensor]] = []
        self._kept: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Filter the self attentions."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
        q, k, v = given["query"], given["key"], given["value"]
        if k.shape[2] != self.tokens or self.level > self.variant.dense_above:
            return func(*args, **kwargs)
        return self._attention(q, k, v)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        done, node = divmod(self._calls, self.nodes)
        self._calls += 1
        if node == 0:
            self._passes.append([])
        scale = q.shape[3] ** -0.5
        rank, energy, own = plan(q, k, v, scale, self.variant)
        bins = c.rank_bin(rank)
        bins.scatter_(-1, rank.argmax(-1, keepdim=True), c.TOP_BIN)
        curve = torch.zeros(c.RANK_BINS, device=q.device)
        curve.index_add_(0, bins.flatten().long(), energy.flatten())
        curve /= curve.sum()
        self._passes[-1].append(curve)
        side = self.variant.skew * (done % BRANCHES - 0.5)
        kept = bins >= self._bin(curve) + round(side * c.BINS_PER_OCTAVE)
        kept |= bins == c.TOP_BIN
        if self.variant.share:
            if done % BRANCHES == 0:
                self._kept[node] = kept
            else:
                kept = self._kept[node]
        kept = kept.repeat_interleave(self.variant.tile // min(self.variant.tile, c.BLOCK_N), -1)
        dropped = (energy * ~kept[..., :: max(self.variant.tile // c.BLOCK_N, 1)]).sum((-1, -2))
        again = None
        if self.compensated is not None:
            again = self.compensated[node][None].expand(q.shape[0], -1)
        elif self.variant.compensate is not None:
            # A head's pseudo-tokens carry exp(q.k_mean) of what exp(q.k) carries: the rest is what
            # its tiles are selective for.
            part = (own * ~kept).sum((-1, -2)) / dropped.clamp_min(1e-9)
            again = part >= self.variant.compensate
        out, lse = self._output(node, (q, k, v, kept, scale), again)
        self.densities.append(kept.float().mean())
        self.recalls.append(probe(q, k, lse, scale, self._calls))
        return out

    def _output(self, node: int, call: AttendCall, again: Tensor | None) -> tuple[Tensor, Tensor]:
        return attend(*call, again, self.variant.tile)

    def _bin(self, curve: Tensor) -> Tensor:
        """The threshold's bin: an energy curve's, by the variant's source."""
        target = curve.new_tensor(self.variant.recall)
        past = self._passes[:-1]
        if self.variant.source == "own":
            return c.threshold_bin(curve, target)
        if not past:
            own = c.threshold_bin(curve, target)
            return own if self.variant.first == "own" else torch.zeros_like(own)
        chosen = {
            "previous": past[-1],
            "branch": past[-BRANCHES] if len(past) >= BRANCHES else past[-1],
            "both": [h for one in past[-BRANCHES:] for h in one],
        }[self.variant.source]
        return c.threshold_bin(torch.stack(list(chosen)).mean(0), target)


class Trial(Filter):
    """Gives the exact output, and adds up what a filter's errs by with compensation and without."""

    def __init__(self, variant: Variant, tokens: int, nodes: int) -> None:
        super().__init__(variant, tokens, nodes)
        self._errors: dict[int, Tensor] = {}  # by node, [without and with, heads]

    def better(self) -> Tensor:
        """bool ``[nodes, heads]``: where compensation made the error smaller."""
        return torch.stack([e[1] < e[0] for _, e in sorted(self._errors.items())])

    def _output(self, node: int, call: AttendCall, again: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, kept, scale = call
        exact, lse = attend(q, k, v, torch.ones_like(kept), scale, None, self.variant.tile)
        every = torch.ones(kept.shape[:2], dtype=torch.bool, device=q.device)
        errors = []
        for way in (None, every):
            out, _ = super()._output(node, call, way)
            off = (out - exact).float().square().sum((0, 2, 3))
            errors.append(off / exact.float().square().sum((0, 2, 3)))
        self._errors[node] = self._errors.get(node, 0) + torch.stack(errors)
        return exact, lse


def plan(
    q: Tensor, k: Tensor, v: Tensor, scale: float, variant: Variant
) -> tuple[Tensor, Tensor, Tensor]:
    """Rank and energy (sums of shares) of the tile pairs, and the energy of pseudo-tokens alone.

    All ``[B, H, Tm, Tn]`` with ``Tn`` tiles of ``variant.tile`` keys; lengths must be multiples.
    """
    rows = q[:, :, :: variant.stride].float()
    pieces = k.unflatten(2, (-1, variant.piece)).float()
    plain = scale * rows @ pieces.mean(3).mT + math.log(variant.piece)
    if variant.exact:
        logits = torch.cat(
            [
                (scale * rows @ part.float().mT).unflatten(3, (-1, variant.piece)).logsumexp(-1)
                for part in k.split(variant.piece * 32, 2)
            ],
            -1,
        )
    else:
        logits = plain + 0.5 * scale**2 * rows.square() @ pieces.var(3, correction=0).mT
    total = logits.logsumexp(-1, keepdim=True)
    per_tile = variant.tile // variant.piece

    def tiles(x: Tensor) -> Tensor:
        shares = (x - total).exp().unflatten(3, (-1, per_tile)).sum(-1)
        return shares.unflatten(2, (-1, c.BLOCK_M // variant.stride))

    shares = tiles(logits)
    energy = shares.sum(3)
    if variant.dither:
        jitter = torch.rand(energy.shape, device=q.device) * variant.dither
    else:
        jitter = torch.zeros((), device=q.device)
    if math.isinf(variant.power):
        rank = shares.amax(3)
    else:
        rank = shares.pow(variant.power).mean(3).pow(1 / variant.power)
    if variant.values:
        middle = v.unflatten(2, (-1, variant.tile)).float().mean(3)
        away = (middle - v.float().mean(2, keepdim=True)).norm(dim=-1)  # [B, H, Tn]
        rank = rank * (away / away.mean(-1, keepdim=True))[:, :, None]
    return (rank * jitter.exp2()).clamp(max=1.0), energy, tiles(plain).sum(3)


def attend(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, scale: float, again: Tensor | None, tile: int
) -> tuple[Tensor, Tensor]:
    """Attention over the kept tiles, and the log of their energy ``[B, H, q_len]``.

    Args:
        kept: bool ``[B, H, Tm, Tn]``, by 64 keys, or by ``tile`` where that is less.
        again: bool ``[B, H]``: heads whose dropped tiles come back as pseudo-tokens; None: none.
    """
    if q.device.type == "cuda" and tile >= c.BLOCK_N:
        return _listed(q, k, v, kept, scale, again)
    block = min(tile, c.BLOCK_N)
    mask = kept.repeat_interleave(c.BLOCK_M, 2).repeat_interleave(block, 3)
    scores = (scale * q.float() @ k.float().mT).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    values = v.float()
    if again is not None:
        means = [x.unflatten(2, (-1, block)).float().mean(3) for x in (k, v)]
        pseudo = scale * q.float() @ means[0].mT + math.log(block)
        hidden = (kept | ~again[..., None, None]).repeat_interleave(c.BLOCK_M, 2)
        scores = torch.cat((scores, pseudo.masked_fill(hidden, -torch.inf)), -1)
        values = torch.cat((values, means[1]), 2)
    return (scores.softmax(-1) @ values).to(q.dtype), lse


def _listed(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, scale: float, again: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`attend` by the library's kernel."""
    from cef_compile.kernels.attend import attend as kernel
    from cef_compile.kernels.centroids import centroids
    from cef_compile.kernels.tuning import find_tuning

    tuning = find_tuning(90, q.shape[3], wide=False)
    assert tuning is not None
    index = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int16)
    number = kept.sum(-1).to(torch.int32)
    order = number.argsort(dim=-1, descending=True).to(torch.int32)
    extra: dict[str, Any] = {}
    if again is not None:
        means = centroids(k)
        extra = {
            "kept": (kept | ~again[..., None, None]).to(torch.uint8),
            "k_mean": means.stats,
            "v_mean": centroids(v).stats,
            "key_count": means.count,
        }
    out, lse = kernel(
        q, k, v, index.contiguous(), torch.stack((number, number)), order.contiguous(),
        scale=scale, descriptors=True, rows=tuning.attend_rows, warps=tuning.attend_warps,
        stages=tuning.attend_stages, **extra,
    )  # fmt: skip
    return out, lse


def probe(q: Tensor, k: Tensor, lse: Tensor, scale: float, seed: int) -> Tensor:
    """Mean recall of a random sample of rows, exactly."""
    draw = torch.Generator().manual_seed(seed)
    at = torch.randperm(q.shape[2], generator=draw)[:PROBED_ROWS].to(q.device)
    full = (scale * q[:, :, at].float() @ k.float().mT).logsumexp(-1)
    return (lse[:, :, at] - full).exp().mean()


class Lab:
    """The model, the scenes, and their dense videos."""

    def __init__(self, given: argparse.Namespace) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = load_model(device, dtype)
        self.scenes = scenes(given, device, dtype)
        self._trial_scenes = partial(scenes, given, device, dtype, first_seed=TRIAL_SEED)
        side = given.size // 8
        self.tokens = given.frames * side * side
        self.order = cubes((given.frames, side, side), (4, 4, 4)).to(device)
        with self._ordered(), self._dense_kernel():
            self.dense = [sample(self.model, s, lambda *_: nullcontext()) for s in self.scenes]

    def row(self, name: str, variant: Variant) -> dict[str, Any]:
        """One variant on all scenes."""
        torch.manual_seed(0)
        mode = Filter(variant, self.tokens, len(self.model.blocks))
        if variant.calibrated:
            mode.compensated = self._where_compensation_helps(variant)
        qualities: dict[str, list[float]] = {"noise": [], "clip": []}
        with self._ordered(), self._dense_kernel():
            for scene, dense in zip(self.scenes, self.dense, strict=True):
                mode.reset()
                with mode:
                    video = sample(self.model, scene, self._at(mode, scene))
                qualities[scene.name.split()[0]].append(psnr(dense, video))
        row: dict[str, Any] = {"variant": name, "target": variant.recall}
        row["recall"] = torch.stack(mode.recalls).mean().item()
        row["density"] = torch.stack(mode.densities).mean().item()
        for kind, found in qualities.items():
            if found:
                row[f"{kind}_psnr"] = statistics.mean(found)
                row[f"{kind}_psnrs"] = [round(x, 2) for x in found]
        return row

    def _where_compensation_helps(self, variant: Variant) -> Tensor:
        """bool ``[nodes, heads]``, of one video from noise and one clip with noise of their own."""
        trial = Trial(variant, self.tokens, len(self.model.blocks))
        made = self._trial_scenes()
        with self._ordered(), self._dense_kernel():
            for scene in (made[0], made[-1]):
                trial.reset()
                with trial:
                    sample(self.model, scene, self._at(trial, scene))
        found = trial.better()
        print(f"compensated heads: {found.int().tolist()}", flush=True)
        return found

    def _at(self, mode: Filter, scene: Scene) -> Any:
        def before(step: int, level: float) -> Any:
            mode.level = level
            return nullcontext()

        return before

    def _ordered(self) -> Any:
        return reordered(self.model, self.order)

    def _dense_kernel(self) -> Any:
        on_gpu = next(self.model.parameters()).is_cuda
        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION if on_gpu else SDPBackend.MATH)


@torch.no_grad()
def main() -> None:
    """Run the rows that are missing, and write all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--recalls", nargs="+", type=float, default=list(RECALLS))
    parser.add_argument(
        "--part", default="0/1", help="i/n: every n-th row from the i-th on, to share the work out"
    )
    add_setting(parser)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "variants.json"
    )
    given = parser.parse_args()
    part, parts = map(int, given.part.split("/"))
    rows = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    known = {(row["variant"], row["target"]) for row in rows}
    wanted = [(name, recall) for name in given.only for recall in given.recalls]
    missing = [row for row in wanted[part::parts] if row not in known]
    setting = {key: getattr(given, key) for key in ("frames", "size", "steps", "clips")}
    lab = Lab(given)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for name, recall in missing:
        row = lab.row(name, replace(BASE, recall=recall, **CHANGES[name]))
        row["seeds"] = given.seeds
        rows.append(row)
        cells = [f"{key} {value:.3f}" for key, value in row.items() if isinstance(value, float)]
        print(f"{name:36}", "  ".join(cells), flush=True)
        found = {"environment": environment(), "setting": setting, "rows": rows}
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

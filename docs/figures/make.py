"""The figures of the docs, from the attention of the trained tiny Wan on a real clip.

    pip install matplotlib
    python docs/figures/make.py

The first 8 frames of clip 0 at 128 x 128 pixels (2,048 tokens), noise level 0.5, fp32 on a CPU.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from quality_tables import methods
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cef_compile.demo.data import load_clip, load_model
from cef_compile.demo.latents import unshuffle
from cef_compile.demo.sampler import add_noise
from cef_compile.kernels import config as c
from cef_compile.kernels import reference

FRAMES, SIZE, LEVEL, RECALL = 8, 128, 0.5, 0.9
OUT = Path(__file__).parent
BENCH = OUT.parents[1] / "bench"
COLOURS = plt.get_cmap("viridis")(torch.linspace(0, 0.9, 6).tolist())
BLUE, ORANGE = "#3a7fc0", "#d9822b"


@dataclass
class Node:
    """One self attention of the model.

    Attributes:
        name: path of the module.
        plan: what the planned filter makes of it.
        energy: exact share of energy of each tile pair, mean over the rows, ``[H, Tm, Tn]``.
        scores: exact share of each tile by row, ``[H, q_len, Tn]``.
    """

    name: str
    plan: reference.Plan
    energy: Tensor
    scores: Tensor

    def kept(self, bin_: Tensor) -> Tensor:
        """Pairs kept at a threshold, ``[H, Tm, Tn]``."""
        return self.plan.bins[0] >= bin_

    def recall(self, bin_: Tensor) -> float:
        """Exact recall at a threshold."""
        return ((self.energy * self.kept(bin_)).sum() / self.energy.sum()).item()

    def density(self, bin_: Tensor) -> float:
        """Density at a threshold."""
        return self.kept(bin_).double().mean().item()

    def own_bin(self, recall: float) -> Tensor:
        """The threshold at which this node alone reaches a recall, by its estimate."""
        return c.threshold_bin(self.plan.histogram()[0], torch.tensor(recall))


class Watch(TorchFunctionMode):
    """Sees the queries and keys of every self attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k = (args[i] if len(args) > i else kwargs[n] for i, n in enumerate(("query", "key")))
            if q.shape[2] == k.shape[2]:
                self.seen.append((q, k))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def nodes() -> list[Node]:
    """The self attentions of one call of the model."""
    model = load_model(torch.device("cpu"), torch.float32)
    video, text = load_clip(0, FRAMES, SIZE)
    latents = add_noise(unshuffle(video)[None], seed=0, level=LEVEL)
    with Watch() as watch:
        model(latents, torch.tensor([1000 * LEVEL]), text, return_dict=False)
    found = []
    for i, (q, k) in enumerate(watch.seen):
        scale = q.shape[3] ** -0.5
        plan = reference.plan(q, reference.centroids(k), scale)
        scores = reference.tile_energies(q, k, scale)[0].softmax(-1)
        energy = scores.unflatten(1, (-1, c.BLOCK_M)).mean(2)
        found.append(Node(f"blocks.{i}.attn1", plan, energy, scores))
    return found


def shared_bin(found: list[Node], recall: float) -> Tensor:
    """The one threshold at which the mean recall of the nodes is the target."""
    energy = torch.stack([node.plan.histogram()[0] for node in found]).mean(0)
    return c.threshold_bin(energy, torch.tensor(recall))


def save(figure: plt.Figure, name: str) -> None:
    """Write a figure, the same bytes each time."""
    figure.savefig(OUT / name, dpi=110, metadata={"Software": None})
    plt.close(figure)


def shares(found: list[Node]) -> None:
    """One query tile: the share that its rows give each key tile."""
    picks = (found[1], found[4])
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.7), sharey=True, layout="constrained")
    for axis, node in zip(axes, picks, strict=True):
        rows = node.scores[0, 8 * c.BLOCK_M : 9 * c.BLOCK_M]
        axis.bar(range(rows.shape[1]), rows.amax(0), color=ORANGE, width=0.9, label="neediest row")
        axis.bar(range(rows.shape[1]), rows.mean(0), color=BLUE, width=0.9, label="mean of rows")
        axis.set(title=f"{node.name}, head 0, query tile 8", xlabel="key tile", yscale="log")
        axis.set_ylim(1e-4, 1)
    axes[0].set_ylabel("share of the energy")
    axes[0].legend(frameon=False)
    save(figure, "shares.png")


def curves(found: list[Node]) -> None:
    """The cumulative-energy curve of each node, and where one threshold cuts it."""
    bin_ = shared_bin(found, RECALL)
    figure, axis = plt.subplots(figsize=(6.2, 4), layout="constrained")
    for node, colour in zip(found, COLOURS, strict=True):
        bins = torch.arange(c.RANK_BINS)
        points = [(node.density(b), node.recall(b)) for b in bins]
        axis.plot(*zip(*points, strict=True), color=colour, label=node.name)
        axis.plot(node.density(bin_), node.recall(bin_), "o", color=colour)
    axis.axhline(RECALL, color="grey", linewidth=0.8, linestyle="--")
    axis.set(xlabel="density: key tiles computed", ylabel="recall: energy kept", ylim=(0.4, 1.01))
    axis.legend(frameon=False, title=f"dots: one threshold, mean recall {RECALL}")
    save(figure, "curves.png")


def tile_maps(found: list[Node]) -> None:
    """Exact energy and kept tiles of one head."""
    bin_ = shared_bin(found, RECALL)
    picks = (found[1], found[3], found[4])
    figure, axes = plt.subplots(2, 3, figsize=(9, 3.6), layout="constrained")
    for (above, below), node in zip(axes.T, picks, strict=True):
        image = above.imshow(
            node.energy[0].clamp_min(1e-4),
            norm="log",
            cmap="Blues",
            aspect="auto",
            vmax=1,
            vmin=1e-4,
        )
        below.imshow(node.kept(bin_)[0], cmap="Blues", aspect="auto", vmin=0, vmax=1)
        above.set_title(f"{node.name}, head 0", fontsize=10)
        share = node.kept(bin_)[0].double().mean()
        below.set_xlabel(f"key tiles; density {share:.2f}")
        for axis in (above, below):
            axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("exact energy")
    axes[1, 0].set_ylabel("kept")
    figure.colorbar(image, ax=axes[0], label="share")
    save(figure, "tile-maps.png")


def policies(found: list[Node]) -> None:
    """Recall and density of each node under one threshold, and under one recall."""
    shared = shared_bin(found, RECALL)
    ways = {
        f"Balanced({RECALL})": [shared] * len(found),
        f"Uniform({RECALL})": [node.own_bin(RECALL) for node in found],
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained")
    for i, (way, bins) in enumerate(ways.items()):
        at = torch.arange(len(found)) + 0.38 * i
        pairs = list(zip(found, bins, strict=True))
        recalls = [node.recall(b) for node, b in pairs]
        densities = [node.density(b) for node, b in pairs]
        mean = sum(densities) / len(densities)
        axes[0].bar(at, recalls, 0.38, color=(BLUE, ORANGE)[i], label=way)
        axes[1].bar(at, densities, 0.38, color=(BLUE, ORANGE)[i], label=f"{way}, mean {mean:.2f}")
        print(f"{way}: recall {sum(recalls) / len(recalls):.3f}, density {mean:.3f}")
    for axis, name in zip(axes, ("achieved recall", "density"), strict=True):
        axis.set_xticks(torch.arange(len(found)) + 0.19, [f"blocks.{i}" for i in range(len(found))])
        axis.set_ylabel(name)
    axes[0].set_ylim(0.7, 1)
    axes[1].set_ylim(0, 1.15)
    axes[1].legend(frameon=False, loc="upper left")
    save(figure, "policies.png")


def estimate(found: list[Node]) -> None:
    """Recall that was asked for against recall that is delivered, node by node."""
    figure, axis = plt.subplots(figsize=(4.6, 4), layout="constrained")
    targets = torch.linspace(0.5, 0.99, 25)
    for node, colour in zip(found, COLOURS, strict=True):
        delivered = [node.recall(node.own_bin(float(target))) for target in targets]
        axis.plot(targets, delivered, color=colour, label=node.name)
    axis.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.8, linestyle="--")
    axis.set(xlabel="recall asked for, by the estimate", ylabel="recall delivered, exact")
    axis.legend(frameon=False, fontsize=8)
    save(figure, "estimate.png")


def quality() -> None:
    """PSNR of sampled videos against the speed of their attention, from bench/quality.py."""
    floor, *rows = methods()
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
    for axis, kind, title in zip(
        axes, ("noise", "clip"), ("videos from noise", "real clips"), strict=True
    ):
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = sorted((r for r in rows if r["method"] == method), key=lambda r: r["speed"])
            axis.plot(
                [row["speed"] for row in mine], [row[f"{kind}_psnr"] for row in mine],
                marker="o", label=method,
            )  # fmt: skip
            for row in mine:
                axis.annotate(
                    f"{row['parameter']:g}", (row["speed"], row[f"{kind}_psnr"]),
                    textcoords="offset points", xytext=(5, 4), fontsize=7, color="grey",
                )  # fmt: skip
        axis.axhline(floor[f"{kind}_psnr"], color="grey", linewidth=0.8, linestyle="--")
        axis.axvline(1, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="speed of the attention calls against cuDNN")
    axes[0].set(ylabel="PSNR, dB (dashed: dense again)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save(figure, "quality.png")


def orders() -> None:
    """Density in each order of tokens, by the script that measured it."""
    sys.path.append(str(BENCH))  # scripts of a folder import one another by name
    from order_study import plot

    found = json.loads((BENCH / "results" / "order-h100.json").read_text(encoding="utf-8"))
    plot(found["summary"], OUT / "order.png")


def main() -> None:
    """All figures, and the numbers that the docs say of them."""
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False})
    matplotlib.rcParams["axes.spines.right"] = False
    quality()
    orders()
    found = nodes()
    for figure in (shares, curves, tile_maps, policies, estimate):
        figure(found)
    bin_ = shared_bin(found, RECALL)
    for node in found:
        print(f"{node.name}: recall {node.recall(bin_):.3f}, density {node.density(bin_):.3f}")


if __name__ == "__main__":
    main()

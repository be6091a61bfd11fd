"""The error of 8-bit scores beside that of a lower recall, on a CPU, as JSON.

    python bench/eight_bits.py [--out bench/results/eight-bits.json]

Queries and keys of the embedded model's self attention, first blocks, one noise level. The error is
``||out - exact|| / ||exact||`` of one attention call. Each query has a scale of its own; so has in
FP8 each key, and in INT8 each tile of keys, as in the engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from learned import Inputs
from torch import Tensor

from cef_compile.demo.data import load_clip, load_model
from cef_compile.demo.latents import tokens, unshuffle
from cef_compile.demo.sampler import add_noise, noise_levels, sample
from cef_compile.kernels import config as c
from cef_compile.kernels import reference as ref

FRAMES, SIZE, STEPS, STEP, NODES = 8, 128, 20, 5, 6
RECALLS = (0.99, 0.97, 0.95, 0.9, 0.85)


def fp8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def int8(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scores as the engine "hopper-int8" has them, less what is the same for a row."""
    eight = ref.eight_bits(q, k, scale)
    sizes = eight.key_scale.repeat_interleave(c.BLOCK_N, -1)[..., None, : k.shape[2]]
    return scale * eight.row_scale[..., None] * sizes * (eight.q.float() @ eight.k.float().mT)


def errors(q: Tensor, k: Tensor, v: Tensor) -> dict[str, dict[str, float]]:
    """Error and density of each way."""
    scale = q.shape[-1] ** -0.5
    centred = k - k.mean(-2, keepdim=True)  # which softmax does not see
    scores = {
        "exact": q @ k.mT * scale,
        "bf16": q.bfloat16().float() @ k.bfloat16().float().mT * scale,
        "fp8": fp8(q) @ fp8(centred).mT * scale,
        "int8": int8(q, k, scale),
    }
    exact = scores["exact"].softmax(-1) @ v

    def error(score: Tensor) -> float:
        return float((score.softmax(-1) @ v - exact).norm() / exact.norm())

    found = {name: {"error": error(scores[name]), "density": 1.0} for name in list(scores)[1:]}
    plan = ref.plan(q, ref.centroids(k), scale)
    curve = plan.histogram()
    curve = curve / curve.sum(-1, keepdim=True)
    for recall in RECALLS:
        numbers = torch.tensor([recall, 0.0, 0.0, 0.0])
        kept, _ = ref.choose(plan, curve.float(), numbers, "threshold")
        rows = kept.repeat_interleave(c.BLOCK_M, 2)[:, :, : q.shape[2]]
        hidden = ~rows.repeat_interleave(c.BLOCK_N, 3)[..., : k.shape[2]]
        for name in ("exact", "fp8", "int8"):
            key = f"recall {recall}" + ("" if name == "exact" else f", {name}")
            masked = scores[name].masked_fill(hidden, -torch.inf)
            found[key] = {"error": error(masked), "density": float(kept.float().mean())}
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/eight-bits.json"))
    arguments = parser.parse_args()
    cpu = torch.device("cpu")
    clip, text = load_clip(0, FRAMES, SIZE)
    levels = noise_levels(STEPS)[STEP : STEP + 2]
    start = add_noise(unshuffle(clip)[None], 0, float(levels[0]))
    with Inputs(tokens(FRAMES, SIZE)) as capture:
        sample(load_model(cpu, torch.float32), start, text, levels)
    nodes = [errors(*call) for call in capture.found[:NODES]]
    ways = {
        way: {
            "error": round(statistics.mean(node[way]["error"] for node in nodes), 4),
            "density": round(statistics.mean(node[way]["density"] for node in nodes), 3),
        }
        for way in nodes[0]
    }
    about = {"tokens": capture.found[0][0].shape[2], "nodes": NODES, "level": float(levels[0])}
    arguments.out.write_text(json.dumps({"about": about, "ways": ways}, indent=1) + "\n")
    print(json.dumps(ways, indent=1))


if __name__ == "__main__":
    main()

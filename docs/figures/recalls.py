"""The quality of the demo's videos by recall, as docs/choosing-a-recall.md has it.

    python docs/figures/recalls.py

Writes recalls.json beside itself. Both clips, 8 frames of 128 x 128 pixels (2,048 tokens), 10 steps
from noise level 0.7, fp32 on a CPU; about ten minutes on one core.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import cef_compile
from cef_compile.demo.data import load_clip, load_model
from cef_compile.demo.latents import unshuffle
from cef_compile.demo.metrics import psnr, ssim
from cef_compile.demo.run import to_video
from cef_compile.demo.sampler import add_noise, euler_step, noise_levels

RECALLS = (0.8, 0.9, 0.95, 0.98)
STEPS, FRAMES, SIZE, SEED = 10, 8, 128, 0
DENSE_STEPS = 3


def denoise(model, start: Tensor, text: Tensor, backend=None, dense_steps: int = 0) -> Tensor:
    """The demo's sampling, with its first steps dense."""
    latents = start
    for i, (level, following) in enumerate(pairwise(noise_levels(STEPS))):
        with backend.dense() if backend and i < dense_steps else nullcontext():
            latents = euler_step(model, latents, text, level, following)
    return latents


@torch.no_grad()
def main() -> None:
    """Both clips, every recall, and the first steps dense."""
    model = load_model(torch.device("cpu"), torch.float32)
    rows = []
    for clip in (0, 1):
        video, text = load_clip(clip, FRAMES, SIZE)
        start = add_noise(unshuffle(video)[None], SEED)
        dense = to_video(denoise(model, start, text))
        for recall, dense_steps in [*((r, 0) for r in RECALLS), (0.9, DENSE_STEPS)]:
            torch._dynamo.reset()
            backend = cef_compile.backend(recall, inner="eager")
            fast = torch.compile(model, backend=backend)
            euler_step(fast, start, text, *noise_levels(STEPS)[:2])  # finds the first threshold
            with backend.audit() as audit:
                other = to_video(denoise(fast, start, text, backend, dense_steps))
            row = {
                "clip": clip,
                "recall": recall,
                "dense_steps": dense_steps,
                "achieved": round(audit.recall, 3),
                "density": round(audit.density, 3),
                "psnr_db": round(psnr(dense, other), 1),
                "ssim": round(ssim(dense, other), 4),
            }
            print(row, flush=True)
            rows.append(row)
    path = Path(__file__).with_name("recalls.json")
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

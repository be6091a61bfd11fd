"""A whole Wan 2.2 transformer forward, filtered against dense, on the GPU at hand.

``python bench/end_to_end.py --models 5b a14b`` builds the transformers of Wan 2.2 with random
weights and times one forward pass, compiled dense on cuDNN and compiled with cef_compile at a fixed
density (top-k selection, so that the time does not depend on what random weights attend to), as a
whole and by repeated blocks. Compile time is reported apart. The error and recall printed are those
of random weights: they say that the same thing was computed, nothing about picture quality.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

import cef_compile
from cef_compile.report.environment import environment

TEXT_TOKENS, TEXT_WIDTH = 512, 4096
WARMUP, REPEATS = 1, 5  # the first call, which compiles, comes before
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer and of the latents that it is run on."""

    heads: int
    channels: int
    ffn: int
    layers: int
    latents: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        """Tokens after 1 x 2 x 2 patches."""
        frames, height, width = self.latents
        return frames * height * width // 4


SHAPES = {
    "5b": Shape(heads=24, channels=48, ffn=14336, layers=30, latents=(31, 44, 80)),
    "a14b": Shape(heads=40, channels=16, ffn=13824, layers=40, latents=(21, 90, 160)),
}
"""Wan 2.2 TI2V-5B at 704 x 1280 x 121 frames, and A14B at 720 x 1280 x 81 frames."""


def build(shape: Shape, layers: int) -> tuple[WanTransformer3DModel, dict[str, Any]]:
    """The transformer with random weights in bf16 on the GPU, and inputs for it."""
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = WanTransformer3DModel(
                num_attention_heads=shape.heads,
                attention_head_dim=128,
                in_channels=shape.channels,
                out_channels=shape.channels,
                ffn_dim=shape.ffn,
                num_layers=layers,
                text_dim=TEXT_WIDTH,
            )
    finally:
        torch.set_default_dtype(previous)
    inputs = {
        "hidden_states": torch.randn(1, shape.channels, *shape.latents),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, TEXT_WIDTH),
    }
    inputs = {name: x.to("cuda", torch.bfloat16) for name, x in inputs.items()}
    timestep = torch.tensor([500], device="cuda")
    return model.eval(), {**inputs, "timestep": timestep, "return_dict": False}


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    """Median time of a call by device events, after warming up."""
    for _ in range(WARMUP):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def attention_ms(shape: Shape, decision: cef_compile.Decision, repeats: int) -> tuple[float, float]:
    """Time of one self attention, dense on cuDNN and filtered, on random q, k and v."""
    made = torch.randn(3, 1, shape.tokens, shape.heads, 128, device="cuda", dtype=torch.bfloat16)
    q, k, v = (part.transpose(1, 2) for part in made)
    dense = median_ms(lambda: F.scaled_dot_product_attention(q, k, v), repeats)
    filtered = median_ms(
        lambda: cef_compile.attention(
            q, k, v, recall=decision.recall, rule=decision.rule, density=decision.density
        ),
        repeats,
    )
    return dense, filtered


def compiled(model: WanTransformer3DModel, how: str, **options: Any) -> Callable[..., Any]:
    """The model compiled as a whole or by its repeated blocks."""
    torch._dynamo.reset()
    if how == "whole":
        return torch.compile(model, **options)
    model.compile_repeated_blocks(**options)
    return model


@torch.inference_mode()
def measure(name: str, how: str, layers: int, density: float, repeats: int) -> dict[str, Any]:
    """One row: a model compiled one way, dense beside filtered."""
    shape = SHAPES[name]
    decision = cef_compile.Decision(0.9, rule="top_k", density=density)
    dense_attention, filtered_attention = attention_ms(shape, decision, repeats)
    model, inputs = build(shape, layers)
    backend = cef_compile.backend(
        policy=lambda node: decision if node.kv_len == shape.tokens else None
    )
    row: dict[str, Any] = {
        "model": name,
        "compiled": how,
        "layers": layers,
        "heads": shape.heads,
        "tokens": shape.tokens,
        "density": density,
        "attention_dense_ms": dense_attention,
        "attention_filtered_ms": filtered_attention,
    }
    outputs = {}
    for kind, options in (("dense", {}), ("filtered", {"backend": backend})):
        run = compiled(model, how, **options)
        begin = time.perf_counter()
        outputs[kind] = run(**inputs)[0]
        torch.cuda.synchronize()
        row[f"{kind}_first_call_s"] = time.perf_counter() - begin
        row[f"{kind}_ms"] = median_ms(lambda run=run: run(**inputs), repeats)
    with backend.audit() as audit:
        run(**inputs)
    row["achieved_density"] = audit.density
    row["achieved_recall"] = audit.recall
    dense = outputs["dense"].float()
    row["relative_error"] = ((outputs["filtered"].float() - dense).norm() / dense.norm()).item()
    row["speedup"] = row["dense_ms"] / row["filtered_ms"]
    row["attention_share_dense"] = layers * dense_attention / row["dense_ms"]
    row["attention_share_filtered"] = layers * filtered_attention / row["filtered_ms"]
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    torch._dynamo.reset()
    return row


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is about: a later measurement of it takes its place in the results."""
    return tuple(row[name] for name in ("model", "compiled", "layers", "density"))


def show(row: dict[str, Any]) -> str:
    """A row as a line."""
    return (
        f"{row['model']:>5} {row['compiled']:>8} {row['layers']:3d} x {row['tokens']:6d} tokens"
        f"  dense {row['dense_ms']:8.1f} ms  filtered {row['filtered_ms']:8.1f} ms"
        f"  {row['speedup']:.2f}x  attention {row['attention_dense_ms']:.2f} ->"
        f" {row['attention_filtered_ms']:.2f} ms, {row['attention_share_dense']:.0%} ->"
        f" {row['attention_share_filtered']:.0%} of the time"
        f"  density {row['achieved_density']:.3f} recall {row['achieved_recall']:.3f}"
        f" error {row['relative_error']:.3f}  first call {row['dense_first_call_s']:.0f} s,"
        f" {row['filtered_first_call_s']:.0f} s"
    )


def main() -> None:
    """Measure what is asked for, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--how", nargs="+", choices=["whole", "regional"], default=["regional"])
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--out", type=Path, default=RESULTS / "end-to-end-h100.json")
    args = parser.parse_args()
    known = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    rows = {key(row): row for row in known}
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        for name in args.models:
            for how in args.how:
                layers = args.layers or SHAPES[name].layers
                row = measure(name, how, layers, args.density, args.repeats)
                rows[key(row)] = {**row, "environment": environment()}
                print(show(row), flush=True)
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"rows": list(rows.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()

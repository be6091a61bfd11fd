"""Blocks of Wan 2.2 A14B on several GPUs: Ulysses with filtered attention beside Ulysses dense.

    torchrun --nproc-per-node 2 bench/multi_gpu.py [--tokens 32768 65536] [--out bench/results]
    torchrun --nproc-per-node 2 bench/multi_gpu.py --tiny    # rehearses on the CPU

A transformer with the width of A14B, a few layers and random weights runs one forward pass on one
GPU and on all, compiled block by block: dense on cuDNN, and filtered at a fixed density (top-k
lists, so that the time does not depend on what random weights attend to). Its results are compared
with those of one GPU: what several change in the dense pass is the floor. Then the default policy
runs: its one threshold and its audit, gathered, beside those of one GPU. The all-to-all of one
block is timed apart.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import ContextParallelConfig, WanTransformer3DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import cef_compile

HEADS, HEAD_DIM, FFN, LAYERS = 40, 128, 13824, 2
TEXT_TOKENS, TEXT_WIDTH = 512, 4096
DENSITY, RECALL = 0.3, 0.9
PASSES = 3
"""Before the audited one: the threshold of a pass comes from the one before."""
WARMUP, REPEATS = 2, 7
SHARPNESS = 1.5
"""Scale of normalised queries and keys; random ones of scale 1 attend to all tiles alike."""
Row = dict[str, Any]


class Bench:
    """A model of some length, on this rank."""

    def __init__(self, tokens: int, tiny: bool) -> None:
        self.tiny = tiny
        self.device = torch.device("cpu" if tiny else "cuda")
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.heads, self.dim, self.ffn = (4, 16, 64) if tiny else (HEADS, HEAD_DIM, FFN)
        self.grid = (16, 64, tokens // 1024)
        draw = torch.Generator().manual_seed(0)
        # A few waves over space and time, so that neighbours attend alike, and noise.
        waves = F.interpolate(torch.randn(1, 16, 4, 8, 8, generator=draw), size=self.latents)
        noise = torch.randn(waves.shape, generator=draw)
        text = torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=draw)
        self.inputs = {
            "hidden_states": (waves + 0.3 * noise).to(self.device, self.dtype),
            "encoder_hidden_states": text.to(self.device, self.dtype),
            "timestep": torch.tensor([500], device=self.device),
            "return_dict": False,
        }

    @property
    def latents(self) -> tuple[int, int, int]:
        frames, height, width = self.grid
        return frames, 2 * height, 2 * width

    def model(self, ranks: int) -> WanTransformer3DModel:
        """The same weights each time, on this GPU alone or in parallel."""
        torch.manual_seed(0)
        previous = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                model = WanTransformer3DModel(
                    num_attention_heads=self.heads,
                    attention_head_dim=self.dim,
                    ffn_dim=self.ffn,
                    num_layers=LAYERS,
                    text_dim=TEXT_WIDTH,
                ).eval()
        finally:
            torch.set_default_dtype(previous)
        for block in model.blocks:
            for norm in (block.attn1.norm_q, block.attn1.norm_k):
                norm.weight.fill_(SHARPNESS)
        if ranks > 1:
            # diffusers divides by the number of accelerators.
            counted = mock.patch.object(torch.accelerator, "device_count", return_value=1)
            with counted if self.tiny else contextlib.nullcontext():
                model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
        return model

    def compiled(
        self, ranks: int, inner: str = "inductor", **policy: Any
    ) -> tuple[Callable[[], Tensor], Any, float]:
        """A forward pass, its backend, and the seconds that its first call took."""
        torch._dynamo.reset()
        model = self.model(ranks)
        backend = cef_compile.backend(
            inner="eager" if self.tiny else inner,
            group=dist.group.WORLD if ranks > 1 else None,
            min_kv_len=0,
            **policy,
        )
        model.compile_repeated_blocks(backend=backend, dynamic=False)
        started = time.perf_counter()
        model(**self.inputs)
        self.synchronize()
        return lambda: model(**self.inputs)[0], backend, time.perf_counter() - started

    def synchronize(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def median_ms(self, call: Callable[[], Any]) -> float:
        """Median over runs that all ranks begin together; of the slowest rank."""
        times = []
        for _ in range(WARMUP + REPEATS):
            self.synchronize()
            dist.barrier()
            started = time.perf_counter()
            call()
            self.synchronize()
            times.append(1e3 * (time.perf_counter() - started))
        median = torch.tensor([statistics.median(times[WARMUP:])], device=self.device)
        dist.all_reduce(median, op=dist.ReduceOp.MAX)
        return round(median.item(), 3)

    def all_to_all(self, ranks: int, tokens: int) -> Row:
        """The exchange of one of q, k, v and the output, alone."""
        shape = (ranks, tokens // ranks, 1, self.heads // ranks, self.dim)
        given = torch.zeros(shape, device=self.device, dtype=self.dtype)
        taken = torch.empty_like(given)
        ms = self.median_ms(lambda: dist.all_to_all_single(taken, given))
        sent = given.nbytes * (ranks - 1) / ranks
        return {"tokens": tokens, "MiB sent": round(sent / 2**20, 1), "ms": ms,
                "GB/s": round(sent / ms / 1e6, 1)}  # fmt: skip


def fixed(node: cef_compile.AttentionNode) -> cef_compile.Decision:
    """Self attention at one density; cross attention dense."""
    if node.kind == "cross":
        return cef_compile.Decision.dense()
    return cef_compile.Decision(RECALL, rule="top_k", density=DENSITY)


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, in the 2-norm."""
    return round(((found - wanted).float().norm() / wanted.float().norm()).item(), 6)


def compared(tokens: int, out: dict[Any, Tensor], *keys: tuple[int, str]) -> Row:
    """An output against another."""
    names = [f"{name} on {ranks} GPU{'s' * (ranks > 1)}" for ranks, name in keys]
    found, wanted = (out[key] for key in keys)
    return {
        "tokens": tokens,
        "of": names[0],
        "against": names[1],
        "relative": error(found, wanted),
    }


def audited(call: Callable[[], Tensor], backend: Any) -> tuple[Tensor, Any]:
    """The output and the audit of the pass after some."""
    for _ in range(PASSES - 1):
        call()
    with backend.audit() as audit:
        out = call()
    return out, audit


def measure(tokens: int, tiny: bool) -> Iterator[tuple[str, Row]]:
    """Parts of the results of one length, as they come."""
    world = dist.get_world_size()
    bench = Bench(tokens, tiny)
    yield "all_to_all", bench.all_to_all(world, tokens)
    out: dict[tuple[int, str], Tensor] = {}
    base: dict[int, float] = {}
    for ranks in (world, 1):
        for name, policy in (("dense", lambda node: None), ("planned", fixed)):
            call, backend, first = bench.compiled(ranks, policy=policy)
            out[ranks, name] = call()
            ms = bench.median_ms(call)
            base.setdefault(ranks, ms)
            filtered = backend.report.filtered
            density = filtered[0].density if filtered else 1.0
            yield "forward", {
                "tokens": tokens, "gpus": ranks, "name": name, "ms": ms,
                "speed": round(base[ranks] / ms, 3), "density": round(density, 3),
                "first_call_s": round(first, 1),
            }  # fmt: skip
    for name in ("dense", "planned"):
        yield "error", compared(tokens, out, (world, name), (1, name))
    yield "error", compared(tokens, out, (1, "planned"), (1, "dense"))

    call, backend, _ = bench.compiled(world, inner="eager", recall=RECALL)
    many, audit = audited(call, backend)
    gathered = cef_compile.gather_audit(audit)
    call, backend, _ = bench.compiled(1, inner="eager", recall=RECALL)
    one, single = audited(call, backend)
    if gathered is not None:
        print(gathered, flush=True)
        fields = ("path", "recall", "interval", "estimate", "density", "threshold")
        yield "balanced", {
            "tokens": tokens,
            "relative_error": error(many, one),
            "gathered": [{f: getattr(node, f) for f in fields} for node in gathered.nodes],
            "ranks": {str(rank): a.recall for rank, a in gathered.ranks.items()},
            "one_gpu": [{f: getattr(node, f) for f in fields} for node in single.nodes],
        }  # fmt: skip


def about(tiny: bool) -> Row:
    """What ran where."""
    import diffusers
    import triton

    return {
        "date": datetime.date.today().isoformat(),
        "card": "CPU" if tiny else torch.cuda.get_device_name(),
        "gpus": dist.get_world_size(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": None if tiny else ".".join(map(str, torch.cuda.nccl.version())),
        "diffusers": diffusers.__version__,
        "dtype": "float32" if tiny else "bfloat16",
        "model": f"{LAYERS} blocks of Wan 2.2 A14B ({HEADS} heads x {HEAD_DIM}), random weights",
        "density": DENSITY,
        "runs": REPEATS,
    }


def main() -> None:
    """Run, and write what is known after every part."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 65536])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    options = parser.parse_args()
    if any(tokens % 1024 for tokens in options.tokens):
        parser.error("--tokens must be multiples of 1024")
    if not options.tiny:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if options.tiny else "nccl")
    results: dict[str, Any] = {"about": about(options.tiny)}
    card = "cpu" if options.tiny else results["about"]["card"].split()[1].lower()
    best = sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
    with torch.no_grad(), contextlib.nullcontext() if options.tiny else best:
        for tokens in options.tokens:
            for part, row in measure(tokens, options.tiny):
                results.setdefault(part, []).append(row)
                if dist.get_rank() == 0:
                    print(part, row, flush=True)
                    text = json.dumps(results, indent=1) + "\n"
                    (options.out / f"multi-gpu-{card}.json").write_text(text, encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

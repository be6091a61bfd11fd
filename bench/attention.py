"""Times of the attention kernels beside cuDNN and FlashAttention-2 on one GPU, as JSON and a table.

    python bench/attention.py [--only NAME ...] [--out bench/results]

Every row has the time, the speed against cuDNN's dense attention on the same tensors in the same
run, the density, the achieved recall (audited, or by the exact ledger) and the error against
float64 on the same kept tiles, of two query tiles.
"""

# ruff: noqa: B023 - what a loop defines is called before the loop goes on

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# A cache of its own, so that the cold start is one.
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="cef-bench-")

import torch
import torch.nn.functional as F
import triton
from learned import inputs as learned_inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cef_compile.kernels import config as c
from cef_compile.kernels import launch
from cef_compile.kernels.attend import attend
from cef_compile.kernels.audit import audit
from cef_compile.kernels.centroids import Centroids, arrange, centroids
from cef_compile.kernels.lists import lists, threshold
from cef_compile.kernels.order import Layout
from cef_compile.kernels.plan import Plan, plan, variance_factor
from cef_compile.kernels.tuning import find_tuning

HEAD_DIM = 128
WAN = {"A14B 480p": (40, 32760), "A14B 720p": (40, 75600), "TI2V-5B 720p": (24, 27280)}
DENSITIES = (0.2, 0.3, 0.4)
ORDERED_DENSITY = 0.3
LAYOUTS = {
    "video": Layout(0, 21, 30, 52, 0),
    "video and text": Layout(0, 21, 30, 52, 256),
    "image and text": Layout(512, 1, 128, 128, 0),
    "short video": Layout(0, 9, 32, 56, 0),
}
"""Tokens of Wan at 480p, HunyuanVideo, Flux at 2,048 pixels, and a ragged one of 16k."""
LEARNED_GRIDS = ((16, 32, 32), (16, 32, 64), (16, 64, 64))
"""Grids of tokens that the tiny Wan runs on: 16k, 32k and 64k."""
MEASURED_S = 0.12
FLUSH_BYTES = 1 << 30  # overwritten before each run: empties the L2 and outlasts its launches
MIN_RUNS, MAX_RUNS = 5, 60
Row = dict[str, object]


def median_ms(function: Callable[[], object]) -> float:
    """Median over runs, each between two events of the device, after two to warm up."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(2):
        started = time.perf_counter()
        function()
        torch.cuda.synchronize()
        once = time.perf_counter() - started
    times = []
    for _ in range(max(MIN_RUNS, min(MAX_RUNS, round(MEASURED_S / once)))):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def dense(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def inputs(heads: int, length: int, dim: int = HEAD_DIM, spread: float = 3.0) -> list[Tensor]:
    """bf16 q, k, v in (B, L, H, D) memory order; some key tiles matter more than others.

    Key tile j is shifted along one direction by a normal number times ``spread``, which shifts the
    scores that all queries give it by about as much.
    """
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device="cuda", dtype=torch.bfloat16)

    direction = F.normalize(torch.randn(dim, generator=draw, device="cuda"), dim=0).bfloat16()
    n_n = c.tiles(length, c.BLOCK_N)
    shift = (spread * normal(n_n, 1, 1)).repeat_interleave(c.BLOCK_N, 0)[:length]
    q = normal(1, length, heads, dim) + dim**0.5 * direction
    k = normal(1, length, heads, dim) + shift * direction
    return [t.transpose(1, 2) for t in (q, k, normal(1, length, heads, dim))]


def control(target: float, log2_threshold: float | None = None) -> Tensor:
    fixed = log2_threshold is not None
    return torch.tensor([target, log2_threshold or 0.0, float(fixed), 1.0], device="cuda")


def error(q: Tensor, k: Tensor, v: Tensor, out: Tensor, index: Tensor, count: Tensor) -> float:
    """Largest error of two query tiles of the first head against float64 on the same key tiles."""
    worst = 0.0
    for t in (0, index.shape[2] - 1):
        rows = slice(t * c.BLOCK_M, (t + 1) * c.BLOCK_M)
        tiles = index[0, 0, t, : int(count[0, 0, t])].long()
        keys = (tiles[:, None] * c.BLOCK_N + torch.arange(c.BLOCK_N, device="cuda")).flatten()
        keys = keys[keys < k.shape[2]]
        scores = q[0, 0, rows].double() @ k[0, 0, keys].double().mT * q.shape[3] ** -0.5
        exact = scores.softmax(-1) @ v[0, 0, keys].double()
        worst = max(worst, (out[0, 0, rows] - exact).abs().max().item())
    return worst


def row(name: str, shape: str, ms: float, base: float, **more: object) -> Row:
    return {"name": name, "shape": shape, "ms": round(ms, 4), "speed": round(base / ms, 3), **more}


def block_lists() -> Iterator[Row]:
    """Attention over random lists alone, every query tile with a list of one length."""
    for heads, length, dim in ((24, 32256, 128), (24, 16384, 128), (24, 32256, 64)):
        q, k, v = inputs(heads, length, dim)
        shape = f"{heads} x {length} x {dim}"
        base = median_ms(dense(q, k, v, SDPBackend.CUDNN_ATTENTION))
        flops = 4 * heads * length**2 * dim
        yield row("cuDNN", shape, base, base, tflops=round(flops / base / 1e9))
        yield row(
            "FlashAttention-2", shape, median_ms(dense(q, k, v, SDPBackend.FLASH_ATTENTION)), base
        )
        n_m, n_n = c.tiles(length, c.BLOCK_M), c.tiles(length, c.BLOCK_N)
        order = torch.arange(n_m, device="cuda", dtype=torch.int32).repeat(1, heads, 1)
        tuning = find_tuning(90, dim, wide=False)
        assert tuning is not None
        for density in (1.0, 0.4, 0.3, 0.18):
            n = round(density * n_n)
            picks = torch.rand(1, heads, n_m, n_n, device="cuda").argsort(-1)[..., :n]
            index = torch.zeros(1, heads, n_m, n_n, dtype=torch.int16, device="cuda")
            index[..., :n] = picks.sort(-1).values
            count = torch.full((2, 1, heads, n_m), n, dtype=torch.int32, device="cuda")

            def call() -> tuple[Tensor, Tensor]:
                return attend(
                    q, k, v, index, count, order, scale=dim**-0.5, descriptors=True,
                    rows=tuning.attend_rows, warps=tuning.attend_warps, stages=tuning.attend_stages,
                )  # fmt: skip

            out, _ = call()
            yield row(
                "block list", shape, median_ms(call), base, density=round(n / n_n, 3),
                error=error(q, k, v, out, index, count[0]),
            )  # fmt: skip


def parts() -> Iterator[Row]:
    """The steps before attention, each alone; speed is that of dense over the step's time."""
    for heads, length in ((24, 32256), (24, 16384), (4, 131072)):
        q, k, v = inputs(heads, length)
        shape, scale = f"{heads} x {length} x {HEAD_DIM}", HEAD_DIM**-0.5
        base = median_ms(dense(q, k, v, SDPBackend.CUDNN_ATTENTION))
        numbers = control(0.9)
        tuning = find_tuning(90, HEAD_DIM, wide=False)
        assert tuning is not None

        def means():
            return centroids(k, variance_factor=variance_factor(scale))

        known = means()

        def ranks(keep_energy: bool = False):
            return plan(
                q, known.stats, known.count, scale=scale, keep_energy=keep_energy,
                group_tiles=tuning.plan_group, block_keys=tuning.plan_keys,
                warps=tuning.plan_warps, stages=tuning.plan_stages,
            )  # fmt: skip

        ranked = ranks()
        bin_, _, measures = threshold(ranked.histogram, numbers)

        def chosen(rule: str = "threshold", energy: Tensor | None = None):
            return lists(
                ranked.bins, energy, known.count, bin_, numbers, measures, ranked.histogram,
                rule=rule, partial=False, want_kept=False,
            )  # fmt: skip

        steps = {
            "centroids": median_ms(means),
            "plan": median_ms(ranks),
            "threshold": median_ms(lambda: threshold(ranked.histogram, numbers)),
            "lists": median_ms(chosen),
        }
        for name, ms in steps.items():
            yield row(name, shape, ms, base, of_dense=round(ms / base, 4))
        together = sum(steps.values())
        yield row("all four", shape, together, base, of_dense=round(together / base, 4))
        energy = ranks(True).energy
        for rule in ("top_k", "top_p"):
            ms = median_ms(lambda: chosen(rule, energy))
            yield row(f"lists {rule}", shape, ms, base, of_dense=round(ms / base, 4))
        result = launch.planned(q, k, v, numbers, scale=scale)

        def audited():
            audit(
                q, k, v, result.out, result.lse, numbers[3:], measures, scale=scale,
                rows=tuning.attend_rows, warps=tuning.attend_warps, stages=tuning.attend_stages,
            )  # fmt: skip

        ms = median_ms(audited)
        yield row("audit", shape, ms, base, of_dense=round(ms / base, 4))
        listed = chosen()
        natural = torch.arange(listed.order.shape[2], device="cuda", dtype=torch.int32)
        natural = natural.expand_as(listed.order).contiguous()
        for name, order in (("longest first", listed.order), ("as they come", natural)):
            ms = median_ms(
                lambda: attend(
                    q,
                    k,
                    v,
                    listed.index,
                    listed.count,
                    order,
                    scale=scale,
                    descriptors=True,
                    rows=tuning.attend_rows,
                    warps=tuning.attend_warps,
                    stages=tuning.attend_stages,
                )
            )
            yield row(f"attend, {name}", shape, ms, base, density=float(measures[0]))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = launch.planned(q, k, v, numbers, scale=scale)
        used = torch.cuda.max_memory_allocated() - before - result.out.nbytes - result.lse.nbytes
        share = used / (q.nbytes + k.nbytes + v.nbytes)
        yield {"name": "workspace", "shape": shape, "of_qkv": round(share, 4)}


def filtered(
    name: str, shape: str, base: float, qkv: list[Tensor], numbers: Tensor, **options: object
) -> Row:
    q, k, v = qkv
    scale = q.shape[3] ** -0.5
    result = launch.planned(q, k, v, numbers, scale=scale, audited=True, **options)
    ms = median_ms(lambda: launch.planned(q, k, v, numbers, scale=scale, **options))
    measures = result.measures.tolist()
    return row(
        name, shape, ms, base, density=round(measures[c.MEASURE_DENSITY], 4),
        recall=round(measures[c.MEASURE_RECALL], 4),
        error=error(q, k, v, result.out, result.index, result.count),
    )  # fmt: skip


def threshold_for(qkv: list[Tensor], density: float) -> Tensor:
    """Control with the threshold at which the node's density is nearest to ``density``."""
    q, k, v = qkv
    result = launch.planned(q, k, v, control(0.5), scale=q.shape[3] ** -0.5)
    above = result.histogram[1].flip(0).cumsum(0).flip(0)
    bin_ = (above - density).abs().argmin()
    return control(0.5, float(c.log2_edge(bin_)))


def wan() -> Iterator[Row]:
    """The whole planned filter at the shapes of Wan 2.2."""
    for model, (heads, length) in WAN.items():
        qkv = inputs(heads, length)
        shape = f"{heads} x {length} x {HEAD_DIM} ({model})"
        base = median_ms(dense(*qkv, SDPBackend.CUDNN_ATTENTION))
        yield row("cuDNN", shape, base, base)
        for density in DENSITIES:
            yield filtered("planned top_k", shape, base, qkv, control(density), rule="top_k")
            yield filtered("planned", shape, base, qkv, threshold_for(qkv, density))


def break_even() -> Iterator[Row]:
    """The planned filter at the density of recall .90 on video, by length."""
    for length in (1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384):
        qkv = inputs(24, length)
        shape = f"24 x {length} x {HEAD_DIM}"
        base = median_ms(dense(*qkv, SDPBackend.CUDNN_ATTENTION))
        numbers = threshold_for(qkv, 0.36)
        yield filtered("planned", shape, base, qkv, numbers)
        q, k, v = qkv
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch.planned(q, k, v, numbers, scale=HEAD_DIM**-0.5)
        plain = torch.cuda.CUDAGraph()
        with torch.cuda.graph(plain):
            dense(q, k, v, SDPBackend.CUDNN_ATTENTION)()
        yield row("planned, CUDA graphs", shape, median_ms(graph.replay), median_ms(plain.replay))


def online() -> Iterator[Row]:
    """The online filter, by threshold, and under a certificate."""
    qkv = inputs(24, 32256)
    q, k, v = qkv
    shape = f"24 x 32256 x {HEAD_DIM}"
    base = median_ms(dense(*qkv, SDPBackend.CUDNN_ATTENTION))
    runs = [
        ({"certify": "none", "bound": bound}, control(0.9, log2))
        for bound in (False, True)
        for log2 in (-60.0, -12.0, -10.0, -9.0, -8.0, -7.0)
    ]
    runs += [({"rule": rule, "certify": "none"}, control(0.9, -9.0)) for rule in ("lse", "max")]
    runs += [({"certify": way}, control(0.9)) for way in ("mean", "row")]
    for options, numbers in runs:
        result = launch.online(q, k, v, numbers, scale=HEAD_DIM**-0.5, audited=True, **options)
        ms = median_ms(lambda: launch.online(q, k, v, numbers, scale=HEAD_DIM**-0.5, **options))
        measures = result.measures.tolist()
        name = ", ".join(["online", *(f"{key} {value}" for key, value in options.items())])
        yield row(
            name, shape, ms, base, density=round(measures[c.MEASURE_DENSITY], 4),
            recall=round(measures[c.MEASURE_RECALL], 4),
        )  # fmt: skip


def order() -> Iterator[Row]:
    """What the token order costs: with and without it, at one density for both.

    Every query tile keeps as many key tiles (top-k), so that only the order is between the two.
    """
    numbers = control(ORDERED_DENSITY)
    tuning = find_tuning(90, HEAD_DIM, wide=False)
    assert tuning is not None
    for name, layout in LAYOUTS.items():
        q, k, v = inputs(24, layout.tokens)
        scale = HEAD_DIM**-0.5
        shape = f"24 x {layout.tokens} x {HEAD_DIM} ({name})"
        base = median_ms(dense(q, k, v, SDPBackend.CUDNN_ATTENTION))
        yield row("cuDNN", shape, base, base)

        def ranks(known: Centroids, **order: object) -> Plan:
            return plan(
                q, known.stats, known.count, scale=scale, keep_energy=True,
                group_tiles=tuning.plan_group, block_keys=tuning.plan_keys,
                warps=tuning.plan_warps, stages=tuning.plan_stages, **order,
            )  # fmt: skip

        factor = variance_factor(scale)
        plain, arranged = (
            centroids(k, variance_factor=factor),
            arrange(k, v, None, layout, variance_factor=factor),
        )
        moved = {"tokens": arranged.tokens, "exact_tiles": layout.exact_tiles}
        pairs = {
            "keys read": (
                lambda: centroids(k, variance_factor=factor),
                lambda: arrange(k, v, None, layout, variance_factor=factor),
            ),
            "plan": (lambda: ranks(plain), lambda: ranks(arranged.centroids, **moved)),
            "planned": tuple(
                lambda order=order: launch.planned(
                    q, k, v, numbers, scale=scale, rule="top_k", layout=order
                )
                for order in (None, layout)
            ),
        }
        for step, (without, within) in pairs.items():
            first, second = median_ms(without), median_ms(within)
            yield row(
                f"order, {step}", shape, second, base, raster_ms=round(first, 4),
                of_dense=round((second - first) / base, 4),
            )  # fmt: skip
        found = [
            launch.planned(q, k, v, numbers, scale=scale, rule="top_k", layout=order).measures
            for order in (None, layout)
        ]
        densities = [round(float(m[c.MEASURE_DENSITY]), 4) for m in found]
        yield {"name": "order, densities", "shape": shape, "raster, order": densities}
        share = (arranged.k.nbytes + arranged.v.nbytes) / (q.nbytes + k.nbytes + v.nbytes)
        yield {"name": "order, copies", "shape": shape, "of_qkv": round(share, 4)}


def learned() -> Iterator[Row]:
    """The planned filter on all nodes of a trained model as one, so with one threshold."""
    for grid in LEARNED_GRIDS:
        q, k, v = learned_inputs(grid, torch.device("cuda"))
        scale = q.shape[3] ** -0.5
        shape = f"{q.shape[1]} x {q.shape[2]} x {q.shape[3]}"
        base = median_ms(dense(q, k, v, SDPBackend.CUDNN_ATTENTION))
        yield row("cuDNN", shape, base, base)
        ms = median_ms(dense(q, k, v, SDPBackend.FLASH_ATTENTION))
        yield row("FlashAttention-2", shape, ms, base)
        for layout in (Layout(0, *grid, 0), None):
            name = "planned, raster" if layout is None else "planned, cubes"
            for recall in (0.95, 0.9):
                numbers = control(recall)
                found = launch.planned(
                    q, k, v, numbers, scale=scale, layout=layout, audited=True
                ).measures.tolist()
                ms = median_ms(lambda: launch.planned(q, k, v, numbers, scale=scale, layout=layout))
                yield row(
                    name, shape, ms, base, target=recall,
                    density=round(found[c.MEASURE_DENSITY], 4),
                    recall=round(found[c.MEASURE_RECALL], 4),
                    output_error=round(found[c.MEASURE_ERROR], 5),
                )  # fmt: skip


def cold_start() -> Iterator[Row]:
    """First call of a process, with nothing compiled before: call this section first."""
    q, k, v = inputs(2, 4096)
    for name, function in (("planned", launch.planned), ("online", launch.online)):
        started = time.perf_counter()
        function(q, k, v, control(0.9), scale=HEAD_DIM**-0.5)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        yield {"name": f"first call of {name}", "shape": "2 x 4096 x 128", "s": round(seconds, 2)}


SECTIONS = {
    "cold_start": cold_start,
    "block_lists": block_lists,
    "parts": parts,
    "wan": wan,
    "order": order,
    "learned": learned,
    "break_even": break_even,
    "online": online,
}


def card() -> str:
    """Short name of the GPU, as in h100."""
    return torch.cuda.get_device_name().split()[1].lower()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    about = {
        "date": datetime.date.today().isoformat(),
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "dtype": "bfloat16",
        "speed": "against cuDNN's dense attention on the same tensors",
    }
    print(about, flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"attention-{card()}.json"
    found: dict[str, list[Row]] = {}
    if path.exists():
        kept = json.loads(path.read_text())
        # Sections that are not run again stay, if they were measured on the same.
        if {**kept["about"], "date": about["date"]} == about:
            found = kept["results"]
    for name in given.only:
        print(f"\n{name}", flush=True)
        found[name] = []
        for line in SECTIONS[name]():
            found[name].append(line)
            rest = {key: value for key, value in line.items() if key not in ("name", "shape")}
            cells = "  ".join(
                f"{key} {value:.2e}" if key == "error" else f"{key} {value}"
                for key, value in rest.items()
            )
            print(f"{line['name']:42} {line['shape']:34} {cells}", flush=True)
        torch.cuda.empty_cache()
        path.write_text(json.dumps({"about": about, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Times of the attention kernels beside dense attention on one GPU, as JSON and a table.

    python bench/attention.py [--only NAME ...] [--out bench/results]

Each shape has rows of cuDNN, FlashAttention-2 and, where it is installed, FlashAttention-4. A row
of a filter has the time, the speed against cuDNN on the same tensors in the same run, what computed
the attention, the density, the achieved recall (audited, or by the exact ledger), the audited
relative error of the output, and where there are lists the largest error against float64 on the
same kept tiles, of two query tiles. bench/engines.py compares the engines over given lists.
"""

# ruff: noqa: B023 - what a loop defines is called before the loop goes on

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

# A cache of its own, so that the cold start is one.
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="cef-bench-")

import torch
from learned import inputs as learned_inputs
from measure import (
    CUDNN,
    HEAD_DIM,
    Row,
    about,
    anchors,
    card,
    dense,
    error,
    flusher,
    inputs,
    list_engines,
    median_ms,
    online_engines,
    over_lists,
    row,
)
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cef_compile.kernels import config as c
from cef_compile.kernels import launch
from cef_compile.kernels.centroids import Arranged, Centroids, arrange, centroids, in_order
from cef_compile.kernels.lists import lists
from cef_compile.kernels.order import Layout
from cef_compile.kernels.ranks import Plan, variance_factor
from cef_compile.kernels.schedule import heads_together

WAN = {"A14B 480p": (40, 32760), "A14B 720p": (40, 75600), "TI2V-5B 720p": (24, 27280)}
DENSITIES = (0.2, 0.3, 0.4)
INT8_DENSITIES = (0.4, 0.18)
SCORES_OF = {"hopper": "exact", "hopper-int8": "int8"}
ONLINE_LOG2_THRESHOLDS = {
    False: (-60.0, -12.0, -10.0, -9.0, -8.0, -7.0),
    True: (-60.0, -9.0, -6.0, -5.0, -4.0, -3.0),
}
"""By ``bound``: bounds are larger than energies, so they drop less at one threshold."""
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
SHORT_GRID, SHORT_HEADS, SHORT_RECALL = (16, 32, 32), (3, 6, 12, 18), 0.9
"""What a call of the demo's model is, and of models with more heads."""


def control(target: float, log2_threshold: float | None = None) -> Tensor:
    fixed = log2_threshold is not None
    return torch.tensor([target, log2_threshold or 0.0, float(fixed), 1.0], device="cuda")


def ranks(
    q: Tensor,
    known: Centroids,
    keep_energy: bool = False,
    tokens: Tensor | None = None,
    exact_tiles: tuple[int, int] | None = None,
) -> Plan:
    """The plan alone, launched as in a call, into memory of its own."""
    engine = "hopper" if "hopper" in list_engines(q, q.shape[3]) else "triton"
    return launch._rank(
        engine, q, replace(known, histogram=None), launch._tuning(q, q),
        scale=q.shape[3] ** -0.5, tokens=tokens, exact_tiles=exact_tiles, keep_energy=keep_energy,
    )  # fmt: skip


def parts() -> Iterator[Row]:
    """The steps before attention, each alone; speed is that of dense over the step's time."""
    for heads, length in ((24, 32256), (24, 16384), (4, 131072)):
        q, k, v = inputs(heads, length)
        shape, scale = f"{heads} x {length} x {HEAD_DIM}", HEAD_DIM**-0.5
        base, found = anchors(shape, q, k, v)
        yield from found
        numbers = control(0.9)

        def means():
            return centroids(k, variance_factor=variance_factor(scale))

        known = means()
        ranked = ranks(q, known)

        def chosen(rule: str = "threshold", energy: Tensor | None = None):
            return lists(
                ranked.bins, energy, known.count, ranked.histogram, numbers,
                rule=rule, partial=False, want_kept=False, together=heads_together(heads, k, v),
            )  # fmt: skip

        steps = {
            "centroids": median_ms(means),
            "plan": median_ms(lambda: ranks(q, known)),
            "threshold and lists": median_ms(chosen),
        }
        for name, ms in steps.items():
            yield row(name, shape, ms, base, of_dense=round(ms / base, 4))
        together = sum(steps.values())
        yield row("all three", shape, together, base, of_dense=round(together / base, 4))
        energy = ranks(q, known, keep_energy=True).energy
        for rule in ("top_k", "top_p"):
            ms = median_ms(lambda: chosen(rule, energy))
            yield row(f"lists {rule}", shape, ms, base, of_dense=round(ms / base, 4))
        result = launch.planned(q, k, v, numbers, scale=scale, audited=True)

        def audited():
            tuning = launch._tuning(q, v)
            launch._audit(
                q, k, v, result.out, result.lse, numbers, result.measures, tuning, scale,
                key_mask=None,
            )  # fmt: skip

        ms = median_ms(audited)
        yield row("audit", shape, ms, base, of_dense=round(ms / base, 4))
        listed, _, _ = chosen()
        natural = torch.arange(len(listed.order), device="cuda", dtype=torch.int32)
        engine = c.ENGINES[int(result.measures[c.MEASURE_ENGINE])]
        for name, order in (("longest first", listed.order), ("as they come", natural)):

            def attend():
                return over_lists(engine, q, k, v, replace(listed, order=order), known)

            yield row(
                f"attend, {name}", shape, median_ms(attend), base, **measured(result.measures),
                error=error(q, k, v, attend(), listed.index, listed.count[0]),
            )  # fmt: skip
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = launch.planned(q, k, v, numbers, scale=scale)
        used = torch.cuda.max_memory_allocated() - before - result.out.nbytes - result.lse.nbytes
        share = used / (q.nbytes + k.nbytes + v.nbytes)
        yield {"name": "workspace", "shape": shape, "of_qkv": round(share, 4)}


def measured(measures: Tensor) -> Row:
    """What an audited call says of itself."""
    found = measures.tolist()
    return {
        "engine": c.ENGINES[int(found[c.MEASURE_ENGINE])],
        "density": round(found[c.MEASURE_DENSITY], 4),
        "recall": round(found[c.MEASURE_RECALL], 4),
        "output_error": round(found[c.MEASURE_ERROR], 5),
    }


def filtered(
    name: str,
    shape: str,
    base: float,
    qkv: list[Tensor],
    numbers: Tensor,
    by: Callable[..., launch.Output] = launch.planned,
    *,
    replayed: bool = False,
    **options: object,
) -> Row:
    """A row of a whole filter; where it is replayed as a CUDA graph, the host has no part in it."""
    options["scale"] = qkv[0].shape[3] ** -0.5
    result = by(*qkv, numbers, audited=True, **options)

    def call() -> launch.Output:
        return by(*qkv, numbers, **options)

    ms = median_ms(captured(call).replay if replayed else call)
    found = row(name, shape, ms, base, **measured(result.measures))
    if result.index is not None:
        found["error"] = error(*qkv, result.out, result.index, result.count, options.get("layout"))
    return found


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
        base, found = anchors(shape, *qkv)
        yield from found
        for density in DENSITIES:
            yield filtered("planned top_k", shape, base, qkv, control(density), rule="top_k")
            yield filtered("planned", shape, base, qkv, threshold_for(qkv, density))


def int8() -> Iterator[Row]:
    """The whole planned filter with exact scores and with scores in 8 bits."""
    for heads, length in ((24, 32256), (24, 16384), (12, 16384), (3, 16384)):
        qkv = inputs(heads, length)
        shape = f"{heads} x {length} x {HEAD_DIM}"
        base, found = anchors(shape, *qkv)
        yield from found
        for density in INT8_DENSITIES:
            numbers = threshold_for(qkv, density)
            for engine, scores in SCORES_OF.items():
                if engine in list_engines(qkv[0], HEAD_DIM):
                    yield filtered(
                        f"planned, {scores} scores", shape, base, qkv, numbers, replayed=True,
                        scores=scores, engine=engine,
                    )  # fmt: skip


def captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a call, which has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def in_graphs(
    line: Row, qkv: list[Tensor], numbers: Tensor, layout: Layout | None = None
) -> tuple[Row, torch.cuda.CUDAGraph]:
    """The row of a planned call with the times of it and of cuDNN in CUDA graphs; its graph."""
    scale = qkv[0].shape[3] ** -0.5
    graph = captured(lambda: launch.planned(*qkv, numbers, scale=scale, layout=layout))
    base = median_ms(captured(dense(*qkv)[CUDNN]).replay)
    name, ms = f"{line['name']}, CUDA graphs", median_ms(graph.replay)
    return {**line, **row(name, line["shape"], ms, base), "cudnn_ms": round(base, 4)}, graph


def break_even() -> Iterator[Row]:
    """The planned filter at the density of recall .90 on video, by length."""
    for length in (1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384):
        qkv = inputs(24, length)
        shape = f"24 x {length} x {HEAD_DIM}"
        base, found = anchors(shape, *qkv)
        yield from found
        numbers = threshold_for(qkv, 0.36)
        line = filtered("planned", shape, base, qkv, numbers)
        yield line
        yield in_graphs(line, qkv, numbers)[0]


def kernels(graph: torch.cuda.CUDAGraph, shape: str) -> Iterator[Row]:
    """Microseconds of each kernel of a replay, with nothing in the L2; kernels of a name summed."""
    flush = flusher()
    for _ in range(2):  # the first starts the profiler
        flush.zero_()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            graph.replay()
            torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in seen.key_averages():
        if event.device_type == DeviceType.CUDA:
            name = re.sub(r"^void |\(anonymous namespace\)::", "", event.key)
            times[re.split(r"[<(]", name)[0].split("::")[-1].strip()] += (
                event.self_device_time_total
            )
    for name, us in times.most_common():
        yield {"name": f"kernel {name}", "shape": shape, "us": round(us, 2)}


def short() -> Iterator[Row]:
    """The planned filter on few heads of a trained model, where steps other than attention show."""
    layout, numbers = Layout(0, *SHORT_GRID, 0), control(SHORT_RECALL)
    nodes = learned_inputs(SHORT_GRID, torch.device("cuda"))
    for heads in SHORT_HEADS:
        # In memory as a node of so many heads has them.
        qkv = [t[:, :heads].transpose(1, 2).contiguous().transpose(1, 2) for t in nodes]
        shape = f"{heads} x {layout.tokens} x {qkv[0].shape[3]}"
        base, found = anchors(shape, *qkv)
        yield from found
        line = filtered("planned", shape, base, qkv, numbers, layout=layout)
        replayed, graph = in_graphs(line, qkv, numbers, layout)
        for each in (line, replayed):
            yield {**each, "heads": heads, "target": SHORT_RECALL}
        if heads == SHORT_HEADS[0]:
            yield from kernels(graph, shape)


def online() -> Iterator[Row]:
    """The online filter, by threshold, and under a certificate, by each engine that computes it."""
    q, k, v = qkv = inputs(24, 32256)
    shape = f"24 x 32256 x {HEAD_DIM}"
    base, found = anchors(shape, q, k, v)
    yield from found
    runs = [
        ({"certify": "none", "bound": bound}, control(0.9, log2))
        for bound, thresholds in ONLINE_LOG2_THRESHOLDS.items()
        for log2 in thresholds
    ]
    runs += [({"rule": rule, "certify": "none"}, control(0.9, -9.0)) for rule in ("lse", "max")]
    runs += [({"certify": way}, control(0.9)) for way in ("mean", "row")]
    for options, numbers in runs:
        name = ", ".join(["online", *(f"{key} {value}" for key, value in options.items())])
        for engine in online_engines(q, HEAD_DIM):
            yield filtered(name, shape, base, qkv, numbers, launch.online, **options, engine=engine)


def order() -> Iterator[Row]:
    """What the token order costs: with and without it, at one density for both.

    Every query tile keeps as many key tiles (top-k), so that only the order is between the two.
    """
    numbers = control(ORDERED_DENSITY)
    for name, layout in LAYOUTS.items():
        q, k, v = qkv = inputs(24, layout.tokens)
        shape = f"24 x {layout.tokens} x {HEAD_DIM} ({name})"
        base, found = anchors(shape, *qkv)
        yield from found
        for way, order in (("raster", None), ("cubes", layout)):
            yield filtered(
                f"planned, {way}", shape, base, qkv, numbers, replayed=True, rule="top_k",
                layout=order,
            )  # fmt: skip
        factor = variance_factor(HEAD_DIM**-0.5)

        def plain() -> Centroids:
            return centroids(k, variance_factor=factor)

        new_v = v.new_empty(*v.shape[:2], layout.length, v.shape[3])

        def arranged() -> Arranged:
            found = arrange(k, None, layout, variance_factor=factor)
            in_order(v, found.tokens, new_v)
            return found

        known, moved = plain(), arranged()
        options = {"tokens": moved.tokens, "exact_tiles": layout.exact_tiles}
        pairs = {
            "keys read": (plain, arranged),
            "plan": (
                lambda: ranks(q, known, keep_energy=True),
                lambda: ranks(q, moved.centroids, keep_energy=True, **options),
            ),
        }
        for step, (without, within) in pairs.items():
            first, second = median_ms(without), median_ms(within)
            yield row(
                f"order, {step}", shape, second, base, raster_ms=round(first, 4),
                of_dense=round((second - first) / base, 4),
            )  # fmt: skip
        share = (moved.k.nbytes + new_v.nbytes) / (q.nbytes + k.nbytes + v.nbytes)
        yield {"name": "order, copies", "shape": shape, "of_qkv": round(share, 4)}


def learned() -> Iterator[Row]:
    """The planned filter on all nodes of a trained model as one, so with one threshold."""
    for grid in LEARNED_GRIDS:
        qkv = learned_inputs(grid, torch.device("cuda"))
        shape = " x ".join(map(str, qkv[0].shape[1:]))
        base, found = anchors(shape, *qkv)
        yield from found
        for name, layout in (("planned, cubes", Layout(0, *grid, 0)), ("planned, raster", None)):
            for recall in (0.95, 0.9):
                numbers = control(recall)
                line = filtered(name, shape, base, qkv, numbers, replayed=True, layout=layout)
                yield {**line, "target": recall}


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
    "parts": parts,
    "wan": wan,
    "int8": int8,
    "order": order,
    "learned": learned,
    "break_even": break_even,
    "short": short,
    "online": online,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    here = about()
    print(here, flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"attention-{card()}.json"
    found: dict[str, list[Row]] = {}
    if path.exists():
        kept = json.loads(path.read_text())
        # Sections that are not run again stay, if they were measured on the same.
        if {**kept["about"], "date": here["date"]} == here:
            found = kept["results"]
    # In this order, whatever was asked for: only what comes first is a first call.
    for name in (name for name in SECTIONS if name in given.only):
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
        path.write_text(json.dumps({"about": here, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

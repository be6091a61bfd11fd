"""The tables of measurements in README.md and docs: between two comments, made by this script.

python docs/figures/tables.py           # write them
python docs/figures/tables.py --check   # fail where one is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import quality_tables
from markdown_tables import Rows, markdown, speed

ROOT: Final = Path(__file__).parents[2]
RESULTS: Final = ROOT / "bench" / "results" / "attention-h100.json"
END_TO_END: Final = ROOT / "bench" / "results" / "end-to-end-h100.json"
MULTI_GPU: Final = ROOT / "bench" / "results" / "multi-gpu-h100.json"
SCALING: Final = ROOT / "bench" / "scaling.py"
ENGINES: Final = ROOT / "bench" / "results" / "engines-h100.json"
EIGHT_BITS: Final = ROOT / "bench" / "results" / "eight-bits.json"
SCORES: Final = ("exact", "int8")
PAGES: Final = tuple(
    ROOT / page
    for page in (
        "README.md",
        "docs/kernel-design.md",
        "docs/choosing-a-recall.md",
        "docs/quality-study.md",
        "docs/calibration.md",
        "docs/several-gpus.md",
    )
)
PLACE: Final = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
ELSEWHERE: Final = "models"
"""The table that bench/census.py makes."""
SHORT_SHAPE: Final = "24 x 32256 x 128"
"""Of the engines in the README."""
DENSE: Final = ("cuDNN", "FlashAttention-2", "FlashAttention-4")


def dense_header(rows: Rows) -> list[str]:
    """The dense attentions that were measured."""
    names = {row["name"] for row in rows}
    return [f"{name}, dense" for name in DENSE if name in names]


def dense_times(rows: Rows, shape: str, form: str = ".2f") -> list[str]:
    """Their times at a shape."""
    mine = {row["name"]: row for row in rows if row["shape"] == shape}
    return [f"{mine[name]['ms']:{form}} ms" for name in DENSE if name in mine]


def about(found: dict[str, Any]) -> str:
    """Where the numbers are from, in a sentence."""
    card = found["about"]
    return (
        f"{card['card']}, torch {card['torch']}, Triton {card['triton']}, cuDNN {card['cudnn']},"
        f" {card['dtype']}, {card['date']}.\n"
    )


def wan(found: dict[str, Any]) -> str:
    """The whole planned filter at the shapes of Wan 2.2."""
    rows: Rows = found["results"]["wan"]
    table = []
    for dense in (row for row in rows if row["name"] == "cuDNN"):
        heads, keys, _, model, size = _shape(dense["shape"])
        mine = [r for r in rows if r["shape"] == dense["shape"] and r["name"] == "planned"]
        cells = [f"{r['ms']:.1f} ms, {speed(r)}" for r in mine]
        times = dense_times(rows, dense["shape"], ".1f")
        table.append([f"{model} {size}", heads, keys, *times, *cells])
    densities = sorted({round(r["density"], 1) for r in rows if r["name"] == "planned"})
    header = ["Wan 2.2", "heads", "keys", *dense_header(rows)]
    return markdown([*header, *(f"density {d}" for d in densities)], table)


def _shape(text: str) -> tuple[str, str, str, str, str]:
    """``"40 x 32760 x 128 (A14B 480p)"`` in parts."""
    match = re.fullmatch(r"(\d+) x (\d+) x (\d+) \((\S+) (\S+)\)", text)
    assert match is not None, text
    heads, keys, dim, model, size = match.groups()
    return heads, keys, dim, model, size


def engines(_: dict[str, Any]) -> str:
    """Engines of the attention over lists, by density."""
    return _engines(json.loads(ENGINES.read_text(encoding="utf-8"))["results"])


def engines_short(_: dict[str, Any]) -> str:
    """The same at one shape."""
    rows: Rows = json.loads(ENGINES.read_text(encoding="utf-8"))["results"]
    return _engines([row for row in rows if row["shape"] == SHORT_SHAPE])


def _engines(rows: Rows) -> str:
    densities = list(dict.fromkeys(row["density"] for row in rows))
    table = []
    for key in dict.fromkeys(map(_of_engine, rows)):
        mine = {r["density"]: r for r in rows if _of_engine(r) == key}
        shape, engine, keys = key
        name = engine if keys is None else f"{engine}, lists of {keys} keys"
        cells = [f"{mine[d]['ms']:.2f} ms, {speed(mine[d])}" for d in densities]
        worst = max(row["error"] for row in mine.values())
        table.append([f"{shape}: {name}", *cells, f"{worst:.1e}"])
    header = [d if d == "uneven" else f"density {d:.2f}" for d in densities]
    return markdown(["", *header, "largest error"], table)


def eight_bits(_: dict[str, Any]) -> str:
    """Error of scores in 8 bits, alone and with a recall."""
    ways = json.loads(EIGHT_BITS.read_text(encoding="utf-8"))["ways"]
    plain = [way for way in ways if way.startswith("recall") and "," not in way]
    table = [["every tile", "1.000", *(f"{ways[n]['error']:.4f}" for n in ("bf16", "int8", "fp8"))]]
    for way in plain:
        errors = [ways[name]["error"] for name in (way, f"{way}, int8", f"{way}, fp8")]
        table.append([way, f"{ways[way]['density']:.3f}", *(f"{e:.4f}" for e in errors)])
    return markdown(["", "density", "error", "with INT8 scores", "with FP8 scores"], table)


def eight_bits_times(found: dict[str, Any]) -> str:
    """What they save of the whole filter."""
    rows: Rows = [row for row in found["results"]["int8"] if "density" in row]
    times = {(r["shape"], r["density"], r["name"]): r["ms"] for r in rows}
    table = []
    for shape, density in dict.fromkeys((r["shape"], r["density"]) for r in rows):
        exact, eight = (times[shape, density, f"planned, {name} scores"] for name in SCORES)
        cells = [f"{exact:.3f} ms", f"{eight:.3f} ms", f"{eight / exact - 1:+.1%}"]
        table.append([shape, f"{density:.2f}", *cells])
    return markdown(["heads x keys x head_dim", "density", "exact", "INT8 scores", ""], table)


def _of_engine(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["shape"], row["engine"], row["tile_keys"]


def parts(found: dict[str, Any]) -> str:
    """What the steps before attention cost, the audit, and memory."""
    rows: Rows = found["results"]["parts"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = ["centroids", "plan", "threshold and lists", "all three", "audit"]
    table = []
    for name in names:
        mine = {row["shape"]: row for row in rows if row["name"] == name}
        shares = [f"{100 * mine[shape]['of_dense']:.2f} %" for shape in shapes]
        table.append([f"{name}, of dense time", *shares])
    memory = {row["shape"]: row["of_qkv"] for row in rows if row["name"] == "workspace"}
    shares = [f"{100 * memory[shape]:.1f} %" for shape in shapes]
    table.append(["workspace, of the memory of q, k and v", *shares])
    return markdown(["heads x keys x head_dim", *shapes], table)


def order(found: dict[str, Any]) -> str:
    """What the token order costs."""
    rows: Rows = found["results"]["order"]
    table = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = {row["name"]: row for row in rows if row["shape"] == shape}
        ways = [mine[f"planned, {way}"] for way in ("raster", "cubes")]
        more = (ways[1]["ms"] - ways[0]["ms"]) / mine["cuDNN"]["ms"]
        steps = [mine[f"order, {step}"]["of_dense"] for step in ("keys read", "plan")]
        times = [f"{way['ms']:.2f} ms, {way['density']:.2f}" for way in ways]
        costs = [f"{100 * cost:+.2f} %" for cost in (*steps, more)]
        copies = f"{100 * mine['order, copies']['of_qkv']:.0f} %"
        table.append([shape, *dense_times(rows, shape), *times, *costs, copies])
    header = ["heads x tokens x head_dim", *dense_header(rows), "raster, density"]
    costs = [f"{step}, of dense" for step in ("keys", "plan", "all")]
    return markdown([*header, "ordered, density", *costs, "copies, of q, k, v"], table)


def break_even(found: dict[str, Any]) -> str:
    """The planned filter at density .36 by length, in CUDA graphs."""
    table = [
        [row["shape"].split(" x ")[1], f"{row['cudnn_ms']:.3f} ms", f"{row['ms']:.3f} ms",
         speed(row)]
        for row in found["results"]["break_even"]
        if row["name"] == "planned, CUDA graphs"
    ]  # fmt: skip
    return markdown(["keys", "cuDNN, dense", "planned", "against cuDNN"], table)


def short(found: dict[str, Any]) -> str:
    """The planned filter on few heads, in CUDA graphs."""
    rows: Rows = found["results"]["short"]
    table = [
        [str(row["heads"]), f"{row['cudnn_ms']:.3f} ms", f"{row['ms']:.3f} ms", speed(row),
         f"{row['recall']:.3f}", f"{row['density']:.3f}", f"{row['output_error']:.3f}"]
        for row in rows
        if row["name"] == "planned, CUDA graphs"
    ]  # fmt: skip
    header = ["heads", "cuDNN, dense", "planned", "against cuDNN", "delivered", "density"]
    return markdown([*header, "error of the output"], table)


def short_kernels(found: dict[str, Any]) -> str:
    """Its kernels, with the fewest heads."""
    rows: Rows = [row for row in found["results"]["short"] if "us" in row]
    table = [[f"`{row['name'].removeprefix('kernel ')}`", f"{row['us']:.1f} µs"] for row in rows]
    return markdown([f"kernel, {rows[0]['shape']}", "time"], table)


def online(found: dict[str, Any]) -> str:
    """The online filter."""
    rows: Rows = found["results"]["online"]
    table = [
        [f"{row['name']}, dense", "", "", "", f"{row['ms']:.1f} ms", speed(row)]
        for row in rows
        if row["name"] in DENSE
    ]
    table += [
        [row["name"].removeprefix("online, "), f"{row['density']:.2f}", f"{row['recall']:.3f}",
         f"`{row['engine']}`", f"{row['ms']:.1f} ms", speed(row)]
        for row in rows
        if row["name"] not in DENSE
    ]  # fmt: skip
    return markdown(["online", "density", "recall", "engine", "time", "against cuDNN"], table)


def end_to_end(_: dict[str, Any]) -> str:
    """Whole transformers."""
    names = {"5b": "TI2V-5B", "a14b": "A14B"}
    table = [
        [
            f"{names[row['model']]}, {row['compiled']}",
            f"{row['layers']}",
            f"{row['tokens']}",
            f"{row['dense_ms']:.0f} ms",
            f"{row['filtered_ms']:.0f} ms",
            speed({"speed": row["speedup"]}),
            f"{row['attention_share_dense']:.0%}",
            f"{row['dense_first_call_s']:.0f} s, {row['filtered_first_call_s']:.0f} s",
        ]
        for row in json.loads(END_TO_END.read_text(encoding="utf-8"))["rows"]
    ]
    header = ["Wan 2.2", "layers", "tokens", "dense", "filtered, density 0.3", ""]
    return markdown([*header, "attention's share, dense", "first call, dense, filtered"], table)


def multi_gpu(_: dict[str, Any]) -> str:
    """Ulysses on two GPUs, and one."""
    rows: Rows = json.loads(MULTI_GPU.read_text(encoding="utf-8"))["forward"]
    table = []
    for tokens, gpus in dict.fromkeys((row["tokens"], row["gpus"]) for row in rows):
        dense, planned = (r for r in rows if (r["tokens"], r["gpus"]) == (tokens, gpus))
        times = [f"{row['ms']:.1f} ms" for row in (dense, planned)]
        table.append([f"{tokens:,}", str(gpus), *times, speed(planned)])
    return markdown(["tokens", "GPUs", "dense", "filtered, density 0.3", ""], table)


def multi_gpu_about(_: dict[str, Any]) -> str:
    """Where those are from."""
    card = json.loads(MULTI_GPU.read_text(encoding="utf-8"))["about"]
    return (
        f"{card['model']}; {card['gpus']} x {card['card']}, torch {card['torch']}, Triton"
        f" {card['triton']}, NCCL {card['nccl']}, diffusers {card['diffusers']}, {card['dtype']},"
        f" {card['date']}.\n"
    )


def multi_gpu_errors(_: dict[str, Any]) -> str:
    """What two GPUs change, beside what filtering changes."""
    found = json.loads(MULTI_GPU.read_text(encoding="utf-8"))
    table = []
    for whole in found["balanced"]:
        tokens = whole["tokens"]
        errors = [row for row in found["error"] if row["tokens"] == tokens]
        cells = [f"{row['relative']:.4f}" for row in errors]
        table.append([f"{tokens:,}", *cells, f"{whole['relative_error']:.4f}"])
    header = [f"{row['of']} against {row['against']}" for row in found["error"][:3]]
    return markdown(["tokens", *header, "default policy, 2 GPUs against 1"], table)


def scaling_check(_: dict[str, Any]) -> str:
    """The model of bench/scaling.py beside the measurements."""
    header = ["tokens", "GPUs", "pass", "measured, ms", "modelled, ms", ""]
    return markdown(header, runpy.run_path(str(SCALING))["checked"]())


def scaling(_: dict[str, Any]) -> str:
    """What it makes of eight GPUs."""
    header = ["tokens", "1 GPU, dense", "8 GPUs, dense", "8 GPUs, filtered", "gain"]
    exchange = ["exchange, of dense", "exchange, of filtered"]
    return markdown([*header, *exchange], runpy.run_path(str(SCALING))["estimates"]())


def learned(found: dict[str, Any]) -> str:
    """The planned filter on learned attention."""
    rows: Rows = found["results"]["learned"]
    table = [
        [f"{row['shape'].split(' x ')[1]}, {row['name'].removeprefix('planned, ')}",
         f"{row['target']:.2f}", f"{row['recall']:.3f}", f"{row['density']:.3f}",
         f"{row['output_error']:.3f}", *dense_times(rows, row["shape"]), f"{row['ms']:.2f} ms",
         speed(row)]
        for row in rows
        if "target" in row
    ]  # fmt: skip
    header = ["tokens, order", "recall", "delivered", "density", "error of the output"]
    return markdown([*header, *dense_header(rows), "filtered", ""], table)


def learned_short(found: dict[str, Any]) -> str:
    """The same in the order that a grid gives, briefly."""
    rows: Rows = found["results"]["learned"]
    dense = {row["shape"]: row["ms"] for row in rows if row["name"] == "cuDNN"}
    table = [
        [row["shape"].split(" x ")[1], f"{row['target']:.2f}", f"{row['recall']:.3f}",
         f"{row['density']:.3f}", f"{dense[row['shape']]:.2f} ms",
         f"{row['ms']:.2f} ms, {speed(row)}"]
        for row in rows
        if row["name"] == "planned, cubes"
    ]  # fmt: skip
    header = ["tokens", "recall", "delivered", "density", "cuDNN, dense", "filtered"]
    return markdown(header, table)


TABLES: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "about": about,
    "wan": wan,
    "engines": engines,
    "engines_short": engines_short,
    "eight_bits": eight_bits,
    "eight_bits_times": eight_bits_times,
    "parts": parts,
    "order": order,
    "break_even": break_even,
    "short": short,
    "short_kernels": short_kernels,
    "online": online,
    "end_to_end": end_to_end,
    "multi_gpu": multi_gpu,
    "multi_gpu_about": multi_gpu_about,
    "multi_gpu_errors": multi_gpu_errors,
    "scaling_check": scaling_check,
    "scaling": scaling,
    "learned": learned,
    "learned_short": learned_short,
    **quality_tables.TABLES,
}


def filled(page: str, found: dict[str, Any]) -> str:
    """A page with its tables up to date."""

    def fill(match: re.Match[str]) -> str:
        if match[2] == ELSEWHERE:
            return match[0]
        return match[1] + TABLES[match[2]](found) + match[3]

    return PLACE.sub(fill, page)


def main() -> int:
    """Write or check the tables of all pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where a table is out of date")
    check = parser.parse_args().check
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    stale = []
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if filled(page, found) != page:
            stale.append(path.name)
            if not check:
                path.write_text(filled(page, found), encoding="utf-8")
    if check and stale:
        print(f"out of date in {', '.join(stale)}: run python docs/figures/tables.py")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())

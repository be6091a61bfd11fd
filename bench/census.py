"""What the backend does with every transformer of the installed diffusers; writes docs/models.md.

    python bench/census.py                                # all of them: the page, and the README
    python bench/census.py --only WanTransformer3DModel   # to look at
    python bench/census.py --readme                       # the README's table from the page

Each class is built with a tiny configuration and random weights, run in eager mode and compiled,
whole and, where diffusers names the class's repeated blocks, block by block. Graphs run with the
inner compiler "eager", so that what differs is the backend's own doing. About 5 minutes on a core.
README.md gets the rows of well-known families from the page.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import census_models
import torch
import torch._dynamo
from torch import Tensor, nn

import cef_compile
from cef_compile.report.words import break_sentences

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
README = ROOT / "README.md"
PLACE = re.compile(r"(<!-- table: models -->\n).*?(<!-- end -->)", re.DOTALL)
"""Where the README's table stands."""
FAMILIES = {
    "Wan 2.1, 2.2": "WanTransformer3DModel",
    "HunyuanVideo": "HunyuanVideoTransformer3DModel",
    "HunyuanVideo 1.5": "HunyuanVideo15Transformer3DModel",
    "LTX-Video": "LTXVideoTransformer3DModel",
    "LTX-2": "LTX2VideoTransformer3DModel",
    "CogVideoX": "CogVideoXTransformer3DModel",
    "Mochi": "MochiTransformer3DModel",
    "Cosmos": "CosmosTransformer3DModel",
    "Flux": "FluxTransformer2DModel",
    "Flux 2": "Flux2Transformer2DModel",
    "SD 3.5": "SD3Transformer2DModel",
    "QwenImage": "QwenImageTransformer2DModel",
    "Z-Image": "ZImageTransformer2DModel",
    "HiDream": "HiDreamImageTransformer2DModel",
    "Lumina 2": "Lumina2Transformer2DModel",
    "Sana": "SanaTransformer2DModel",
}
"""Well-known families, and the class that stands for each in the README."""
FP32 = 1e-5
"""Largest difference from eager at recall 1, relative to the largest output."""
MIN_KV_LEN = 65
"""Two key tiles: with fewer there is nothing to choose from, however tiny the model."""
HEALERS = ("capture_scalar_outputs", "capture_dynamic_output_shape_ops")
"""Settings of torch._dynamo.config that keep a graph whole where a value decides a shape."""


@dataclass
class Run:
    """One way to compile one model.

    Attributes:
        graphs, breaks: as Dynamo counted them.
        report: the backend's, after a call at recall 0.9.
        error: at recall 1, largest difference from eager over the largest output.
        change: at recall 0.9, norm of the difference over the norm of the output.
        finite: whether all outputs at recall 0.9 are.
    """

    graphs: int
    breaks: int
    report: cef_compile.Report
    error: float
    change: float
    finite: bool

    @property
    def filtered(self) -> list[cef_compile.ReportedNode]:
        """The nodes that ran filtered; layers that share a graph may be listed and never run."""
        return [node for node in self.report.filtered if node.calls]

    @property
    def reasons(self) -> Counter[str]:
        """Why nodes are dense."""
        return Counter(node.reason for node in self.report.dense)


@dataclass
class Row:
    """One class.

    Attributes:
        name: of the class.
        whole, regional: compiled as a whole, and block by block where the class has such blocks.
        healed: the whole again, with each of :data:`HEALERS` that leaves fewer graphs.
        refused: those of :data:`HEALERS` with which Dynamo cannot trace the class at all.
    """

    name: str
    whole: Run
    regional: Run | None = None
    healed: dict[str, Run] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


def classes() -> list[str]:
    """Every transformer class that the installed diffusers exports."""
    import importlib
    import pkgutil

    import diffusers
    from diffusers.models import transformers

    names = set()
    for info in pkgutil.iter_modules(transformers.__path__):
        module = importlib.import_module(f"{transformers.__name__}.{info.name}")
        names |= {
            name
            for name, value in vars(module).items()
            if isinstance(value, type)
            and issubclass(value, diffusers.ModelMixin)
            and value.__module__ == module.__name__
            and hasattr(diffusers, name)
        }
    return sorted(names)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a model's output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)
    elif hasattr(value, "to_tuple"):
        yield from tensors(value.to_tuple())


def compare(got: Any, expected: Any) -> tuple[float, float, bool]:
    """Largest difference over the largest value, norm over norm, and whether all is finite."""
    a = torch.cat([t.flatten().double() for t in tensors(got)])
    b = torch.cat([t.flatten().double() for t in tensors(expected)])
    difference = a - b
    worst = difference.abs().max() / b.abs().max()
    return worst.item(), (difference.norm() / b.norm()).item(), bool(a.isfinite().all())


@contextmanager
def setting(name: str | None) -> Iterator[None]:
    """One of :data:`HEALERS`, or nothing, switched on."""
    patches = {name: True} if name else {}
    with torch._dynamo.config.patch(patches):
        yield


@torch.no_grad()
def measure(model: nn.Module, inputs: dict[str, Any], regional: bool, expected: Any) -> Run:
    """Compile a model, or its repeated blocks, and compare with eager."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = 0
    backend = cef_compile.backend(recall=1.0, inner="eager", min_kv_len=MIN_KV_LEN)

    def counted(gm: Any, example_inputs: Any, **kwargs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return backend(gm, example_inputs, **kwargs)

    call = model
    if regional:
        model.compile_repeated_blocks(backend=counted)  # type: ignore[operator]
    else:
        call = torch.compile(model, backend=counted)
    error, _, _ = compare(call(**inputs), expected)
    if backend.report.filtered:
        backend.set_recall(0.9)
        backend.reset()
        call(**inputs)  # keeps every tile, and finds the threshold
    _, change, finite = compare(call(**inputs), expected)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return Run(graphs, breaks, backend.report, error, change, finite)


def examine(name: str) -> Row:
    """Everything about one class."""
    warnings.filterwarnings("ignore", message="cef_compile found no attention")
    model, inputs = census_models.build(name)
    with torch.no_grad():
        expected = model(**inputs)
    whole = measure(model, inputs, False, expected)
    row = Row(name, whole)
    for healer in HEALERS if whole.report.breaks else ():
        try:
            with setting(healer):
                run = measure(model, inputs, False, expected)
        except RuntimeError:  # of Dynamo: what it captures decides a shape that must be known
            row.refused.append(healer)
            continue
        if run.graphs < whole.graphs:
            row.healed[healer] = run
    blocks = getattr(model, "_repeated_blocks", None)
    if blocks and any(type(module).__name__ in blocks for module in model.modules()):
        row.regional = measure(model, inputs, True, expected)
    return row


def problems(row: Row) -> list[str]:
    """What is wrong with a row: nothing, where all is well."""
    found = []
    ways = {"whole": row.whole, "regional": row.regional, **row.healed}
    for way, run in ways.items():
        if run is None:
            continue
        if not run.error <= FP32:
            found.append(f"{way}: recall 1 differs from eager by {run.error:.1e}")
        if not run.finite:
            found.append(f"{way}: recall 0.9 is not finite")
        if any(not node.reason for node in run.report.dense):
            found.append(f"{way}: a node is dense without a reason")
        if way != "regional" and run.graphs > 1 and not run.report.breaks:
            found.append(f"{way}: {run.graphs} graphs, and the report names no break")
    if row.regional is not None:
        seen = {(n.path, n.ordinal) for n in row.regional.filtered}
        whole = {(n.path, n.ordinal) for n in row.whole.filtered}
        if row.whole.breaks == 0 and not seen <= whole:
            found.append(f"regional: other nodes are filtered than in the whole: {seen - whole}")
    return found


COLUMNS = 8
"""Of the page's table."""
HEAD = """\
# Models

Generated by `python bench/census.py` with torch {torch} and diffusers {diffusers}: every
transformer class of diffusers that a tiny configuration is kept for, with random weights.

- **nodes**: attention nodes in the graphs of the whole model; **filtered**: those that the default
  policy filters where `kv_len` is at least {min_kv_len} (two key tiles; the models here are tiny).
- **recall 1**: largest difference from eager, over the largest output, in fp32.
- **recall 0.9**: norm of the difference from eager over the norm of the output. It says that the
  filter is at work, and nothing of pictures: random weights attend to everything alike.
- **graphs / breaks**: of the whole model, as Dynamo counts them; where it gives up a whole function
  it counts no break. Attention that runs outside of any graph is not seen.
- **regional**: filtered nodes and graphs where only the blocks that diffusers names as repeated are
  compiled (`compile_repeated_blocks`); a dash where it names none.

| model | nodes | filtered | dense, and why | recall 1 | recall 0.9 | graphs / breaks | regional |
| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |
"""


def table(rows: list[Row], missing: dict[str, str]) -> str:
    """The page as markdown."""
    import diffusers

    versions = {"torch": torch.__version__.split("+")[0], "diffusers": diffusers.__version__}
    lines = [HEAD.format(**versions, min_kv_len=MIN_KV_LEN).rstrip("\n")]
    for row in rows:
        run, regional = row.whole, row.regional
        reasons = "; ".join(f"{count} {reason}" for reason, count in run.reasons.most_common())
        cells = [
            row.name,
            str(len(run.report.nodes)),
            str(len(run.filtered)),
            reasons or "none",
            f"{run.error:.0e}",
            f"{run.change:.3f}" if run.filtered else "",
            f"{run.graphs} / {run.breaks}",
            f"{len(regional.filtered)} in {regional.graphs}" if regional else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Graph breaks", ""]
    lines += ["The results are right either way. In the words of `backend.report`:", ""]
    lines += [_breaks(row) for row in rows if row.whole.report.breaks]
    if missing:
        lines += ["", "## Not looked at", ""]
        lines += [f"- {name}: {why}" for name, why in missing.items()]
    return "\n".join(lines) + "\n"


def _breaks(row: Row) -> str:
    """What the report says of a broken graph, and what was seen to heal it."""
    said = break_sentences([asdict(found) for found in row.whole.report.breaks])
    graphs = f"{row.whole.graphs} graph{'s' if row.whole.graphs > 1 else ''}"
    parts = [f"- {row.name}: {graphs}.", *said, "**Tried:**"]
    if not row.healed:
        parts.append(f"neither {' nor '.join(f'`{name}`' for name in HEALERS)} leaves fewer.")
    for name, run in row.healed.items():
        nodes = f"{len(run.report.nodes)} attention nodes seen, {len(run.filtered)} filtered"
        parts.append(f"`{name} = True` leaves {run.graphs}: {nodes}.")
    parts += [f"With `{name} = True` Dynamo raises an error." for name in row.refused]
    return " ".join(parts)


def readme_table(page: str) -> str:
    """The README's table: rows of the page for :data:`FAMILIES`, as markdown.

    Args:
        page: text of ``docs/models.md``.
    """
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    rows = {row[0]: row for row in cells if len(row) == COLUMNS}
    lines = ["| model | nodes | filtered | dense, and why | recall 1 | blocks compiled apart |"]
    lines.append("| --- | ---: | ---: | --- | ---: | ---: |")
    for family, class_ in FAMILIES.items():
        _, nodes, filtered, reasons, error, _, _, regional = rows[class_]
        lines.append(f"| {family} | {nodes} | {filtered} | {reasons} | {error} | {regional} |")
    return "\n".join(lines) + "\n"


def write_readme() -> None:
    """Put :func:`readme_table` of the page into the README."""
    table_of_page = readme_table(PAGE.read_text(encoding="utf-8"))
    text = README.read_text(encoding="utf-8")
    README.write_text(
        PLACE.sub(lambda place: place[1] + table_of_page + place[2], text), encoding="utf-8"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="CLASS", help="these classes, and no file")
    parser.add_argument("--readme", action="store_true", help="write only the README's table")
    arguments = parser.parse_args()
    if arguments.readme:
        write_readme()
        return 0
    unknown = sorted(set(arguments.only or ()) - set(census_models.RECIPES))
    if unknown:
        parser.error(f"no recipe for {', '.join(unknown)}")
    present = set(classes())
    names = arguments.only or sorted(present & set(census_models.RECIPES))
    rows, wrong = [], 0
    for name in names:
        row = examine(name)
        rows.append(row)
        found = problems(row)
        wrong += bool(found)
        nodes = f"{len(row.whole.filtered)} of {len(row.whole.report.nodes)} filtered"
        print(f"{name}: {nodes}", *found, sep="\n  ", file=sys.stderr, flush=True)
    missing = {
        name: census_models.OUT_OF_REACH.get(name, "no tiny configuration is kept here for it")
        for name in sorted(present - set(census_models.RECIPES))
    }
    text = table(rows, {} if arguments.only else missing)
    if arguments.only:
        print(text)
    else:
        PAGE.write_text(text)
        write_readme()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

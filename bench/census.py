"""What the backend does with every transformer of the installed diffusers; writes docs/models.md.

    python bench/census.py [--only WanTransformer3DModel ...] [--out docs/models.md]

Each class is built with a tiny configuration and random weights, run in eager mode and compiled,
whole and, where diffusers names the class's repeated blocks, block by block. Graphs run with the
inner compiler "eager", so that what differs is the backend's own doing. About 5 minutes on a core.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import census_models
import torch
import torch._dynamo
from torch import Tensor, nn

import cef_compile

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
        healed: the whole again, with each of :data:`HEALERS` that leaves fewer graph breaks.
    """

    name: str
    whole: Run
    regional: Run | None
    healed: dict[str, Run] = field(default_factory=dict)


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
    healed = {}
    for healer in HEALERS if whole.breaks else ():
        with setting(healer):
            run = measure(model, inputs, False, expected)
        if run.breaks < whole.breaks:
            healed[healer] = run
    blocks = getattr(model, "_repeated_blocks", None)
    regional = None
    if blocks and any(type(module).__name__ in blocks for module in model.modules()):
        regional = measure(model, inputs, True, expected)
    return Row(name, whole, regional, healed)


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
    if row.regional is not None:
        seen = {(n.path, n.ordinal) for n in row.regional.filtered}
        whole = {(n.path, n.ordinal) for n in row.whole.filtered}
        if row.whole.breaks == 0 and not seen <= whole:
            found.append(f"regional: other nodes are filtered than in the whole: {seen - whole}")
    return found


HEAD = """\
# Models

Generated by `python bench/census.py` with torch {torch} and diffusers {diffusers}: every
transformer class of diffusers that a tiny configuration is kept for, with random weights.

- **nodes**: attention nodes in the graphs of the whole model; **filtered**: those that the default
  policy filters where `kv_len` is at least {min_kv_len} (two key tiles; the models here are tiny).
- **recall 1**: largest difference from eager, over the largest output, in fp32.
- **recall 0.9**: norm of the difference from eager over the norm of the output. It says that the
  filter is at work, and nothing of pictures: random weights attend to everything alike.
- **graphs / breaks**: of the whole model, as Dynamo counts them. Attention that runs outside of any
  graph is not seen.
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
    lines += [_breaks(row) for row in rows if row.whole.breaks] or ["None."]
    if missing:
        lines += ["", "## Not looked at", ""]
        lines += [f"- {name}: {why}" for name, why in missing.items()]
    return "\n".join(lines) + "\n"


def _breaks(row: Row) -> str:
    count = row.whole.breaks
    text = f"- {row.name}: {count} break{'s' if count > 1 else ''}, and works."
    if not row.healed:
        return f"{text} Neither {' nor '.join(f'`{name}`' for name in HEALERS)} changes that."
    best = min(row.healed, key=lambda name: row.healed[name].breaks)
    run = row.healed[best]
    nodes = f"{len(run.report.nodes)} attention nodes seen, {len(run.filtered)} filtered"
    return f"{text} `torch._dynamo.config.{best} = True` leaves {run.breaks or 'none'}: {nodes}."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="CLASS", help="these classes, and no file")
    default = Path(__file__).parent.parent / "docs" / "models.md"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
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
        arguments.out.write_text(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

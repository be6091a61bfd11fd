"""A calibrated policy on inputs that it was not made from: error and time, beside one recall.

    python bench/calibration.py [--max-error 0.01] [--out bench/results/calibration-cpu.json]

The trained tiny Wan is calibrated on a few guided steps of one clip. Then every step of the same
noise levels is taken from the other clip and from other seeds, and a row has the error of the
model's output against dense (root mean square over the calls, as in the calibration) and the time
of a step. Rows: the policy as it was saved and loaded again, the fastest single recall (Uniform)
and the fastest Balanced that met the budget in the calibration, and dense. The compiled graph of a
row answers densely too, so that its error is that of filtering alone; what another compilation
changes is the floor. Times are medians over the noise levels' own steps, on a GPU by device events
and in CUDA graphs, as in the demo. The last row is the policy under an audit: its cost.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cef_compile
from cef_compile.backend import Backend
from cef_compile.calibrate import CANDIDATES
from cef_compile.demo.calibration import denoising
from cef_compile.demo.data import load_clip, load_model
from cef_compile.demo.defaults import FRAMES, SIZE
from cef_compile.demo.latents import tokens, unshuffle
from cef_compile.demo.sampler import add_noise, noise_levels
from cef_compile.policy import Balanced, PolicyLike, Uniform
from cef_compile.report.environment import environment
from cef_compile.report.table import number, text_table

RESULTS = Path(__file__).parent / "results"
MADE_FROM = (0, 0)
"""Clip and seed of the calibration."""
TESTED = ((0, 1), (0, 2), (1, 1), (1, 2))
"""Others: the same clip under other noise, and the other clip."""
WARMUP = 3
"""Calls before the clock: CUDA graphs are recorded in the second one."""


@dataclass(frozen=True)
class Inputs:
    """The calls of the steps from one clip and seed: with text and without it, at each level."""

    levels: list[float]
    latents: list[Tensor]
    text: Tensor

    def calls(self) -> Iterator[tuple[float, tuple[Tensor, Tensor, Tensor]]]:
        """Noise level and arguments of each call."""
        for level, hidden in zip(self.levels, self.latents, strict=True):
            timestep = torch.tensor([1000 * level], device=hidden.device)
            for text in (self.text, torch.zeros_like(self.text)):
                yield level, (hidden, timestep, text)


def inputs(given: argparse.Namespace, clip: int, seed: int, like: Tensor) -> Inputs:
    """Noised latents of a clip at the levels of the steps."""
    video, text = load_clip(clip, given.frames, given.size)
    levels = noise_levels(given.steps)[:-1]
    clean = unshuffle(video)[None]
    noised = [add_noise(clean, seed, level).to(like) for level in levels]
    return Inputs(levels, noised, text.to(like))


class Way:
    """The model compiled with one policy.

    Args:
        model: not compiled.
        policy: None for dense, compiled without this project.
        given: the command line.
    """

    def __init__(
        self, model: nn.Module, policy: PolicyLike | None, given: argparse.Namespace
    ) -> None:
        torch._dynamo.reset()
        self.backend: Backend | None = None
        if policy is not None:
            self.backend = cef_compile.backend(
                policy=policy, inner=given.inner, min_kv_len=given.min_kv_len
            )
        # As in the demo: without CUDA graphs the times would be those of launches.
        graphs = given.device == "cuda" and given.inner == "inductor"
        mode = "reduce-overhead" if graphs else None
        self.model = torch.compile(model, backend=self.backend or given.inner, mode=mode)

    def call(self, level: float, args: tuple[Tensor, ...]) -> Tensor:
        """The model's output at a noise level."""
        if self.backend is not None:
            self.backend.set_noise_level(level)
        return self.model(*args, return_dict=False)[0]

    def dense(self) -> Any:
        """While the block runs, the same graph answers densely."""
        return nullcontext() if self.backend is None else self.backend.dense()

    @contextmanager
    def audited(self) -> Iterator[None]:
        """While the block runs, an audit is on."""
        assert self.backend is not None, "dense is not audited"
        with self.backend.audit():
            yield


def relative_errors(way: Way, given: Inputs) -> list[float]:
    """Of each call, against the same graph answering densely."""
    found = []
    for level, args in given.calls():
        with way.dense():
            dense = way.call(level, args).double()
        off = way.call(level, args).double() - dense
        found.append((off.norm() / dense.norm()).item())
    return found


def root_mean_square(values: list[float]) -> float:
    """Root of the mean of the squares."""
    return math.sqrt(math.fsum(value**2 for value in values) / len(values))


def median_ms(step: Callable[[], Any], given: argparse.Namespace) -> float:
    """Median time of a step; on a GPU by device events."""
    for _ in range(WARMUP):
        step()
    times = []
    for _ in range(given.repeats):
        if given.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            step()
            times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def step_ms(way: Way, timed: Inputs, given: argparse.Namespace) -> float:
    """Time of a guided step (two calls), mean over the noise levels of their medians."""
    calls = list(timed.calls())
    steps = [calls[i : i + 2] for i in range(0, len(calls), 2)]
    return statistics.mean(
        median_ms(lambda step=step: [way.call(*one) for one in step], given) for step in steps
    )


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, then a row for each way to run the model."""
    device = torch.device(given.device)
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    model = load_model(device, dtype)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the results say it
        made = cef_compile.calibrate(
            model,
            denoising(
                model,
                noise_levels(given.steps),
                clip=MADE_FROM[0],
                frames=given.frames,
                size=given.size,
                seed=MADE_FROM[1],
                device=device,
                dtype=dtype,
            ),
            max_error=given.max_error,
            candidates=given.candidates,
            min_kv_len=given.min_kv_len,
            progress=False,
        )
    seconds = time.perf_counter() - begin
    calibration = made.calibration
    assert calibration is not None, "calibrate has measured it"
    print(f"calibrated in {seconds:.0f} s\n{calibration}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        cef_compile.save_policy(made, Path(folder) / "policy.json")
        policy = cef_compile.load_policy(Path(folder) / "policy.json")

    like = torch.empty(0, device=device, dtype=dtype)
    tested = {pair: inputs(given, *pair, like) for pair in TESTED}
    timed = tested[TESTED[0]]
    dense = Way(model, None, given)
    dense_ms = step_ms(dense, timed, given)
    floor = root_mean_square(
        [
            ((dense.call(level, args) - plain).double().norm() / plain.double().norm()).item()
            for level, args in timed.calls()
            for plain in [model(*args, return_dict=False)[0]]
        ]
    )
    rows: list[dict[str, Any]] = [{"name": "dense", "predicted_time": 1.0, "step_ms": dense_ms}]
    best_uniform, best_balanced = calibration.best_uniform, calibration.best_balanced
    ways: list[tuple[str, PolicyLike, Any]] = [("calibrated", policy, calibration.chosen)]
    if best_uniform is not None:
        assert best_uniform.recall is not None, "a single recall"
        ways.append(("single recall", Uniform(best_uniform.recall), best_uniform))
    if best_balanced is not None:
        assert best_balanced.recall is not None, "a single recall"
        ways.append(("Balanced", Balanced(best_balanced.recall), best_balanced))
    for name, chosen, tried in ways:
        way = Way(model, chosen, given)
        for level, args in timed.calls():  # compiles; and Balanced filters from its second pass on
            way.call(level, args)
        errors = {
            f"clip {clip}, seed {seed}": root_mean_square(relative_errors(way, one))
            for (clip, seed), one in tested.items()
        }
        rows.append(
            {
                "name": name,
                "recall": tried.recall,
                "predicted_time": tried.predicted_time,
                "density": tried.density,
                "calibration_error": tried.error,
                "errors": errors,
                "worst_error": max(errors.values()),
                "step_ms": step_ms(way, timed, given),
            }
        )
        if name == "calibrated":
            with way.audited():
                audited_ms = step_ms(way, timed, given)
            plain_ms = rows[-1]["step_ms"]
            audit = {
                "step_ms": audited_ms,
                "overhead_of_dense_step": (audited_ms - plain_ms) / dense_ms,
            }
    for row in rows:
        row["speed"] = dense_ms / row["step_ms"]
    return {
        "calibration_s": seconds,
        "outcome": str(calibration).splitlines(),
        "beats_balanced": calibration.beats_balanced,
        "floor": floor,
        "rows": rows,
        "audit": audit,
        "verdict": verdict(rows, given.max_error, given.allowance),
    }


def verdict(rows: list[dict[str, Any]], max_error: float, allowance: float) -> dict[str, Any]:
    """Whether the policy keeps the budget elsewhere, and is the faster one."""
    by_name = {row["name"]: row for row in rows}
    mine, single = by_name["calibrated"], by_name.get("single recall")
    found: dict[str, Any] = {"within_budget": mine["worst_error"] <= allowance * max_error}
    # Where no single recall meets the budget, dense is what is left.
    other = by_name["dense"] if single is None else single
    found["faster_by_prediction"] = mine["predicted_time"] < other["predicted_time"]
    found["faster_as_measured"] = mine["step_ms"] < other["step_ms"]
    found["beside"] = other["name"]
    return found


def show(result: dict[str, Any]) -> str:
    """The rows as a table, and what they come to."""
    header = ["policy", "recall", "predicted", "error made", "error elsewhere", "step ms", "speed"]
    rows = [
        [
            row["name"],
            number(row.get("recall")),
            number(row["predicted_time"]),
            number(row.get("calibration_error"), 4),
            number(row.get("worst_error"), 4),
            number(row["step_ms"], 2),
            f"{row['speed']:.2f}x",
        ]
        for row in result["rows"]
    ]
    audit = result["audit"]
    return (
        f"{text_table(header, rows)}\n"
        f"floor (another compilation of dense): {result['floor']:.4f}\n"
        f"with an audit: {audit['step_ms']:.2f} ms a step,"
        f" {100 * audit['overhead_of_dense_step']:.1f} % of a dense one more\n"
        f"{result['verdict']}"
    )


@torch.no_grad()
def main() -> None:
    """Measure, print a table, write JSON."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--max-error", type=float, default=0.01)
    parser.add_argument("--allowance", type=float, default=1.3, help="of the budget, elsewhere")
    parser.add_argument("--frames", type=int, default=FRAMES[device])
    parser.add_argument("--size", type=int, default=SIZE[device])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--candidates", type=float, nargs="+", default=CANDIDATES)
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each level")
    parser.add_argument("--min-kv-len", type=int)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.device = device
    found = environment()
    card = found["cuda"]["devices"][0]["name"].split()[1].lower() if device == "cuda" else "cpu"
    out = given.out or RESULTS / f"calibration-{card}.json"
    setting = {name: value for name, value in vars(given).items() if name != "out"}
    setting["tokens"] = tokens(given.frames, given.size)
    result = measure(given)
    print(show(result))
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": found, "setting": setting, **result}, indent=1)
    out.write_text(text + "\n")


if __name__ == "__main__":
    main()

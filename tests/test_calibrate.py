"""Calibration: the steps, the budget, what is compiled, interruptions, and the trained tiny Wan."""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from math import sqrt
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

import cef_compile
from cef_compile import Calibration, PolicyFormatError, Rules, TimeModel, load_policy, save_policy
from cef_compile.calibrate.choose import Option, lower_hull, prefix_within, recalls_after, steps
from cef_compile.calibrate.lab import ModelCall
from cef_compile.calibrate.search import calibrated_bands
from cef_compile.demo.data import load_clip, load_model
from cef_compile.demo.latents import unshuffle
from cef_compile.demo.sampler import add_noise
from cef_compile.policy import NodePolicy, Tried

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# --- the steps -----------------------------------------------------------------------------------

# Small integers, so that sums are exact.
options = st.lists(
    st.builds(
        Option,
        st.sampled_from([0.9, 0.8, 0.7]),
        st.integers(0, 20).map(float),
        st.integers(1, 12).map(float),
    ),
    max_size=4,
).map(lambda found: [Option(None, 0.0, 10.0), *found])


@given(options=options)
def test_the_hull_is_what_no_mixture_beats(options: list[Option]) -> None:
    hull = lower_hull(options)
    assert set(hull) <= set(options)
    assert hull[0].squared_error == 0
    rates = [
        (b.squared_error - a.squared_error) / (a.time - b.time) for a, b in itertools.pairwise(hull)
    ]
    assert all(a.time > b.time for a, b in itertools.pairwise(hull))
    assert all(rate > 0 for rate in rates)
    assert rates == sorted(set(rates))
    for option in options:
        for left, right in itertools.pairwise(hull):
            if right.time <= option.time <= left.time:
                part = (left.time - option.time) / (left.time - right.time)
                line = left.squared_error + part * (right.squared_error - left.squared_error)
                assert option.squared_error >= line - 1e-9
        assert option.time >= hull[-1].time


@given(items=st.lists(options, min_size=1, max_size=3), budget=st.integers(0, 60))
def test_the_greedy_choice_is_within_one_step_of_the_best(items, budget: int) -> None:
    path = steps(items)
    assert [step.rate for step in path] == sorted(step.rate for step in path)
    taken = prefix_within(path, budget)
    recalls = recalls_after(path, taken, len(items))
    assert len(recalls) == len(items)
    assert sum(step.squared_error for step in path[:taken]) <= budget

    def time_after(count: int) -> float:
        chosen = [lower_hull(one)[0] for one in items]
        for step in path[:count]:
            chosen[step.item] = step.option
        return sum(option.time for option in chosen)

    best = min(
        sum(option.time for option in combination)
        for combination in itertools.product(*items)
        if sum(option.squared_error for option in combination) <= budget
    )
    assert best <= time_after(taken)
    if taken < len(path):  # the step too many would have been enough
        assert time_after(taken + 1) <= best + 1e-9
    else:
        assert time_after(taken) == best


def test_bands_meet_half_way_and_what_was_not_measured_is_dense() -> None:
    bands = calibrated_bands({0.7: None, 0.4: 0.95, 0.2: 0.9})
    assert [(level, decision.recall) for level, decision in bands] == [
        (0.0, 0.9),
        (pytest.approx(0.3), 0.95),
        (pytest.approx(0.55), None),
    ]
    bands = calibrated_bands({0.7: 0.9, 0.4: 0.9})
    assert [(level, decision.recall) for level, decision in bands] == [
        (0.0, 0.9),
        (pytest.approx(0.707), None),
    ]
    assert calibrated_bands({None: 0.8})[0][1].recall == 0.8
    assert len(calibrated_bands({0.0: 0.8})) == 1


@pytest.mark.parametrize("numbers", [(-0.1, 1.0), (0.0, float("nan")), (float("inf"), 1.0)])
def test_a_time_model_is_made_of_finite_numbers(numbers) -> None:
    with pytest.raises(ValueError, match="must be at least 0 and finite"):
        TimeModel(*numbers)
    assert TimeModel(0.1, 2.0)(0.25) == 0.6


def tried(recall: float | None, error: float, time: float) -> Tried:
    return Tried(recall, error, time, 0.5)


def test_a_calibration_says_whether_it_beats_balanced() -> None:
    balanced = (tried(0.9, 0.04, 0.4), tried(0.95, 0.01, 0.6))
    uniform = (tried(0.99, 0.01, 0.8), tried(0.9, 0.05, 0.3))

    def made(error: float, time: float) -> Calibration:
        return Calibration(0.01, 3, tried(None, error, time), balanced, uniform, ())

    good = made(0.01, 0.5)
    assert good.balanced_error == pytest.approx(0.02)  # the geometric mean, half way
    assert good.beats_balanced is True
    assert "beats Balanced" in str(good)
    assert good.best_balanced == balanced[1]
    assert good.best_uniform == uniform[0]
    assert made(0.03, 0.5).beats_balanced is False
    assert "does NOT beat Balanced" in str(made(0.03, 0.5))
    assert made(0.01, 0.1).beats_balanced is None
    assert "not tried at so short" in str(made(0.01, 0.1))


# --- on a small model ----------------------------------------------------------------------------

LEVELS = (0.8, 0.3)
CANDIDATES = (0.9, 0.6, 0.3)


def stack() -> models.Stack:
    torch.manual_seed(0)
    model = models.Stack(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model.eval()


def runner(model: torch.nn.Module, levels: Any = LEVELS) -> Any:
    def run(backend: cef_compile.Backend) -> None:
        for i, level in enumerate(levels):
            backend.set_noise_level(level)
            model(models.tokens(512, seed=i))

    return run


def calibrated(model: Any = None, run: Any = None, **options: Any) -> NodePolicy:
    torch._dynamo.reset()
    model = stack() if model is None else model
    defaults = {
        "max_error": 0.05,
        "candidates": CANDIDATES,
        "progress": False,
        "time_model": TimeModel(0.0, 1.0),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a random model may favour Balanced
        return cef_compile.calibrate(model, run or runner(model), **{**defaults, **options})


def test_a_budget_is_met_with_one_compilation_and_the_model_is_left_alone(tmp_path: Path) -> None:
    model = stack()
    before = dict(vars(model))
    counters.clear()
    policy = calibrated(model)
    assert counters["stats"]["unique_graphs"] == 1
    assert vars(model) == before
    calibration = policy.calibration
    assert isinstance(policy, Rules)
    assert policy.model == "Stack"
    assert calibration is not None
    assert 0 < calibration.chosen.error <= 0.05
    assert calibration.chosen.predicted_time < 1
    assert calibration.calls == 2
    assert [(n.path, n.noise_level) for n in calibration.nodes] == [
        (path, level) for level in sorted(LEVELS) for path in ("blocks.0", "blocks.1")
    ]
    for node in calibration.nodes:
        assert [one.recall for one in node.candidates] == sorted(CANDIDATES, reverse=True)
        densities = [one.density for one in node.candidates]
        assert densities == sorted(densities, reverse=True)
        assert all(one.output_error > 0 and one.attention_error > 0 for one in node.candidates)
    for entry in policy.nodes:
        # Dense from just above the highest level, or from where it was dense already.
        assert entry.bands[-1][0] <= 0.8 * 1.01
        assert entry.bands[-1][1].is_dense
    save_policy(policy, tmp_path / "policy.json")
    loaded = load_policy(tmp_path / "policy.json")
    assert isinstance(loaded, NodePolicy)
    assert (loaded.nodes, loaded.calibration) == (policy.nodes, calibration)
    # The backend that a user makes does what was measured.
    torch._dynamo.reset()
    backend = cef_compile.backend(policy=loaded, inner="eager")
    compiled = torch.compile(model, backend=backend)
    squares = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for i, level in enumerate(LEVELS):
            backend.set_noise_level(level)
            x = models.tokens(512, seed=i)
            squares.append(((compiled(x) - model(x)).norm() / model(x).norm()).item() ** 2)
    assert sqrt(sum(squares) / 2) == pytest.approx(calibration.chosen.error, rel=1e-3)


def test_the_same_again_gives_the_same() -> None:
    one, two = calibrated(), calibrated()
    assert (one.nodes, one.calibration) == (two.nodes, two.calibration)


def test_without_noise_levels_there_is_one_decision_for_each_node() -> None:
    model = stack()

    def run(backend: cef_compile.Backend) -> None:
        model(models.tokens(512))

    policy = calibrated(model, run)
    assert [len(entry.bands) for entry in policy.nodes] == [1, 1]
    assert policy.calibration.chosen.error <= 0.05
    torch._dynamo.reset()
    backend = cef_compile.backend(policy=policy, inner="eager")
    with torch.no_grad():
        torch.compile(model, backend=backend)(models.tokens(512))  # needs no level


def test_a_larger_budget_is_no_slower_and_a_tiny_one_is_dense() -> None:
    times = [
        calibrated(max_error=budget).calibration.chosen.predicted_time
        for budget in (1e-9, 0.02, 0.2)
    ]
    assert times[0] == pytest.approx(1.0)
    assert times == sorted(times, reverse=True)


def test_an_interrupted_calibration_goes_on_where_it_was(tmp_path, monkeypatch) -> None:
    whole = calibrated()
    file = tmp_path / "checkpoint.json"
    tries: list[tuple[str, float]] = []
    real = ModelCall.try_one

    def counted(call, entry, recall):
        if len(tries) == 8:  # in the second call, in its first node
            raise KeyboardInterrupt
        tries.append((entry.path, recall))
        return real(call, entry, recall)

    monkeypatch.setattr(ModelCall, "try_one", counted)
    model = stack()
    before = dict(vars(model))
    with pytest.raises(KeyboardInterrupt):
        calibrated(model, checkpoint=file)
    assert vars(model) == before
    assert len(json.loads(file.read_text())["calls"]) == 1
    monkeypatch.setattr(ModelCall, "try_one", real)
    resumed = calibrated(checkpoint=file)
    assert (resumed.nodes, resumed.calibration) == (whole.nodes, whole.calibration)

    def never(call, entry, recall):
        raise AssertionError("everything has been measured")

    # Another budget needs no more measurements.
    monkeypatch.setattr(ModelCall, "try_one", never)
    assert calibrated(checkpoint=file, max_error=0.1).calibration.max_error == 0.1


def test_a_checkpoint_of_another_calibration_or_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.json"
    calibrated(checkpoint=file)
    with pytest.raises(ValueError, match=r"its candidates are \[0.9, 0.6, 0.3\], now \[0.9\]"):
        calibrated(checkpoint=file, candidates=[0.9])
    model = stack()
    with pytest.raises(ValueError, match=r"call 1 of run is another than before"):
        calibrated(model, runner(model, (0.7, 0.3)), checkpoint=file)
    with pytest.raises(ValueError, match=r"run called the model 1 times, and 2 times when"):
        calibrated(model, runner(model, LEVELS[:1]), checkpoint=file)
    data = json.loads(file.read_text())
    data["calls"][1]["nodes"][0][1]["density"] = 1.5
    file.write_text(json.dumps(data))
    with pytest.raises(PolicyFormatError, match=r"calls\[1\]\.nodes\[0\]\[1\]\.density: must be"):
        calibrated(checkpoint=file)
    file.write_text("{")
    with pytest.raises(PolicyFormatError, match="no JSON"):
        calibrated(checkpoint=file)


def test_a_calibration_that_leaves_everything_dense_can_be_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.Stack(7)  # sevenths do not add up to 1 exactly
    policy = calibrated(model, runner(model), max_error=1e-9, candidates=[0.9])
    assert policy.calibration.chosen.density == pytest.approx(1.0)
    save_policy(policy, tmp_path / "dense.json")
    assert load_policy(tmp_path / "dense.json").nodes == policy.nodes


def test_what_cannot_be_calibrated_says_why() -> None:
    model = stack()
    run = runner(model)
    for options, error, says in (
        ({"max_error": 0}, ValueError, r"max_error must be in \(0, 1\], got 0"),
        ({"max_error": "1 %"}, TypeError, "max_error must be a number"),
        ({"candidates": []}, ValueError, "candidates is empty"),
        ({"candidates": [0.9, 2]}, ValueError, "a candidate must be in"),
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
        ({"run": 3}, TypeError, "run must be a function of a backend, got int"),
        ({"run": lambda backend: None}, ValueError, "run never called the model"),
        ({"min_kv_len": 10_000}, ValueError, "no attention node of this model can be filtered"),
        ({"grid": (0, 16, 32)}, ValueError, "grid"),
    ):
        with pytest.raises(error, match=says):
            calibrated(**{"model": model, "run": run, **options})

    def now_and_then(backend: cef_compile.Backend) -> None:
        backend.set_noise_level(0.5)
        model(models.tokens(512))
        backend.set_noise_level(None)
        model(models.tokens(512))

    with pytest.raises(ValueError, match="sets the noise level for some calls only"):
        calibrated(model, now_and_then)
    seeds = itertools.count()
    with pytest.raises(ValueError, match="call 1 of run is another than before"):
        calibrated(model, lambda backend: model(models.tokens(512, seed=next(seeds))))

    class Noisy(models.Stack):
        def forward(self, x):
            return super().forward(x) + torch.randn_like(x)

    noisy = Noisy(2)
    with pytest.raises(ValueError, match="answers the same inputs differently"):
        calibrated(noisy, runner(noisy))
    model.blocks[1].compile()
    with pytest.raises(ValueError, match=r"before it is compiled; compiled here: blocks\.1"):
        calibrated(model)


def test_it_measures_in_the_order_of_a_grid() -> None:
    """Random attention needs other tiles in another order."""
    ordered, raster = (calibrated(grid=grid).calibration for grid in ((2, 16, 16), None))
    assert ordered.nodes != raster.nodes


def test_it_says_when_balanced_is_better(monkeypatch) -> None:
    model = stack()

    def no_better(self: Calibration) -> bool:
        return False

    monkeypatch.setattr(Calibration, "beats_balanced", property(no_better))
    with pytest.warns(UserWarning, match="no better than Balanced here"):
        cef_compile.calibrate(
            model, runner(model), max_error=0.05, candidates=[0.9], progress=False
        )


def test_it_needs_no_tqdm(monkeypatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == "tqdm":
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    calibrated(candidates=[0.9], progress=True)


# --- on the trained model ------------------------------------------------------------------------

BUDGET = 0.01
ALLOWANCE = 1.3
WAN_LEVELS = (0.7, 0.2)
FRAMES, SIZE = 4, 96


def wan_inputs(clip: int, seed: int, level: float) -> tuple[torch.Tensor, ...]:
    video, text = load_clip(clip, FRAMES, SIZE)
    return add_noise(unshuffle(video)[None], seed, level), torch.tensor([1000 * level]), text


@torch.no_grad()
def test_the_trained_model_keeps_a_budget_of_1_percent_on_another_clip_and_seed(tmp_path) -> None:
    model = load_model(torch.device("cpu"), torch.float32)

    def run(backend: cef_compile.Backend) -> None:
        for level in WAN_LEVELS:
            backend.set_noise_level(level)
            model(*wan_inputs(0, 0, level), return_dict=False)

    counters.clear()
    policy = cef_compile.calibrate(
        model, run, max_error=BUDGET, candidates=(0.99, 0.97, 0.95, 0.9), progress=False
    )
    assert counters["stats"]["unique_graphs"] == 1
    calibration = policy.calibration
    print(calibration)
    assert calibration is not None
    assert calibration.chosen.error <= BUDGET
    assert calibration.chosen.predicted_time < 1
    assert calibration.beats_balanced
    for best in (calibration.best_uniform, calibration.best_balanced):
        assert best is None or best.predicted_time > calibration.chosen.predicted_time
    save_policy(policy, tmp_path / "wan.json")
    torch._dynamo.reset()
    backend = cef_compile.backend(policy=load_policy(tmp_path / "wan.json"), inner="eager")
    compiled = torch.compile(model, backend=backend)
    for clip, seed in ((0, 1), (1, 2)):
        squares = []
        for level in WAN_LEVELS:
            backend.set_noise_level(level)
            inputs = wan_inputs(clip, seed, level)
            dense = model(*inputs, return_dict=False)[0]
            got = compiled(*inputs, return_dict=False)[0]
            squares.append(((got - dense).norm() / dense.norm()).item() ** 2)
        assert sqrt(sum(squares) / len(squares)) <= ALLOWANCE * BUDGET

"""Schedules: which band holds, what is compiled, and that a new level compiles nothing."""

from __future__ import annotations

import math
from typing import Any

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_policy import NO_NUMBERS, NODE

import cef_compile
from cef_compile import Balanced, Decision, Reason, Rules, Schedule, Uniform
from cef_compile.policy import Bands, band_at, noise_bands

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

LEVELS = [0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 14.6]
VALUES = st.sampled_from([None, 0.5, 0.9, 1.0, Decision(0.9, group="a"), Balanced(0.8)])


def bands_of(policy: Any) -> list[tuple[float, float | None]]:
    return [(level, decision.recall) for level, decision in noise_bands(policy, NODE)]


def at(bands: Bands, level: float) -> Decision:
    return bands[band_at(bands, level)][1]


schedules = st.dictionaries(st.sampled_from(LEVELS[1:]), VALUES, max_size=4).flatmap(
    lambda bands: VALUES.map(lambda low: Schedule({**bands, 0.0: low}))
)


class TestBands:
    def test_dense_above_a_level_then_rising(self) -> None:
        schedule = Schedule({0.86: None, 0.0: 0.9, 0.5: 0.98})
        assert bands_of(schedule) == [(0.0, 0.9), (0.5, 0.98), (0.86, None)]
        assert list(schedule.bands) == [0.86, 0.5, 0.0]
        assert schedule.decide(NODE) == Decision(0.9)
        bands = noise_bands(schedule, NODE)
        for level, recall in ((0, 0.9), (0.49, 0.9), (0.5, 0.98), (0.86, None), (80.0, None)):
            assert at(bands, level).recall == recall
        assert at(bands, 1.0).detail == "noise level 0.86"

    @given(schedule=schedules, level=st.sampled_from([*LEVELS, 0.3, 3.0]))
    def test_the_highest_band_at_or_below_the_level_holds(self, schedule, level) -> None:
        key = max(lower for lower in schedule.bands if lower <= level)
        wanted = Rules({"*": schedule.bands[key]}).decide(NODE)
        found = at(schedule.noise_bands(NODE), level)
        assert (found.recall, found.group) == (wanted.recall, wanted.group)
        filtered = any(not d.is_dense for _, d in schedule.noise_bands(NODE))
        assert schedule.decide(NODE).is_dense == (not filtered)

    @given(
        outer=schedules, inner=schedules, edge=st.sampled_from(LEVELS[1:]), level=st.floats(0, 9)
    )
    def test_schedules_nest(self, outer, inner, edge, level) -> None:
        nested = Schedule({edge: Rules({NODE.path: outer}), 0.0: inner})
        found = at(noise_bands(nested, NODE), level)
        wanted = at(noise_bands(outer if level >= edge else inner, NODE), level)
        assert found == wanted

    def test_equal_neighbours_are_one_band(self) -> None:
        assert bands_of(Schedule({0.7: 0.9, 0.3: 0.9, 0.0: 0.5})) == [(0.0, 0.5), (0.3, 0.9)]
        assert bands_of(Rules({"*": Schedule({0.0: 0.5})})) == [(0.0, 0.5)]
        assert bands_of(Rules({"other": Schedule({0.5: None, 0.0: 0.5})})) == [(0.0, None)]

    def test_bands_of_different_filters_are_an_error_that_names_the_node(self) -> None:
        schedule = Schedule({0.5: Uniform(0.9, filter="online"), 0.0: 0.9})
        with pytest.raises(ValueError, match=r"blocks\.0\.attn1#0 want different filters"):
            schedule.decide(NODE)
        fine = Schedule({0.5: Uniform(0.99, filter="online"), 0.1: Uniform(0.9, "online"), 0: None})
        assert fine.decide(NODE).variant == (
            "online",
            "share",
            "mean",
            False,
            False,
            "exact",
            "grid",
        )


class TestErrors:
    @pytest.mark.parametrize("level", ["0.5", True, None, 1j, torch.tensor(0.5)], ids=str)
    def test_a_level_of_the_wrong_type(self, level: Any) -> None:
        with pytest.raises(TypeError, match="must be a Python number, got"):
            Schedule({level: 0.9, 0.0: 0.9})
        if level is not None:
            with pytest.raises(TypeError, match=f"sigma .* got {type(level).__name__}"):
                cef_compile.backend().set_noise_level(level)

    @pytest.mark.parametrize("level", [-0.1, math.nan, math.inf])
    def test_a_level_out_of_range(self, level: float) -> None:
        with pytest.raises(ValueError, match=f"at least 0 and finite, got {level}"):
            Schedule({level: 0.9, 0.0: 0.9})
        with pytest.raises(ValueError, match=f"at least 0 and finite, got {level}"):
            cef_compile.backend().set_noise_level(level)

    def test_a_gap_at_the_bottom(self) -> None:
        with pytest.raises(ValueError, match=r"noise levels below 0\.2: add a band for 0"):
            Schedule({0.5: None, 0.2: 0.9})
        with pytest.raises(ValueError, match="says nothing of noise levels: add a band for 0"):
            Schedule({})

    @pytest.mark.parametrize("value", [v for v in NO_NUMBERS if v is not None], ids=str)
    def test_a_value_of_the_wrong_type(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r"the recall of noise level 0\.5 must be a number"):
            Schedule({0.5: value, 0.0: 0.9})

    def test_no_mapping(self) -> None:
        with pytest.raises(TypeError, match=r"needs a mapping from noise level .* got \[\(0"):
            Schedule([(0, 0.9)])  # type: ignore[arg-type]


class Counting:
    """An inner compiler that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm, example_inputs, **kwargs):
        self.graphs += 1
        return gm.forward


def compiled_stack(policy: Any, regional: bool) -> tuple[Any, Any, Any, Counting]:
    counter = Counting()
    backend = cef_compile.backend(policy=policy, inner=counter)
    model = models.Stack()
    for module in model.blocks if regional else [model]:
        module.compile(backend=backend)
    return model, models.tokens(), backend, counter


def alone(model: Any, policy: Any) -> Any:
    """Output under a policy without a schedule, as the first call gives it."""
    torch._dynamo.reset()
    twin = models.Stack()
    twin.load_state_dict(model.state_dict())
    return torch.compile(twin, backend=cef_compile.backend(policy=policy, inner="eager"))(
        models.tokens()
    )


@torch.no_grad()
@pytest.mark.parametrize("regional", [False, True])
def test_levels_change_what_runs_and_compile_nothing(regional: bool) -> None:
    rules = {
        "blocks.0": Schedule({0.8: None, 0.4: 0.9, 0.0: 0.5}),
        "blocks.1": None,
        "*": Schedule({0.6: 1.0, 0.0: Decision(0.7, threshold=0.05)}),
    }
    model, x, backend, counter = compiled_stack(Rules(rules), regional)
    outputs = {}
    for level in (1.0, 0.7, 0.5, 0.1, 0.7, 1.0):
        backend.set_noise_level(level)
        assert backend.noise_level == level
        out = model(x)
        assert torch.equal(outputs.setdefault(level, out), out)
        recalls = [node.recall for node in backend.report.nodes]
        first = None if level >= 0.8 else 0.9 if level >= 0.4 else 0.5
        assert recalls == [first, None, 1.0 if level >= 0.6 else 0.7]
    assert counter.graphs == 1
    calls = [node.calls for node in backend.report.nodes]
    assert calls == [4, 0, 6]
    for level, plain in (
        (1.0, {"blocks.2": 1.0}),
        (0.5, {"blocks.0": 0.9, "blocks.2": Decision(0.7, threshold=0.05)}),
        (0.1, {"blocks.0": 0.5, "blocks.2": Decision(0.7, threshold=0.05)}),
    ):
        torch.testing.assert_close(outputs[level], alone(model, Rules(plain)))


@torch.no_grad()
@pytest.mark.parametrize("regional", [False, True])
def test_a_node_that_any_level_filters_is_compiled_filtered(regional: bool) -> None:
    policy = Schedule({0.5: None, 0.0: 0.5})
    model, x, backend, counter = compiled_stack(policy, regional)
    backend.set_noise_level(1.0)
    dense = model(x)
    nodes = backend.report.nodes
    assert [node.reason for node in nodes] == [str(Reason.POLICY)] * 3
    assert {node.detail for node in nodes} == {"noise level 0.5"}
    backend.set_noise_level(0.2)
    assert not torch.equal(model(x), dense)
    assert [node.calls for node in backend.report.nodes] == [1, 1, 1]
    assert counter.graphs == 1


@torch.no_grad()
def test_a_node_that_no_level_filters_stays_on_sdpa() -> None:
    model, x, backend, _ = compiled_stack(
        Schedule({0.5: None, 0.0: Rules({"blocks.1": 0.5})}), False
    )
    backend.set_noise_level(0.0)
    model(x)
    assert [node.calls for node in backend.report.nodes] == [0, 1, 0]


@torch.no_grad()
@pytest.mark.parametrize("regional", [False, True])
def test_a_call_without_a_level_raises_and_dense_needs_none(regional: bool) -> None:
    model, x, backend, _ = compiled_stack(Schedule({0.5: None, 0.0: 0.5}), regional)
    says = r"no noise level is set: call backend\.set_noise_level\(sigma\)"
    with pytest.raises(RuntimeError, match=says):
        model(x)
    with backend.dense():
        dense = model(x)
    backend.set_noise_level(0.7)
    assert torch.equal(model(x), dense)
    backend.set_noise_level(None)
    with pytest.raises(RuntimeError, match=says):
        model(x)
    backend.set_policy(Uniform(1.0))
    model(x)


@torch.no_grad()
def test_balanced_in_a_band_takes_the_target_of_the_band() -> None:
    schedule = Schedule({0.5: Balanced(0.95), 0.0: Balanced(0.6)})
    model, x, backend, counter = compiled_stack(schedule, False)
    twin = models.Stack()
    twin.load_state_dict(model.state_dict())
    other = cef_compile.backend(recall=0.95, inner="eager")
    plain = torch.compile(twin, backend=other)
    for level, recall in ((0.9, 0.95), (0.9, 0.95), (0.1, 0.6), (0.1, 0.6), (0.9, 0.95)):
        backend.set_noise_level(level)
        other.set_recall(recall)
        model(x)
        plain(x)
        thresholds = [node.threshold for node in backend.report.nodes]
        assert thresholds == [node.threshold for node in other.report.nodes]
    assert len(set(thresholds)) == 1
    assert counter.graphs == 1


@torch.no_grad()
def test_a_schedule_may_replace_a_policy_and_the_other_way_round() -> None:
    model, x, backend, counter = compiled_stack(Uniform(0.9), False)
    model(x)
    backend.set_noise_level(0.9)
    backend.set_policy(Schedule({0.5: None, 0.0: 0.5}))
    assert [node.recall for node in backend.report.nodes] == [None] * 3
    backend.set_noise_level(0.1)
    assert [node.recall for node in backend.report.nodes] == [0.5] * 3
    backend.set_policy(Uniform(0.9))
    backend.set_noise_level(0.9)
    model(x)
    assert [node.recall for node in backend.report.nodes] == [0.9] * 3
    assert counter.graphs == 1


@torch.no_grad()
def test_a_level_keeps_the_seeds_of_an_audit_going() -> None:
    model, x, backend, _ = compiled_stack(Schedule({0.5: 0.9, 0.0: 0.5}), False)
    seeds = []
    with backend.audit():
        for level in (0.9, 0.1, 0.9):
            backend.set_noise_level(level)
            model(x)
            seeds.append([node.control[-1].item() for node in backend._states[0].nodes])
    assert seeds == [[1.0] * 3, [2.0] * 3, [3.0] * 3]


@pytest.mark.parametrize("compiling", [torch.no_grad, torch.inference_mode])
def test_levels_may_change_in_inference_mode_and_outside_it(compiling) -> None:
    model, x, backend, counter = compiled_stack(Schedule({0.5: None, 0.0: 0.5}), False)
    outputs: dict[float, Any] = {}
    with compiling():
        for level in (0.9, 0.1):
            backend.set_noise_level(level)
            outputs[level] = model(x).clone()
    for mode in (torch.no_grad, torch.inference_mode):
        for level in (0.9, 0.1):
            with mode():
                backend.set_noise_level(level)
                assert torch.equal(model(x), outputs[level])
    assert counter.graphs <= 2  # one for each mode, as without a schedule


@torch.no_grad()
def test_explain_shows_level_0() -> None:
    report = cef_compile.explain(
        models.Stack(), models.tokens(), policy=Schedule({0.5: None, 0.0: 0.8})
    )
    assert [node.recall for node in report.nodes] == [0.8] * 3

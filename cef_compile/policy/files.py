"""Policies as plain JSON files.

A file holds what the policy says and nothing else: reading one either gives back exactly that, or
raises :class:`PolicyFormatError` with the place. Nothing in a file has a default, but for keys that
files of an earlier release lack.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from cef_compile.policy.bands import Bands
from cef_compile.policy.builtin import Balanced, Rules, Uniform
from cef_compile.policy.calibration import Calibration, Candidate, MeasuredNode, Tried
from cef_compile.policy.decision import (
    CERTIFICATES,
    FILTER_RULES,
    ORDERS,
    SCORES,
    Decision,
    PolicyLike,
)
from cef_compile.policy.json_files import Place, read_json, write_json
from cef_compile.policy.node import Reason
from cef_compile.policy.nodes import NodeEntry, NodePolicy, check_entry
from cef_compile.policy.schedule import Schedule

FORMAT = "cef_compile policy"
VERSION = 1

_DECISION = tuple(field.name for field in fields(Decision))
_UNIFORM = tuple(field.name for field in fields(Uniform))
_BALANCED = tuple(field.name for field in fields(Balanced))
_LATER = {"bound": False, "scores": SCORES[0]}
"""Keys that came after the first files, and what it means where one is missing."""
_DTYPES = tuple(
    sorted(
        str(value).removeprefix("torch.")
        for value in vars(torch).values()
        if isinstance(value, torch.dtype)
    )
)


def save_policy(policy: PolicyLike, path: str | os.PathLike[str]) -> None:
    """Write a policy to a JSON file, replacing the file if there is one.

    Args:
        policy: a Balanced, Uniform, Rules, Schedule, or what ``calibrate`` or
            ``backend.frozen_policy()`` returned.
        path: the file.

    Raises:
        TypeError: the policy, or one inside it, is a function or a class of your own: what code
            does cannot be written down.
        OSError: the file cannot be written.
    """
    head = {"format": FORMAT, "version": VERSION}
    write_json(path, {**head, **_policy_data(policy, "the policy")})


def load_policy(path: str | os.PathLike[str]) -> Balanced | Uniform | Rules | Schedule:
    """Read a policy that :func:`save_policy` wrote, or that was written by hand to that format.

    Returns:
        a policy whose decisions equal those of the one that was saved.

    Raises:
        PolicyFormatError: the file is damaged or of another format or version; names the place.
        OSError: the file cannot be read.
    """
    whole = read_json(path)
    whole.at("format").string([FORMAT])
    version = whole.at("version")
    if version.integer() != VERSION:
        version.fail(f"this release reads version {VERSION}, got {version.value}")
    policy = _policy(whole, ("format", "version"))
    if isinstance(policy, (Balanced, Uniform, Rules, Schedule)):
        return policy
    return whole.at("kind").fail("a decision alone is no policy; a file holds a whole one")


def _policy_data(policy: Any, where: str) -> dict[str, Any]:
    if type(policy) is Uniform:
        return {"kind": "uniform", **{name: getattr(policy, name) for name in _UNIFORM}}
    if type(policy) is Balanced:
        return {"kind": "balanced", **{name: getattr(policy, name) for name in _BALANCED}}
    if type(policy) is Rules:
        rules = [
            {"pattern": pattern, "value": _value_data(value, f"rule {pattern!r}")}
            for pattern, value in policy.rules.items()
        ]
        return {"kind": "rules", "rules": rules}
    if type(policy) is Schedule:
        bands = [
            {"from": level, "value": _value_data(value, f"noise level {level!r}")}
            for level, value in policy.bands.items()
        ]
        return {"kind": "schedule", "bands": bands}
    if type(policy) is NodePolicy:
        return {
            "kind": "nodes",
            "model": policy.model,
            "nodes": [_entry_data(entry) for entry in policy.nodes],
            "calibration": _calibration_data(policy.calibration),
        }
    raise TypeError(
        f"{where} cannot be saved: {policy!r} is code of your own. Balanced, Uniform, Rules and"
        " Schedule can, and so can what backend.frozen_policy() makes of any policy once it has run"
    )


def _value_data(value: Any, where: str) -> Any:
    if value is None:
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, Decision):
        return {"kind": "decision", **_decision_data(value)}
    return _policy_data(value, where)


def _decision_data(decision: Decision) -> dict[str, Any]:
    data = {name: getattr(decision, name) for name in _DECISION}
    return {**data, "reason": None if decision.reason is None else decision.reason.name}


def _entry_data(entry: NodeEntry) -> dict[str, Any]:
    return {
        "path": entry.path,
        "ordinal": entry.ordinal,
        "q_shape": list(entry.q_shape),
        "k_shape": list(entry.k_shape),
        "dtype": entry.dtype,
        "bands": [{"from": level, **_decision_data(decision)} for level, decision in entry.bands],
    }


def _calibration_data(calibration: Calibration | None) -> dict[str, Any] | None:
    if calibration is None:
        return None
    return {
        "max_error": calibration.max_error,
        "calls": calibration.calls,
        "chosen": _tried_data(calibration.chosen),
        "balanced": [_tried_data(tried) for tried in calibration.balanced],
        "uniform": [_tried_data(tried) for tried in calibration.uniform],
        "nodes": [
            {
                "path": node.path,
                "ordinal": node.ordinal,
                "noise_level": node.noise_level,
                "candidates": [dict(vars(candidate)) for candidate in node.candidates],
            }
            for node in calibration.nodes
        ],
    }


def _tried_data(tried: Tried) -> dict[str, Any]:
    return dict(vars(tried))


def _policy(place: Place, head: tuple[str, ...] = ()) -> Any:
    kinds: dict[str, Callable[[Place, tuple[str, ...]], Any]] = {
        "uniform": _uniform,
        "balanced": _balanced,
        "rules": _rules,
        "schedule": _schedule,
        "nodes": _nodes,
        "decision": _decision_value,
    }
    return kinds[place.at("kind").string(kinds)](place, (*head, "kind"))


def _value(place: Place) -> Any:
    if place.is_null():
        return None
    return _policy(place) if place.is_object() else place.fraction()


def _uniform(place: Place, head: tuple[str, ...]) -> Uniform:
    found = place.fields(*head, *_UNIFORM, **_LATER)
    recall = found["recall"].fraction()
    filter_ = found["filter"].string(FILTER_RULES)
    certify = found["certify"].string(("", *CERTIFICATES))
    bound = found["bound"].boolean()
    scores = found["scores"].string(SCORES)
    return place.make(lambda: Uniform(recall, filter_, certify, bound, scores))


def _balanced(place: Place, head: tuple[str, ...]) -> Balanced:
    found = place.fields(*head, *_BALANCED, **_LATER)
    return Balanced(found["recall"].fraction(), found["scores"].string(SCORES))


def _rules(place: Place, head: tuple[str, ...]) -> Rules:
    rules: dict[str, Any] = {}
    for rule in place.fields(*head, "rules")["rules"].items():
        found = rule.fields("pattern", "value")
        pattern, value = found["pattern"].string(), _value(found["value"])
        if pattern in rules:
            found["pattern"].fail(f"the pattern {pattern!r} is given twice")
        rules[pattern] = value
        found["pattern"].make(lambda one={pattern: value}: Rules(one))  # type: ignore[misc]
    return Rules(rules)


def _schedule(place: Place, head: tuple[str, ...]) -> Schedule:
    bands: dict[float, Any] = {}
    listed = place.fields(*head, "bands")["bands"]
    for band in listed.items():
        found = band.fields("from", "value")
        level = found["from"].number()
        if bands and level >= min(bands):
            found["from"].fail(f"the bands must descend, got {level!r} after {min(bands)!r}")
        bands[level] = _value(found["value"])
    return listed.make(lambda: Schedule(bands))


def _nodes(place: Place, head: tuple[str, ...]) -> NodePolicy:
    found = place.fields(*head, "model", "nodes", "calibration")
    entries: list[NodeEntry] = []
    for node in found["nodes"].items():
        entry = _entry(node)
        if entry.key in {other.key for other in entries}:
            node.fail(f"node {entry} is given twice")
        entries.append(entry)
    model, calibration = found["model"].string(), found["calibration"].optional(_calibration)
    return found["nodes"].make(lambda: NodePolicy(model, entries, calibration))


def _entry(place: Place) -> NodeEntry:
    found = place.fields("path", "ordinal", "q_shape", "k_shape", "dtype", "bands")
    entry = NodeEntry(
        path=found["path"].string(),
        ordinal=found["ordinal"].integer(),
        q_shape=_shape(found["q_shape"]),
        k_shape=_shape(found["k_shape"]),
        dtype=found["dtype"].string(_DTYPES),
        bands=_bands(found["bands"]),
    )
    return found["bands"].make(lambda: check_entry(entry))


def _shape(place: Place) -> tuple[int, ...]:
    sizes = tuple(size.integer(least=-1) for size in place.items())
    if len(sizes) < 2:
        place.fail(f"a shape ends with a length and a head_dim, got {len(sizes)} sizes")
    return sizes


def _bands(place: Place) -> Bands:
    bands = []
    for band in place.items():
        found = band.fields("from", *_DECISION, **_LATER)
        bands.append((found["from"].number(), _decision(band, found)))
    return tuple(bands)


def _decision_value(place: Place, head: tuple[str, ...]) -> Decision:
    return _decision(place, place.fields(*head, *_DECISION, **_LATER))


def _decision(place: Place, found: dict[str, Place]) -> Decision:
    recall = found["recall"].optional(Place.fraction)
    filter_ = found["filter"].string(FILTER_RULES)
    reason = found["reason"].optional(lambda name: Reason[name.string(Reason.__members__)])
    if recall is None and reason is None:
        found["reason"].fail("a dense node has a reason, got null")
    rule = found["rule"].string(FILTER_RULES[filter_])
    certify = found["certify"].string(CERTIFICATES)
    bound = found["bound"].boolean()
    threshold = found["threshold"].optional(Place.fraction)
    density = found["density"].optional(Place.fraction)
    compensate = found["compensate"].boolean()
    order = found["order"].string(ORDERS)
    scores = found["scores"].string(SCORES)
    group = found["group"].optional(Place.string)
    detail = found["detail"].string()
    return place.make(
        lambda: Decision(
            recall=recall,
            filter=filter_,
            rule=rule,
            certify=certify,
            bound=bound,
            threshold=threshold,
            density=density,
            compensate=compensate,
            order=order,
            scores=scores,
            group=group,
            reason=reason,
            detail=detail,
        )
    )


def _calibration(place: Place) -> Calibration:
    found = place.fields("max_error", "calls", "chosen", "balanced", "uniform", "nodes")
    return Calibration(
        max_error=found["max_error"].number(),
        calls=found["calls"].integer(least=1),
        chosen=_tried(found["chosen"]),
        balanced=tuple(_tried(one) for one in found["balanced"].items()),
        uniform=tuple(_tried(one) for one in found["uniform"].items()),
        nodes=tuple(_measured(node) for node in found["nodes"].items()),
    )


def _tried(place: Place) -> Tried:
    found = place.fields("recall", "error", "predicted_time", "density")
    return Tried(
        recall=found["recall"].optional(Place.fraction),
        error=found["error"].number(),
        predicted_time=found["predicted_time"].number(),
        density=found["density"].fraction(),
    )


def _measured(place: Place) -> MeasuredNode:
    found = place.fields("path", "ordinal", "noise_level", "candidates")
    return MeasuredNode(
        path=found["path"].string(),
        ordinal=found["ordinal"].integer(),
        noise_level=found["noise_level"].optional(Place.number),
        candidates=tuple(read_candidate(one) for one in found["candidates"].items()),
    )


def read_candidate(place: Place) -> Candidate:
    """One candidate, as calibrated policies and checkpoints hold it."""
    found = place.fields("recall", "output_error", "attention_error", "density")
    return Candidate(
        recall=found["recall"].fraction(),
        output_error=found["output_error"].number(),
        attention_error=found["attention_error"].number(),
        density=found["density"].fraction(),
    )

"""A report and its audit as one piece of plain data: what ``report.json`` holds.

``{"policy", "unmatched_rules", "breaks", "mean", "passes", "nodes": [{..., "audit": {...} or
None}], ...}``, and, where they are known, ``"environment"``, ``"tile_maps"`` and ``"page"``: what a
page shows besides, ``{"title", "tables": [{"title", "header", "rows", "note"}], "frames": {caption:
file}}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

NODE_FIELDS: Final[Mapping[str, tuple[type, ...]]] = {
    "model": (str,),
    "path": (str,),
    "ordinal": (int,),
    "form": (str,),
    "kind": (str,),
    "q_len": (int,),
    "kv_len": (int,),
    "decision": (str,),
    "filter": (str,),
    "recall": (int, float, type(None)),
    "reason": (str,),
    "detail": (str,),
    "density": (int, float, type(None)),
    "estimated_recall": (int, float, type(None)),
}
"""What a page needs of a node, and its types."""
AUDIT_FIELDS: Final[Mapping[str, tuple[type, ...]]] = {
    "target": (int, float),
    "recall": (int, float, type(None)),
    "error": (int, float, type(None)),
    "density": (int, float),
    "calls": (int,),
    "interval": (list, tuple),
    "error_interval": (list, tuple),
    "recalls": (list, tuple),
    "errors": (list, tuple),
    "densities": (list, tuple),
}
"""Recall and error are None where the model's numbers were not finite."""
CALL_FIELDS: Final = ("recalls", "errors", "densities")
"""What an audit has for each call."""
MEANS: Final = ("recall", "error", "density")
"""What an audit has for the model."""
BREAK_FIELDS: Final[Mapping[str, tuple[type, ...]]] = dict.fromkeys(
    ("model", "place", "reason", "remedy"), (str,)
)
PASS_FIELDS: Final[Mapping[str, tuple[type, ...]]] = {
    "model": (str,),
    "step": (str,),
    "branch": (str,),
}
RECORD_FIELDS: Final[Mapping[str, tuple[type, ...]]] = {
    "unmatched_rules": (list,),
    "breaks": (list,),
    "passes": (list,),
    "tile_maps": (list,),
    "environment": (dict, type(None)),
}
PAGE_FIELDS: Final[Mapping[str, tuple[type, ...]]] = {
    "title": (str,),
    "tables": (list,),
    "frames": (dict,),
}
TABLE_FIELDS: Final[Mapping[str, tuple[type, ...]]] = {
    "title": (str,),
    "header": (list,),
    "rows": (list,),
    "note": (str,),
}
TILE_MAP_FIELDS: Final[Mapping[str, tuple[type, ...]]] = {
    "model": (str,),
    "path": (str,),
    "ordinal": (int,),
    "q_tiles": (int,),
    "kv_tiles": (int,),
    "panels": (list,),
}
PANEL_FIELDS: Final[Mapping[str, tuple[type, ...]]] = {
    "name": (str,),
    "density": (int, float),
    "rows": (int,),
    "columns": (int,),
    "cells": (str,),
}
PAGE: Final[Mapping[str, Any]] = {"title": "Attention report", "tables": [], "frames": {}}
Key = tuple[str, str, int]


class RecordError(ValueError):
    """A file that holds no report; the message names the place and what was found there."""


def join(report: Mapping[str, Any], audit: Mapping[str, Any] | None) -> dict[str, Any]:
    """The nodes of a report, each with its audit.

    Args:
        report: a :meth:`Report.to_dict <cef_compile.report.Report.to_dict>`.
        audit: an :meth:`Audit.to_dict <cef_compile.report.Audit.to_dict>`.

    Returns:
        plain data; what is not finite is None, as JSON wants it.
    """
    audited = {key(node): node for node in audit["nodes"]} if audit else {}
    nodes: list[dict[str, Any]] = []
    # A node that was compiled for several sizes is listed once for each, and audited as one; its
    # audit stands with the newest that ran filtered, be it dense at the noise level of now.
    for node in reversed(report["nodes"]):
        ran = node["decision"] == "filtered" or node["calls"]
        found = audited.pop(key(node), None) if ran else None
        nodes.insert(0, {**node, "audit": found})
    return finite(
        {
            "policy": report["policy"],
            "unmatched_rules": report["unmatched_rules"],
            "breaks": report["breaks"],
            "mean": {name: audit[name] for name in MEANS} if audit else None,
            "passes": audit["passes"] if audit else [],
            "nodes": nodes,
        }
    )


def key(node: Mapping[str, Any]) -> Key:
    """What tells a node from the others of a report."""
    return node["model"], node["path"], node["ordinal"]


def finite(value: Any) -> Any:
    """``value`` with None for every number that is not finite, however deep."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check(data: Any) -> dict[str, Any]:
    """``data`` with everything that a page needs.

    Raises:
        RecordError: something is missing or of the wrong type.
    """
    _fields(data, {"nodes": (list,), "policy": (str,)}, "the file")
    record = {
        "unmatched_rules": [],
        "breaks": [],
        "mean": None,
        "passes": [],
        "tile_maps": [],
        **data,
    }
    record.setdefault("environment", None)
    _fields({"page": record.get("page", {})}, {"page": (dict,)}, "the file")
    record["page"] = {**PAGE, **record.get("page", {})}
    _fields(record, RECORD_FIELDS, "the file")
    _fields(record["page"], PAGE_FIELDS, "page")
    for i, found in enumerate(record["breaks"]):
        _fields(found, BREAK_FIELDS, f"breaks[{i}]")
    for i, table in enumerate(record["page"]["tables"]):
        _fields(table, TABLE_FIELDS, f"page.tables[{i}]")
    for i, tile_map in enumerate(record["tile_maps"]):
        _fields(tile_map, TILE_MAP_FIELDS, f"tile_maps[{i}]")
        for j, panel in enumerate(tile_map["panels"]):
            _fields(panel, PANEL_FIELDS, f"tile_maps[{i}].panels[{j}]")
    if record["mean"] is not None:
        _fields(record["mean"], dict.fromkeys(MEANS, (int, float, type(None))), "mean")
    for i, pass_ in enumerate(record["passes"]):
        _fields(pass_, PASS_FIELDS, f"passes[{i}]")
    for i, node in enumerate(record["nodes"]):
        _fields(node, NODE_FIELDS, f"nodes[{i}]")
        node.setdefault("audit", None)
        node.setdefault("engine", "")
        if node["audit"] is not None:
            _audit(node["audit"], f"nodes[{i}].audit", len(record["passes"]))
    return record


def _audit(audit: Any, place: str, passes: int) -> None:
    _fields(audit, AUDIT_FIELDS, place)
    calls = len(audit["recalls"])
    audit.setdefault("passes", [])
    _fields(audit, {"passes": (list, tuple)}, place)
    for name in CALL_FIELDS:
        if len(audit[name]) != calls:
            raise RecordError(f"{place}.{name} must have {calls} numbers, as recalls has")
    for name in ("interval", "error_interval"):
        if len(audit[name]) != 2:
            raise RecordError(f"{place}.{name} must have 2 numbers")
    if len(audit["passes"]) not in (0, calls) or any(
        not isinstance(i, int) or not 0 <= i < passes for i in audit["passes"]
    ):
        raise RecordError(f"{place}.passes must be {calls} indices below {passes}")
    for name in (*CALL_FIELDS, "interval", "error_interval"):
        for i, value in enumerate(audit[name]):
            if not isinstance(value, int | float | None):
                raise RecordError(f"{place}.{name}[{i}] must be a number or null, got {value!r}")


def _fields(data: Any, wanted: Mapping[str, tuple[type, ...]], place: str) -> None:
    if not isinstance(data, dict):
        raise RecordError(f"{place} must be a JSON object, got {type(data).__name__}")
    for name, types in wanted.items():
        if name not in data:
            raise RecordError(f"{place} has no {name!r}; is this a report of cef_compile?")
        if not isinstance(data[name], types):
            kinds = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise RecordError(f"{place}.{name} must be {kinds}, got {data[name]!r:.60}")

"""A report in words: what a reader should know before the numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def sentences(record: Mapping[str, Any]) -> list[str]:
    """Paragraphs about a record, see :mod:`cef_compile.report.record`."""
    nodes = record["nodes"]
    if not nodes:
        none = "No attention node was seen: run the compiled model once, then write the report."
        return [none, *break_sentences(record["breaks"])]
    filtered = [node for node in nodes if node["decision"] == "filtered"]
    dense = [node for node in nodes if node["decision"] != "filtered"]
    text = [_decisions(len(nodes), len(filtered), record["policy"]), _reasons(dense)]
    text += [f"{sentence}." for sentence in (*order_sentences(nodes), *bound_sentences(nodes))]
    if record["unmatched_rules"]:
        patterns = ", ".join(map(repr, record["unmatched_rules"]))
        text.append(f"Rules of the policy that match no node: {patterns}.")
    text += break_sentences(record["breaks"])
    audited = [node for node in nodes if node["audit"]]  # some may be dense by now
    if filtered or audited:
        text += _delivered(record, audited)
    return [paragraph for paragraph in text if paragraph]


def break_sentences(breaks: Sequence[Mapping[str, str]]) -> list[str]:
    """Where graphs were broken, one paragraph for all places where Dynamo met the same."""
    places: dict[tuple[str, str, str], list[str]] = {}
    for found in breaks:
        same = places.setdefault((found["model"], found["reason"], found["remedy"]), [])
        if found["place"] not in same:
            same.append(found["place"])
    return [
        f"The graph of {model} breaks at {where[0]}"
        + (f", and at {len(where) - 1} more" if len(where) > 1 else "")
        + f": {reason}. {remedy}"
        for (model, reason, remedy), where in places.items()
    ]


def _decisions(count: int, filtered: int, policy: str) -> str:
    are = "is" if filtered == 1 else "are"
    return f"Of {count} attention nodes {filtered} {are} filtered. Policy: {policy}."


def _reasons(dense: list[Mapping[str, Any]]) -> str:
    if not dense:
        return "None is dense."
    counts = Counter(node["reason"] for node in dense).most_common()
    return "Dense: " + "; ".join(f"{reason} ({count})" for reason, count in counts) + "."


def _delivered(record: Mapping[str, Any], audited: list[Mapping[str, Any]]) -> list[str]:
    if not audited:
        return [
            "Nothing was audited, so the achieved recall is not known: run the model inside"
            " backend.audit()."
        ]
    finite = [node for node in audited if node["audit"]["recall"] is not None]
    text = [_not_finite(len(audited) - len(finite))]
    if not finite:
        return text
    audits = [node["audit"] for node in finite]
    recall = sum(audit["recall"] for audit in audits) / len(audits)
    density = sum(audit["density"] for audit in audits) / len(audits)
    target = sum(audit["target"] for audit in audits) / len(audits)
    passes = len(record["passes"]) or max(audit["calls"] for audit in audits)
    worst = min(finite, key=lambda node: node["audit"]["recall"] - node["audit"]["target"])
    found = worst["audit"]
    low, high = found["interval"]
    within = "at" if abs(recall - target) < 0.005 else "above" if recall > target else "below"
    text.append(
        f"Over {passes} forward pass{'' if passes == 1 else 'es'} the filtered nodes computed"
        f" {100 * density:.1f} % of their key tiles, which carried {100 * recall:.1f} % of the"
        f" attention energy: {within} the target of {100 * target:.1f} %, which is a mean."
        f" The node furthest from it is {_name(worst)} with {100 * found['recall']:.1f} %"
        f" (95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
        f" at {100 * found['density']:.1f} % of its tiles."
    )
    text.append(_errors(finite))
    shares = {node["group"] for node in audited if node.get("group")}
    note = (
        "Nodes of a group share one threshold: peaked attention ends above the target and diffuse"
        " attention below, on purpose. "
        if shares
        else ""
    )
    text.append(f"{note}Tiles that were not computed are not time saved: choosing them costs too.")
    return text


def _not_finite(nodes: int) -> str:
    if not nodes:
        return ""
    are = "node has" if nodes == 1 else "nodes have"
    return f"{nodes} filtered {are} no recall: NaN or infinity was among the model's numbers."


def _errors(audited: list[Mapping[str, Any]]) -> str:
    """Of the output: in the mean, and where it is largest."""
    known = [node for node in audited if node["audit"]["error"] is not None]
    if not known:
        return ""
    mean = sum(node["audit"]["error"] for node in known) / len(known)
    worst = max(known, key=lambda node: node["audit"]["error"])
    low, high = worst["audit"]["error_interval"]
    return (
        f"Measured on the same sample against exact attention, their output was off by"
        f" {100 * mean:.1f} % of its size in the mean, and most in {_name(worst)}:"
        f" {100 * worst['audit']['error']:.1f} % (95 % interval {100 * low:.1f} to"
        f" {100 * high:.1f} %)."
    )


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['path'] or '(unnamed)'}#{node['ordinal']}"


def token_words(node: Mapping[str, Any]) -> str:
    """What the tokens of a node are: ``"4 x 16 x 16 + 12"`` for a video and 12 tokens of text.

    Empty where nothing is known of them; "raster" stands behind a grid that is not used.
    """
    grid, segments = node.get("grid"), list(node.get("segments") or ())
    if grid is None:
        return " + ".join(map(str, segments))
    words = " x ".join(map(str, grid))
    tokens = math.prod(grid)
    text = " + ".join(words if n == tokens else str(n) for n in segments or [tokens])
    return f"{text}, raster" if node.get("order") == "raster" else text


def order_sentences(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What there is to know of the order of tokens, and to do about it."""
    ordered = [
        node
        for node in nodes
        if node.get("order") == "grid"
        and node["kind"] != "cross"
        and node["q_len"] == node["kv_len"]
    ]
    unknown = sum(node.get("grid") is None for node in ordered)
    told = sum(node.get("grid_source") == "call" for node in ordered)
    sentences = []
    if told:
        sentences.append(
            f"{told} take the grid of their tokens from the call that was compiled; another one"
            " of as many tokens runs in the same order"
        )
    if unknown:
        sentences.append(
            f"{unknown} filtered in raster order: no grid of tokens was found; give"
            " backend(grid=(frames, height, width)), which takes fewer tiles for the same recall"
        )
    return sentences


def bound_sentences(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What there is to know of nodes whose ledger holds bounds; reports of before have none."""
    bounded = sum(bool(node.get("bound")) for node in nodes)
    if not bounded:
        return []
    return [
        f"{bounded} filtered with bound=True, by bounds of tiles' energies: the estimate is a lower"
        " bound of the recall, and only an audit shows what was achieved"
    ]

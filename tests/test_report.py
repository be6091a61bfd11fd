"""Reports and audits: plain data, tables, the arithmetic over calls."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Stack, tokens
from report_cases import DENSE, FILTERED, NODE

import cef_compile
from cef_compile.policy import Decision
from cef_compile.report import Audit, AuditedNode, Report, ReportedNode
from cef_compile.report.record import join
from cef_compile.report.table import number, text_table
from cef_compile.report.words import sentences

SHARES = st.floats(0, 1, width=32)
STDERRS = st.floats(0, 0.25, width=32)
CALLS = st.tuples(
    SHARES, SHARES, SHARES, STDERRS, st.floats(-16, 0, width=32), st.floats(0, 4, width=32), STDERRS
)
"""Density, estimate, recall, its stderr, log2 of the threshold, error, its stderr."""


SEQUENCES = [f.name for f in fields(AuditedNode) if str(f.type).startswith("tuple")]


class TestReport:
    def test_plain_data_comes_back_from_json(self) -> None:
        report = Report("Balanced(recall=0.9)", [FILTERED, DENSE], ["oops.*"])
        plain = report.to_dict()
        back = json.loads(json.dumps(plain, allow_nan=False))
        assert list(back) == ["policy", "nodes", "unmatched_rules", "breaks"]
        assert back["policy"] == "Balanced(recall=0.9)"
        assert back["unmatched_rules"] == ["oops.*"]
        for node, data in zip(report.nodes, back["nodes"], strict=True):
            assert (data.pop("q_len"), data.pop("kv_len")) == (4096, 8192)
            for name in ("q_shape", "kv_shape", "grid", "segments"):
                data[name] = tuple(data[name])
            assert ReportedNode(**data) == node

    def test_text_says_what_the_tokens_are(self) -> None:
        joint = replace(FILTERED, kv_shape=FILTERED.q_shape, segments=(77, 4096), kind="joint")
        nodes = [
            joint,
            replace(joint, order="raster"),
            replace(joint, grid=None),
            replace(joint, grid=None, segments=()),
            replace(joint, grid_source="call"),
            replace(FILTERED, grid=None),
        ]
        text = str(Report("p", nodes))
        assert text.count("77 + 8 x 16 x 32") == 3
        assert text.count("77 + 8 x 16 x 32, raster") == 1
        assert text.count("77 + 4096") == 1
        assert (
            "  2 filtered in raster order: no grid of tokens was found; give backend(grid=" in text
        )
        assert "  1 take the grid of their tokens from the call that was compiled" in text
        assert "raster order" not in str(Report("p", [joint, replace(joint, order="raster")]))

    def test_text_says_where_the_estimate_is_a_lower_bound(self) -> None:
        bounded = replace(FILTERED, filter="online", bound=True)
        fresh = replace(bounded, calls=0, estimated_recall=None)
        nodes = [FILTERED, bounded, fresh, DENSE]
        report = Report("p", nodes)
        says = (
            "2 filtered with bound=True, by bounds of tiles' energies: the estimate is a lower"
            " bound of the recall, and only an audit shows what was achieved"
        )
        assert f"  {says}\n" in str(report)
        assert [line.count(">=") for line in str(report).splitlines()[-4:]] == [0, 1, 0, 0]
        assert ">= 0.910" in str(report)
        assert f"{says}." in sentences(join(report.to_dict(), None))
        assert "bound" not in str(Report("p", [FILTERED, DENSE]))
        # A report that was saved before there were bounds has no such key.
        old = Report("p", [FILTERED]).to_dict()
        del old["nodes"][0]["bound"]
        assert not any("bound" in text for text in sentences(join(old, None)))

    def test_filtered_and_dense(self) -> None:
        report = Report("p", [FILTERED, DENSE, FILTERED])
        assert report.filtered == [FILTERED, FILTERED]
        assert report.dense == [DENSE]

    def test_text_names_every_node_and_reason(self) -> None:
        nodes = [FILTERED, DENSE, replace(DENSE, path="", detail=""), replace(DENSE, reason="x")]
        text = str(Report("Balanced(recall=0.9)", nodes, ["oops.*"]))
        lines = text.splitlines()
        assert lines[0] == ("4 attention nodes: 1 filtered, 3 dense. Policy: Balanced(recall=0.9)")
        assert lines[1] == "  2 dense: cross attention to a short context"
        assert lines[2] == "  1 dense: x"
        assert lines[3] == "  rule 'oops.*' matches no node"
        assert lines[5].split() == [
            "node",
            "kind",
            "form",
            "q",
            "x",
            "kv",
            "tokens",
            "decision",
            "engine",
            "recall",
            "estimate",
            "density",
            "why",
        ]
        assert " ".join(lines[7].split()) == (
            "blocks.0.attn1#0 self softmax(bmm) 4096 x 8192 8 x 16 x 32"
            " planned triton 0.900 0.910 0.250"
        )
        assert lines[8].endswith("cross attention to a short context (77 keys)")
        assert lines[9].startswith("(unnamed)#1")
        assert lines[9].endswith("cross attention to a short context")
        assert len(lines) == 11

    def test_text_shows_the_model_where_there_are_several(self) -> None:
        one = str(Report("p", [FILTERED, DENSE]))
        two = str(Report("p", [FILTERED, replace(DENSE, model="Flux")]))
        assert "Wan" not in one
        assert "Wan" in two
        assert "Flux" in two

    def test_no_node(self) -> None:
        assert "No attention node" in str(Report("p", []))
        empty = {"policy": "p", "nodes": [], "unmatched_rules": [], "breaks": []}
        assert Report("p", []).to_dict() == empty


def audit_of(calls: list[tuple[float, ...]], **changes) -> Audit:
    audit = Audit()
    for call in calls:
        audit.add("Wan", replace(NODE, **changes), Decision(0.9), torch.tensor(call))
    return audit


class TestAudit:
    @given(calls=st.lists(CALLS, min_size=1, max_size=6))
    def test_node_is_the_mean_of_its_calls(self, calls: list[tuple[float, ...]]) -> None:
        (node,) = audit_of(calls).nodes
        n = len(calls)
        density, estimate, recall, stderr, log2, error, error_stderr = zip(*calls, strict=True)
        assert (node.model, node.path, node.ordinal) == ("Wan", "a", 0)
        assert (node.target, node.calls) == (0.9, n)
        assert node.density == pytest.approx(sum(density) / n)
        assert node.estimate == pytest.approx(sum(estimate) / n)
        assert node.recall == pytest.approx(sum(recall) / n)
        assert node.recalls == recall
        assert node.densities == density
        assert node.stderrs == stderr
        assert node.error == pytest.approx(sum(error) / n)
        assert node.errors == error
        assert node.error_stderrs == error_stderr
        assert node.passes == tuple(range(n))
        assert node.threshold == 2.0 ** log2[-1]
        # Independent samples: variances add, and a mean of n divides by n.
        half = 1.959964 * math.sqrt(sum(s**2 for s in stderr)) / n
        low, high = node.interval
        assert low == pytest.approx(max(node.recall - half, 0), abs=1e-6)
        assert high == pytest.approx(min(node.recall + half, 1), abs=1e-6)
        assert 0 <= low <= node.recall <= high <= 1
        half = 1.959964 * math.sqrt(sum(s**2 for s in error_stderr)) / n
        low, high = node.error_interval
        assert low == pytest.approx(max(node.error - half, 0), abs=1e-6)
        assert high == pytest.approx(node.error + half, abs=1e-6)

    @given(st.lists(st.lists(CALLS, min_size=1, max_size=3), min_size=1, max_size=4))
    def test_model_is_the_mean_of_its_nodes(self, nodes: list[list[tuple[float, ...]]]) -> None:
        audit = Audit()
        for i, calls in enumerate(nodes):
            for call in calls:
                audit.add("Wan", replace(NODE, ordinal=i), Decision(0.9), torch.tensor(call))
        recalls = [sum(c[2] for c in calls) / len(calls) for calls in nodes]
        densities = [sum(c[0] for c in calls) / len(calls) for calls in nodes]
        assert audit.recall == pytest.approx(sum(recalls) / len(nodes))
        assert audit.density == pytest.approx(sum(densities) / len(nodes))
        errors = [sum(c[5] for c in calls) / len(calls) for calls in nodes]
        assert audit.error == pytest.approx(sum(errors) / len(nodes))
        plain = audit.to_dict()
        assert plain["error"] == audit.error
        assert plain["recall"] == audit.recall
        assert plain["density"] == audit.density
        assert len(plain["nodes"]) == len(nodes)

    def test_nodes_are_told_apart_and_stay_in_order(self) -> None:
        audit = Audit()
        names = [("M", "b", 0), ("M", "a", 0), ("M", "a", 1), ("N", "a", 0), ("M", "b", 0)]
        for model, path, ordinal in names:
            node = replace(NODE, path=path, ordinal=ordinal)
            audit.add(model, node, Decision(0.9), torch.zeros(8))
        found = [(n.model, n.path, n.ordinal, n.calls) for n in audit.nodes]
        assert found == [("M", "b", 0, 2), ("M", "a", 0, 1), ("M", "a", 1, 1), ("N", "a", 0, 1)]

    def test_target_and_threshold_are_those_of_the_last_call(self) -> None:
        audit = Audit()
        audit.add("M", NODE, Decision(0.8), torch.tensor([0.5, 0.8, 0.8, 0.0, -4.0, 0.1, 0.0]))
        audit.add("M", NODE, Decision(0.7), torch.tensor([0.5, 0.8, 0.8, 0.0, math.nan, 0.1, 0.0]))
        (node,) = audit.nodes
        assert node.target == 0.7
        assert node.threshold is None

    @given(calls=st.lists(CALLS, min_size=1, max_size=3))
    def test_plain_data_comes_back_from_json(self, calls: list[tuple[float, ...]]) -> None:
        audit = audit_of([*calls, (0.5, 0.9, 0.9, 0.0, math.nan, 0.1, 0.0)])
        back = json.loads(json.dumps(audit.to_dict(), allow_nan=False))
        assert list(back) == ["recall", "error", "density", "passes", "nodes"]
        (data,) = back["nodes"]
        assert set(data) == {field.name for field in fields(AuditedNode)}
        for name in SEQUENCES:
            data[name] = tuple(data[name])
        assert [AuditedNode(**data)] == audit.nodes

    def test_text(self) -> None:
        calls = [
            (0.25, 0.9, 0.75, 0.0, -4.0, 0.02, 0.001),
            (0.5, 0.9, 1.0, 0.01, -4.0, 0.01, 0.0),
        ]
        lines = str(audit_of(calls, path="")).splitlines()
        heading = "node target recall 95 % interval error 95 % interval density calls"
        assert lines[0].split() == heading.split()
        row = "(unnamed)#0 0.900 0.875 0.865 .. 0.885 0.0150 0.0140 .. 0.0160 0.375 2"
        assert lines[2].split() == row.split()
        assert lines[3] == "mean recall 0.8750, error 0.0150, density 0.3750"

    def test_nothing_audited(self) -> None:
        audit = Audit()
        assert audit.nodes == []
        assert math.isnan(audit.recall)
        assert math.isnan(audit.density)
        assert math.isnan(audit.error)
        assert "Nothing audited" in str(audit)
        assert audit.to_dict()["nodes"] == []

    @given(runs=st.lists(st.integers(0, 2**4 - 1), min_size=1, max_size=8))
    def test_a_pass_ends_where_a_node_runs_again(self, runs: list[int]) -> None:
        """Whatever subset of four nodes each pass runs, in their order, as a model does."""
        audit = Audit()
        expected: list[list[int]] = []
        for mask in runs:
            nodes = [i for i in range(4) if mask >> i & 1]
            for i in nodes:
                audit.add("Wan", replace(NODE, ordinal=i), Decision(0.9), torch.zeros(8))
                if not expected or i in expected[-1]:
                    expected.append([])
                expected[-1].append(i)
        assert [p.step for p in audit.passes] == [str(i) for i in range(len(expected))]
        for node in audit.nodes:
            assert node.passes == tuple(i for i, p in enumerate(expected) if node.ordinal in p)

    def test_passes_of_two_models_are_counted_apart(self) -> None:
        audit = Audit()
        for model in ("high", "low", "high"):
            audit.add(model, NODE, Decision(0.9), torch.zeros(8))
        passes = [(p.model, p.step) for p in audit.passes]
        assert passes == [("high", "0"), ("low", "0"), ("high", "1")]
        assert [node.passes for node in audit.nodes] == [(0, 2), (1,)]

    def test_two_models_of_a_class_are_told_apart(self, fresh_dynamo: None) -> None:
        """Even where the second one turns up after the first one was audited."""
        backend = cef_compile.backend(0.9, inner="eager", min_kv_len=0)
        with backend.audit() as audit, torch.no_grad():
            for _ in range(2):
                model = torch.compile(Stack(depth=1), backend=backend)
                model(tokens(256))
        assert [node.model for node in audit.nodes] == ["Stack 1", "Stack 2"]
        assert [p.model for p in audit.passes] == ["Stack 1", "Stack 2"]
        assert {node.model for node in backend.report.nodes} == {"Stack 1", "Stack 2"}

    def test_labels_name_steps_and_branches(self) -> None:
        audit = Audit()
        for step in range(2):
            for branch in ("text", "no text"):
                audit.label(step, branch)
                audit.label(step, branch)  # saying it again changes nothing
                for ordinal in range(2):
                    node = replace(NODE, ordinal=ordinal)
                    audit.add("Wan", node, Decision(0.9), torch.zeros(8))
        passes = [(p.step, p.branch) for p in audit.passes]
        assert passes == [("0", "text"), ("0", "no text"), ("1", "text"), ("1", "no text")]
        assert all(node.passes == (0, 1, 2, 3) for node in audit.nodes)

    def test_a_new_label_starts_a_pass_even_if_other_nodes_run(self) -> None:
        audit = Audit()
        audit.label("a")
        audit.add("Wan", NODE, Decision(0.9), torch.zeros(8))
        audit.label("b")
        audit.add("Wan", replace(NODE, ordinal=1), Decision(0.9), torch.zeros(8))
        assert [p.step for p in audit.passes] == ["a", "b"]


class TestTable:
    def test_columns_are_aligned(self) -> None:
        text = text_table(["name", "n"], [["a", "1.5"], ["longer", "-20"], ["b", ""]])
        assert text.splitlines() == [
            "name      n",
            "------  ---",
            "a       1.5",
            "longer  -20",
            "b",
        ]

    def test_no_row(self) -> None:
        assert text_table(["a", "bc"], []).splitlines() == ["a  bc", "-  --"]

    @given(
        rows=st.lists(st.lists(st.text("ab1 .-", max_size=6), min_size=3, max_size=3), max_size=5)
    )
    def test_every_cell_is_in_its_column(self, rows: list[list[str]]) -> None:
        header = ["x", "yy", "z"]
        lines = text_table(header, rows).split("\n")
        widths = [len(dashes) for dashes in lines[1].split("  ")]
        assert widths == [max(len(r[i]) for r in [header, *rows]) for i in range(3)]
        for line, row in zip([lines[0], *lines[2:]], [header, *rows], strict=True):
            starts = [0, widths[0] + 2, widths[0] + widths[1] + 4]
            cells = [line[s : s + w].strip() for s, w in zip(starts, widths, strict=True)]
            assert cells == [cell.strip() for cell in row]

    def test_number(self) -> None:
        assert number(0.12345) == "0.123"
        assert number(2.0, 1) == "2.0"
        assert number(None) == number(math.nan) == ""
        assert number(0.0) == "0.000"

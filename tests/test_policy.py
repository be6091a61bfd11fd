"""Policies: decisions and their errors, rules and their precedence, the usual care."""

from __future__ import annotations

import math
import re
from dataclasses import FrozenInstanceError, replace
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cef_compile.kernels import config as c
from cef_compile.policy import (
    CERTIFICATES,
    FILTER_RULES,
    SCORES,
    AttentionNode,
    Balanced,
    Decision,
    Policy,
    Reason,
    Rules,
    Uniform,
    ask,
    check_choice,
    check_fraction,
    check_policy,
)
from cef_compile.policy.node import SHORT_CONTEXT

NODE = AttentionNode(
    path="blocks.0.attn1",
    ordinal=0,
    q_shape=(1, 2, 4096, 64),
    k_shape=(1, 2, 4096, 64),
    v_shape=(1, 2, 4096, 64),
    q_stride=(1, 1, 1, 1),
    k_stride=(1, 1, 1, 1),
    v_stride=(1, 1, 1, 1),
    dtype=torch.bfloat16,
    device=torch.device("cpu"),
    scale=None,
    is_causal=False,
    dropout_p=0.0,
    enable_gqa=False,
    mask="none",
    kind="self",
    requires_grad=False,
)

NO_NUMBERS = ["0.9", None, True, False, [0.9], 1j, torch.tensor(0.9)]
OUT_OF_RANGE = [0, 0.0, -0.5, 1.0000001, 2, math.nan, math.inf, -math.inf]


def context(length: int, kind: str = "cross") -> AttentionNode:
    shape = (1, 2, length, 64)
    return replace(NODE, k_shape=shape, v_shape=shape, kind=kind)


class TestDecision:
    def test_defaults(self) -> None:
        decision = Decision(0.9)
        assert decision.variant == ("planned", "threshold", "none", False, False, "exact", "grid")
        assert not decision.is_dense
        assert decision.reason is None
        assert decision.log2_threshold is None
        online = Decision(0.9, filter="online")
        assert online.variant == ("online", "share", "mean", False, False, "exact", "grid")
        bounded = Decision(0.9, filter="online", bound=True)
        assert bounded.options == ("online", "share", "mean", True, False, "exact")
        assert Decision(0.9, filter="online", rule="lse").certify == "none"
        assert Decision(1).recall == 1.0
        assert isinstance(Decision(1).recall, float)

    @given(recall=st.floats(0, 1, exclude_min=True), threshold=st.floats(1e-6, 1))
    def test_numbers_are_taken_as_they_are(self, recall: float, threshold: float) -> None:
        decision = Decision(recall, threshold=threshold)
        assert decision.recall == recall
        assert decision.log2_threshold == math.log2(threshold)

    @pytest.mark.parametrize("name", ["recall", "threshold", "density"])
    @pytest.mark.parametrize("value", [v for v in NO_NUMBERS if v is not None], ids=str)
    def test_no_number(self, name: str, value: Any) -> None:
        given_ = {"recall": 0.9, name: value}
        if name == "density":
            given_["rule"] = "top_k"
        with pytest.raises(TypeError, match=f"{name} must be a number.*{type(value).__name__}"):
            Decision(**given_)

    @pytest.mark.parametrize("name", ["recall", "threshold", "density"])
    @pytest.mark.parametrize("value", OUT_OF_RANGE)
    def test_number_out_of_range(self, name: str, value: float) -> None:
        given_ = {"recall": 0.9, name: value}
        if name == "density":
            given_["rule"] = "top_k"
        with pytest.raises(ValueError, match=rf"{name} must be in \(0, 1\], got {value!r}"):
            Decision(**given_)

    @pytest.mark.parametrize(
        ("name", "given_"),
        [
            ("filter", {"filter": "dense"}),
            ("filter", {"filter": ""}),
            ("filter", {"filter": None}),
            ("rule", {"rule": "share"}),
            ("rule", {"filter": "online", "rule": "top_k"}),
            ("rule", {"rule": "best"}),
            ("certify", {"filter": "online", "certify": "all"}),
        ],
    )
    def test_unknown_choice(self, name: str, given_: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"{name} must be one of .*got {given_[name]!r}"):
            Decision(0.9, **given_)
        # A dense decision is held to the same.
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            Decision(None, **given_)

    @pytest.mark.parametrize(
        ("given_", "says"),
        [
            ({"certify": "mean"}, "certify='mean' needs filter='online'"),
            ({"certify": "row"}, "certify='row' needs filter='online'"),
            ({"reason": Reason.POLICY}, "no reason for being dense"),
            ({"rule": "top_k"}, "rule='top_k' and density go together"),
            ({"density": 0.5}, "rule='top_k' and density go together"),
            ({"rule": "top_p", "threshold": 0.1}, "rule='top_p' has no threshold, got 0.1"),
            (
                {"rule": "top_k", "density": 0.5, "threshold": 0.1},
                "rule='top_k' has no threshold, got 0.1",
            ),
            ({"filter": "online", "compensate": True}, "compensate=True needs filter='planned'"),
            ({"bound": True}, "bound=True needs filter='online', got filter='planned': a plan"),
            ({"rule": "top_p", "group": "a"}, "a group shares one threshold.*'top_p'"),
            ({"filter": "online", "group": "a"}, "a group shares one threshold.*'share'"),
        ],
    )
    def test_contradictions(self, given_: dict[str, Any], says: str) -> None:
        with pytest.raises(ValueError, match=says):
            Decision(0.9, **given_)

    @pytest.mark.parametrize("name", ["bound", "compensate"])
    @pytest.mark.parametrize("value", ["yes", 1, None], ids=str)
    def test_no_flag(self, name: str, value: Any) -> None:
        with pytest.raises(TypeError, match=f"{name} must be True or False, got {value!r}"):
            Decision(0.9, **{name: value})

    def test_a_dense_decision_has_no_bound(self) -> None:
        with pytest.raises(ValueError, match="bound=True needs filter='online'"):
            Decision(None, bound=True)

    @given(
        filter_=st.sampled_from(sorted(FILTER_RULES)),
        rule=st.sampled_from(["", *(r for rules in FILTER_RULES.values() for r in rules)]),
        certify=st.sampled_from(["", *CERTIFICATES]),
        threshold=st.none() | st.just(0.1),
        density=st.none() | st.just(0.5),
        bound=st.booleans(),
        compensate=st.booleans(),
        scores=st.sampled_from(SCORES),
        group=st.none() | st.just("a"),
    )
    def test_is_made_exactly_where_nothing_contradicts(
        self, filter_, rule, certify, bound, threshold, density, compensate, scores, group
    ) -> None:
        online = filter_ == "online"
        resolved = rule or FILTER_RULES[filter_][0]
        fine = (
            resolved in FILTER_RULES[filter_]
            and (online or certify in ("", "none"))
            and (online or not bound)
            and (threshold is None or resolved not in ("top_k", "top_p"))
            and (density is not None) == (resolved == "top_k")
            and not (compensate and online)
            and (group is None or resolved == "threshold")
        )
        more = {"threshold": threshold, "density": density, "compensate": compensate}
        more["scores"] = scores  # a permission, which contradicts nothing
        if not fine:
            with pytest.raises(ValueError, match=r"must|needs|has no|go together|shares"):
                Decision(0.9, filter_, rule, certify, bound, group=group, **more)
            return
        decision = Decision(0.9, filter_, rule, certify, bound, group=group, **more)
        default = "mean" if online and resolved == "share" else "none"
        options = (filter_, resolved, certify or default, bound, compensate, scores)
        assert decision.variant == (*options, "grid")

    @pytest.mark.parametrize("make", [Decision, Uniform, Balanced])
    @pytest.mark.parametrize("value", ["int4", "", None, True, 8], ids=str)
    def test_scores_are_exact_or_int8(self, make: Any, value: Any) -> None:
        with pytest.raises(ValueError, match="scores must be one of 'exact', 'int8', got"):
            make(0.9, scores=value)

    def test_a_report_names_what_is_allowed(self) -> None:
        assert repr(Balanced(0.9)) == "Balanced(recall=0.9)"
        assert repr(Balanced(0.9, scores="int8")) == "Balanced(recall=0.9, scores='int8')"
        assert "scores='int8'" in repr(Uniform(0.9, scores="int8"))

    @pytest.mark.parametrize("make", [Uniform, Balanced])
    def test_policies_pass_scores_on(self, make: Any) -> None:
        assert make(0.9).decide(NODE).scores == "exact"
        assert make(0.9, scores="int8").decide(NODE).scores == "int8"

    def test_dense(self) -> None:
        decision = Decision.dense(Reason.CAUSAL, "because")
        assert decision.is_dense
        assert (decision.reason, decision.detail) == (Reason.CAUSAL, "because")
        assert Decision(None).reason is Reason.POLICY
        assert Decision.dense() == Decision(None)

    def test_is_a_frozen_value(self) -> None:
        decision = Decision(0.9)
        with pytest.raises(FrozenInstanceError):
            decision.recall = 0.5
        assert decision == Decision(0.9, "planned", "threshold", "none")
        assert hash(decision) == hash(Decision(0.9))
        assert replace(decision, recall=0.5) == Decision(0.5)

    def test_choices_are_those_of_the_kernels(self) -> None:
        assert FILTER_RULES == {"planned": c.PLANNED_RULES, "online": c.ONLINE_RULES}
        assert CERTIFICATES == c.CERTIFICATES


class TestChecks:
    @given(value=st.floats(0, 1, exclude_min=True) | st.just(1))
    def test_fraction(self, value: float) -> None:
        found = check_fraction("recall", value)
        assert found == value
        assert isinstance(found, float)

    @pytest.mark.parametrize("value", NO_NUMBERS, ids=str)
    def test_fraction_of_no_number(self, value: Any) -> None:
        says = re.escape(f"{type(value).__name__} {value!r}")
        with pytest.raises(TypeError, match=f"^recall must be a number in .*got {says}$"):
            check_fraction("recall", value)

    def test_choice(self) -> None:
        assert check_choice("inner", "a", ("a", "b")) == "a"
        with pytest.raises(ValueError, match="inner must be one of 'a', 'b', got 'c'"):
            check_choice("inner", "c", ("a", "b"))

    @pytest.mark.parametrize("policy", [0.9, None, "0.9", Uniform, {"*": 0.9}, []], ids=repr)
    def test_no_policy(self, policy: Any) -> None:
        with pytest.raises(TypeError, match=r"policy must have a method decide") as caught:
            check_policy(policy)
        assert repr(policy) in str(caught.value)

    def test_policies(self) -> None:
        def function(node):
            return 0.9

        for policy in (Uniform(0.9), Balanced(0.9), Rules({}), function):
            assert check_policy(policy) is policy


class TestAsk:
    def test_function_and_class(self) -> None:
        class Mine:
            def decide(self, node: AttentionNode) -> Decision:
                return Decision(0.5 if node.path.endswith("attn1") else 0.6)

        assert isinstance(Mine(), Policy)
        assert ask(Mine(), NODE) == Decision(0.5)
        assert ask(lambda node: Mine().decide(node), NODE.at("x")) == Decision(0.6)

    @pytest.mark.parametrize(
        ("answer", "wanted"),
        [
            (0.9, Decision(0.9)),
            (1, Decision(1.0)),
            (None, Decision.dense()),
            (Decision(0.5, "online"), Decision(0.5, "online")),
        ],
    )
    def test_answers(self, answer: Any, wanted: Decision) -> None:
        assert ask(lambda node: answer, NODE) == wanted

    @pytest.mark.parametrize("answer", ["0.9", True, [0.9], ("planned", 0.9), {"recall": 0.9}])
    def test_answer_of_the_wrong_type_names_the_node(self, answer: Any) -> None:
        says = re.escape(f"must be a Decision, a recall or None, got {answer!r}")
        with pytest.raises(TypeError, match=rf"blocks\.0\.attn1#0 {says}"):
            ask(lambda node: answer, NODE)

    @pytest.mark.parametrize("answer", OUT_OF_RANGE)
    def test_answer_out_of_range_names_the_node(self, answer: float) -> None:
        with pytest.raises(ValueError, match=rf"blocks\.0\.attn1#0 must be in .*got {answer!r}"):
            ask(lambda node: answer, NODE)

    def test_unnamed_node(self) -> None:
        with pytest.raises(TypeError, match=r"\(unnamed\)#2"):
            ask(lambda node: "?", replace(NODE, path="", ordinal=2))


@pytest.mark.parametrize("make", [Uniform, Balanced])
class TestUsualCare:
    @pytest.mark.parametrize("length", [1, 77, 512, SHORT_CONTEXT - 1])
    def test_cross_attention_to_a_short_context_stays_dense(self, make, length: int) -> None:
        decision = make(0.9).decide(context(length))
        assert decision.is_dense
        assert decision.reason is Reason.CROSS_ATTENTION
        assert decision.detail == f"{length} keys"

    @pytest.mark.parametrize(
        "node",
        [
            context(SHORT_CONTEXT),
            context(77, "self"),
            context(77, "joint"),
            NODE,
        ],
        ids=["long cross", "self", "joint", "usual"],
    )
    def test_others_are_filtered(self, make, node: AttentionNode) -> None:
        decision = make(0.9).decide(node)
        assert decision.recall == 0.9
        assert decision.reason is None

    @pytest.mark.parametrize("value", OUT_OF_RANGE)
    def test_recall_out_of_range(self, make, value: float) -> None:
        with pytest.raises(ValueError, match=rf"recall must be in .*got {value!r}"):
            make(value)

    @pytest.mark.parametrize("value", NO_NUMBERS[:1] + NO_NUMBERS[2:], ids=str)
    def test_recall_of_no_number(self, make, value: Any) -> None:
        with pytest.raises(TypeError, match="recall must be a number"):
            make(value)

    def test_is_a_value(self, make) -> None:
        assert make(0.9) == make(0.9) != make(0.8)
        assert "0.9" in repr(make(0.9))


class TestUniformAndBalanced:
    def test_uniform_nodes_have_thresholds_of_their_own(self) -> None:
        assert Uniform(0.9).decide(NODE) == Decision(0.9)
        online = Uniform(0.9, filter="online", certify="row").decide(NODE)
        assert online == Decision(0.9, filter="online", certify="row")
        bounded = Uniform(0.9, filter="online", bound=True).decide(NODE)
        assert bounded == Decision(0.9, filter="online", certify="mean", bound=True)

    def test_balanced_nodes_share_one(self) -> None:
        decision = Balanced(0.9).decide(NODE)
        assert decision.group is not None
        assert decision == Balanced(0.9).decide(NODE.at("another"))
        assert replace(decision, group=None) == Decision(0.9)

    def test_uniform_takes_no_contradiction(self) -> None:
        with pytest.raises(ValueError, match="needs filter='online'"):
            Uniform(0.9, certify="row")
        with pytest.raises(ValueError, match="bound=True needs filter='online'"):
            Uniform(0.9, bound=True)
        with pytest.raises(ValueError, match="filter must be one of"):
            Uniform(0.9, filter="none")


def first_match(rules: list[tuple[str, float]], path: str) -> float | None:
    """The documented precedence, written down naively."""
    exact = [value for pattern, value in rules if pattern == path != "*"]
    globs = [
        value
        for pattern, value in rules
        if pattern != "*" and not pattern.startswith("re:") and fnmatchcase(path, pattern)
    ]
    regexes = [
        value
        for pattern, value in rules
        if pattern.startswith("re:") and re.fullmatch(pattern[3:], path)
    ]
    default = [value for pattern, value in rules if pattern == "*"]
    return next(iter(exact + globs + regexes + default), None)


PATHS = ["a", "b", "a.b", "b.a", "a.0", "a.1", "b.0.a", "a.b.0", ""]
PATTERNS = [
    *PATHS[:-1],
    *("*", "a*", "a.*", "*.0", "?", "[ab]", "[!a]*", "*b*", "**"),
    *("re:a.*", r"re:a\..", "re:.*", r"re:[ab]\.\d", "re:b", "re:"),
]


class TestRules:
    @given(
        rules=st.lists(st.sampled_from(PATTERNS), unique=True, max_size=8),
        path=st.sampled_from(PATHS),
    )
    def test_precedence(self, rules: list[str], path: str) -> None:
        recalls = [(pattern, (i + 1) / 100) for i, pattern in enumerate(rules)]
        decision = Rules(dict(recalls)).decide(NODE.at(path))
        wanted = first_match(recalls, path)
        assert decision.recall == wanted
        if wanted is None:
            assert decision.reason is Reason.POLICY
            assert decision.detail == "no rule matches the path"

    @given(
        rules=st.lists(st.sampled_from(PATTERNS), unique=True, max_size=8),
        paths=st.lists(st.sampled_from(PATHS), unique=True, max_size=4),
    )
    def test_unmatched(self, rules: list[str], paths: list[str]) -> None:
        wanted = [
            pattern
            for pattern in rules
            if pattern != "*" and all(first_match([(pattern, 1.0)], p) is None for p in paths)
        ]
        assert Rules(dict.fromkeys(rules, 0.5)).unmatched(paths) == wanted

    def test_glob_crosses_dots_and_case_counts(self) -> None:
        rules = Rules({"blocks.*.attn1": 0.9, "Other*": 0.8})
        assert rules.decide(NODE.at("blocks.0.inner.attn1")).recall == 0.9
        assert rules.decide(NODE.at("other")).is_dense

    def test_regex_matches_the_whole_path(self) -> None:
        rules = Rules({r"re:blocks\.[0-4]": 0.9})
        assert rules.decide(NODE.at("blocks.3")).recall == 0.9
        assert rules.decide(NODE.at("blocks.3.attn1")).is_dense
        assert rules.decide(NODE.at("x.blocks.3")).is_dense

    def test_values(self) -> None:
        fixed = Decision(0.5, filter="online", certify="row")
        rules = Rules(
            {
                "recall": 0.9,
                "dense": None,
                "decision": fixed,
                "policy": Balanced(0.8),
                "function": lambda node: node.q_len / 8192,
            }
        )
        assert rules.decide(NODE.at("recall")) == Uniform(0.9).decide(NODE)
        assert rules.decide(NODE.at("dense")).reason is Reason.POLICY
        assert rules.decide(NODE.at("dense")).detail == "rule 'dense'"
        assert rules.decide(NODE.at("decision")) is fixed
        assert rules.decide(NODE.at("policy")) == Balanced(0.8).decide(NODE)
        assert rules.decide(NODE.at("function")) == Decision(0.5)
        # A recall takes the usual care, a decision is taken as it is.
        assert rules.decide(context(77).at("recall")).reason is Reason.CROSS_ATTENTION
        assert rules.decide(context(77).at("decision")) is fixed

    @pytest.mark.parametrize("rules", [0.9, None, [("a", 0.9)], "a"], ids=repr)
    def test_needs_a_mapping(self, rules: Any) -> None:
        with pytest.raises(TypeError, match="Rules needs a mapping") as caught:
            Rules(rules)
        assert repr(rules) in str(caught.value)

    def test_pattern_must_be_a_string(self) -> None:
        with pytest.raises(TypeError, match="pattern must be a string, got 3"):
            Rules({3: 0.9})

    @pytest.mark.parametrize("value", [v for v in NO_NUMBERS if v is not None], ids=str)
    def test_value_of_the_wrong_type_names_its_rule(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r"the recall of rule 'blocks\.\*' must be a number"):
            Rules({"ok": 0.9, "blocks.*": value})

    @pytest.mark.parametrize("value", OUT_OF_RANGE)
    def test_value_out_of_range_names_its_rule(self, value: float) -> None:
        with pytest.raises(ValueError, match=rf"rule 'blocks\.\*' must be in .*got {value!r}"):
            Rules({"blocks.*": value})

    def test_bad_regex_names_its_rule(self) -> None:
        with pytest.raises(ValueError, match=r"'re:\(' is no regular expression"):
            Rules({"re:(": 0.9})

    def test_answer_of_a_rule_is_validated(self) -> None:
        rules = Rules({"*": lambda node: "dense"})
        with pytest.raises(TypeError, match="must be a Decision"):
            rules.decide(NODE)

    def test_later_changes_of_the_mapping_do_not_count(self) -> None:
        given_ = {"*": 0.9}
        rules = Rules(given_)
        given_["*"] = 0.1
        assert rules.decide(NODE).recall == 0.9
        assert repr(rules) == "Rules({'*': 0.9})"


class TestNode:
    def test_views(self) -> None:
        node = replace(NODE, q_shape=(1, 2, 3, 4), k_shape=(1, 2, 5, 4), path="p", ordinal=7)
        assert (node.q_len, node.kv_len, node.head_dim, node.key) == (3, 5, 4, ("p", 7))
        assert node.at("other") == replace(node, path="other")

    def test_every_reason_says_what_and_what_to_do(self) -> None:
        assert len({str(reason) for reason in Reason}) == len(Reason)
        for reason in Reason:
            assert str(reason) == reason.value
            assert reason.remedy.endswith(".")


def test_a_uniform_policy_needs_a_recall_and_a_rule_an_instance() -> None:
    with pytest.raises(TypeError, match=r"recall must be a number.*NoneType"):
        Uniform(None)
    with pytest.raises(TypeError, match="recall of rule '\\*'"):
        Rules({"*": Uniform})

"""The policies that come with the library."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from cef_compile.policy.bands import Bands, noise_bands
from cef_compile.policy.decision import (
    SCORES,
    Decision,
    Policy,
    PolicyLike,
    ask,
    check_fraction,
)
from cef_compile.policy.node import SHORT_CONTEXT, AttentionNode, Reason

BALANCED_GROUP = "balanced"
REGEX_PREFIX = "re:"
DEFAULT_PATTERN = "*"
NO_RULE = "no rule matches the path"


def _usual(node: AttentionNode, decision: Decision) -> Decision:
    """``decision``, unless the node is one that filtering cannot make faster."""
    if node.kind == "cross" and node.kv_len < SHORT_CONTEXT:
        return Decision.dense(Reason.CROSS_ATTENTION, f"{node.kv_len} keys")
    return decision


@dataclass(frozen=True)
class Uniform:
    """Every node gets the same recall, with a threshold of its own.

    Args:
        recall: share of the attention energy to keep in each node, in (0, 1].
        filter: "planned" or "online".
        certify: for "online": "mean", "row" or "none".
        bound: for "online": see :class:`Decision`.
        scores: "exact" or "int8", see :class:`Decision`.

    Raises:
        TypeError, ValueError: as :class:`Decision`.
    """

    recall: float
    filter: str = "planned"
    certify: str = ""
    bound: bool = False
    scores: str = SCORES[0]

    def __post_init__(self) -> None:
        check_fraction("recall", self.recall)
        self._decision()

    def decide(self, node: AttentionNode) -> Decision:
        """Filter the node, unless it is a cross attention to a short context."""
        return _usual(node, self._decision())

    def _decision(self) -> Decision:
        return Decision(
            self.recall,
            filter=self.filter,
            certify=self.certify,
            bound=self.bound,
            scores=self.scores,
        )


@dataclass(frozen=True)
class Balanced:
    """One threshold for all nodes, so that the model's MEAN recall is the target.

    Nodes whose attention is peaked end above the target and diffuse ones below it, which for the
    same number of tiles keeps more of what the picture depends on. The threshold is read off the
    cumulative-energy histograms of the previous forward pass, on the device. The first pass, which
    has none before it, keeps every tile and only fills the histograms: from noise that pass decides
    the composition, and is worth several dB for its small part of the whole run.

    Args:
        recall: mean over the filtered nodes of the share of attention energy kept, in (0, 1].
        scores: "exact" or "int8", see :class:`Decision`.

    Raises:
        TypeError, ValueError: as :class:`Decision`.
    """

    recall: float
    scores: str = SCORES[0]

    def __post_init__(self) -> None:
        check_fraction("recall", self.recall)
        self._decision()

    def decide(self, node: AttentionNode) -> Decision:
        """Filter the node, unless it is a cross attention to a short context."""
        return _usual(node, self._decision())

    def __repr__(self) -> str:
        more = "" if self.scores == SCORES[0] else f", scores={self.scores!r}"
        return f"Balanced(recall={self.recall!r}{more})"

    def _decision(self) -> Decision:
        return Decision(self.recall, scores=self.scores, group=BALANCED_GROUP)


class Rules:
    r"""Decisions by module path.

    Precedence: an exact path, then a glob (``blocks.*.attn1``; ``*`` crosses dots), then a regular
    expression that matches the whole path (``re:blocks\.[0-4]\..*``), then the default ``"*"``;
    within a class the rule written first wins. A path that no rule matches stays dense.

    Args:
        rules: from pattern to a recall in (0, 1] (as :class:`Uniform`), None (dense), a
            :class:`Decision` (taken as it is) or another policy.

    Raises:
        TypeError: a pattern or a value is of the wrong type.
        ValueError: a recall is out of range or a regular expression does not compile.
    """

    def __init__(self, rules: Mapping[str, float | Decision | PolicyLike | None]) -> None:
        if not isinstance(rules, Mapping):
            raise TypeError(f"Rules needs a mapping from pattern to recall, got {rules!r}")
        self._given = dict(rules)
        self._rules = {
            _check_pattern(pattern): policy_of(f"rule {pattern!r}", value)
            for pattern, value in rules.items()
        }
        self._regexes = {p: _compile(p) for p in self._rules if p.startswith(REGEX_PREFIX)}

    def __repr__(self) -> str:
        return f"Rules({self._given!r})"

    @property
    def rules(self) -> dict[str, Any]:
        """The rules as they were given."""
        return dict(self._given)

    def decide(self, node: AttentionNode) -> Decision:
        """The decision of the first rule that matches ``node.path``."""
        for pattern in self.matches(node.path):
            return ask(self._rules[pattern], node)
        return Decision.dense(Reason.POLICY, NO_RULE)

    def noise_bands(self, node: AttentionNode) -> Bands:
        """The decisions on ``node`` by noise level: several where its rule is a Schedule."""
        for pattern in self.matches(node.path):
            return noise_bands(self._rules[pattern], node)
        return ((0.0, Decision.dense(Reason.POLICY, NO_RULE)),)

    def matches(self, path: str) -> Iterator[str]:
        """Patterns that match ``path``, the one that counts first."""
        exact = [p for p in self._rules if p == path and p != DEFAULT_PATTERN]
        globs = [p for p in self._rules if self._is_glob(p) and fnmatchcase(path, p)]
        regexes = [p for p, regex in self._regexes.items() if regex.fullmatch(path)]
        default = [DEFAULT_PATTERN] if DEFAULT_PATTERN in self._rules else []
        return iter(dict.fromkeys(exact + globs + regexes + default))

    def unmatched(self, paths: list[str]) -> list[str]:
        """Patterns that match none of ``paths``: misspelt, or for another model."""
        used = {pattern for path in paths for pattern in self.matches(path)}
        return [p for p in self._rules if p not in used and p != DEFAULT_PATTERN]

    def _is_glob(self, pattern: str) -> bool:
        return pattern != DEFAULT_PATTERN and pattern not in self._regexes


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix(REGEX_PREFIX))
    except re.error as error:
        raise ValueError(f"rule {pattern!r} is no regular expression: {error}") from error


def _check_pattern(pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise TypeError(f"a rule's pattern must be a string, got {pattern!r}")
    return pattern


def policy_of(where: str, value: Any) -> PolicyLike:
    """The policy behind a value of :class:`Rules` or :class:`Schedule`.

    Args:
        where: what the value belongs to, for reports and errors.
        value: a recall in (0, 1] (as :class:`Uniform`), None, a Decision or a policy.

    Raises:
        TypeError, ValueError: it is none of them, or a recall out of range.
    """
    if value is None:
        return _Always(Decision.dense(Reason.POLICY, where))
    if isinstance(value, Decision):
        return _Always(value)
    if not isinstance(value, type) and (isinstance(value, Policy) or callable(value)):
        return value
    return Uniform(check_fraction(f"the recall of {where}", value))


@dataclass(frozen=True)
class _Always:
    """The same decision for every node."""

    decision: Decision

    def decide(self, node: AttentionNode) -> Decision:
        return self.decision

"""What a policy returns, and the protocol that it follows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from cef_compile.policy.node import AttentionNode, Reason

FILTER_RULES = {"planned": ("threshold", "top_k", "top_p"), "online": ("share", "lse", "max")}
"""Filters and the rules that each knows; the first one is the default."""
CERTIFICATES = ("none", "mean", "row")
ORDERS = ("grid", "raster")
"""Orders in which tiles are cut; the first one is the default."""
SCORES = ("exact", "int8")
"""How the scores of kept tiles may be computed; the first one is the default."""


def check_fraction(name: str, value: Any) -> float:
    """``value`` as a float in (0, 1].

    Raises:
        TypeError: it is not a real number.
        ValueError: it is out of range or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in (0, 1], got {type(value).__name__} {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}")
    return float(value)


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """``value`` if it is one of ``allowed``.

    Raises:
        ValueError: it is not.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return str(value)


def check_flag(name: str, value: Any) -> bool:
    """``value`` if it is True or False.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_sizes(name: str, value: Any, number: int, least: int) -> tuple[int, ...]:
    """``value`` as a tuple of ``number`` integers, each at least ``least``.

    Raises:
        TypeError: it is no list or tuple of integers.
        ValueError: there are more or fewer, or one is too small.
    """
    if not isinstance(value, (list, tuple)) or any(
        isinstance(size, bool) or not isinstance(size, int) for size in value
    ):
        raise TypeError(f"{name} must be {number} integers, got {value!r}")
    if len(value) != number or any(size < least for size in value):
        raise ValueError(f"{name} must be {number} integers of at least {least}, got {value!r}")
    return tuple(value)


@dataclass(frozen=True)
class Decision:
    """What is to be done with one attention node.

    Attributes:
        recall: wanted share of the attention energy in (0, 1]; None keeps the node dense.
        filter: "planned" (tiles chosen from centroids, QK^T dropped too) or "online" (one pass over
            all tiles, certified).
        rule: how the filter chooses; "planned": "threshold" (default), "top_k", "top_p";
            "online": "share" (default), "lse" (arXiv 2606.16317), "max" (BLASST, arXiv 2512.12087).
        certify: for "online": "mean" (default) or "row" never lets the mean recall of a query tile,
            or any row's, below ``recall``; "none" trusts the threshold.
        bound: for "online": judge a tile by the bound ``n_j * exp(its largest score)`` in place of
            its exact energy, so that the exponentials of dropped tiles are never taken. A bound is
            never too small: certificates hold, at more tiles, and the ledger is a lower bound of
            the recall.
        threshold: a fixed threshold, a share in (0, 1], in place of the one found for ``recall``.
        density: for ``rule="top_k"``, the share of tiles kept in every query tile.
        compensate: put dropped tiles back as one pseudo-token each; off by default, since it harms
            heads that are selective inside a tile.
        order: "grid" cuts tiles as cubes of the node's grid, where it has one, and keeps text
            exact; "raster" cuts them as the tokens come.
        scores: "int8" allows the scores of kept tiles to be computed from queries and keys in 8
            bits. It is done where that is faster (engine "hopper-int8" in reports), and nowhere
            else; "exact" forbids it.
        group: nodes of one model and group share ONE threshold, chosen so that their mean recall
            is ``recall``; None gives the node its own.
        reason: why the node is dense; only for dense decisions.
        detail: a sentence for the report.

    Raises:
        TypeError, ValueError: when made with values out of range or that contradict each other.
    """

    recall: float | None
    filter: str = "planned"
    rule: str = ""
    certify: str = ""
    bound: bool = False
    threshold: float | None = None
    density: float | None = None
    compensate: bool = False
    order: str = ORDERS[0]
    scores: str = SCORES[0]
    group: str | None = None
    reason: Reason | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # the class is frozen for its users
        rules = FILTER_RULES[check_choice("filter", self.filter, tuple(FILTER_RULES))]
        set_(self, "rule", check_choice("rule", self.rule or rules[0], rules))
        default = "mean" if self.filter == "online" and self.rule == "share" else "none"
        set_(self, "certify", check_choice("certify", self.certify or default, CERTIFICATES))
        check_choice("order", self.order, ORDERS)
        check_choice("scores", self.scores, SCORES)
        if self.filter == "planned" and self.certify != "none":
            raise ValueError(
                f"certify={self.certify!r} needs filter='online': a plan's recall is an estimate"
            )
        check_flag("bound", self.bound)
        if self.bound and self.filter != "online":
            raise ValueError(
                f"bound=True needs filter='online', got filter={self.filter!r}: a plan estimates"
                " energies without scores to bound them by"
            )
        if self.recall is None:
            set_(self, "reason", self.reason or Reason.POLICY)
            return
        set_(self, "recall", check_fraction("recall", self.recall))
        check_flag("compensate", self.compensate)
        if self.reason is not None:
            raise ValueError(f"a decision with a recall has no reason for being dense: {self!r}")
        if self.threshold is not None:
            check_fraction("threshold", self.threshold)
            if self.rule in ("top_k", "top_p"):
                raise ValueError(f"rule={self.rule!r} has no threshold, got {self.threshold!r}")
        if (self.density is not None) != (self.rule == "top_k"):
            raise ValueError(f"rule='top_k' and density go together, got {self!r}")
        if self.density is not None:
            check_fraction("density", self.density)
        if self.compensate and self.filter != "planned":
            raise ValueError("compensate=True needs filter='planned': only a plan has centroids")
        if self.group is not None and self.rule != "threshold":
            raise ValueError(
                f"a group shares one threshold, which rule={self.rule!r} of"
                f" filter={self.filter!r} does not take from a plan"
            )

    @property
    def is_dense(self) -> bool:
        """Whether the node stays on ``scaled_dot_product_attention``."""
        return self.recall is None

    @property
    def options(self) -> tuple[str, str, str, bool, bool, str]:
        """How the op filters: (filter, rule, certify, bound, compensate, scores)."""
        return (self.filter, self.rule, self.certify, self.bound, self.compensate, self.scores)

    @property
    def variant(self) -> tuple[str, str, str, bool, bool, str, str]:
        """What is compiled into the graph: the options and the order."""
        return (*self.options, self.order)

    @property
    def log2_threshold(self) -> float | None:
        """log2 of the fixed threshold, or None."""
        return None if self.threshold is None else math.log2(self.threshold)

    @classmethod
    def dense(cls, reason: Reason = Reason.POLICY, detail: str = "") -> Decision:
        """Keep the node dense, and say why."""
        return cls(None, reason=reason, detail=detail)


@runtime_checkable
class Policy(Protocol):
    """Anything with this method is a policy; so is a function of an :class:`AttentionNode`."""

    def decide(self, node: AttentionNode) -> Decision:
        """What to do with ``node``. Must depend on ``node`` alone."""
        ...


PolicyLike = Policy | Callable[[AttentionNode], Any]


def check_policy(policy: Any) -> PolicyLike:
    """``policy`` if it can be used as one.

    Raises:
        TypeError: it has no ``decide`` method and is not a function.
    """
    if isinstance(policy, type) or not (isinstance(policy, Policy) or callable(policy)):
        raise TypeError(
            "policy must have a method decide(node) -> Decision, or be a function of a node;"
            f" got {policy!r}"
        )
    return policy


def ask(policy: PolicyLike, node: AttentionNode) -> Decision:
    """The policy's decision on ``node``: a Decision as it is, None as dense, a number as a recall.

    Raises:
        TypeError: the policy returned something else.
        ValueError: it returned a number outside (0, 1].
    """
    answer = policy.decide(node) if isinstance(policy, Policy) else policy(node)
    where = f"the policy's answer for node {node.path or '(unnamed)'}#{node.ordinal}"
    if isinstance(answer, Decision):
        return answer
    if answer is None:
        return Decision.dense()
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        return Decision(check_fraction(where, answer))
    raise TypeError(f"{where} must be a Decision, a recall or None, got {answer!r}")

"""From a policy's wish to what is done with a node."""

from __future__ import annotations

from typing import Any

from cef_compile import ops
from cef_compile.errors import UnsupportedNodeError
from cef_compile.graph import Site, concrete
from cef_compile.policy import (
    SCORES,
    AttentionNode,
    Decision,
    PolicyLike,
    Reason,
    ask,
    check_policy,
)


class Decider:
    """Asks the policy, and keeps dense what cannot be filtered or cannot win.

    Args:
        policy: see :func:`cef_compile.backend`.
        strict: raise in place of keeping a node dense that the policy wants filtered.
        min_kv_len: nodes with fewer keys stay dense; None for the device's break-even.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    def __init__(self, policy: PolicyLike, strict: bool, min_kv_len: int | None) -> None:
        self.policy = check_policy(policy)
        self.strict = bool(strict)
        self.min_kv_len = _check_min_kv_len(min_kv_len)

    def decide(self, site: Site, prefix: str) -> Decision:
        """What to do with a site of a graph, for the layer at ``prefix``.

        Raises:
            UnsupportedNodeError: it should be filtered and cannot be, and ``strict`` is on.
        """
        node = site.node.at(join(prefix, site.node.path))
        wanted = ask(self.policy, node)
        if wanted.is_dense:
            return wanted
        problem = site.problem or ops.unsupported(node)
        if site.nested is not None:
            problem = Reason.NESTED_GRAPH, site.nested
        if problem is not None:
            return self.fall_back(node, *problem)
        least = self.min_kv_len
        if least is None:
            least = ops.default_min_kv_len(node.device)
        if 0 <= node.kv_len < least:  # -1 is a length that depends on data
            return Decision.dense(Reason.SHORT_KV_LEN, f"{concrete(node).kv_len} < {least}")
        return wanted

    def settle(
        self, decision: Decision, node: AttentionNode, variant: tuple[Any, ...] | None
    ) -> Decision:
        """``decision``, or dense where the graph was compiled with another filter than it wants."""
        if decision.is_dense or decision.variant == variant:
            return decision
        return self.fall_back(node, Reason.SHARED_GRAPH, f"wants {_spell(decision.variant)}")

    def follow(
        self,
        policy: PolicyLike,
        node: AttentionNode,
        current: Decision,
        variant: tuple[Any, ...] | None,
    ) -> Decision:
        """A new policy's decision on a node that is compiled already."""
        wanted = ask(policy, node)
        if wanted.is_dense or wanted.variant == variant:
            return wanted
        if variant is None and current.reason not in (None, Reason.POLICY, Reason.CROSS_ATTENTION):
            return current  # what kept it from being filtered still holds
        compiled = "dense" if variant is None else _spell(variant)
        return self.fall_back(node, Reason.FIXED, f"compiled {compiled}")

    def fall_back(self, node: AttentionNode, reason: Reason, detail: str) -> Decision:
        """Dense with a reason, or an error where that is not allowed."""
        if self.strict:
            raise UnsupportedNodeError(*node.key, str(reason), detail, reason.remedy)
        return Decision.dense(reason, detail)


def join(prefix: str, path: str) -> str:
    """A path below a prefix; either may be empty."""
    return ".".join(part for part in (prefix, path) if part)


def _spell(variant: tuple[Any, ...]) -> str:
    filter_, rule, certify, bound, compensate, scores, order = variant
    flags = [name for name, on in (("bound", bound), ("compensate", compensate)) if on]
    flags += [] if scores == SCORES[0] else [scores]
    return "/".join([filter_, rule, certify, *flags, order])


def _check_min_kv_len(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"min_kv_len must be an integer or None, got {value!r}")
    if value < 0:
        raise ValueError(f"min_kv_len must not be negative, got {value}")
    return value

"""Who gets how much: nodes, decisions and the built-in policies."""

from cef_compile.policy.builtin import Balanced, Rules, Uniform
from cef_compile.policy.decision import (
    CERTIFICATES,
    FILTER_RULES,
    Decision,
    Policy,
    PolicyLike,
    ask,
    check_choice,
    check_fraction,
    check_policy,
)
from cef_compile.policy.node import AttentionNode, Kind, MaskKind, Reason

__all__ = [
    "CERTIFICATES",
    "FILTER_RULES",
    "AttentionNode",
    "Balanced",
    "Decision",
    "Kind",
    "MaskKind",
    "Policy",
    "PolicyLike",
    "Reason",
    "Rules",
    "Uniform",
    "ask",
    "check_choice",
    "check_fraction",
    "check_policy",
]

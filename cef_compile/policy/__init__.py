"""Who gets how much: nodes, decisions and the built-in policies."""

from cef_compile.policy.bands import Bands, band_at, compiled_decision, noise_bands
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
from cef_compile.policy.schedule import Schedule, check_level

__all__ = [
    "CERTIFICATES",
    "FILTER_RULES",
    "AttentionNode",
    "Balanced",
    "Bands",
    "Decision",
    "Kind",
    "MaskKind",
    "Policy",
    "PolicyLike",
    "Reason",
    "Rules",
    "Schedule",
    "Uniform",
    "ask",
    "band_at",
    "check_choice",
    "check_fraction",
    "check_level",
    "check_policy",
    "compiled_decision",
    "noise_bands",
]

"""Who gets how much: nodes, decisions and the built-in policies."""

from cef_compile.policy.bands import Bands, band_at, compiled_decision, join_bands, noise_bands
from cef_compile.policy.builtin import Balanced, Rules, Uniform
from cef_compile.policy.calibration import Calibration, Candidate, MeasuredNode, Tried
from cef_compile.policy.decision import (
    CERTIFICATES,
    FILTER_RULES,
    SCORES,
    Decision,
    Policy,
    PolicyLike,
    ask,
    check_choice,
    check_fraction,
    check_policy,
    check_sizes,
)
from cef_compile.policy.files import load_policy, save_policy
from cef_compile.policy.node import (
    SHORT_CONTEXT,
    AttentionNode,
    GridSource,
    Kind,
    MaskKind,
    Reason,
)
from cef_compile.policy.nodes import NodeEntry, NodePolicy, dtype_name
from cef_compile.policy.schedule import Schedule, check_level

__all__ = [
    "CERTIFICATES",
    "FILTER_RULES",
    "SCORES",
    "SHORT_CONTEXT",
    "AttentionNode",
    "Balanced",
    "Bands",
    "Calibration",
    "Candidate",
    "Decision",
    "GridSource",
    "Kind",
    "MaskKind",
    "MeasuredNode",
    "NodeEntry",
    "NodePolicy",
    "Policy",
    "PolicyLike",
    "Reason",
    "Rules",
    "Schedule",
    "Tried",
    "Uniform",
    "ask",
    "band_at",
    "check_choice",
    "check_fraction",
    "check_level",
    "check_policy",
    "check_sizes",
    "compiled_decision",
    "dtype_name",
    "join_bands",
    "load_policy",
    "noise_bands",
    "save_policy",
]

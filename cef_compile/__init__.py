"""cef_compile: attention that computes only the tiles that carry the energy.

``torch.compile(model, backend=cef_compile.backend(recall=0.95))`` makes a Diffusion Transformer
faster without training; ``backend.report`` says what was done and why, ``backend.audit()`` what
recall was delivered.
"""

from cef_compile.backend import Backend, backend, named_backend
from cef_compile.calibrate import TimeModel, calibrate
from cef_compile.distributed import gather_audit
from cef_compile.errors import PolicyFormatError, RankError, UnsupportedNodeError
from cef_compile.explain import explain
from cef_compile.functional import AttentionStats, attention
from cef_compile.policy import (
    AttentionNode,
    Balanced,
    Calibration,
    Decision,
    NodePolicy,
    Policy,
    Reason,
    Rules,
    Schedule,
    Uniform,
    load_policy,
    save_policy,
)
from cef_compile.report import (
    Audit,
    AuditedNode,
    GatheredAudit,
    Report,
    ReportedBreak,
    ReportedNode,
)

__version__ = "0.1.0"

__all__ = [
    "AttentionNode",
    "AttentionStats",
    "Audit",
    "AuditedNode",
    "Backend",
    "Balanced",
    "Calibration",
    "Decision",
    "GatheredAudit",
    "NodePolicy",
    "Policy",
    "PolicyFormatError",
    "RankError",
    "Reason",
    "Report",
    "ReportedBreak",
    "ReportedNode",
    "Rules",
    "Schedule",
    "TimeModel",
    "Uniform",
    "UnsupportedNodeError",
    "attention",
    "backend",
    "calibrate",
    "explain",
    "gather_audit",
    "load_policy",
    "named_backend",
    "save_policy",
]

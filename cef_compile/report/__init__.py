"""What was found, decided and delivered."""

from cef_compile.report.audit import Audit, AuditedNode
from cef_compile.report.summary import Report, ReportedNode

__all__ = ["Audit", "AuditedNode", "Report", "ReportedNode"]

"""What was found, decided and delivered."""

from cef_compile.report.audit import Audit, AuditedNode, AuditedPass
from cef_compile.report.html import Table, write_html
from cef_compile.report.ranks import GatheredAudit
from cef_compile.report.summary import Report, ReportedBreak, ReportedNode
from cef_compile.report.tiles import TileMap, TilePanel

__all__ = [
    "Audit",
    "AuditedNode",
    "AuditedPass",
    "GatheredAudit",
    "Report",
    "ReportedBreak",
    "ReportedNode",
    "Table",
    "TileMap",
    "TilePanel",
    "write_html",
]

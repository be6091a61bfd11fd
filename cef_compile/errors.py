"""Errors of the public API."""

from __future__ import annotations


class UnsupportedNodeError(RuntimeError):
    """With ``strict=True``: a node that the policy wants filtered cannot be.

    Attributes:
        path: module path of the node.
        reason: value of the :class:`~cef_compile.policy.Reason`.
    """

    def __init__(self, path: str, ordinal: int, reason: str, detail: str, remedy: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(
            f"attention node {path or '(unnamed)'}#{ordinal} cannot be filtered: {reason}"
            f" ({detail}). {remedy} Or drop strict=True to keep such nodes dense."
        )

"""Errors of the public API."""

from __future__ import annotations

from pathlib import Path


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


class RankError(RuntimeError):
    """With a process group: another rank has failed, or has decided otherwise than this one."""


class PolicyFormatError(ValueError):
    """A policy file, or a calibration's checkpoint, is damaged or not of a known format.

    Attributes:
        file: the file.
        place: where in it, as in ``nodes[3].recall``; empty for the whole.
    """

    def __init__(self, file: Path, place: str, message: str) -> None:
        self.file = file
        self.place = place
        super().__init__(f"{file}: {place or 'the file'}: {message}")

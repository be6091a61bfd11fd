"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

ERROR_DIGITS: Final = 4
"""Errors of attention are small numbers."""


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; numbers to the right, words to the left."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [all(_is_number(row[i]) for row in rows) and bool(rows) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def number(value: float | None, digits: int = 3) -> str:
    """A number as it stands in a table; empty where there is none."""
    return "" if value is None or value != value else f"{value:.{digits}f}"


def span(interval: Sequence[float | None], digits: int = 3) -> str:
    """An interval as it stands in a table."""
    return " .. ".join(number(end, digits) for end in interval)


def _is_number(cell: str) -> bool:
    return not cell or cell[0] in "-0123456789"

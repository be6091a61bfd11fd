"""What the tables of measurements are made of."""

from __future__ import annotations

from typing import Any

Rows = list[dict[str, Any]]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table whose columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *rows))


def speed(row: dict[str, Any]) -> str:
    """Against cuDNN."""
    return f"{row['speed']:.2f}x"

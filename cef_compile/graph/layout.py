"""The token order of an attention: which of its tokens are a grid, and which are text beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from cef_compile.graph.axes import Axis, Origin, Part, hint, part_size
from cef_compile.graph.patterns import same
from cef_compile.policy import SHORT_CONTEXT, GridSource

Grid = tuple[Any, Any, Any]
_FRAMES_HEIGHT_WIDTH = 3


@dataclass(frozen=True)
class Segment:
    """One of the sequences that were joined.

    Attributes:
        part: the axes that its tokens were merged from.
        grid: frames, height and width, if they are known; sizes, or axes that have them.
    """

    part: Part
    grid: tuple[Axis | int, Axis | int, Axis | int] | None = None

    @property
    def tokens(self) -> Any:
        """Number of tokens."""
        return part_size(self.part)


@dataclass(frozen=True)
class Layout:
    """The sequences behind the tokens of an attention.

    Attributes:
        segments: in order.
        main: indices ``[start, end)`` of those that are not text.
        source: where the grid was found; empty where there is none.
    """

    segments: tuple[Segment, ...]
    main: tuple[int, int]
    source: GridSource = ""

    @property
    def grid(self) -> Grid | None:
        """Frames, height and width; None where they are not known."""
        start, end = self.main
        grid = self.segments[start].grid if end == start + 1 else None
        if grid is None:
            return None
        frames, height, width = (n.size if isinstance(n, Axis) else n for n in grid)
        return frames, height, width

    @property
    def sizes(self) -> tuple[Any, ...]:
        """Tokens of each segment."""
        return tuple(segment.tokens for segment in self.segments)

    @property
    def matters(self) -> bool:
        """Whether the order differs from raster order without text."""
        return self.grid is not None or self.main != (0, len(self.segments))

    @property
    def ungridded(self) -> int:
        """Tokens of the one segment that is not text, where its grid is not known; else 0."""
        start, end = self.main
        size = self.segments[start].tokens if end == start + 1 else 0
        return size if isinstance(size, int) and self.grid is None else 0

    def with_grid(self, grid: tuple[int, int, int], source: GridSource) -> Layout | None:
        """This layout with ``grid`` for the one segment that has so many tokens; None if none has.

        Comparing a symbolic size with a number makes it that number: the graph is then compiled
        for this length alone.
        """
        tokens = grid[0] * grid[1] * grid[2]
        fits = [i for i, n in enumerate(self.sizes) if hint(n) == tokens and bool(n == tokens)]
        if len(fits) != 1:
            return None
        (at,) = fits
        segments = (
            *self.segments[:at],
            replace(self.segments[at], grid=grid),
            *self.segments[at + 1 :],
        )
        return Layout(segments, (at, at + 1), source)


def find_layout(query: Origin, key: Origin, q_len: Any, kv_len: Any) -> Layout | None:
    """The layout of an attention whose queries and keys are the same tokens; None for others.

    Args:
        query, key: origins of the two axes of tokens.
        q_len, kv_len: their sizes.
    """
    if not same(q_len, kv_len):
        return None
    fits = [origin for origin in (query, key) if origin and _adds_up(origin, q_len)]
    if len(fits) == 2 and len(query) > 1 and len(key) > 1 and not _alike(query, key):
        fits = []
    unknown: Origin = ((Axis(None, 0, q_len),),)
    origin = max(fits, key=lambda o: (len(o), sum(map(len, o))), default=unknown)
    segments = tuple(Segment(part, _grid_of(part)) for part in origin)
    sizes = [hint(segment.tokens) for segment in segments]
    with_grid = [i for i, segment in enumerate(segments) if segment.grid is not None]
    largest = max(with_grid or range(len(segments)), key=sizes.__getitem__)
    long = [i for i, size in enumerate(sizes) if size >= SHORT_CONTEXT or i == largest]
    main = (min(long), max(long) + 1)
    layout = Layout(segments, main)
    return replace(layout, source="graph") if layout.grid is not None else layout


def _grid_of(part: Part) -> tuple[Axis | int, Axis | int, Axis | int] | None:
    """A video has three axes, an image two."""
    if len(part) == _FRAMES_HEIGHT_WIDTH:
        return part[0], part[1], part[2]
    return (1, part[0], part[1]) if len(part) == _FRAMES_HEIGHT_WIDTH - 1 else None


def _alike(one: Origin, other: Origin) -> bool:
    return len(one) == len(other) and all(
        hint(part_size(a)) == hint(part_size(b)) for a, b in zip(one, other, strict=True)
    )


def _adds_up(origin: Origin, length: Any) -> bool:
    """Whether the parts are known to have ``length`` tokens together, whatever the sizes are."""
    total = sum(map(part_size, origin))
    if isinstance(total, int) or isinstance(length, int):
        return same(total, length)
    if not isinstance(total, torch.SymInt):
        return False
    return bool((total.node.expr - length.node.expr).expand() == 0)

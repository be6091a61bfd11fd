"""Pictures of which tile pairs of a node are kept, small however large the node is."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

MAX_CELLS: Final = 128
"""Cells of a picture in each direction; a larger map is averaged down to them."""
SINGLE_HEADS: Final = ("densest head", "median head", "sparsest head")


@dataclass(frozen=True)
class TilePanel:
    """One picture of a map.

    Attributes:
        name: "mean of all heads", or which head.
        density: kept tiles / visible tiles.
        cells: uint8 ``[rows, columns]``, share of the tile pairs of a cell that are kept, 255 for
            all. Rows are queries, columns are keys.
    """

    name: str
    density: float
    cells: Tensor


@dataclass(frozen=True)
class TileMap:
    """Which tiles of a node are kept in one call.

    Attributes:
        model, path, ordinal: which node.
        q_tiles, kv_tiles: its size in tiles.
        panels: the mean over all heads and batch entries, and single heads.
    """

    model: str
    path: str
    ordinal: int
    q_tiles: int
    kv_tiles: int
    panels: tuple[TilePanel, ...]

    @classmethod
    def of(cls, model: str, path: str, ordinal: int, kept: Tensor, visible: Tensor) -> TileMap:
        """From the kept pairs of a call.

        Args:
            model, path, ordinal: which node.
            kept: bool ``[B, H, Tm, Tn]``.
            visible: bool ``[B, Tn]``, tiles with at least one visible key.
        """
        batch, heads, q_tiles, kv_tiles = kept.shape
        pairs = visible.sum(-1).clamp_min(1).mul(q_tiles).repeat_interleave(heads)
        flat = kept.flatten(0, 1)
        densities = flat.sum((-2, -1)) / pairs
        panels = [TilePanel("mean of all heads", float(densities.mean()), _cells(flat))]
        if batch * heads > 1:
            order = densities.argsort(descending=True).tolist()
            picks = (order[0], order[len(order) // 2], order[-1])
            for name, pick in zip(SINGLE_HEADS, picks, strict=True):
                which = f"{name} ({pick % heads})" if batch == 1 else name
                cells = _cells(flat[pick : pick + 1])
                panels.append(TilePanel(which, float(densities[pick]), cells))
        return cls(model, path, ordinal, q_tiles, kv_tiles, tuple(panels))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; cells as base64."""
        return {
            "model": self.model,
            "path": self.path,
            "ordinal": self.ordinal,
            "q_tiles": self.q_tiles,
            "kv_tiles": self.kv_tiles,
            "panels": [
                {
                    "name": panel.name,
                    "density": panel.density,
                    "rows": panel.cells.shape[0],
                    "columns": panel.cells.shape[1],
                    "cells": base64.b64encode(panel.cells.numpy().tobytes()).decode(),
                }
                for panel in self.panels
            ],
        }


def _cells(kept: Tensor) -> Tensor:
    """Mean over the first dimension, averaged down to at most MAX_CELLS in each direction."""
    mean = kept.float().mean(0)
    rows, columns = (min(length, MAX_CELLS) for length in mean.shape)
    small = torch.nn.functional.adaptive_avg_pool2d(mean[None], (rows, columns))[0]
    return (255 * small).round().to(torch.uint8).cpu()

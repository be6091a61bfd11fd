"""What a run of the demo found, as text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Final

from cef_compile.demo.environment import describe
from cef_compile.demo.measure import Cost
from cef_compile.demo.metrics import Video, psnr, ssim
from cef_compile.demo.settings import Settings

CPU_NOTE: Final = """\
NOTE: this ran on a CPU, where the filter is a PyTorch reference, made to be read and checked.
Recall, density and picture quality are real; the times mean nothing."""
GIB: Final = 2**30


@dataclass(frozen=True)
class Quality:
    """A video against the eager dense one."""

    psnr_db: float
    """Over all frames; ``inf`` when they are identical."""
    ssim: float
    """Mean over frames, at most 1."""

    @classmethod
    def of(cls, dense: Video, other: Video) -> Quality:
        """Measure ``other`` against ``dense``."""
        return cls(psnr(dense, other), ssim(dense, other))


@dataclass(frozen=True)
class Outcome:
    """Everything that the demo measured; ``str()`` is its report."""

    settings: Settings
    environment: Mapping[str, Any]
    costs: Mapping[str, Cost]
    """By way of running: eager, compiled, filtered."""
    process_peak_bytes: int
    filtered: Quality
    floor: Quality
    """Compiled dense against eager dense: the difference that rounding alone makes."""
    nodes: Sequence[Mapping[str, Any]]
    """The backend's report of each node, with ``audit`` (``None`` where it stayed dense)."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is not finite (the PSNR of identical videos) is ``None``."""
        settings = {
            **asdict(self.settings),
            "device": str(self.settings.device),
            "dtype": str(self.settings.dtype).removeprefix("torch."),
            "out": str(self.settings.out),
            "tokens": self.settings.tokens,
        }
        return _finite(
            {
                "settings": settings,
                "environment": self.environment,
                "quality": {"filtered": asdict(self.filtered), "floor": asdict(self.floor)},
                "costs": {way: asdict(cost) for way, cost in self.costs.items()},
                "process_peak_bytes": self.process_peak_bytes,
                "mean": self.means(),
                "nodes": list(self.nodes),
            }
        )

    def means(self) -> dict[str, float] | None:
        """Achieved recall and density, mean over the filtered nodes; ``None`` without any."""
        audits = [node["audit"] for node in self.nodes if node["audit"]]
        if not audits:
            return None
        return {key: mean(audit[key] for audit in audits) for key in ("recall", "density")}

    def write(self, folder: Path) -> None:
        """``report.json`` and ``report.txt``, the latter with the environment."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        text = f"{self}\n\n{describe(self.environment)}\n"
        (folder / "report.txt").write_text(text, encoding="utf-8")

    def __str__(self) -> str:
        s = self.settings
        dtype = str(s.dtype).removeprefix("torch.")
        title = (
            f"clip {s.clip}, {s.frames} frames of {s.size} x {s.size} pixels = {s.tokens} tokens, "
            f"{s.steps} steps, recall {s.recall:g}, {dtype} on {s.device}"
        )
        parts = [title, self._node_table(), self._quality_table(), self._cost_table()]
        if s.device.type == "cpu":
            parts.append(CPU_NOTE)
        return "\n\n".join(parts)

    def _node_table(self) -> str:
        rows = [("node", "kind", "keys", "decision", "achieved recall (95 %)", "density")]
        for node in self.nodes:
            name = f"{node['path']}#{node['ordinal']}" if node["ordinal"] else str(node["path"])
            row = (name, str(node["kind"]), str(node["kv_len"]))
            if audit := node["audit"]:
                low, high = audit["interval"]
                achieved = f"{audit['recall']:.3f} ({low:.3f} to {high:.3f})"
                rows.append((*row, str(node["decision"]), achieved, f"{audit['density']:.3f}"))
            else:
                rows.append((*row, f"{node['decision']}: {node['reason']}", "1", "1"))
        if means := self.means():
            achieved = f"{means['recall']:.3f}"
            rows.append(("mean of filtered", "", "", "", achieved, f"{means['density']:.3f}"))
        return _table(rows)

    def _quality_table(self) -> str:
        rows = [("against eager dense", "PSNR dB", "SSIM")]
        named = (("filtered", self.filtered), ("compiled dense (floor)", self.floor))
        rows += [(name, f"{q.psnr_db:.1f}", f"{q.ssim:.4f}") for name, q in named]
        return _table(rows)

    def _cost_table(self) -> str:
        rows = [("way", "first step s", "step s", "device peak GiB")]
        for way, cost in self.costs.items():
            peak = "-" if cost.peak_bytes is None else f"{cost.peak_bytes / GIB:.2f}"
            rows.append((way, f"{cost.first_step_s:.2f}", f"{cost.step_s:.3f}", peak))
        peak = f"peak memory of the whole process: {self.process_peak_bytes / GIB:.2f} GiB"
        return f"{_table(rows)}\n{peak}"


def join_nodes(
    report: Iterable[Mapping[str, Any]], audit: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Each node of the backend's report with its audit (``None``: not filtered, nothing to audit).

    Nodes are told apart by path and ordinal.
    """
    audited = {(node["path"], node["ordinal"]): dict(node) for node in audit}
    return [{**node, "audit": audited.get((node["path"], node["ordinal"]))} for node in report]


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

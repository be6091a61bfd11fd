"""What a run of the demo found, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from cef_compile.demo.measure import Cost
from cef_compile.demo.metrics import Video, psnr, ssim
from cef_compile.demo.settings import Settings
from cef_compile.report.environment import describe
from cef_compile.report.record import finite, join
from cef_compile.report.saved import write_page
from cef_compile.report.table import number, span, text_table

CPU_NOTE: Final = """\
NOTE: this ran on a CPU, where the filter is a PyTorch reference, made to be read and checked.
Recall, density and picture quality are real; the times mean nothing."""
FLOOR_NOTE: Final = """\
The floor is what rounding alone changes: compiled dense against eager dense."""
FRAMES: Final = {
    "frames.gif": "all frames",
    "frames.png": "first, middle and last frame",
}
"""The pictures in the folder, and what the page says below them."""
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
    report: Mapping[str, Any]
    """What the backend found and decided: its ``report.to_dict()``."""
    audit: Mapping[str, Any]
    """What was delivered over the whole video: the audit's ``to_dict()``."""
    tile_maps: Sequence[Mapping[str, Any]] = ()
    """Which tiles the nodes furthest below their target keep: each map's ``to_dict()``."""

    @cached_property
    def record(self) -> dict[str, Any]:
        """The report and its audit, joined node by node."""
        return join(self.report, self.audit)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is not finite (the PSNR of identical videos) is ``None``."""
        settings = {
            **asdict(self.settings),
            "device": str(self.settings.device),
            "dtype": str(self.settings.dtype).removeprefix("torch."),
            "out": str(self.settings.out),
            "policy": None if self.settings.policy is None else str(self.settings.policy),
            "tokens": self.settings.tokens,
        }
        return finite(
            {
                "settings": settings,
                "environment": self.environment,
                "quality": {"filtered": asdict(self.filtered), "floor": asdict(self.floor)},
                "costs": {way: asdict(cost) for way, cost in self.costs.items()},
                "process_peak_bytes": self.process_peak_bytes,
                **self.record,
                "tile_maps": self.tile_maps,
                "page": self._page(),
            }
        )

    def _page(self) -> dict[str, Any]:
        """What the page shows besides the report."""
        on_cpu = self.settings.device.type == "cpu"
        tables = [
            ("Quality against eager dense", *self._quality(), FLOOR_NOTE),
            ("Time and memory", *self._cost(), CPU_NOTE if on_cpu else ""),
        ]
        names = ("title", "header", "rows", "note")
        return {
            "title": f"cef-compile demo: {self.title}",
            "tables": [dict(zip(names, table, strict=True)) for table in tables],
            "frames": {caption: file for file, caption in FRAMES.items()},
        }

    def write(self, folder: Path) -> None:
        """``report.json``, ``report.txt`` and ``report.html``.

        The page takes the pictures from the folder, where they must be already.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        text = f"{self}\n\n{describe(self.environment)}\n"
        (folder / "report.txt").write_text(text, encoding="utf-8")
        write_page(folder / "report.json", folder / "report.html")

    @property
    def title(self) -> str:
        """What was done, in a line."""
        s = self.settings
        dtype = str(s.dtype).removeprefix("torch.")
        wanted = f"recall {s.recall:g}" if s.policy is None else f"policy {s.policy.name}"
        return (
            f"clip {s.clip}, {s.frames} frames of {s.size} x {s.size} pixels = {s.tokens} tokens, "
            f"{s.steps} steps, {wanted}, {dtype} on {s.device}"
        )

    def __str__(self) -> str:
        s = self.settings
        parts = [self.title, self._node_table(), self._quality_table(), self._cost_table()]
        if s.device.type == "cpu":
            parts.append(CPU_NOTE)
        return "\n\n".join(parts)

    def _node_table(self) -> str:
        header = ["node", "kind", "keys", "decision", "recall", "95 % interval", "density"]
        rows = []
        for node in self.record["nodes"]:
            row = [f"{node['path']}#{node['ordinal']}", node["kind"], str(node["kv_len"])]
            if audit := node["audit"]:
                recall, density = number(audit["recall"]), number(audit["density"])
                row += ["filtered", recall, span(audit["interval"]), density]
            else:
                row += [f"dense: {node['reason']}", "", "", ""]
            rows.append(row)
        return f"{text_table(header, rows)}\n{self._mean()}"

    def _mean(self) -> str:
        if not self.audit["nodes"]:
            return "no node was filtered"
        mean = ", ".join(f"{name} {number(self.audit[name])}" for name in ("recall", "density"))
        return f"mean of the filtered nodes: {mean}"

    def _quality_table(self) -> str:
        return text_table(*self._quality())

    def _quality(self) -> tuple[list[str], list[list[str]]]:
        named = (("filtered", self.filtered), ("compiled dense (the floor)", self.floor))
        rows = [[name, number(q.psnr_db, 1), number(q.ssim, 4)] for name, q in named]
        return ["against eager dense", "PSNR dB", "SSIM"], rows

    def _cost_table(self) -> str:
        process = f"peak memory of the whole process: {self.process_peak_bytes / GIB:.2f} GiB"
        return f"{text_table(*self._cost())}\n{process}"

    def _cost(self) -> tuple[list[str], list[list[str]]]:
        rows = []
        for way, cost in self.costs.items():
            peak = None if cost.peak_bytes is None else cost.peak_bytes / GIB
            rows.append([way, number(cost.first_step_s, 2), number(cost.step_s), number(peak, 2)])
        return ["run", "first step s", "step s", "peak GiB on the device"], rows

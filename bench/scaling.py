"""An estimate of Ulysses on more GPUs than were measured, from a small model of one forward pass.

    python bench/scaling.py

Of a transformer block on P GPUs at N tokens, each GPU has N / P rows and H / P heads:

- attention: the 4 N^2 W FLOP of the block / P, at cuDNN's measured speed; filtered, less by the
  gain that the measured forward passes of one GPU differ by;
- everything else (projections, MLP, norms): a time per token, the rest of such a pass, / P;
- exchange: q, k, v and the output once each, N W / P numbers of 2 bytes of which (P - 1) / P leave
  the GPU, at the measured bandwidth of the all-to-all between two GPUs, not overlapped.

What it assumes beyond that: eight GPUs exchange at the bandwidth of two (one NVSwitch host), heads
divide evenly, and the gain of filtering at one density does not depend on the length. It is checked
against the passes of two GPUs, which it has not seen.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

RESULTS: Final = Path(__file__).parent / "results"
WIDTH: Final = 40 * 128
BLOCKS: Final = 40
"""Wan 2.2 A14B."""
NEAREST: Final = "40 x 75600 x 128 (A14B 720p)"
BYTES: Final = 2
EXCHANGES: Final = 4
GPUS: Final = 8
TOKENS: Final = (131_072, 262_144, 524_288)


@dataclass(frozen=True)
class Rates:
    """Measured rates of one GPU.

    Attributes:
        attention: dense attention, FLOP/s.
        gain: dense time of attention / filtered time.
        rest: everything but self attention, seconds a token and block.
        exchange: all-to-all, bytes/s out of a GPU.
    """

    attention: float
    gain: float
    rest: float
    exchange: float


@dataclass(frozen=True)
class Estimate:
    """Seconds of one block."""

    attention: float
    rest: float
    exchange: float

    @property
    def total(self) -> float:
        """All of them, one after the other."""
        return self.attention + self.rest + self.exchange


def read(name: str) -> dict[str, Any]:
    """A file of results."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def flops(tokens: int) -> float:
    """Of one block's dense self attention."""
    return 4.0 * tokens**2 * WIDTH


def rates() -> Rates:
    """From the measurements on H100, the passes of one GPU those of the longest length."""
    rows = read("attention-h100.json")["results"]["wan"]
    dense = next(row for row in rows if row["shape"] == NEAREST and row["name"] == "cuDNN")
    keys = int(NEAREST.split()[2])
    speed = flops(keys) / (dense["ms"] / 1e3)
    many = read("multi-gpu-h100.json")
    longest = max(row["tokens"] for row in many["forward"])
    blocks = int(many["about"]["model"].split()[0])
    seconds = {
        row["name"]: row["ms"] / 1e3 / blocks
        for row in many["forward"]
        if row["gpus"] == 1 and row["tokens"] == longest
    }
    attention = flops(longest) / speed
    saved = seconds["dense"] - seconds["planned"]
    return Rates(
        attention=speed,
        gain=attention / (attention - saved),
        rest=(seconds["dense"] - attention) / longest,
        exchange=1e9 * max(row["GB/s"] for row in many["all_to_all"]),
    )


def estimate(rates: Rates, tokens: int, gpus: int, filtered: bool) -> Estimate:
    """One block."""
    attention = flops(tokens) / gpus / rates.attention
    sent = BYTES * tokens * WIDTH / gpus * (gpus - 1) / gpus
    return Estimate(
        attention=attention / rates.gain if filtered else attention,
        rest=rates.rest * tokens / gpus,
        exchange=EXCHANGES * sent / rates.exchange,
    )


def checked() -> list[list[str]]:
    """The model beside what was measured: tokens, GPUs, way, measured and modelled ms."""
    many = read("multi-gpu-h100.json")
    blocks = int(many["about"]["model"].split()[0])
    table = []
    for row in many["forward"]:
        found = estimate(rates(), row["tokens"], row["gpus"], row["name"] == "planned")
        modelled = 1e3 * blocks * found.total
        off = f"{100 * (modelled / row['ms'] - 1):+.0f} %"
        cells = [f"{row['tokens']:,}", str(row["gpus"]), row["name"], f"{row['ms']:.1f}"]
        table.append([*cells, f"{modelled:.1f}", off])
    return table


def estimates() -> list[list[str]]:
    """Whole forward passes of A14B on eight GPUs."""
    table = []
    for tokens in TOKENS:
        dense, filtered = (estimate(rates(), tokens, GPUS, way) for way in (False, True))
        alone = estimate(rates(), tokens, 1, False)
        table.append(
            [
                f"{tokens:,}",
                f"{BLOCKS * alone.total:.0f} s",
                f"{BLOCKS * dense.total:.1f} s",
                f"{BLOCKS * filtered.total:.1f} s",
                f"{dense.total / filtered.total:.2f}x",
                f"{100 * dense.exchange / dense.total:.0f} %",
                f"{100 * filtered.exchange / filtered.total:.0f} %",
            ]
        )
    return table


def main() -> None:
    """Print the rates, the check and the estimates."""
    print(rates())
    for row in (*checked(), *estimates()):
        print("  ".join(row))


if __name__ == "__main__":
    main()

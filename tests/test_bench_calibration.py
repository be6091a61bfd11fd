"""The bench of calibrated policies: a small run of it says what it should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


def test_a_small_run(tmp_path: Path) -> None:
    out = tmp_path / "calibration.json"
    small = "--frames 4 --size 48 --steps 1 --min-kv-len 64 --candidates 0.7 --repeats 1"
    command = [sys.executable, str(BENCH / "calibration.py"), *small.split()]
    command += ["--max-error", "0.1", "--inner", "eager", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(out.read_text())
    assert found["setting"]["tokens"] == 144
    assert found["floor"] < 1e-5  # fp32, and no other compiler
    by_name = {row["name"]: row for row in found["rows"]}
    assert {"dense", "calibrated"} <= set(by_name)
    for name, row in by_name.items():
        assert name in run.stdout
        assert row["step_ms"] > 0
        assert row["speed"] == pytest.approx(by_name["dense"]["step_ms"] / row["step_ms"])
        if name == "dense":
            continue
        assert row["calibration_error"] <= 0.1
        assert sorted(row["errors"]) == [
            f"clip {clip}, seed {seed}" for clip in (0, 1) for seed in (1, 2)
        ]
        assert row["worst_error"] == max(row["errors"].values()) > 0
    mine = by_name["calibrated"]
    verdict = found["verdict"]
    assert verdict["within_budget"] == (mine["worst_error"] <= 1.3 * 0.1)
    other = by_name[verdict["beside"]]
    assert verdict["faster_by_prediction"] == (mine["predicted_time"] < other["predicted_time"])
    overhead = found["audit"]["step_ms"] - mine["step_ms"]
    expected = overhead / by_name["dense"]["step_ms"]
    assert found["audit"]["overhead_of_dense_step"] == pytest.approx(expected)

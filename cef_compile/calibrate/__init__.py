"""Calibration: a recall for each node and noise level, from a budget of output error."""

from cef_compile.calibrate.choose import TimeModel
from cef_compile.calibrate.run import CANDIDATES, calibrate

__all__ = ["CANDIDATES", "TimeModel", "calibrate"]

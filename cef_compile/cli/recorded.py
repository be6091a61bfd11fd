"""A user's own transformer and calls of it, from files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cef_compile.cli.common import UsageError, one_line

Call = tuple[float | None, dict[str, Any]]
"""Noise level, and keyword arguments of the model."""


def load_transformer(folder: Path, device: torch.device) -> nn.Module:
    """A diffusers model in eval mode, in the dtype of its weights.

    Raises:
        UsageError: the folder holds no model that can be loaded.
    """
    import diffusers
    from diffusers.utils import logging

    logging.disable_progress_bar()
    config = folder / "config.json"
    try:
        name = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"cannot read {config}: {one_line(error)}") from error
    class_ = getattr(diffusers, name, None) if isinstance(name, str) else None
    if class_ is None or not issubclass(class_, nn.Module):
        raise UsageError(f"{config}: its _class_name {name!r} is no model of diffusers")
    try:
        model: nn.Module = class_.from_pretrained(folder, torch_dtype="auto", local_files_only=True)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"cannot load {folder}: {one_line(error)}") from error
    return model.to(device).eval().requires_grad_(False)


def load_calls(path: Path, device: torch.device) -> list[Call]:
    """Recorded calls: a list of (noise level or None, keyword arguments), by ``torch.save``.

    Only tensors and plain values are read, no code.

    Raises:
        UsageError: the file holds something else; names the place.
    """
    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # what bytes that are no pickle raise is up to the bytes
        raise UsageError(f"{path} is no file of torch.save: {one_line(error)}") from error
    if not isinstance(found, list) or not found:
        raise UsageError(f"{path} must hold a list of calls, got {type(found).__name__}")
    return [_call(call, f"{path}: call {i}") for i, call in enumerate(found)]


def _call(call: Any, place: str) -> Call:
    if not isinstance(call, tuple | list) or len(call) != 2:
        raise UsageError(f"{place} must be a pair of noise level and keyword arguments")
    level, inputs = call
    if level is not None and not (isinstance(level, int | float) and 0 <= level < math.inf):
        raise UsageError(f"{place}: its noise level must be a number from 0 or None, got {level!r}")
    if not isinstance(inputs, dict) or not all(isinstance(name, str) for name in inputs):
        raise UsageError(f"{place}: its keyword arguments must be a dict by name")
    if not any(isinstance(value, Tensor) for value in inputs.values()):
        raise UsageError(f"{place} has no tensor among its keyword arguments")
    return level, inputs

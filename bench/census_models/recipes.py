"""What recipes of models are made of, and the list of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Recipe = Callable[[], tuple[dict[str, Any], dict[str, Any]]]
"""Returns the arguments of a class and those of its forward."""
RECIPES: dict[str, Recipe] = {}
TEXT = 12
"""Text tokens."""


def recipe(name: str) -> Callable[[Recipe], Recipe]:
    def add(function: Recipe) -> Recipe:
        RECIPES[name] = function
        return function

    return add


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape)


def time(*shape: int) -> Tensor:
    return torch.full(shape or (1,), 3)

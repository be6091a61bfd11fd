"""Tiny configurations of diffusers' transformers, with inputs that fit, for the census.

Each has random weights and enough tokens for several key tiles where its class allows it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Importing them fills RECIPES.
from census_models import audio, cross, flux, joint, joint_masked, newer, wan  # noqa: F401
from census_models.recipes import RECIPES

OUT_OF_REACH: dict[str, str] = {
    "WanAnimate2Transformer3DModel": "its forward needs a cache that its pipeline fills",
}
"""Classes that have no recipe, and why."""


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A model by the name of its class, in eval mode, and its inputs.

    Raises:
        KeyError: the class has no recipe.
        AttributeError: the installed diffusers has no such class.
    """
    import diffusers

    recipe = RECIPES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config, inputs = recipe()
        model = getattr(diffusers, name)(**config).eval()
        # Some classes start with zeros where training will put the output's gate.
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.detach().any():
                nn.init.normal_(parameter, std=0.02)
    return model, inputs

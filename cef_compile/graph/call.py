"""Grids of tokens told by the call that is running, where the graph does not show one.

The graph of a block (regional compilation) starts after the patch embedding, and the tokens of
packed latents (Flux, LTX) come without their axes. The arguments of the model's call are on the
stack while its graph is compiled, and say what the graph cannot: the latents that a patch embedding
cuts up, tensors of token positions, or numbers called ``num_frames``, ``height`` and ``width``.

They are looked at when compiling. A graph that runs for another grid of as many tokens later on
keeps the grid of its first call: its tiles are then less coherent, and its result is as right.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

Grid = tuple[int, int, int]

_CALLS = frozenset({"_call_impl", "_wrapped_call_impl"})
"""Functions of torch.nn.Module that hold the arguments of a module's call."""
_POSITION_AXES = (2, 3, 4)
"""Numbers that a token's position may have: image models put a constant before height and width."""


def running_grids(tokens: set[int]) -> dict[int, Grid]:
    """Grids with so many tokens among the arguments of the module calls that are running.

    Args:
        tokens: wanted numbers of tokens.

    Returns:
        a grid for each number for which one was found, that of the outermost call.
    """
    found: dict[int, Grid] = {}
    for module, args, kwargs in _running_calls():
        for grid in _grids(module, args, kwargs, tokens - found.keys()):
            found.setdefault(grid[0] * grid[1] * grid[2], grid)
    return {n: grid for n, grid in found.items() if n in tokens}


def _running_calls() -> list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """Modules that are being called, with their arguments, the outermost first."""
    calls = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in _CALLS:
            seen = frame.f_locals
            module, args, kwargs = seen.get("self"), seen.get("args"), seen.get("kwargs")
            if (
                isinstance(module, nn.Module)
                and isinstance(args, tuple)
                and isinstance(kwargs, dict)
            ):
                calls.append((module, args, kwargs))
        frame = frame.f_back
    return calls[::-1]


def _grids(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], tokens: set[int]
) -> Iterator[Grid]:
    values = [*args, *kwargs.values()]
    tensors = [value for value in values if isinstance(value, Tensor)]
    patches = _patch_sizes(module)
    for tensor in tensors:
        yield from _of_latents(tensor, patches)
    named = tuple(kwargs.get(name) for name in ("num_frames", "height", "width"))
    if all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in named):
        yield named  # type: ignore[misc]
    for tensor in tensors:
        grid = _of_positions(tensor, tokens)
        if grid is not None:
            yield grid


def _patch_sizes(module: nn.Module) -> set[tuple[int, ...]]:
    """Sizes of the patches that convolutions of ``module`` cut latents into."""
    return {
        (layer.in_channels, *layer.kernel_size)
        for layer in module.modules()
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)) and layer.kernel_size == layer.stride
    }


def _of_latents(latents: Tensor, patches: set[tuple[int, ...]]) -> Iterator[Grid]:
    """Grids of latents ``[B, C, H, W]``, ``[B, C, T, H, W]`` or ``[B, T, C, H, W]``."""
    shape = tuple(latents.shape)
    for channels, *patch in patches:
        if len(patch) == 2 and len(shape) == 4 and shape[1] == channels:
            yield 1, shape[2] // patch[0], shape[3] // patch[1]
        if len(patch) == 2 and len(shape) == 5 and shape[2] == channels:
            yield shape[1], shape[3] // patch[0], shape[4] // patch[1]
        if len(patch) == 3 and len(shape) == 5 and shape[1] == channels:
            frames, height, width = (n // p for n, p in zip(shape[2:], patch, strict=True))
            yield frames, height, width


def _of_positions(positions: Tensor, tokens: set[int]) -> Grid | None:
    """The grid whose raster ``positions [tokens, axes]`` are (or one batch of them), if they are.

    Waits for the device, once for a compilation.
    """
    if positions.device.type == "meta" or type(positions) is not Tensor:
        return None  # without numbers, or with numbers of its own kind
    rows = positions[0] if positions.dim() == 3 and len(positions) else positions
    if rows.dim() != 2 or len(rows) not in tokens or rows.shape[1] not in _POSITION_AXES:
        return None
    places = rows.detach().cpu().double()
    places = places - places[0]
    sizes = (places.amax(0).round().long() + 1).tolist()
    product = 1
    for size in sizes:
        product *= size
    if product != len(rows) or any(size < 1 for size in sizes):
        return None
    raster = torch.cartesian_prod(*(torch.arange(size).double() for size in sizes))
    if not torch.equal(places, raster.view_as(places)):
        return None
    grid = [size for size in sizes if size > 1][-3:] or [1]
    frames, height, width = [1] * (3 - len(grid)) + grid
    return frames, height, width

"""What kernels compute with: formats, tensors, memory of the device, and what TMA reads of it."""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Dtype:
    """A number format, by its name in Gluon."""

    def __init__(self, torch_dtype: torch.dtype) -> None:
        self.torch = torch_dtype
        self.primitive_bitwidth = 8 * torch_dtype.itemsize

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dtype) and self.torch == other.torch

    def __hash__(self) -> int:
        return hash(self.torch)


class Block(Tensor):
    """A tensor or number of a kernel."""

    type = types.SimpleNamespace(layout=None)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    # In Triton these make a new value of a name, too.
    __iadd__ = Tensor.__add__
    __isub__ = Tensor.__sub__
    __imul__ = Tensor.__mul__

    def to(self, dtype: Dtype, bitcast: bool = False) -> Block:
        return self.view(dtype.torch) if bitcast else super().to(dtype.torch)


def block(x: object) -> Block:
    """A tensor or number as kernels have it."""
    return (x if isinstance(x, Tensor) else torch.tensor(x)).as_subclass(Block)


class Pointer:
    """Memory on the device, and how far into it."""

    def __init__(self, memory: Tensor, at: Any = 0) -> None:
        self.memory = memory
        self.at = at

    def __add__(self, more: object) -> Pointer:
        return Pointer(self.memory, self.at + more)


def pointer(x: Tensor) -> Pointer:
    """To the first element; everything between its last and that is within reach."""
    reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return Pointer(x.as_strided((reach,), (1,)))


class Descriptor:
    """What TMA copies: blocks of a tensor, zeros beyond its edges."""

    def __init__(
        self, x: Tensor, shape: Sequence[int], strides: object, block: Sequence[int], layout: object
    ) -> None:
        del shape, strides
        self.x = x
        self.block_shape = list(block)
        self.block_type = types.SimpleNamespace(shape=self.block_shape)
        self.layout = layout
        self.dtype = Dtype(x.dtype)

    def read(self, at: Sequence[int]) -> Tensor:
        size = self.block_shape
        found = torch.zeros(size, dtype=self.x.dtype)
        part = self.x[tuple(slice(a, a + n) for a, n in zip(at, size, strict=True))]
        found[tuple(slice(n) for n in part.shape)] = part
        return found

"""Shared memory of a program."""

from __future__ import annotations

import math
import types
from collections.abc import Sequence

import torch
from torch import Tensor

from .program import let_others
from .values import Block, Dtype, block


class SharedLayout:
    """Rows of 128 bytes, each panel of them one after the other; ``bits`` None for plain memory."""

    def __init__(self, bits: int | None) -> None:
        self.bits = bits

    def places(self, shape: Sequence[int]) -> Tensor:
        """Where in memory each element is."""
        where = torch.arange(math.prod(shape))
        if self.bits is None or shape[-1] <= 1024 // self.bits:
            return where.view(*shape)
        *lead, rows, columns = shape
        line = 1024 // self.bits
        panels = where.view(-1, columns // line, rows, line)
        return panels.transpose(1, 2).reshape(*lead, rows, columns)


class Shared:
    """Shared memory: bytes, and which of them each element is."""

    def __init__(self, memory: Tensor, places: Tensor, layout: SharedLayout | None = None) -> None:
        self.memory = memory
        self.places = places
        self.numel = places.numel()
        self.shape = list(places.shape)
        self.dtype = Dtype(memory.dtype)
        self.type = types.SimpleNamespace(layout=layout)

    @property
    def now(self) -> Tensor:
        return self.memory[self.places]

    def index(self, at: object) -> Shared:
        return Shared(self.memory, self.places[int(at)])

    def slice(self, start: object, length: int, dim: int = 0) -> Shared:
        return Shared(self.memory, self.places.narrow(dim, int(start), length))

    def permute(self, dims: Sequence[int]) -> Shared:
        return Shared(self.memory, self.places.permute(*dims))

    def _reinterpret(self, dtype: Dtype, shape: Sequence[int], layout: SharedLayout) -> Shared:
        return Shared(self.memory.view(dtype.torch), layout.places(shape), layout)

    def load(self, layout: object = None) -> Block:
        del layout
        let_others()
        return block(self.now)

    def store(self, values: Tensor) -> None:
        let_others()
        self.memory[self.places] = values.as_subclass(Tensor).to(self.memory.dtype)

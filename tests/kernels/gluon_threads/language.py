"""gluon.language, as far as the kernels use it."""

from __future__ import annotations

import functools
import math
import threading
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .asynchronous import Mbarrier
from .memory import Shared, SharedLayout
from .program import Barriers, local, program
from .values import Block, Dtype, Pointer, block


def _asm(
    text: str, constraints: str, given: Sequence[Any], dtype: object, is_pure: bool, pack: int
) -> Any:
    """What the kernels have inline: products with accumulators, and votes."""
    del constraints, dtype, is_pure, pack
    if "vote.sync.any" in text:
        acc, factor = given
        return acc * factor
    if "set.eq.f16x2" in text:
        return torch.eq(*given).to(Dtype(torch.float16))
    if text == "mov.b32 $0, $1;":
        return given[0]
    assert "barrier.cta.red.and.pred all" in text, f"no such instruction is known here: {text}"
    (yes,) = given
    return torch.ones_like(yes) * (yes != 0).all()


def _warp_specialize(parts: Sequence[tuple[Any, tuple[Any, ...]]], *_: object) -> None:
    mine = program()

    def run(function: Any, given: tuple[Any, ...]) -> None:
        local.program, local.pending = mine, []
        try:
            function(*given)
        except BaseException as error:
            with mine.changed:
                mine.failed = mine.failed or error
                mine.changed.notify_all()

    threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if mine.failed:
        raise mine.failed


class _Constant(int):
    """A number that modules of kernels share; its value is asked for outside of kernels."""

    @property
    def value(self) -> int:
        return int(self)


class Language(types.ModuleType):
    """gluon.language, as far as the kernels use it."""

    float32, float16 = Dtype(torch.float32), Dtype(torch.float16)
    int32, int64, uint8 = Dtype(torch.int32), Dtype(torch.int64), Dtype(torch.uint8)
    static_range = range

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):  # how a tensor's elements lie in registers does not matter here
            return lambda *_, **__: None
        raise AttributeError(name)

    class constexpr:
        def __new__(cls, value: Any) -> Any:
            return _Constant(value) if isinstance(value, int) else value

    @staticmethod
    def NVMMASharedLayout(swizzle: int, bits: int, rank: int) -> SharedLayout:
        del swizzle, rank
        return SharedLayout(bits)

    @staticmethod
    def SwizzledSharedLayout(*_: object) -> SharedLayout:
        return SharedLayout(None)

    @staticmethod
    def allocate_shared_memory(dtype: Dtype, shape: Sequence[int], layout: Any) -> Any:
        if isinstance(layout, Mbarrier.MBarrierLayout):
            return Barriers(shape[0], program())
        # What nobody has written is no number.
        memory = torch.full((math.prod(shape) * dtype.torch.itemsize,), -1, dtype=torch.int8)
        return Shared(memory.view(dtype.torch), layout.places(shape), layout)

    program_id = staticmethod(lambda axis: block(program().number[axis]))
    num_programs = staticmethod(lambda axis: program().grid[axis])
    inline_asm_elementwise = staticmethod(_asm)
    warp_specialize = staticmethod(_warp_specialize)
    arange = staticmethod(lambda start, end, layout=None: block(torch.arange(start, end)))
    zeros = staticmethod(lambda shape, d, layout=None: block(torch.zeros(shape, dtype=d.torch)))
    cdiv = staticmethod(lambda a, b: -(-a // b))
    multiple_of = staticmethod(lambda x, number: x)
    expand_dims = staticmethod(lambda x, dim: x.unsqueeze(dim))
    reshape = staticmethod(lambda x, shape: x.reshape(shape))
    permute = staticmethod(lambda x, dims: x.permute(*dims))
    split = staticmethod(lambda x: (x[..., 0], x[..., 1]))
    broadcast = staticmethod(torch.broadcast_tensors)
    sum = staticmethod(lambda x, dim: x.sum(dim))
    exp2 = staticmethod(torch.exp2)
    log2 = staticmethod(torch.log2)
    floor = staticmethod(torch.floor)
    where = staticmethod(lambda a, b, c: torch.where(block(a), block(b), block(c)))
    min = staticmethod(lambda x, dim: x.amin(dim))
    div_rn = staticmethod(torch.div)
    cast = staticmethod(lambda x, d: block(x).to(d))

    @staticmethod
    def full(shape: Sequence[int], value: Any, d: Dtype, layout: object = None) -> Block:
        del layout
        return block(torch.full(shape, value, dtype=d.torch))

    @staticmethod
    def static_assert(sound: bool, text: str) -> None:
        assert sound, text

    @staticmethod
    def convert_layout(x: Any, layout: object, assert_trivial: bool = False) -> Any:
        del layout, assert_trivial
        return x

    @staticmethod
    def max(x: Block, dim: int) -> Block:
        """Passes over NaN, as the GPU's does."""
        if not x.is_floating_point():
            return x.amax(dim)
        highest = x.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(dim)
        return torch.where(x.isnan().all(dim), torch.nan, highest)

    @staticmethod
    def reduce(x: tuple[Block, ...], dim: int, combine: Any) -> tuple[Block, ...]:
        """One after the other, in the order of their places."""
        first, *others = zip(*(each.unbind(dim) for each in x), strict=True)
        return functools.reduce(lambda a, b: combine(*a, *b), others, first)

    @staticmethod
    def minimum(a: Any, b: Any) -> Block:
        return torch.minimum(block(a), block(b))

    @staticmethod
    def maximum(a: Any, b: Any) -> Block:
        return torch.fmax(block(a), block(b))

    @staticmethod
    def load(at: Pointer, mask: Any = None, other: Any = 0) -> Block:
        places = block(at.at).as_subclass(Tensor).long()
        if mask is None:
            return block(at.memory[places].clone())  # of one place it is a view
        mask = block(mask).as_subclass(Tensor)
        places, mask = torch.broadcast_tensors(places, mask)
        found = at.memory[torch.where(mask, places, 0)]
        return block(torch.where(mask, found, torch.tensor(other, dtype=found.dtype)))

    @staticmethod
    def store(at: Pointer, values: Any, mask: Any = None) -> None:
        places, values = torch.broadcast_tensors(
            block(at.at).as_subclass(Tensor).long(), block(values).as_subclass(Tensor)
        )
        kept = torch.ones_like(places, dtype=torch.bool)
        if mask is not None:
            kept = block(mask).as_subclass(Tensor).expand(places.shape)
        at.memory[places[kept]] = values[kept].to(at.memory.dtype)

    @staticmethod
    def atomic_add(at: Pointer, value: Any, sem: str, mask: Any = None) -> Block:
        del sem
        with program().changed:
            past = Language.load(at, mask)
            Language.store(at, past + value, mask)
        return past

"""What goes on beside a thread: products, copies, and the barriers that they are awaited by."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .memory import Shared
from .program import Barrier, Barriers, let_others, local, program
from .values import Block, Descriptor, block


class Pending:
    """A product that is under way."""

    def __init__(self, compute: Callable[[], Block]) -> None:
        self.compute = compute
        self.value: Block | None = None
        self.type = types.SimpleNamespace(layout=None)

    def finish(self) -> Block:
        if self.value is None:
            self.value = self.compute()
        return self.value

    @property
    def shape(self) -> torch.Size:
        return self.finish().shape


def warpgroup_mma(a: Any, b: Any, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    """A product of 64 rows; its operands in shared memory are read when it is done."""

    def compute() -> Block:
        left, right = (x.now if isinstance(x, Shared) else x.as_subclass(Tensor) for x in (a, b))
        exact = torch.int32 if left.dtype == torch.int8 else torch.float32
        product = block(left.to(exact) @ right.to(exact))
        if use_acc:
            return (acc.finish() if isinstance(acc, Pending) else acc) + product
        return product

    found = Pending(compute)
    local.pending.append(found)
    if not is_async or program().chance.random() < 0.5:
        found.finish()
    return found


def warpgroup_mma_wait(number: int, deps: tuple[Any, ...]) -> Any:
    """Until all but the last so many of the thread's products are done."""
    let_others()
    pending = local.pending
    done, local.pending = (
        (pending, []) if number == 0 else (pending[:-number], pending[-number:])
    )  # fmt: skip
    for each in done:
        each.finish()
    left = set(map(id, local.pending))
    found = tuple(d.finish() if isinstance(d, Pending) and id(d) not in left else d for d in deps)
    return found[0] if len(found) == 1 else found


def mma_v2(a: Tensor, b: Tensor, acc: Tensor) -> Tensor:
    """A product of registers, done at once."""
    return acc + a.float() @ b.float()


class Mbarrier(types.ModuleType):
    """gluon.language.nvidia.hopper.mbarrier."""

    class MBarrierLayout:
        pass

    @staticmethod
    def _one(of: Any) -> Barrier:
        return of.all[0] if isinstance(of, Barriers) else of

    def init(self, of: Any, count: int) -> None:
        one = self._one(of)
        one.count = one.pending = count

    def wait(self, of: Any, phase: object, pred: object = True) -> None:
        let_others()
        if not bool(pred):
            return
        one = self._one(of)

        def done() -> bool:
            if one.phase == int(phase):
                one.finish_copies()
            return one.phase != int(phase)

        program().wait(done)

    def arrive(self, of: Any, count: int = 1, pred: object = True) -> None:
        let_others()
        if bool(pred):
            with program().changed:
                self._one(of).arrive(count)

    def expect(self, of: Any, bytes_: object, pred: object = True) -> None:
        if bool(pred):
            with program().changed:
                one = self._one(of)
                one.bytes += int(bytes_)
                one.arrive()


def copy_block(
    desc: Descriptor, at: Sequence[Any], of: Any, to: Shared, pred: object = True
) -> None:
    """A copy by TMA: now, or when it is awaited."""
    let_others()
    if not bool(pred):
        return
    where = [int(x) for x in at]

    def copy() -> int:
        to.memory[to.places] = desc.read(where).view(to.places.shape)
        return to.places.numel() * to.memory.itemsize

    with program().changed:
        barrier = Mbarrier._one(of)
        barrier.copies.append(copy)
        if program().chance.random() < 0.5:
            barrier.finish_copies()
        # Who waits for it already finishes it.
        program().changed.notify_all()

"""Runs kernels written in Gluon on the CPU, where Triton's interpreter does not know them.

``load`` imports a module of kernels anew, with other functions behind the names of Gluon: tensors
are torch's, a group of warps is a thread, barriers in shared memory are counted as the GPU counts
them, and asynchronous copies and products are done at once or as late as they may be, by chance.
What a kernel computes is checked, and that its groups wait for each other where they must; what
registers hold, how layouts are laid out and how fast it is is not.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import random
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .asynchronous import Mbarrier, copy_block, mma_v2, warpgroup_mma, warpgroup_mma_wait
from .language import Language
from .program import Program, let_others, local
from .values import Descriptor, block, pointer

_PACKAGE = "cef_compile.kernels."


class _Jit:
    """A kernel or a part of one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self.function(*given, **named)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*given: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            del num_warps, maxnreg
            arguments = [_argument(x) for x in given]
            chance = random.Random(0)
            for number in itertools.product(*map(range, grid)):
                local.program = Program(number, grid, chance)
                local.pending = []
                self.function(*arguments, **constants)

        return launch


def _argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return pointer(x)
    return block(x) if isinstance(x, int) and not isinstance(x, bool) else x


def _jit(function: Any = None, **_: object) -> Any:
    return _Jit if function is None else _Jit(function)


@contextmanager
def _instead(modules: dict[str, types.ModuleType]) -> Iterator[None]:
    """Modules of other contents, while others import them."""
    past = {name: sys.modules.get(name) for name in modules}
    own = [name for name in sys.modules if name.startswith(_PACKAGE)]
    kernels = {name: sys.modules.pop(name) for name in own}
    package = sys.modules[_PACKAGE[:-1]]
    attributes = dict(vars(package))
    # What does not name Gluon stays what it is.
    sys.modules.update({n: m for n, m in kernels.items() if "gluon" not in vars(m)})
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.startswith(_PACKAGE)]:
            del sys.modules[name]
        sys.modules.update(kernels)
        for name, module in past.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
        vars(package).clear()
        vars(package).update(attributes)


@functools.cache
def load(name: str) -> types.ModuleType:
    """The module ``cef_compile.kernels.NAME``, whose kernels run on the CPU."""
    gluon = types.ModuleType("gluon")
    language = Language("gl")
    vars(gluon).update(jit=_jit, constexpr_function=lambda function: function, language=language)
    hopper = types.ModuleType("hopper")
    vars(hopper).update(
        mbarrier=Mbarrier("mbarrier"),
        tma=types.SimpleNamespace(async_copy_global_to_shared=copy_block),
        warpgroup_mma=warpgroup_mma,
        warpgroup_mma_wait=warpgroup_mma_wait,
        fence_async_shared=let_others,
        TensorDescriptor=Descriptor,
    )
    ampere = types.ModuleType("ampere")
    vars(ampere).update(mma_v2=mma_v2)
    experimental = types.ModuleType("experimental")
    vars(experimental).update(gluon=gluon)
    root = "triton.experimental"
    fakes = {
        root: experimental,
        f"{root}.gluon": gluon,
        f"{root}.gluon.language": language,
        f"{root}.gluon.language.nvidia.ampere": ampere,
        f"{root}.gluon.language.nvidia.hopper": hopper,
        f"{root}.gluon.nvidia.hopper": hopper,
    }
    language.thread_barrier = let_others
    with _instead(fakes):
        return importlib.import_module(_PACKAGE + name)

"""The compiler behind ours: which it is, and calling it with torch.compile's options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx


def check_inner(inner: Any) -> str | Callable[..., Any]:
    """``inner`` if it names a registered backend or can be called.

    Raises:
        TypeError: it is neither a string nor callable.
        ValueError: no backend of this name is registered.
    """
    if callable(inner):
        return inner
    if not isinstance(inner, str):
        raise TypeError(f"inner must be the name of a backend or a function, got {inner!r}")
    import torch._dynamo

    known = torch._dynamo.list_backends(exclude_tags=None)
    if inner not in known:
        raise ValueError(f"inner={inner!r} is no registered backend; known: {', '.join(known)}")
    if inner == "cef":
        raise ValueError("inner='cef' is this backend itself; use 'inductor', 'aot_eager', 'eager'")
    return inner


def compile_with(
    inner: str | Callable[..., Any],
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    kwargs: dict[str, Any],
) -> Callable[..., Any]:
    """Compile a graph with the inner compiler.

    Args:
        inner: as from :func:`check_inner`.
        gm, example_inputs: the graph and its inputs.
        kwargs: ``mode`` and ``options`` as torch.compile passes them to a backend.
    """
    import torch._dynamo
    import torch._inductor

    if inner != "inductor":
        compiler = torch._dynamo.lookup_backend(inner)
        return compiler(gm, list(example_inputs), **kwargs)
    from torch._inductor.compile_fx import compile_fx

    mode, options = kwargs.get("mode"), kwargs.get("options")
    patches = {**(torch._inductor.list_mode_options(mode) if mode else {}), **(options or {})}
    return compile_fx(gm, example_inputs, config_patches=patches or None)  # type: ignore[return-value]


def surfaced(error: Exception) -> Exception:
    """``error`` in a form that Dynamo hands to the user as it is.

    Of a backend's errors Dynamo lets only its own pass, and buries the others in a
    BackendCompilerFailed. The result is an instance of the error's own class as well.
    """
    from torch._dynamo.exc import ShortenTraceback

    kind = type(error)
    both = type(kind.__name__, (kind, ShortenTraceback), {"__init__": _init_surfaced})
    both.__module__, both.__qualname__ = kind.__module__, kind.__qualname__
    return both(error)


def _init_surfaced(self: Exception, original: Exception) -> None:
    self.__dict__.update(original.__dict__)
    self.args = original.args
    vars(self)["first_useful_frame"] = None

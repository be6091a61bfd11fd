"""Which tiles of chosen nodes a backend keeps, as pictures for a report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from cef_compile import ops
from cef_compile.backend import Backend
from cef_compile.policy import AttentionNode, Decision
from cef_compile.report import ReportedNode, TileMap


def tile_maps(
    backend: Backend,
    model: nn.Module,
    *args: Any,
    nodes: Collection[str],
    **kwargs: Any,
) -> list[TileMap]:
    """The tiles that ``backend`` keeps in some nodes of one call of ``model``.

    The model runs once more, uncompiled, with those nodes filtered at the thresholds that the
    backend's last call used, and the others dense. Their tiles are chosen by the PyTorch reference
    of the filter, head by head, and averaged to pictures at once, so that neither the map of a
    node nor a score matrix is ever held as a whole.

    Args:
        backend: has run the compiled model before.
        model: the module itself, not what ``torch.compile`` returned for it.
        args, kwargs: what to call it with, for instance a step's inputs.
        nodes: paths of the nodes, as in ``backend.report``.

    Returns:
        a map for each call of each of the nodes, in the order in which they run.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a path is no filtered node of the backend that has run, or its filter has no
            plan to show (``online``, ``top_k``).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)
    known = _thresholds(backend, nodes)

    def frozen(node: AttentionNode) -> Decision | None:
        found = known.get(node.key)
        if found is None or found.recall is None:
            return None
        return Decision(found.recall, rule=found.rule, threshold=found.threshold, order=found.order)

    watched = _Watch(type(model).__name__)
    watching = Backend(frozen, watched.compile, strict=False, min_kv_len=0, grid=backend.grid)
    watched.backend = watching
    with torch.no_grad():
        torch.compile(model, backend=watching, dynamic=False)(*args, **kwargs)
    return watched.maps


def _thresholds(backend: Backend, nodes: Collection[str]) -> dict[tuple[str, int], ReportedNode]:
    filtered = [node for node in backend.report.filtered if node.calls]
    for path in nodes:
        found = [node for node in filtered if node.path == path]
        if not found:
            paths = sorted({node.path for node in filtered})
            raise ValueError(
                f"{path!r} is no node that the backend has run filtered; these are: {paths}"
            )
        for node in found:
            if node.filter != "planned" or node.rule not in ("threshold", "top_p"):
                raise ValueError(
                    f"{path!r} is filtered by {node.filter!r}, rule {node.rule!r}; a tile map needs"
                    " filter 'planned' with rule 'threshold' or 'top_p'"
                )
    return {(node.path, node.ordinal): node for node in filtered if node.path in nodes}


class _Watch:
    """An inner compiler whose graphs run as they are and show their filtered attention."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.backend: Backend | None = None
        self.maps: list[TileMap] = []

    def compile(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Sequence[Any]]:
        """Run ``gm`` node by node."""

        def run(*args: Any) -> Sequence[Any]:
            results: Sequence[Any] = _Interpreter(gm, self).run(*args)
            return results

        return run

    def see(
        self,
        q: Tensor,
        k: Tensor,
        attn_mask: Tensor | None,
        control: Tensor,
        *,
        scale: float,
        rule: str,
        layout: Sequence[int],
    ) -> None:
        """One call of the op."""
        assert self.backend is not None, "set before the first call"
        key = self.backend.node_of(control)
        kept, visible = ops.kept_tiles(
            q, k, attn_mask, control, scale=scale, rule=rule, layout=layout
        )
        self.maps.append(TileMap.of(self.model, *key, kept, visible))


class _Interpreter(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, watch: _Watch) -> None:
        super().__init__(gm)
        self.watch = watch

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Look at the op's inputs on the way."""
        if target is torch.ops.cef.attention.default:
            q, k, _, attn_mask, control, _, scale, _, rule, *_, layout = args
            self.watch.see(q, k, attn_mask, control, scale=scale, rule=rule, layout=layout)
        return super().call_function(target, args, kwargs)

"""The forward ops of the flash-attn library and of its relatives: ``(B, L, H, D)``, or packed.

They are found by the name of the op, and their arguments by the names in its schema, which differ
from release to release. The packed (varlen) form is taken only where both index tensors are
constants that say: one sequence, all of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cef_compile.graph.patterns.calls import (
    argument,
    call_name,
    fake_value,
    overload,
    schema_arguments,
)
from cef_compile.graph.patterns.masks import changed_in_place
from cef_compile.graph.patterns.match import (
    Match,
    Operand,
    RefusedError,
    check_nothing_changes,
)
from cef_compile.policy import Reason

NAMESPACES = ("flash_attn", "flash_attn_2", "flash_attn_3", "_diffusers_flash_attn_3")
DENSE_OPS = ("_flash_attn_forward", "_flash_attn_func", "flash_attn_func", "fwd")
PACKED_OPS = ("_flash_attn_varlen_forward", "flash_attn_varlen_func")

_KNOWN = frozenset(
    {
        *("q", "k", "v", "dropout_p", "softmax_scale", "causal", "is_causal"),
        *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
        # How it is computed, not what.
        *("num_splits", "pack_gqa", "deterministic", "sm_margin", "zero_tensors"),
        *("return_softmax", "return_attn_probs", "return_softmax_lse"),
    }
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "window_size_left": (-1, None),
    "window_size_right": (-1, None),
    "window_size": ([-1, -1], (-1, -1), None),
    "softcap": (0, 0.0),
    "attention_chunk": (0,),
}
"""Values of further arguments at which they change nothing; None does for those not listed."""


def match(node: fx.Node) -> Match | None:
    """The attention of a flash-attn op."""
    target = overload(node)
    if target is None:
        return None
    namespace, _, name = target._schema.name.partition("::")
    if namespace not in NAMESPACES or name not in (*DENSE_OPS, *PACKED_OPS):
        return None
    given = schema_arguments(node, target)
    return _dense(node, given) if name in DENSE_OPS else _packed(node, given)


def _form(node: fx.Node) -> str:
    """The op by its name, as ``flash_attn::_flash_attn_forward``."""
    target = overload(node)
    return "" if target is None else str(target._schema.name)


def _dense(node: fx.Node, given: dict[str, Any]) -> Match:
    q, k, v = (Operand(given[name]).then(torch.transpose, 1, 2) for name in "qkv")
    views = ((torch.transpose, (1, 2)),)
    try:
        result, absorbed = _output(node)
        _check_neutral(given)
        check_nothing_changes(absorbed, result)
    except RefusedError as refused:
        return _reported(node, (q, k, v), given, refused.problem)
    return Match(
        result=result,
        form=_form(node),
        query=q,
        key=k,
        value=v,
        scale=given.get("softmax_scale"),
        is_causal=_causal(given),
        dropout_p=given.get("dropout_p") or 0.0,
        enable_gqa=True,
        result_views=views,
        absorbed=absorbed,
    )


def _packed(node: fx.Node, given: dict[str, Any]) -> Match:
    q, k, v = (
        Operand(given[name]).then(torch.unsqueeze, 0).then(torch.transpose, 1, 2) for name in "qkv"
    )
    try:
        result, absorbed = _output(node)
        _check_neutral(given)
        for name, tensor in (("cu_seqlens_q", "q"), ("cu_seqlens_k", "k")):
            if _constant(given.get(name)) != [0, fake_value(given[tensor]).shape[0]]:
                raise RefusedError(Reason.PACKED, f"{name} is not known to say [0, length]")
        check_nothing_changes(absorbed, result)
    except RefusedError as refused:
        return _reported(node, (q, k, v), given, refused.problem)
    return Match(
        result=result,
        form=_form(node),
        query=q,
        key=k,
        value=v,
        scale=given.get("softmax_scale"),
        is_causal=_causal(given),
        dropout_p=given.get("dropout_p") or 0.0,
        enable_gqa=True,
        result_views=((torch.transpose, (1, 2)), (torch.squeeze, (0,))),
        absorbed=absorbed,
    )


def _reported(
    node: fx.Node,
    operands: tuple[Operand, Operand, Operand],
    given: dict[str, Any],
    problem: tuple[Reason, str],
) -> Match:
    """What is only reported: under the op's first output where that can be told."""
    outputs = [user for user in node.users if call_name(user) == "view" and user.args[1:] == (0,)]
    q, k, v = operands
    return Match(
        result=outputs[0] if outputs else node,
        form=_form(node),
        query=q,
        key=k,
        value=v,
        scale=given.get("softmax_scale"),
        is_causal=_causal(given),
        problem=problem,
    )


def _causal(given: dict[str, Any]) -> Any:
    return bool(given.get("causal") or given.get("is_causal"))


def _output(node: fx.Node) -> tuple[fx.Node, frozenset[fx.Node]]:
    """The node of the attention's output, and the op where that is another node."""
    if isinstance(fake_value(node), torch.Tensor):
        return node, frozenset()
    used = [user for user in node.users if user.users]
    if len(used) != 1 or call_name(used[0]) != "view" or used[0].args[1:] != (0,):
        raise RefusedError(Reason.INTERMEDIATES, "more than the op's first output is used")
    unused = frozenset(user for user in node.users if not user.users)
    return used[0], frozenset({node}) | unused


def _check_neutral(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if name in _KNOWN or value is None:
            continue
        if name in ("window_size_left", "window_size_right", "window_size"):
            if value not in _NEUTRAL[name]:
                raise RefusedError(Reason.MASK, f"{name}={value}")
        elif isinstance(value, fx.Node) or value not in _NEUTRAL.get(name, ()):
            raise RefusedError(Reason.UNKNOWN_FORM, f"{name}={value}")


def _constant(node: Any) -> list[int] | None:
    """The elements of an index tensor that the graph builds from numbers; None if not known."""
    if not isinstance(node, fx.Node) or changed_in_place(node):
        return None
    if call_name(node) == "cast":
        return _constant(node.args[0])
    numbers: Any = node.args
    if call_name(node) == "tensor":
        numbers = argument(node, 0, "data")
    elif call_name(node) != "arange":
        return None
    if not isinstance(numbers, (list, tuple)) or any(type(x) is not int for x in numbers):
        return None
    return list(numbers) if call_name(node) == "tensor" else list(range(*numbers))

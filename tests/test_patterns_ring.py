"""Fused attention ops called directly, and ring attention: their outputs merged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_cases import assert_refused, assert_taken, heads, qkv
from torch import Tensor

import cef_compile
from cef_compile import Reason
from cef_compile.graph import find_sites

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
Merge = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """As diffusers spells it."""
    merged = out - F.sigmoid(other_lse - lse) * (out - other)
    return merged, lse - F.logsigmoid(lse - other_lse)


def ring(
    q: Tensor,
    shards: list[tuple[Tensor, Tensor]],
    *,
    model_layout: bool = True,
    merge: Merge = merge,
    return_lse: bool = False,
    scales: tuple[float | None, ...] = (None,),
    mask: Tensor | None = None,
):
    """Attention of ``[B, H, L, D]`` to shards of the keys; in ``(B, L, H, D)`` between merges."""
    total = None
    for i, (k, v) in enumerate(shards):
        q_i = q.contiguous()
        scale = scales[i % len(scales)]
        out, lse = FLASH(q_i, k.contiguous(), v.contiguous(), attn_mask=mask, scale=scale)
        if model_layout:
            out, lse = out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()
        out, lse = out.to(torch.float32), lse.to(torch.float32).unsqueeze(-1)
        total = (out, lse) if total is None else merge(*total, out, lse)
    assert total is not None
    out, lse = total[0].to(q.dtype), total[1].squeeze(-1)
    out = out.transpose(1, 2) if model_layout else out
    return (out, lse) if return_lse else out


def cut(k: Tensor, v: Tensor, lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(k.split(lengths, 2), v.split(lengths, 2), strict=True))


@settings(max_examples=6)
@given(
    st.lists(st.sampled_from([1, 63, 64, 130]), min_size=2, max_size=4),
    st.booleans(),
    st.floats(0.3, 0.95),
    st.integers(0, 2**32 - 1),
)
def test_a_ring_filters_the_whole_row(
    lengths: list[int], model_layout: bool, recall: float, seed: int
) -> None:
    """As the same policy filters one attention to all keys: same output, recall and tiles."""
    q, k, v = (heads(sum(lengths), seed=seed % 1000 + i) for i in range(3))
    q = 2 * q[:, :, : max(lengths)]

    def run(function: Callable[[], Tensor]) -> tuple[Tensor, cef_compile.AuditedNode]:
        torch._dynamo.reset()
        backend = cef_compile.backend(policy=lambda node: recall, inner="eager", min_kv_len=0)
        with torch.no_grad(), backend.audit() as audit:
            out = torch.compile(function, backend=backend)()
        (node,) = audit.nodes
        return out, node

    many, found = run(lambda: ring(q, cut(k, v, lengths), model_layout=model_layout))
    one, wanted = run(lambda: F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-5)
    assert (found.recall, found.density) == (wanted.recall, wanted.density)


@pytest.mark.parametrize("model_layout", [True, False])
@pytest.mark.parametrize("parts", [2, 3])
def test_a_ring_is_one_node(parts: int, model_layout: bool) -> None:
    q, k, v = qkv()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring(q, cut(k, v, [150 // parts] * parts), model_layout=model_layout)

    compiled = assert_taken(function, q, k, v)
    assert compiled.node.form == f"ring of {parts} flash_attention_for_cpu"
    assert compiled.node.kv_len == 150
    assert not any("flash" in str(node.target) for node in compiled.passed_on.graph.nodes)


@pytest.mark.parametrize("shards", [1, 2])
def test_cudnn_in_a_ring_and_alone(shards: int) -> None:
    """As diffusers calls it. It runs on no CPU; replaced, it does not have to."""
    q, k, v = qkv()

    def part(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
        out, lse, *_ = cudnn(q, k, v, attn_bias=None, compute_log_sumexp=True)
        out = out.transpose(1, 2).contiguous()
        return out, lse.squeeze(-1).transpose(1, 2).contiguous().unsqueeze(-1)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [part(q, *shard) for shard in cut(k, v, [150 // shards] * shards)]
        total = parts[0]
        for other in parts[1:]:
            total = merge(*total, *other)
        return total[0].transpose(1, 2)

    backend = cef_compile.backend(policy=lambda node: 1.0, inner="eager", min_kv_len=0)
    with torch.no_grad():
        out = torch.compile(function, backend=backend)(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    (node,) = backend.report.nodes
    assert node.form == ("cudnn_attention" if shards == 1 else "ring of 2 cudnn_attention")


def test_a_fused_op_alone() -> None:
    compiled = assert_taken(lambda q, k, v: FLASH(q, k, v, scale=0.3)[0], *qkv())
    assert compiled.node.form == "flash_attention_for_cpu"


def test_a_fused_op_whose_lse_leads_nowhere() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = FLASH(q, k, v)
        lse.transpose(1, 2).contiguous()
        return out

    assert_taken(function, *qkv())


def test_a_fused_op_whose_lse_is_used() -> None:
    assert_refused(lambda q, k, v: FLASH(q, k, v), *qkv(), reason=Reason.PARTIAL)


def wrong_sign(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor):
    return out - F.sigmoid(lse - other_lse) * (out - other), lse - F.logsigmoid(lse - other_lse)


def other_weight(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor):
    return out - F.tanh(other_lse - lse) * (out - other), lse - F.logsigmoid(lse - other_lse)


def stale_lse(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor):
    return out - F.sigmoid(other_lse - lse) * (out - other), lse


def other_difference(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor):
    merged = out - F.sigmoid(other_lse - lse) * (2 * out - other)
    return merged, lse - F.logsigmoid(lse - other_lse)


def foreign_lse(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor):
    """Of the form of a merged one, of numbers that are no attention's."""
    one = torch.ones_like(other_lse)
    strange = one - F.logsigmoid(one - 2 * one)
    return out - F.sigmoid(strange - lse) * (out - other), lse - F.logsigmoid(lse - other_lse)


def other_function(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor):
    merged = out - F.sigmoid(other_lse - lse) * (out - other)
    return merged, lse - F.softplus(lse - other_lse)


def other_start(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor):
    merged = out - F.sigmoid(other_lse - lse) * (out - other)
    return merged, lse - F.logsigmoid(2 * lse - other_lse)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"merge": wrong_sign}, 2),
        ({"merge": other_weight}, 2),
        ({"merge": other_difference}, 2),
        ({"merge": foreign_lse}, 2),
        ({"merge": stale_lse}, 3),
        ({"merge": other_function}, 3),
        ({"merge": other_start}, 3),
        ({"return_lse": True}, 2),
    ],
)
def test_what_merges_otherwise_stays_dense(options: dict, parts: int) -> None:
    """Part by part, and with the result that it had."""
    q, k, v = qkv()
    shards = cut(k, v, [150 // parts] * parts)
    backend = cef_compile.backend(policy=lambda node: 1.0, inner="eager", min_kv_len=0)

    def function() -> Tensor:
        return ring(q, shards, **options)

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(function, backend=backend)(), function())
    assert {node.reason for node in backend.report.nodes} <= {str(Reason.PARTIAL)}
    assert sum(node.form == "flash_attention_for_cpu" for node in backend.report.nodes) >= parts - 1


def test_a_gate_of_other_things_is_left_alone() -> None:
    """Of the form of a merge, without an attention behind it."""

    def gate(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return a - F.sigmoid(d - c) * (a - b)

    values = [heads(64, seed=seed) for seed in range(2)]
    weights = [heads(64, seed=seed)[..., :1] for seed in (2, 3)]
    backend = cef_compile.backend(policy=lambda node: 1.0, inner="eager", min_kv_len=0)
    with torch.no_grad(), pytest.warns(UserWarning, match="found no attention"):
        out = torch.compile(gate, backend=backend)(*values, *weights)
    torch.testing.assert_close(out, gate(*values, *weights))
    assert backend.report.nodes == []


def test_weights_of_another_axis_merge_nothing() -> None:
    """Where all sizes are equal, rows' log-sum-exps broadcast along the wrong axis."""
    q, *shards = (torch.randn(1, 16, 16, 16, generator=torch.manual_seed(i)) for i in range(5))

    def function() -> Tensor:
        out, lse = FLASH(q, *shards[:2])
        other, other_lse = FLASH(q, *shards[2:])
        return merge(out, lse, other, other_lse)[0]

    backend = cef_compile.backend(policy=lambda node: 1.0, inner="eager", min_kv_len=0)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(function, backend=backend)(), function())
    assert [node.reason for node in backend.report.nodes] == [str(Reason.PARTIAL)] * 2


@pytest.mark.parametrize(
    "options",
    [{"scales": (0.3, 0.4)}, {"mask": torch.zeros(1, 1, 1, 75)}],
)
def test_parts_that_are_not_of_one_attention(options: dict) -> None:
    q, k, v = qkv()
    function = partial(ring, shards=cut(k, v, [75, 75]), **options)
    assert_refused(function, q, reason=Reason.PARTIAL)


def test_dtensors_are_reported() -> None:
    """Found by their class; nobody can build one here without processes."""
    from torch.testing._internal.two_tensor import TwoTensor

    graph = torch.fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    node = graph.call_function(F.scaled_dot_product_attention, (q, k, v))
    graph.output((node,))
    for each in graph.nodes:
        each.meta["example_value"] = TwoTensor(heads(), heads())
    (site,) = find_sites(torch.fx.GraphModule(torch.nn.Module(), graph))
    assert site.problem == (Reason.SUBCLASS, "TwoTensor")

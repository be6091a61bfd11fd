"""Attention behind library calls: flash-attn's ops, nn.MultiheadAttention, flex_attention."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from pattern_cases import LENGTH, assert_refused, assert_taken, attention_count, qkv
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from cef_compile import Reason
from cef_compile.graph import find_sites

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]

# flash-attn needs a GPU to install. These have the names and signatures of its ops and compute what
# they would, so that what Dynamo puts into a graph is the same.


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """Attention of ``[B, L, H, D]``, in memory of its own."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    out = _attend(q, k, v, softmax_scale, causal)
    return out, lse, q.new_empty(0), q.new_empty(2, dtype=torch.int64)


@flash_forward.register_fake
def _(q, k, v, *others):
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    return out, lse, q.new_empty(0), q.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())
def flash_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    ends = zip(cu_seqlens_q.tolist()[1:], cu_seqlens_k.tolist()[1:], strict=True)
    q_start = k_start = 0
    for q_end, k_end in ends:
        parts = q[q_start:q_end], k[k_start:k_end], v[k_start:k_end]
        out[q_start:q_end] = _attend(*(x[None] for x in parts), softmax_scale, causal)[0]
        q_start, k_start = q_end, k_end
    return out, q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)


@flash_varlen_forward.register_fake
def _(q, k, v, *others, **more):
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return q.new_empty(*q.shape[:2], v.shape[-1]), lse


@torch.library.custom_op("flash_attn_3::fwd", mutates_args=())
def flash_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    window_size: list[int] | None = None,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
) -> Tensor:
    return _attend(q, k, v, softmax_scale or q.shape[-1] ** -0.5, causal)


@flash_3.register_fake
def _(q, k, v, *others, **more):
    return q.new_empty(*q.shape[:3], v.shape[-1])


OPS = torch.ops.flash_attn


def tokens(**options) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, L, H, D]``."""
    return tuple(x.transpose(1, 2).contiguous() for x in qkv(**options))


def dense(q, k, v, dropout=0.0, causal=False, left=-1, softcap=0.0, slopes=None):
    return OPS._flash_attn_forward(q, k, v, dropout, 0.3, causal, left, -1, softcap, slopes, False)


def test_flash_attention_in_the_layout_of_tokens() -> None:
    compiled = assert_taken(lambda q, k, v: dense(q, k, v)[0].flatten(2), *tokens())
    assert compiled.node.q_shape == (2, 2, LENGTH, 8)
    assert compiled.node.form == "flash_attn::_flash_attn_forward"
    targets = [str(node.target) for node in compiled.passed_on.graph.nodes]
    assert not any("flash_attn" in target for target in targets)


def test_flash_attention_with_grouped_queries() -> None:
    q, _, _ = tokens(count=4)
    _, k, v = tokens(count=2)
    assert_taken(lambda q, k, v: dense(q, k, v)[0], q, k, v)


def test_flash_attention_3_with_one_output_and_defaults() -> None:
    compiled = assert_taken(lambda q, k, v: torch.ops.flash_attn_3.fwd(q, k, v), *tokens())
    assert compiled.node.q_shape == (2, 2, LENGTH, 8)
    assert_taken(
        lambda q, k, v: torch.ops.flash_attn_3.fwd(
            q, v=v, k=k, softmax_scale=0.2, window_size=[-1, -1], num_splits=4
        ),
        *tokens(),
    )


@pytest.mark.parametrize(
    ("function", "reason", "detail"),
    [
        (lambda q, k, v: dense(q, k, v, causal=True)[0], Reason.CAUSAL, "causal"),
        (lambda q, k, v: dense(q, k, v, dropout=0.1)[0], Reason.DROPOUT, "0.1"),
        (lambda q, k, v: dense(q, k, v, left=16)[0], Reason.MASK, "window_size_left=16"),
        (lambda q, k, v: dense(q, k, v, softcap=5.0)[0], Reason.UNKNOWN_FORM, "softcap"),
        (lambda q, k, v: dense(q, k, v, slopes=q[0, 0, :, 0])[0], Reason.UNKNOWN_FORM, "alibi"),
        (lambda q, k, v: dense(q, k, v)[:2], Reason.INTERMEDIATES, "first output"),
        (lambda q, k, v: dense(q, k, v)[1] + 0, Reason.INTERMEDIATES, "first output"),
        (
            lambda q, k, v: torch.ops.flash_attn_3.fwd(q, k, v, qv=q),
            Reason.UNKNOWN_FORM,
            "qv",
        ),
        (
            lambda q, k, v: torch.ops.flash_attn_3.fwd(q, k, v, window_size=[32, 0]),
            Reason.MASK,
            "window_size",
        ),
        (
            lambda q, k, v: torch.ops.flash_attn_3.fwd(q, k, v, attention_chunk=64),
            Reason.UNKNOWN_FORM,
            "attention_chunk",
        ),
    ],
)
def test_flash_attention_with_more_to_it_is_refused(function, reason, detail) -> None:
    assert_refused(function, *tokens(), reason=reason, detail=detail)


def test_flash_attention_whose_inputs_change_before_its_output_is_read() -> None:
    def function(q, k, v):
        q = q + 0
        out = dense(q, k, v)[0]
        q.mul_(2)
        return out + 0, q

    gm = assert_taken(function, *tokens()).given
    change, out = (
        next(node for node in gm.graph.nodes if node.target == target)
        for target in ("mul_", operator.getitem)
    )
    change.append(out)  # Dynamo reads outputs at once; another tracer may not
    (site,) = find_sites(gm)
    assert site.problem is not None
    assert site.problem[0] == Reason.UNKNOWN_FORM
    assert "in place" in site.problem[1]


# --- packed sequences ----------------------------------------------------------------------------


def packed(q, k, v, starts_q, starts_k, **options):
    return OPS._flash_attn_varlen_forward(
        q, k, v, starts_q, starts_k, LENGTH, LENGTH, 0.0, 0.3, False, **options
    )[0]


def one_sequence() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x[0] for x in tokens())


@pytest.mark.parametrize(
    "starts",
    [
        lambda: torch.tensor([0, LENGTH], dtype=torch.int32),
        lambda: torch.tensor([0, LENGTH]).to(torch.int32),
        lambda: torch.arange(0, 2 * LENGTH, LENGTH, dtype=torch.int32),
    ],
)
def test_one_packed_sequence_is_taken(starts) -> None:
    compiled = assert_taken(lambda q, k, v: packed(q, k, v, starts(), starts()), *one_sequence())
    assert compiled.node.form == "flash_attn::_flash_attn_varlen_forward"
    assert compiled.node.q_shape == (1, 2, LENGTH, 8)


HALF = LENGTH // 2


@pytest.mark.parametrize(
    "starts",
    [
        lambda: torch.tensor([0, HALF, LENGTH], dtype=torch.int32),
        lambda: torch.arange(0, LENGTH + 1, HALF, dtype=torch.int32),
        lambda: torch.tensor([0, LENGTH], dtype=torch.int32) + 0,
        lambda: torch.tensor([0, HALF], dtype=torch.int32).mul_(2),
        lambda: doubled(torch.tensor([0, HALF], dtype=torch.int32)),
    ],
)
def test_packed_sequences_are_refused(starts) -> None:
    whole = torch.tensor([0, LENGTH], dtype=torch.int32)
    for q_starts, k_starts in ((starts, starts), (starts, None), (None, starts)):
        if (q_starts is None or k_starts is None) and len(starts()) != 2:
            continue  # as many sequences of queries as of keys

        def function(q, k, v, q_starts=q_starts, k_starts=k_starts):
            return packed(
                q, k, v, (q_starts or (lambda: whole + 0))(), (k_starts or (lambda: whole + 0))()
            )

        assert_refused(function, *one_sequence(), reason=Reason.PACKED, detail="cu_seqlens")


def doubled(starts: Tensor) -> Tensor:
    starts.mul_(2)
    return starts


def test_packed_sequences_that_end_early_are_refused() -> None:
    def function(q, k, v):
        starts = torch.tensor([0, HALF], dtype=torch.int32)
        return packed(q, k, v, starts, starts)[:HALF]

    assert_refused(function, *one_sequence(), reason=Reason.PACKED)


@pytest.mark.parametrize("part", [slice(None), slice(1, None)])
def test_starts_that_are_changed_in_place_are_refused(part: slice) -> None:
    def function(q, k, v):
        starts = torch.tensor([0, LENGTH], dtype=torch.int32)
        starts[part].floor_divide_(2)
        return packed(q, k, v, starts, starts)[:HALF]

    assert_refused(function, *one_sequence(), reason=Reason.PACKED)


def test_packed_sequences_given_from_outside_are_refused() -> None:
    starts = torch.tensor([0, LENGTH], dtype=torch.int32)
    assert_refused(packed, *one_sequence(), starts, starts, reason=Reason.PACKED)


def test_packed_sequences_with_a_block_table_are_refused() -> None:
    def function(q, k, v):
        starts = torch.tensor([0, LENGTH], dtype=torch.int32)
        return packed(q, k, v, starts, starts, block_table=starts)

    assert_refused(function, *one_sequence(), reason=Reason.UNKNOWN_FORM, detail="block_table")


def test_ops_without_a_default_overload_are_passed_over() -> None:
    def function(q, k, v):
        rows = torch.ops.aten.index(v, [torch.tensor([0, 1])])
        return dense(q, k, rows)[0]

    assert_taken(function, *tokens())


# --- other libraries, PyTorch's own --------------------------------------------------------------


@torch.library.custom_op("flash_attn::_flash_attn_backward_like", mutates_args=())
def something_else(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.clone()


@something_else.register_fake
def _(q, k, v):
    return torch.empty_like(q)


def test_other_ops_of_the_library_are_no_attention() -> None:
    with pytest.warns(UserWarning, match="no attention"):
        count = attention_count(
            lambda q, k, v: OPS._flash_attn_backward_like(q, k, v) + 1, *tokens()
        )
    assert count == 0


@pytest.mark.parametrize("batch_first", [True, False])
def test_multi_head_attention_is_reported(batch_first: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 2, batch_first=batch_first).eval()
    x = torch.randn(3, LENGTH, 16) if batch_first else torch.randn(LENGTH, 3, 16)
    compiled = assert_refused(
        lambda x: module(x, x, x, need_weights=False)[0], x, reason=Reason.MULTI_HEAD
    )
    assert compiled.node.q_shape == (3, 2, LENGTH, 8)
    assert compiled.node.form == "multi_head_attention_forward"


def test_multi_head_attention_without_a_batch_and_with_weights() -> None:
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(16, 2).eval(), torch.randn(LENGTH, 16)
    compiled = assert_refused(lambda x: module(x, x, x), x, reason=Reason.MULTI_HEAD)
    assert compiled.node.q_shape == (1, 2, LENGTH, 8)


def test_flex_attention_is_reported() -> None:
    def distance(score, batch, head, q_index, k_index):
        return score - (q_index - k_index).abs()

    q, k, v = qkv(dim=16)
    compiled = assert_refused(
        lambda q, k, v: flex_attention(q, k, v, score_mod=distance), q, k, v, reason=Reason.FLEX
    )
    assert compiled.node.q_shape == (2, 2, LENGTH, 16)
    assert compiled.node.form == "flex_attention"

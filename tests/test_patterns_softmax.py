"""Attention spelled out with a softmax: the forms that are taken, the look-alikes that are not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pattern_cases import (
    LENGTH,
    assert_refused,
    assert_taken,
    attention_count,
    compile_at_recall_1,
    heads,
    qkv,
)
from torch import Tensor, nn

import cef_compile
from cef_compile import Reason

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:cef_compile found no attention"),
]

S = 0.3
VISIBLE = torch.arange(LENGTH) < 100


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * S).softmax(-1) @ v


# --- placements of the scale ---------------------------------------------------------------------

SCALES = {
    "none": (1, lambda q, k: q @ k.mT),
    "after": (S, lambda q, k: q @ k.mT * S),
    "after, first": (S, lambda q, k: S * (q @ k.mT)),
    "divided": (1 / 3, lambda q, k: q @ k.mT / 3),
    "sqrt": (8**-0.5, lambda q, k: q @ k.mT / math.sqrt(q.shape[-1])),
    "method mul": (S, lambda q, k: (q @ k.mT).mul(S)),
    "method div": (1 / 3, lambda q, k: (q @ k.mT).div(3)),
    "in place": (S, lambda q, k: (q @ k.mT).mul_(S)),
    "twice": (S / 3, lambda q, k: (q @ k.mT) * S / 3),
    "on q": (S, lambda q, k: (q * S) @ k.mT),
    "on q, divided": (1 / 3, lambda q, k: (q / 3) @ k.mT),
    "on k": (S, lambda q, k: q @ (k * S).mT),
    "on k transposed": (S, lambda q, k: q @ (k.mT * S)),
    "on k permuted": (S, lambda q, k: q @ (k * S).permute(0, 1, 3, 2)),
    "on k, copied": (S, lambda q, k: q @ (k * S).transpose(2, 3).contiguous()),
    "on both": (S * S, lambda q, k: (q * S) @ (k * S).mT),
    "everywhere": (S * S / 3, lambda q, k: (S * q) @ (k * S).mT / 3),
    "changed in place": (1, lambda q, k: (q + 0).mul_(S) @ k.mT),
}


@pytest.mark.parametrize("placement", SCALES)
def test_every_placement_of_the_scale(placement: str) -> None:
    scale, scores = SCALES[placement]
    compiled = assert_taken(lambda q, k, v: scores(q, k).softmax(-1) @ v, *qkv())
    nodes = compiled.passed_on.graph.nodes
    (call,) = (node for node in nodes if node.target is torch.ops.cef.attention.default)
    assert call.args[6] == pytest.approx(scale)


def test_a_scaled_query_that_is_used_elsewhere_stays() -> None:
    def function(q, k, v):
        scaled = q * S
        return (scaled @ k.mT).softmax(-1) @ v, scaled.sum()

    compiled = assert_taken(function, *qkv())
    assert "mul" in compiled.names


# --- spellings of the products and the softmax ---------------------------------------------------

PRODUCTS = {
    "operator": lambda a, b: a @ b,
    "function": lambda a, b: torch.matmul(a, b),
    "method": lambda a, b: a.matmul(b),
    "by name": lambda a, b: torch.matmul(input=a, other=b),
    "aten": lambda a, b: torch.ops.aten.matmul.default(a, b),
}
SOFTMAXES = {
    "method": lambda s: s.softmax(-1),
    "method by name": lambda s: s.softmax(dim=-1),
    "function": lambda s: F.softmax(s, dim=-1),
    "torch": lambda s: torch.softmax(s, -1),
    "positive axis": lambda s: torch.softmax(s, 3),
    "module": nn.Softmax(dim=-1),
    "fp32": lambda s: F.softmax(s, -1, dtype=torch.float32),
    "cast": lambda s: s.float().softmax(-1).type_as(s),
    "aten": lambda s: torch.ops.aten.softmax.int(s, -1),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_every_spelling_of_the_products(product: str) -> None:
    multiply = PRODUCTS[product]
    assert_taken(lambda q, k, v: multiply(multiply(q, k.mT).softmax(-1), v), *qkv())


def test_the_form_in_the_report_names_the_products() -> None:
    q, k, v = qkv()
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    empty = torch.empty(1)
    forms = {
        "softmax(matmul)": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (q, k, v)),
        "softmax(bmm)": (lambda q, k, v: q.bmm(k.mT).softmax(-1).bmm(v), flat),
        "softmax(baddbmm, bmm)": (
            lambda q, k, v: torch.bmm(
                torch.baddbmm(empty, q, k.mT, beta=0, alpha=S).softmax(-1), v
            ),
            flat,
        ),
        "softmax(einsum)": (
            lambda q, k, v: torch.einsum(
                "bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v
            ),
            (q, k, v),
        ),
    }
    for form, (function, args) in forms.items():
        assert assert_taken(function, *args).node.form == form
    refused = compile_at_recall_1(lambda q, k, v: (q @ k.mT).relu().softmax(-1) @ v, q, k, v)
    assert refused.node.form == "softmax(matmul)"


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_every_spelling_of_the_softmax(softmax: str) -> None:
    normalise = SOFTMAXES[softmax]
    assert_taken(lambda q, k, v: normalise(q @ k.mT) @ v, *qkv())


@pytest.mark.parametrize(
    ("first", "second", "swap"),
    [
        ("bhid,bhjd->bhij", "bhij,bhjd->bhid", False),
        ("b h i d, b h j d -> b h i j", "b h i j, b h j d -> b h i d", False),
        ("bhjd,bhid->bhij", "bhij,bhjd->bhid", True),
        ("...id,...jd->...ij", "...ij,...jd->...id", False),
        ("bhid,bhjd->bhij", "bhij,bhjd->bihd", False),
    ],
)
def test_einsum(first: str, second: str, swap: bool) -> None:
    def function(q, k, v):
        scores = torch.einsum(first, *((k, q) if swap else (q, k)))
        return torch.einsum(second, (scores * S).softmax(-1), v)

    assert_taken(function, *qkv())


def test_einsum_in_the_layout_of_tokens() -> None:
    def function(q, k, v):
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * S
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return out.reshape(2, LENGTH, -1)

    assert_taken(function, *(x.transpose(1, 2).contiguous() for x in qkv()))


# --- three dimensions ----------------------------------------------------------------------------


def as_3d(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def baddbmm_unused_input(q, k, v):
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=S)
    return torch.bmm(scores.softmax(dim=-1).to(q.dtype), v)


THREE_D = {
    "bmm": lambda q, k, v: torch.bmm(torch.bmm(q, k.mT).mul(S).softmax(-1), v),
    "method bmm": lambda q, k, v: q.bmm(k.transpose(1, 2)).softmax(-1).bmm(v),
    "matmul": lambda q, k, v: (q @ k.mT).softmax(2) @ v,
    "einsum": lambda q, k, v: torch.einsum(
        "bij,bjd->bid", torch.einsum("bid,bjd->bij", q, k).softmax(-1), v
    ),
    "baddbmm with beta=0": baddbmm_unused_input,
    "method baddbmm": lambda q, k, v: (
        torch.empty(4, LENGTH, LENGTH).baddbmm(q, k.mT, beta=0, alpha=S).softmax(-1) @ v
    ),
    "baddbmm twice": lambda q, k, v: torch.baddbmm(
        torch.empty(4, LENGTH, 8),
        torch.baddbmm(torch.empty(4, LENGTH, LENGTH), q, k.mT, beta=0).softmax(-1),
        v,
        beta=0,
    ),
}


@pytest.mark.parametrize("form", THREE_D)
def test_batch_and_heads_in_one(form: str) -> None:
    function = THREE_D[form]
    compiled = assert_taken(function, *map(as_3d, qkv()))
    assert compiled.node.q_shape == (4, 1, LENGTH, 8)


def test_a_3d_mask_is_one_for_each_batch_and_head() -> None:
    hidden = ~VISIBLE.expand(4, 1, LENGTH)

    def function(q, k, v, hidden):
        return (q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    compiled = assert_taken(function, *map(as_3d, qkv()), hidden)
    assert compiled.node.mask == "key_padding"


# --- layouts and shapes --------------------------------------------------------------------------


def test_outputs_that_are_viewed_keep_their_strides() -> None:
    def function(q, k, v):
        return ((q @ k.mT).softmax(-1) @ v).view(4, LENGTH, 8).mul(2)

    assert_taken(function, *qkv())
    assert_taken(lambda q, k, v: plain(q, k, v)[:, 0:2].view(4, LENGTH, 8), *qkv())


def test_a_scale_before_several_transposes() -> None:
    def function(q, k, v):
        keys = (k * S).transpose(1, 2).transpose(2, 3)
        return (q.transpose(1, 2) @ keys).softmax(-1) @ v.transpose(1, 2)

    assert_taken(function, *(x.transpose(1, 2).contiguous() for x in qkv()))


def test_rounding_of_queries_stays() -> None:
    def floored(q, k, v):
        return (torch.div(q, 0.3, rounding_mode="floor") @ k.mT).softmax(-1) @ v

    assert_taken(floored, *qkv())
    assert_taken(lambda q, k, v: (q.half().float() @ k.mT).softmax(-1) @ v, *qkv())


def test_tokens_in_and_out() -> None:
    def function(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return plain(q, k, v).transpose(1, 2).reshape(2, LENGTH, 16)

    assert_taken(function, *(x.transpose(1, 2).contiguous() for x in qkv()))


def test_cross_attention_and_other_value_sizes() -> None:
    q, k, _ = qkv()
    compiled = assert_taken(plain, q, heads(200), heads(200, dim=12))
    assert compiled.node.kind == "cross"
    assert_taken(plain, q[:, :, :70], k, heads(dim=12))


def test_attention_across_channels() -> None:
    def function(q, k, v):
        weights = torch.einsum("bhid,bhie->bhde", q, k).softmax(-1)
        return torch.einsum("bhde,bhie->bhid", weights, v)

    compiled = assert_taken(function, *qkv())
    assert (compiled.node.kv_len, compiled.node.q_shape[-1]) == (8, LENGTH)


def test_one_key_head_for_all_query_heads() -> None:
    q, k, v = heads(count=4), heads(count=1, seed=1), heads(count=1, seed=2)
    assert_taken(plain, q, k, v)


def test_dynamic_lengths() -> None:
    q, k, v = qkv()
    for x in (q, k, v):
        torch._dynamo.mark_dynamic(x, 2)
    compiled = assert_taken(lambda q, k, v: (q @ k.mT * 0.3).softmax(-1) @ v, q, k, v)
    assert compiled.node.q_len == LENGTH


def test_two_dynamic_lengths_are_not_taken_for_one() -> None:
    q, k, v = heads(70), heads(seed=1), heads(seed=2)
    for x in (q, k, v):
        torch._dynamo.mark_dynamic(x, 2)
    compiled = assert_taken(lambda q, k, v: (q @ k.mT * 0.3).softmax(-1) @ v, q, k, v)
    assert compiled.node.kind == "cross"


def test_lengths_that_depend_on_data() -> None:
    def function(q, k, v, keep):
        kept = keep.nonzero().flatten()
        return (q @ k[:, :, kept].mT * 0.3).softmax(-1) @ v[:, :, kept]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = assert_taken(function, *qkv(), VISIBLE)
    assert compiled.node.kv_len == -1


def test_through_inductor() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)
            self.drop = nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            weights = (q * 8**-0.5 @ k.transpose(-2, -1)).softmax(-1)
            return (self.drop(weights) @ v).transpose(1, 2).reshape(x.shape)

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, LENGTH, 16)
    backend = cef_compile.backend(recall=1.0, min_kv_len=0)
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
        with backend.dense():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    (node,) = backend.report.filtered
    assert (node.path, node.kind) == ("", "self")


# --- casts and autocast --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_up_and_down_are_the_ops_own(dtype: torch.dtype) -> None:
    def function(q, k, v):
        scores = q.float() @ k.float().transpose(-2, -1) * S
        return scores.softmax(-1).to(v.dtype) @ v

    # The weights and the output are rounded to the dtype: two roundings of at most half an eps.
    compiled = assert_taken(
        function, *(x.to(dtype) for x in qkv()), tolerance=2 * torch.finfo(dtype).eps
    )
    assert compiled.node.dtype == str(dtype).removeprefix("torch.")
    assert "cast" not in compiled.names


def test_autocast() -> None:
    def function(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(q, k, v)

    # Eager rounds scores as large as 5 to bfloat16 and the op does not.
    tolerance = 5 * torch.finfo(torch.bfloat16).eps
    compiled = assert_taken(function, *qkv(), tolerance=tolerance)
    assert compiled.node.dtype == "bfloat16"


def test_scores_finer_than_the_values_are_refused() -> None:
    def function(q, k, v):
        return (q @ k.mT).softmax(-1).bfloat16() @ v.bfloat16()

    assert_refused(function, *qkv(), reason=Reason.DTYPE, detail="float32")


def test_casts_to_integers_are_refused() -> None:
    assert_refused(
        lambda q, k, v: (q @ k.mT).to(torch.int32).float().softmax(-1) @ v,
        *qkv(),
        reason=Reason.UNKNOWN_FORM,
        detail="cast to torch.int32",
    )


# --- masks ---------------------------------------------------------------------------------------

FILLS = (-torch.inf, -torch.finfo(torch.float32).max, -1e9, -1e4)
PADDING = {
    "(B, 1, 1, L)": VISIBLE.expand(2, 1, 1, LENGTH),
    "(1, 1, 1, L)": VISIBLE[None, None, None],
    "(1, L)": VISIBLE[None],
    "(L,)": VISIBLE,
    "expanded": VISIBLE.expand(2, 2, LENGTH, LENGTH),
}


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("shape", PADDING)
def test_masks_that_are_filled_in(shape: str, fill: float) -> None:
    def function(q, k, v, mask):
        return (q @ k.mT * S).masked_fill(~mask, fill).softmax(-1) @ v

    assert assert_taken(function, *qkv(), PADDING[shape]).node.mask == "key_padding"


MASKED = {
    "in place": lambda s, m: s.masked_fill_(~m, -torch.inf),
    "function": lambda s, m: torch.masked_fill(s, ~m, -torch.inf),
    "where": lambda s, m: torch.where(m, s, -torch.inf),
    "before the scale": lambda s, m: s.masked_fill(~m, -1e9) * S,
    "added, where": lambda s, m: s + torch.where(m, 0.0, -torch.inf),
    "added first": lambda s, m: torch.where(m, 0.0, -torch.inf) + s,
    "added in place": lambda s, m: s.add_(torch.where(m, 0.0, -torch.inf)),
    "zeros": lambda s, m: s + torch.zeros(m.shape).masked_fill(~m, -torch.inf),
    "one minus": lambda s, m: s + (1.0 - m.to(s.dtype)) * -10000.0,
    "inverted": lambda s, m: s + (~m).float() * torch.finfo(s.dtype).min,
    "viewed": lambda s, m: s + ((1 - m[:, 0, 0].float()) * -1e9)[:, None, None, :],
}


@pytest.mark.parametrize("form", MASKED)
def test_every_way_to_mask(form: str) -> None:
    mask = MASKED[form]

    def function(q, k, v, visible):
        return mask(q @ k.mT, visible).softmax(-1) @ v

    assert assert_taken(function, *qkv(), PADDING["(B, 1, 1, L)"]).node.mask == "key_padding"


def test_a_bias_that_is_filled_in_place_first() -> None:
    def function(q, k, v, visible):
        bias = torch.zeros(2, 1, 1, LENGTH).masked_fill_(~visible, -torch.inf)
        return (q @ k.mT + bias).softmax(-1) @ v

    compiled = assert_taken(function, *qkv(), PADDING["(B, 1, 1, L)"])
    assert compiled.node.mask == "key_padding"


def test_the_bias_of_baddbmm_is_a_mask() -> None:
    def function(q, k, v, m):
        bias = torch.where(m, 0.0, -torch.inf).expand(4, 1, LENGTH)
        return torch.baddbmm(bias, q, k.mT, alpha=S).softmax(-1) @ v

    assert assert_taken(function, *map(as_3d, qkv()), VISIBLE).node.mask == "key_padding"


BAND = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs() < 40
UNTAKEN_MASKS = {
    "a band": (BAND, lambda s, m: s.masked_fill(~m, -torch.inf), "bool"),
    "any float": (torch.rand(LENGTH), lambda s, m: s + m, "float"),
    "small fill": (VISIBLE, lambda s, m: s.masked_fill(~m, -5.0), "-5.0"),
    "zero fill": (VISIBLE, lambda s, m: s.masked_fill(~m, 0.0), "0.0"),
    "small fill, where": (VISIBLE, lambda s, m: torch.where(m, s, -5.0), "-5.0"),
    "fill that is scaled away": (VISIBLE, lambda s, m: s.masked_fill(~m, -1e4) * 1e-3, "-10000"),
    "small where": (VISIBLE, lambda s, m: s + torch.where(m, 0.0, -5.0), "float"),
    "where of others": (VISIBLE, lambda s, m: s + torch.where(m, 1.0, -1e9), "float"),
    "ones": (VISIBLE, lambda s, m: s + torch.ones(LENGTH).masked_fill(~m, -1e9), "float"),
    "small zeros": (VISIBLE, lambda s, m: s + torch.zeros(LENGTH).masked_fill(~m, -5.0), "float"),
    "small factor": (VISIBLE, lambda s, m: s + (1.0 - m.float()) * -5.0, "float"),
    "integers": (VISIBLE.int(), lambda s, m: s + (1.0 - m.float()) * -1e4, "float"),
    "two minus": (VISIBLE, lambda s, m: s + (2.0 - m.float()) * -1e4, "float"),
    "alpha of one minus": (
        VISIBLE,
        lambda s, m: s + torch.sub(1.0, m.float(), alpha=0.5) * -1e4,
        "float",
    ),
    "two masks": (
        VISIBLE,
        lambda s, m: s.masked_fill(~m, -1e9).masked_fill(~m, -1e9),
        "two masks",
    ),
}


@pytest.mark.parametrize("form", UNTAKEN_MASKS)
def test_masks_that_cannot_be_honoured_are_refused(form: str) -> None:
    given, mask, detail = UNTAKEN_MASKS[form]

    def function(q, k, v, m):
        return mask(q @ k.mT, m).softmax(-1) @ v

    assert_refused(function, *qkv(), given, reason=Reason.MASK, detail=detail)


def changed(mask: Tensor) -> Tensor:
    mask.mul_(0.5).add_(1)
    return mask


def part_changed(mask: Tensor) -> Tensor:
    mask[:50].fill_(0.25e-9)
    return mask


@pytest.mark.parametrize(
    "make",
    [
        lambda m: changed(torch.where(m, 0.0, -1e9)),
        lambda m: part_changed((~m).float()) * -1e9,
        lambda m: changed(torch.zeros(LENGTH)).masked_fill(~m, -1e9),
    ],
)
def test_masks_that_are_changed_in_place_are_taken_as_they_are(make) -> None:
    def function(q, k, v, m):
        bias = make(m)
        return (q @ k.mT + bias).softmax(-1) @ v

    assert_refused(function, *qkv(), VISIBLE, reason=Reason.MASK, detail="float")


def test_a_negation_of_what_is_changed_later_is_used_as_it_was() -> None:
    def function(q, k, v, m):
        m = m & True
        hidden = ~m
        m.logical_not_()
        return (q @ k.mT).masked_fill(hidden, -1e9).softmax(-1) @ v

    assert_taken(function, *qkv(), VISIBLE)


def test_masks_that_are_no_tensor_or_weighted_are_refused() -> None:
    number = assert_refused(
        lambda q, k, v: (q @ k.mT + 1.0).softmax(-1) @ v, *qkv(), reason=Reason.UNKNOWN_FORM
    )
    assert "1.0 is added" in number.node.detail
    assert_refused(
        lambda q, k, v: torch.add(q @ k.mT, VISIBLE.float(), alpha=2).softmax(-1) @ v,
        *qkv(),
        reason=Reason.UNKNOWN_FORM,
        detail="with a factor",
    )


# --- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dropout",
    [
        lambda p: F.dropout(p, 0.0),
        lambda p: F.dropout(p, p=0.3, training=False),
        lambda p: torch.dropout(p, 0.3, False),
        nn.Dropout(0.0),
        nn.Dropout(0.3).eval(),
        lambda p: F.dropout(p, 0.0, inplace=True),
    ],
)
def test_dropout_that_is_off(dropout) -> None:
    assert_taken(lambda q, k, v: dropout((q @ k.mT).softmax(-1)) @ v, *qkv())


@pytest.mark.parametrize(
    "dropout", [lambda p: F.dropout(p, 0.3), nn.Dropout(0.3), lambda p: torch.dropout(p, 0.3, True)]
)
def test_dropout_that_is_on_is_refused(dropout) -> None:
    def function(q, k, v):
        return dropout((q @ k.mT).softmax(-1)) @ v

    with pytest.raises(AssertionError):  # two draws differ, so this is all that can be compared
        compile_at_recall_1(function, *qkv())
    backend = cef_compile.backend(policy=lambda node: 1.0, inner="eager", min_kv_len=0)
    torch._dynamo.reset()
    torch.compile(function, backend=backend)(*qkv())
    assert [node.reason for node in backend.report.nodes] == [str(Reason.DROPOUT)]


# --- look-alikes ---------------------------------------------------------------------------------

A_TENSOR = torch.tensor(S)
SQUARE = heads(8, dim=LENGTH, seed=3)
LOOK_ALIKES = {
    "softmax over the queries": (
        lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
        Reason.UNKNOWN_FORM,
        "dimension -2",
    ),
    "softmax over the heads": (
        lambda q, k, v: (q @ k.mT).softmax(1) @ v,
        Reason.UNKNOWN_FORM,
        "dimension 1",
    ),
    "scores used elsewhere": (
        lambda q, k, v: ((s := q @ k.mT * S).softmax(-1) @ v, s.mean()),
        Reason.INTERMEDIATES,
        "2 users",
    ),
    "raw scores used elsewhere": (
        lambda q, k, v: (((s := q @ k.mT) * S).softmax(-1) @ v, s.mean()),
        Reason.INTERMEDIATES,
        "2 users",
    ),
    "weights returned": (
        lambda q, k, v: ((p := (q @ k.mT).softmax(-1)) @ v, p),
        Reason.INTERMEDIATES,
        "2 users",
    ),
    "weights used twice": (
        lambda q, k, v: (p := (q @ k.mT).softmax(-1)) @ v + p @ q,
        Reason.INTERMEDIATES,
        "2 users",
    ),
    "a cast of the weights returned": (
        lambda q, k, v: ((p := (q @ k.mT).softmax(-1).to(v.dtype)) @ v, p.mean()),
        Reason.INTERMEDIATES,
        "2 users",
    ),
    "stabilised by hand": (
        lambda q, k, v: ((s := q @ k.mT) - s.amax(-1, keepdim=True)).softmax(-1) @ v,
        Reason.UNKNOWN_FORM,
        "",
    ),
    "a scale that is a tensor": (
        lambda q, k, v: (q @ k.mT * A_TENSOR).softmax(-1) @ v,
        Reason.SCALE,
        "in the graph",
    ),
    "a scale per head": (
        lambda q, k, v: (q @ k.mT / q.mean((0, 2, 3))[None, :, None, None]).softmax(-1) @ v,
        Reason.SCALE,
        "in the graph",
    ),
    "a negative scale": (lambda q, k, v: (q @ k.mT * -S).softmax(-1) @ v, Reason.SCALE, "-0.3"),
    "rounded": (
        lambda q, k, v: torch.div(q @ k.mT, 2, rounding_mode="floor").softmax(-1) @ v,
        Reason.UNKNOWN_FORM,
        "rounded",
    ),
    "divided into": (
        lambda q, k, v: (2.0 / (q @ k.mT)).softmax(-1) @ v,
        Reason.SCALE,
        "in the graph",
    ),
    "soft cap": (
        lambda q, k, v: ((q @ k.mT / 5).tanh() * 5).softmax(-1) @ v,
        Reason.UNKNOWN_FORM,
        "tanh",
    ),
    "subtracted": (
        lambda q, k, v: (q @ k.mT - v.mean()).softmax(-1) @ v,
        Reason.UNKNOWN_FORM,
        "sub",
    ),
    "reshaped on the way": (
        lambda q, k, v: (q @ k.mT).view(4, LENGTH, LENGTH).softmax(-1).view(2, 2, LENGTH, -1) @ v,
        Reason.UNKNOWN_FORM,
        "",
    ),
    "part of the weights": (
        lambda q, k, v: (q @ k.mT).softmax(-1)[..., 1:] @ v[:, :, 1:],
        Reason.UNKNOWN_FORM,
        "view",
    ),
    "weights hidden after the softmax": (
        lambda q, k, v: (q @ k.mT).softmax(-1).masked_fill(BAND, 0.0) @ v,
        Reason.UNKNOWN_FORM,
        "masked_fill",
    ),
    "weights scaled": (
        lambda q, k, v: ((q @ k.mT).softmax(-1) * 2) @ v,
        Reason.UNKNOWN_FORM,
        "mul",
    ),
    "weights transposed": (
        lambda q, k, v: (q @ k.mT).softmax(-1).mT @ v,
        Reason.UNKNOWN_FORM,
        "transpose",
    ),
    "weights on the right": (
        lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1),
        Reason.UNKNOWN_FORM,
        "first factor",
    ),
    "five dimensions": (
        lambda q, k, v: plain(q[None], k[None], v[None]),
        Reason.LAYOUT,
        "5-D",
    ),
    "a broadcast batch": (lambda q, k, v: plain(q, k[:1], v[:1]), Reason.LAYOUT, "broadcast"),
    "one value head": (lambda q, k, v: plain(q, k, v[:, :1]), Reason.LAYOUT, "broadcast"),
    "a mask that adds a batch": (
        lambda q, k, v: (
            (q[:1] @ k[:1].mT).masked_fill(BAND.expand(2, 1, -1, -1), -1e9).softmax(-1) @ v
        ),
        Reason.UNKNOWN_FORM,
        "another shape",
    ),
    "einsum that sums the heads": (
        lambda q, k, v: (
            torch.einsum("bhid,bhjd->bij", q, k).softmax(-1)[:, None].expand(2, 2, -1, -1) @ v
        ),
        Reason.UNKNOWN_FORM,
        "",
    ),
    "einsum with keys for all heads": (
        lambda q, k, v: torch.einsum("bhid,bjd->bhij", q, k[:, 0]).softmax(-1) @ v,
        Reason.UNKNOWN_FORM,
        "first product",
    ),
    "einsum that keeps the keys apart": (
        lambda q, k, v: torch.einsum("bhij,bhjd->bhijd", (q @ k.mT).softmax(-1), v).sum(3),
        Reason.UNKNOWN_FORM,
        "second product",
    ),
    "einsum of three": (
        lambda q, k, v: torch.einsum("bhid,bhjd,bhj->bhij", q, k, k[..., 0]).softmax(-1) @ v,
        Reason.UNKNOWN_FORM,
        "",
    ),
    "einsum that sums the queries": (
        lambda q, k, v: torch.einsum("bhij,bhid->bhjd", (q @ k.mT).softmax(-1), v),
        Reason.UNKNOWN_FORM,
        "second product",
    ),
    "changed in place meanwhile": (
        lambda q, k, v: in_between(q + 0, k, v, lambda q: q.mul_(2)),
        Reason.UNKNOWN_FORM,
        "in place",
    ),
    "set meanwhile": (
        lambda q, k, v: in_between(q + 0, k, v, lambda q: q.__setitem__(0, 1.0)),
        Reason.UNKNOWN_FORM,
        "in place",
    ),
    "scaled before a change": (
        lambda q, k, v: scaled_before_a_change(q + 0, k, v),
        Reason.UNKNOWN_FORM,
        "in place",
    ),
}


def in_between(q, k, v, change):
    scores = q @ k.mT
    change(q)
    return scores.softmax(-1) @ v


def scaled_before_a_change(q, k, v):
    scaled = q * S
    q.mul_(3)
    return (scaled @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("form", LOOK_ALIKES)
def test_look_alikes_are_seen_and_left_alone(form: str) -> None:
    function, reason, detail = LOOK_ALIKES[form]
    assert_refused(function, *qkv(), reason=reason, detail=detail)


BADDBMM_LOOK_ALIKES = {
    "a bias with a factor": (
        lambda q, k, v: torch.baddbmm(q[:, :, :1], q, k.mT, beta=0.5).softmax(-1) @ v,
        Reason.UNKNOWN_FORM,
        "beta=0.5",
    ),
    "a bias": (
        lambda q, k, v: torch.baddbmm(q[:, :, :1], q, k.mT).softmax(-1) @ v,
        Reason.MASK,
        "float",
    ),
    "an output that is added": (
        lambda q, k, v: torch.baddbmm(v, (q @ k.mT).softmax(-1), v),
        Reason.UNKNOWN_FORM,
        "adds or scales",
    ),
    "an output that is scaled": (
        lambda q, k, v: torch.baddbmm(v, (q @ k.mT).softmax(-1), v, beta=0, alpha=2),
        Reason.UNKNOWN_FORM,
        "adds or scales",
    ),
}


@pytest.mark.parametrize("form", BADDBMM_LOOK_ALIKES)
def test_baddbmm_look_alikes(form: str) -> None:
    function, reason, detail = BADDBMM_LOOK_ALIKES[form]
    assert_refused(function, *map(as_3d, qkv()), reason=reason, detail=detail)


def test_strict_names_what_is_not_recognised() -> None:
    backend = cef_compile.backend(recall=0.9, inner="eager", strict=True, min_kv_len=0)
    with torch.no_grad(), pytest.raises(cef_compile.UnsupportedNodeError, match="not recognised"):
        torch.compile(lambda q, k, v: (q @ k.mT).softmax(-2) @ v, backend=backend)(*qkv())


def test_grad_keeps_it_dense() -> None:
    q, k, v = qkv()
    backend = cef_compile.backend(policy=lambda node: 1.0, inner="eager", min_kv_len=0)
    torch.compile(plain, backend=backend)(q.requires_grad_(), k, v).sum().backward()
    assert [node.reason for node in backend.report.nodes] == [str(Reason.GRADIENT)]


class Router(nn.Module):
    """A mixture of experts: a softmax between two products, none of them an attention's."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.gate).softmax(-1) @ self.experts


class TransposedRouter(nn.Module):
    """The same with the weights of a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.gate.mT).softmax(-1) @ self.experts.T


@pytest.mark.parametrize(
    "function",
    [
        Router(),
        TransposedRouter(),
        lambda x: (x @ x.mT).relu() @ x,  # no softmax
        lambda x: x.softmax(-1) @ (x.mT.softmax(-1) @ x),  # linear attention
        lambda x: F.linear(x, x[0, 0, :8]).softmax(-1) @ x.mT,  # a projection
        lambda x: F.linear(x @ (x.mT @ x), torch.ones(8, 8)).softmax(-1) @ x.mT,
        lambda x: (x @ x.mT).softmax(-1),  # no values
    ],
)
def test_what_is_no_attention_is_not_reported(function) -> None:
    assert attention_count(function, heads()) == 0


# --- all together --------------------------------------------------------------------------------


@given(
    scale=st.sampled_from(sorted(SCALES)),
    product=st.sampled_from(sorted(PRODUCTS)),
    softmax=st.sampled_from(sorted(SOFTMAXES)),
    mask=st.sampled_from([None, *sorted(MASKED)]),
    dropout=st.sampled_from([None, 0.0, 0.5]),
)
def test_combinations(scale, product, softmax, mask, dropout) -> None:
    make_scores, normalise, multiply = SCALES[scale][1], SOFTMAXES[softmax], PRODUCTS[product]

    def function(q, k, v, visible):
        scores = make_scores(q, k)
        if mask is not None:
            scores = MASKED[mask](scores, visible)
        weights = normalise(scores)
        if dropout is not None:
            weights = F.dropout(weights, dropout, training=False)
        return multiply(weights, v)

    assert_taken(function, *qkv(), PADDING["(B, 1, 1, L)"])

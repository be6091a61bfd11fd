"""``cef_compile.attention`` and the op behind it: SDPA's arguments, errors, layout, phases."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    RECALLS,
    Case,
    Inputs,
    achieved,
    assert_attention,
    cases,
    control,
    oracle,
    same_bits,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import cef_compile
from cef_compile import AttentionStats, attention, ops
from cef_compile.kernels import config as c
from cef_compile.kernels import reference as ref
from cef_compile.kernels.order import Layout
from cef_compile.policy import Decision

options = st.sampled_from(
    [
        {},
        {"rule": "top_p"},
        {"rule": "top_k", "density": 1.0},
        {"compensate": True},
        {"scores": "int8"},
        {"filter": "online"},
        {"filter": "online", "certify": "row"},
        {"filter": "online", "rule": "lse"},
        {"filter": "online", "rule": "max"},
        {"filter": "online", "certify": "none"},
        {"filter": "online", "bound": True},
    ]
)


def mask_of(x: Inputs) -> Tensor | None:
    return None if x.mask is None else x.mask[:, None, None]


def call(x: Inputs, **more: Any) -> Any:
    gqa = x.q.shape[1] != x.k.shape[1]
    return attention(x.q, x.k, x.v, mask_of(x), scale=x.scale, enable_gqa=gqa, **more)


class TestAgreesWithSdpa:
    @given(case=cases(), chosen=options)
    def test_at_recall_1(self, case: Case, chosen: dict[str, Any]) -> None:
        x = case.make()
        out = call(x, recall=1.0, **chosen)
        dense = oracle(x)
        assert torch.all((out - dense.out).abs() <= dense.rounding[..., None] * x.v.abs().amax())
        assert out.dtype == x.q.dtype
        assert out.transpose(1, 2).is_contiguous()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_in_every_dtype(self, dtype: torch.dtype) -> None:
        x = Case(batch=2, kv_heads=2).make(dtype)
        out = attention(x.q, x.k, x.v, recall=1.0)
        assert out.dtype == dtype
        wanted = F.scaled_dot_product_attention(x.q.double(), x.k.double(), x.v.double())
        dense = F.scaled_dot_product_attention(x.q, x.k, x.v)
        unit = torch.finfo(dtype).eps * wanted.abs().amax()
        error = (out.double() - wanted).abs().amax()
        assert error <= 2 * (dense.double() - wanted).abs().amax() + unit / 2

    def test_takes_sdpa_arguments_by_the_same_names_and_places(self) -> None:
        mine = list(inspect.signature(attention).parameters.values())
        schema = torch.ops.aten.scaled_dot_product_attention.default._schema.arguments
        names = [argument.name for argument in schema]
        assert [p.name for p in mine[: len(names)]] == names
        defaults = [a.default_value for a in schema if a.has_default_value()]
        assert [p.default for p in mine[3 : len(names)]] == defaults
        assert all(p.kind is p.KEYWORD_ONLY for p in mine[len(names) :])
        x = Case(group=2).make()
        by_place = attention(x.q, x.k, x.v, None, 0.0, False, 0.3, True, recall=1.0)
        wanted = F.scaled_dot_product_attention(
            x.q, x.k, x.v, None, 0.0, False, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(by_place, wanted)
        assert cef_compile.attention is attention

    def test_scale_is_that_of_sdpa(self) -> None:
        x = Case(head_dim=11).make()
        wanted = F.scaled_dot_product_attention(x.q, x.k, x.v)
        torch.testing.assert_close(attention(x.q, x.k, x.v, recall=1.0), wanted)
        for scale in (1e-3, 0.5, 2):
            wanted = F.scaled_dot_product_attention(x.q, x.k, x.v, scale=scale)
            found = attention(x.q, x.k, x.v, recall=1.0, scale=scale)
            torch.testing.assert_close(found, wanted)

    @pytest.mark.parametrize(
        "shape",
        [(2, 1, 1, 257), (1, 1, 1, 257), (1, 1, 257), (1, 257), (2, 1, 1, 1)],
        ids=str,
    )
    def test_masks_of_key_padding(self, shape: tuple[int, ...]) -> None:
        x = Case(batch=2, kv_heads=2).make()
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
        mask[0] = True
        wanted = F.scaled_dot_product_attention(x.q, x.k, x.v, mask)
        torch.testing.assert_close(attention(x.q, x.k, x.v, mask, recall=1.0), wanted)

    def test_mask_expanded_over_heads_and_queries(self) -> None:
        x = Case(batch=2, kv_heads=2, mask="lengths").make()
        mask = x.mask[:, None, None].expand(2, 2, 200, 257)
        a = attention(x.q, x.k, x.v, mask, recall=0.7)
        b = attention(x.q, x.k, x.v, x.mask[:, None, None], recall=0.7)
        assert torch.equal(a, b)

    def test_inputs_are_not_written_to(self) -> None:
        x = Case(mask="lengths").make()
        copies = [t.clone() for t in (x.q, x.k, x.v, x.mask)]
        call(x, recall=0.5, return_stats=True)
        for tensor, copy in zip((x.q, x.k, x.v, x.mask), copies, strict=True):
            assert torch.equal(tensor, copy)

    def test_values_of_another_width_and_empty_shapes(self) -> None:
        x = Case(value_dim=13).make()
        assert attention(x.q, x.k, x.v).shape == (1, 1, 200, 13)
        assert attention(x.q[:, :, :0], x.k, x.v).shape == (1, 1, 0, 13)
        assert attention(x.q[:0], x.k[:0], x.v[:0]).shape == (0, 1, 200, 13)
        none = attention(x.q, x.k[:, :, :0], x.v[:, :, :0], return_stats=True)
        assert torch.all(none[0] == 0)
        assert none[1].density == none[1].estimate == none[1].recall == 1

    def test_needs_no_gradient_but_in_no_grad_it_may_be_asked_for(self) -> None:
        x = Case().make()
        x.q.requires_grad_()
        with torch.no_grad():
            out = attention(x.q, x.k, x.v)
        assert not out.requires_grad


class TestFilters:
    @pytest.mark.parametrize("filter_", ["planned", "online"])
    def test_scores_in_8_bits_are_a_permission(self, filter_: str) -> None:
        """Where nothing is faster for it, as on a CPU, scores stay exact."""
        allowed, exact = (call(X, recall=0.5, filter=filter_, scores=s) for s in ("int8", "exact"))
        assert same_bits(allowed, exact)

    @given(case=cases(), recall=RECALLS)
    def test_is_the_filter_of_the_reference(self, case: Case, recall: float) -> None:
        x = case.make()
        found, stats = call(x, recall=recall, return_stats=True)
        wanted = ref.planned(x.q, x.k, x.v, control(recall), **x.options, audited=True)
        assert torch.equal(found, wanted.out)
        measures = wanted.measures.tolist()
        assert stats.density == measures[c.MEASURE_DENSITY]
        assert stats.recall == measures[c.MEASURE_RECALL]
        assert stats.estimate == measures[c.MEASURE_ESTIMATE]
        assert stats.error == measures[c.MEASURE_ERROR]

    @given(case=cases(), recall=RECALLS)
    def test_online_is_certified(self, case: Case, recall: float) -> None:
        x = case.make()
        out, stats = call(x, recall=recall, filter="online", return_stats=True)
        wanted = ref.online(x.q, x.k, x.v, control(recall), **x.options)
        assert_attention(out, wanted.lse, oracle(x, wanted.kept), x.v)
        got = achieved(wanted.lse, oracle(x))
        got = got[~got.isnan()]
        mean = got.mean().item() if got.numel() else 1.0
        assert stats.recall == pytest.approx(mean, abs=1e-6)
        assert stats.recall >= recall - 1e-6  # float32 holds both
        assert stats.interval == (stats.recall, stats.recall)

    @given(case=cases(), recall=RECALLS)
    def test_online_by_bounds_is_certified_and_audited(self, case: Case, recall: float) -> None:
        x = case.make()
        out, stats = call(x, recall=recall, filter="online", bound=True, return_stats=True)
        wanted = ref.online(x.q, x.k, x.v, control(recall), **x.options, bound=True)
        assert torch.equal(out, wanted.out)
        assert stats.estimate == wanted.measures[c.MEASURE_ESTIMATE].item()
        # The recall is measured, since the ledger does not know it; float32 holds both.
        got = achieved(wanted.lse, oracle(x))
        got = got[~got.isnan()]
        mean = got.mean().item() if got.numel() else 1.0
        assert stats.recall == pytest.approx(mean, abs=1e-6)
        assert stats.recall >= stats.estimate - 1e-6
        assert stats.estimate >= recall - 1e-6

    def test_stats(self) -> None:
        x = Case(q_len=128 * 80, kv_len=577, family="banded").make(torch.float32)
        out, stats = attention(x.q, x.k, x.v, recall=0.8, return_stats=True)
        assert isinstance(stats, AttentionStats)
        assert torch.equal(out, attention(x.q, x.k, x.v, recall=0.8))
        low, high = stats.interval
        assert 0 < low < stats.recall < high < 1
        measures = ref.planned(
            x.q, x.k, x.v, control(0.8), scale=8**-0.5, audited=True
        ).measures.tolist()
        half = 1.959964 * measures[c.MEASURE_STDERR]
        assert high - stats.recall == pytest.approx(half, rel=1e-5)
        assert stats.recall - low == pytest.approx(half, rel=1e-5)
        assert stats.density < 0.7
        assert math.log2(stats.threshold) * 16 == pytest.approx(
            round(math.log2(stats.threshold) * 16)
        )

    @pytest.mark.parametrize(("recall", "low", "high"), [(0.99, 0.95, 1.0), (0.01, 0.0, 0.05)])
    def test_interval_stays_in_0_to_1(
        self, recall: float, low: float, high: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x = Case().make()
        stderr = 0.04 / 1.959964
        measured = torch.tensor([0.5, recall, recall, stderr, -3.0, 0.99, stderr])
        monkeypatch.setattr(ops, "attention", lambda *args: (x.v, None, measured))
        _, stats = attention(x.q, x.k, x.v, return_stats=True)
        assert stats.interval == pytest.approx((low, high), abs=1e-6)
        assert 0 <= stats.interval[0] <= stats.interval[1] <= 1
        assert stats.error == pytest.approx(0.99)
        assert stats.error_interval == pytest.approx((0.95, 1.03), abs=1e-6)  # an error may pass 1

    def test_given_threshold_and_density(self) -> None:
        x = Case(q_len=256, kv_len=640, family="banded").make()
        _, stats = attention(x.q, x.k, x.v, threshold=2**-3, return_stats=True)
        assert stats.threshold == 2**-3
        _, stats = attention(x.q, x.k, x.v, rule="top_k", density=0.5, return_stats=True)
        assert stats.density == 0.5
        assert math.isnan(stats.threshold)

    def test_compensation_reaches_the_filter(self) -> None:
        x = Case(kv_len=577).make()
        found = attention(x.q, x.k, x.v, recall=0.5, compensate=True)
        plain = attention(x.q, x.k, x.v, recall=0.5)
        wanted = ref.planned(x.q, x.k, x.v, control(0.5), scale=8**-0.5, compensate=True)
        assert torch.equal(found, wanted.out)
        assert not torch.equal(found, plain)


X = Case(batch=2, kv_heads=2).make(torch.float32)
GIVEN: dict[str, Any] = {"query": X.q, "key": X.k, "value": X.v}

ERRORS = [
    (TypeError, {"query": [1.0]}, "query must be a tensor, got list"),
    (TypeError, {"key": None}, "key must be a tensor, got NoneType"),
    (TypeError, {"value": 1.0}, "value must be a tensor, got float"),
    (ValueError, {"key": X.k.double()}, r"agree in dtype.*float32.*for key torch.float64"),
    (ValueError, {"value": X.v.to("meta")}, r"agree in dtype and device.*for value.*meta"),
    (ValueError, {"query": X.q[0]}, r"4-D.*q is 3-D"),
    (ValueError, {"key": X.k[0]}, r"4-D"),
    (ValueError, {"query": X.q[:1]}, r"batch sizes differ.*\(1, 2, 200, 8\)"),
    (ValueError, {"value": X.v[:1]}, r"batch sizes differ.*\(1, 2, 257, 8\)"),
    (ValueError, {"value": X.v[:, :, 1:]}, r"heads or length.*\(2, 2, 256, 8\)"),
    (ValueError, {"value": X.v[:, 1:]}, r"heads or length.*\(2, 1, 257, 8\)"),
    (ValueError, {"query": X.q[..., 1:]}, r"head_dim.*\(2, 2, 200, 7\)"),
    (ValueError, {"query": X.q[:, :1]}, "1 query heads, 2 key heads.*enable_gqa=True"),
    (
        ValueError,
        {"query": X.q.repeat(1, 2, 1, 1)},
        "4 query heads, 2 key heads.*enable_gqa=True",
    ),
    (
        ValueError,
        {"query": torch.cat((X.q, X.q[:, :1]), 1), "enable_gqa": True},
        "3 query heads, 2 key heads",
    ),
    (
        ValueError,
        {"key": X.k[:, :0], "value": X.v[:, :0], "enable_gqa": True},
        "2 query heads, 0 key heads",
    ),
    (ValueError, {name: t[..., :0] for name, t in GIVEN.items()}, "head_dim 0"),
    (TypeError, {"query": X.q.to_sparse()}, "query must be a dense tensor.*sparse_coo"),
    (ValueError, {"dropout_p": 0.1}, "dropout_p=0.1"),
    (ValueError, {"is_causal": True}, "is_causal=True"),
    (ValueError, {"scale": math.nan}, "scale must be positive and finite, got nan"),
    (ValueError, {"scale": math.inf}, "scale must be positive and finite, got inf"),
    (ValueError, {"scale": 0.0}, "scale must be positive and finite, got 0.0"),
    (ValueError, {"scale": -0.5}, "scale must be positive and finite, got -0.5"),
    (TypeError, {"scale": "a"}, "scale must be a number, got str 'a'"),
    (TypeError, {"recall": None}, "recall must be a number.*NoneType"),
    (TypeError, {"compensate": "yes"}, "compensate must be True or False, got 'yes'"),
    (TypeError, {"filter": "online", "bound": 1}, "bound must be True or False, got 1"),
    (TypeError, {"attn_mask": [True]}, "attn_mask must be a tensor or None, got list"),
    (ValueError, {name: t.long() for name, t in GIVEN.items()}, "dtype.*int64"),
    (ValueError, {"attn_mask": torch.zeros(2, 1, 1, 257)}, "float mask.*Pass a boolean mask"),
    (
        ValueError,
        {"attn_mask": torch.ones(2, 1, 200, 257, dtype=torch.bool)},
        "bool mask.*Pass a boolean mask",
    ),
    (ValueError, {"attn_mask": torch.ones(2, 2, 1, 257, dtype=torch.bool)}, "bool mask"),
    (
        ValueError,
        {"attn_mask": torch.ones(2, 1, 1, 256, dtype=torch.bool)},
        r"attn_mask of shape \(2, 1, 1, 256\) does not broadcast to.*\(2, 2, 200, 257\)",
    ),
    (
        ValueError,
        {"attn_mask": torch.ones(3, 1, 1, 257, dtype=torch.bool)},
        r"attn_mask of shape \(3, 1, 1, 257\) does not broadcast",
    ),
    (
        ValueError,
        {"attn_mask": torch.ones(1, 2, 1, 1, 257, dtype=torch.bool)},
        r"attn_mask of shape \(1, 2, 1, 1, 257\) does not broadcast",
    ),
    (
        ValueError,
        {"attn_mask": torch.ones(2, 1, 1, 257, dtype=torch.bool, device="meta")},
        "attn_mask is on meta, query on cpu",
    ),
    (TypeError, {"recall": "0.9"}, "recall must be a number.*'0.9'"),
    (ValueError, {"recall": 0.0}, r"recall must be in \(0, 1\], got 0.0"),
    (ValueError, {"recall": 1.5}, r"recall must be in \(0, 1\], got 1.5"),
    (ValueError, {"recall": math.nan}, r"recall must be in \(0, 1\], got nan"),
    (ValueError, {"filter": "dense"}, "filter must be one of.*'dense'"),
    (ValueError, {"rule": "lse"}, "rule must be one of.*'lse'"),
    (ValueError, {"certify": "row"}, "certify='row' needs filter='online'"),
    (ValueError, {"bound": True}, "bound=True needs filter='online', got filter='planned'"),
    (ValueError, {"scores": "fp8"}, "scores must be one of 'exact', 'int8', got 'fp8'"),
    (ValueError, {"filter": "online", "certify": "x"}, "certify must be one of.*'x'"),
    (ValueError, {"threshold": 0}, r"threshold must be in \(0, 1\], got 0"),
    (ValueError, {"rule": "top_k"}, "density go together"),
    (ValueError, {"density": 0.5}, "density go together"),
    (ValueError, {"rule": "top_k", "density": 2.0}, r"density must be in \(0, 1\], got 2.0"),
    (ValueError, {"filter": "online", "compensate": True}, "compensate=True needs"),
]


class TestOrder:
    X = Case(q_len=205, kv_len=205, kv_heads=2)

    @settings(max_examples=max(8, settings.default.max_examples // 5))
    @given(case=cases(q_len=210, kv_len=210), chosen=options)
    def test_at_recall_1(self, case: Case, chosen: dict[str, Any]) -> None:
        x = case.make()
        out = call(x, recall=1.0, grid=(5, 5, 8), text=(3, 7), **chosen)
        dense = oracle(x)
        assert torch.all((out - dense.out).abs() <= dense.rounding[..., None] * x.v.abs().amax())

    def test_is_the_op_with_a_layout(self) -> None:
        x = self.X.make(torch.float32)
        got = call(x, recall=0.6, grid=(5, 5, 8), text=(0, 5))
        wanted = ref.planned(x.q, x.k, x.v, control(0.6), **x.options, layout=Layout(0, 5, 5, 8, 5))
        assert torch.equal(got, wanted.out)

    def test_text_without_a_grid(self) -> None:
        x = self.X.make(torch.float64)
        got = call(x, recall=0.1, text=(5, 0))
        assert torch.all((got - oracle(x).out)[:, :, :5].abs() < 1e-9)

    @pytest.mark.parametrize(
        ("more", "error", "message"),
        [
            ({"grid": (5, 5, 8)}, ValueError, r"make 200 tokens, but there are 205 queries"),
            ({"grid": (5, 41)}, ValueError, "grid must be 3 integers of at least 1"),
            ({"grid": (0, 5, 41)}, ValueError, "grid must be 3 integers of at least 1"),
            ({"grid": 205}, TypeError, "grid must be 3 integers"),
            ({"grid": (1, 5.0, 41)}, TypeError, "grid must be 3 integers"),
            ({"text": (205, 0)}, ValueError, "grid must be 3 integers of at least 1"),
            ({"text": (-1, 0)}, ValueError, "text must be 2 integers of at least 0"),
        ],
    )
    def test_refuses(self, more: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            call(self.X.make(torch.float32), **more)


class TestErrors:
    @pytest.mark.parametrize(("error", "given_", "says"), ERRORS, ids=lambda v: str(v)[:40])
    def test_say_what_was_got_before_any_work(
        self, error: type[Exception], given_: dict[str, Any], says: str, monkeypatch
    ) -> None:
        def work(*args: Any) -> None:
            pytest.fail("work was done before the error")

        monkeypatch.setattr(ops, "attention", work)
        with pytest.raises(error, match=f"(?s){says}"):
            attention(**{**GIVEN, **given_})

    @pytest.mark.parametrize("name", ["query", "key", "value"])
    def test_gradient(self, name: str) -> None:
        given_ = {**GIVEN, name: GIVEN[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match=r"a gradient is needed.*torch\.no_grad"):
            attention(**given_)

    def test_filter_options_are_by_name_only(self) -> None:
        with pytest.raises(TypeError, match="positional"):
            attention(X.q, X.k, X.v, None, 0.0, False, None, False, 0.9)


def arguments(
    x: Inputs,
    phase: ops.Phase,
    decision: Decision,
    mask: Tensor | None,
    layout: tuple[int, ...] = (),
) -> tuple[Any, ...]:
    numbers = ops.new_control(decision, x.q.device)
    return (x.q, x.k, x.v, mask, numbers, int(phase), x.scale, *decision.options, list(layout))


DECISIONS = {
    "planned": Decision(0.8),
    "compensated": Decision(0.8, compensate=True),
    "top_k": Decision(0.8, rule="top_k", density=0.5),
    "top_p": Decision(0.8, rule="top_p"),
    "online": Decision(0.8, "online"),
    "row": Decision(0.8, "online", certify="row"),
    "lse": Decision(0.8, "online", rule="lse"),
    "bound": Decision(0.8, "online", bound=True),
    "int8": Decision(0.8, scores="int8"),
}
by_phase = pytest.mark.parametrize("phase", list(ops.Phase), ids=lambda phase: phase.name)
by_decision = pytest.mark.parametrize("name", DECISIONS)


def layouts(case: Case, dtype: torch.dtype) -> list[Inputs]:
    """A case as it is, and as a view of (batch, length, heads, head_dim)."""
    x = case.make(dtype)
    moved = {n: getattr(x, n).transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv"}
    return [x, x.replace(**moved)]


class TestOp:
    @by_phase
    @by_decision
    def test_opcheck(self, phase: ops.Phase, name: str) -> None:
        case = Case(batch=2, kv_heads=2, group=2, q_len=130, kv_len=200, mask="lengths")
        for x in layouts(case, torch.float32):
            for mask in (None, mask_of(x)):
                torch.library.opcheck(
                    torch.ops.cef.attention.default,
                    arguments(x, phase, DECISIONS[name], mask),
                    test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
                )

    @by_phase
    @pytest.mark.parametrize("name", ["planned", "online"])
    def test_opcheck_of_an_order(self, phase: ops.Phase, name: str) -> None:
        case = Case(batch=2, kv_heads=2, group=2, q_len=200, kv_len=200, mask="lengths")
        for x in layouts(case, torch.float32):
            args = arguments(x, phase, DECISIONS[name], mask_of(x), (6, 4, 6, 8, 2))
            torch.library.opcheck(
                torch.ops.cef.attention.default,
                args,
                test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
            )
        bad = arguments(x, ops.Phase.FILTERED, DECISIONS[name], None, (5, 4, 6, 8, 2))
        with pytest.raises(ValueError, match="199 tokens, but there are 200 queries"):
            torch.ops.cef.attention(*bad)

    def test_opcheck_of_tracing(self) -> None:
        # Of all calls an audited one alone has no NaN among its measures, which opcheck takes for
        # a difference; the next test traces the others.
        case = Case(batch=2, kv_heads=2, q_len=130, kv_len=200)
        for x in layouts(case, torch.float32):
            for name in ("planned", "compensated"):
                args = arguments(x, ops.Phase.AUDITED, DECISIONS[name], None)
                torch.library.opcheck(torch.ops.cef.attention.default, args)

    @by_phase
    @by_decision
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_traced_equals_eager(self, phase: ops.Phase, name: str, dynamic: bool) -> None:
        case = Case(batch=2, kv_heads=2, group=2, q_len=130, kv_len=200, mask="lengths")
        torch._dynamo.reset()
        traced = torch.compile(
            torch.ops.cef.attention.default, backend="aot_eager", fullgraph=True, dynamic=dynamic
        )
        for x in layouts(case, torch.float32):
            args = arguments(x, phase, DECISIONS[name], mask_of(x))
            for one, other in zip(traced(*args), torch.ops.cef.attention(*args), strict=True):
                assert same_bits(one, other)
                assert one.stride() == other.stride()

    @by_phase
    @pytest.mark.parametrize("name", ["planned", "online"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "case",
        [
            Case(batch=2, kv_heads=2, group=2, value_dim=13),
            Case(q_len=1, kv_heads=3),
            Case(batch=3, q_len=65, kv_len=64, mask="lengths"),
        ],
        ids=["grouped", "one query", "masked"],
    )
    def test_fake_outputs_are_like_the_real_ones(
        self, phase: ops.Phase, name: str, dtype: torch.dtype, case: Case
    ) -> None:
        for x in layouts(case, dtype):
            args = arguments(x, phase, DECISIONS[name], mask_of(x))
            real = torch.ops.cef.attention(*args)
            with FakeTensorMode() as mode:
                converted = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
                fake = torch.ops.cef.attention(*converted)
            assert len(real) == len(fake) == 3
            for one, other in zip(real, fake, strict=True):
                assert one.shape == other.shape
                assert one.stride() == other.stride()
                assert one.dtype == other.dtype
                assert one.device == other.device
                assert one.storage_offset() == other.storage_offset()

    @by_decision
    @given(case=cases())
    def test_dense_phase_is_sdpa(self, name: str, case: Case) -> None:
        x = case.make(torch.float32)
        args = arguments(x, ops.Phase.DENSE, DECISIONS[name], mask_of(x))
        out, histogram, measures = torch.ops.cef.attention(*args)
        wanted = F.scaled_dot_product_attention(
            x.q, x.k, x.v, mask_of(x), scale=x.scale, enable_gqa=case.group > 1
        )
        assert torch.equal(out, wanted)
        assert torch.all(histogram == 0)
        assert measures.isnan().all()

    def test_outputs_share_no_memory_with_inputs(self) -> None:
        for phase in ops.Phase:
            args = arguments(X, phase, DECISIONS["planned"], None)
            given_ = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            made = [t.untyped_storage().data_ptr() for t in torch.ops.cef.attention(*args)]
            assert not given_ & set(made)
            assert len(set(made)) == 3

    def test_audited_phase_measures_what_the_filtered_one_leaves_open(self) -> None:
        filtered, audited = (
            torch.ops.cef.attention(*arguments(X, phase, DECISIONS["planned"], None))
            for phase in (ops.Phase.FILTERED, ops.Phase.AUDITED)
        )
        assert torch.equal(filtered[0], audited[0])
        assert torch.equal(filtered[1], audited[1])
        assert math.isnan(ops.Measures.of(filtered[2]).recall)
        read = ops.Measures.of(audited[2])
        lse = ref.planned(X.q, X.k, X.v, control(0.8), scale=X.scale).lse
        assert read.recall == pytest.approx(achieved(lse, oracle(X)).mean().item(), abs=1e-5)
        assert read.stderr == 0


class TestNumbers:
    def test_control(self) -> None:
        cpu = torch.device("cpu")
        assert ops.new_control(Decision(0.75), cpu, seed=5).tolist() == [0.75, 0, 0, 5]
        assert ops.new_control(Decision(0.75, threshold=0.25), cpu).tolist() == [0.75, -2, 1, 0]
        top_k = Decision(0.75, rule="top_k", density=0.5)
        assert ops.new_control(top_k, cpu).tolist() == [0.5, 0, 0, 0]

    def test_seeds_advance_in_place(self) -> None:
        controls = [ops.new_control(Decision(0.5), torch.device("cpu"), seed) for seed in (0, 7)]
        ops.next_seeds(controls)
        assert [control_.tolist() for control_ in controls] == [[0.5, 0, 0, 1], [0.5, 0, 0, 8]]

    def test_measures(self) -> None:
        read = ops.Measures.of(torch.tensor([0.25, 0.5, 0.75, 0.125, -3.0, 0.375, 0.0625]))
        assert read == ops.Measures(0.25, 0.5, 0.75, 0.125, 0.125, 0.375, 0.0625)
        assert math.isnan(ops.Measures.of(torch.full((8,), math.nan)).threshold)

    def test_engine(self) -> None:
        measures = torch.full((ops.MEASURE_SIZE,), math.nan)
        assert ops.engine(measures) == ""
        hopper = measures.clone()
        hopper[c.MEASURE_ENGINE] = c.ENGINES.index("hopper")
        assert ops.engine(hopper) == "hopper"
        assert ops.engine(ops.pooled([hopper, hopper], [3, 5])) == "hopper"
        assert ops.engine(ops.pooled([hopper, measures], [3, 5])) == ""
        decision = DECISIONS["planned"]
        assert ops.engine(torch.ops.cef.attention(*arguments(X, 0, decision, None))[2]) == ""
        assert (
            ops.engine(torch.ops.cef.attention(*arguments(X, 1, decision, None))[2]) == "reference"
        )

    @given(
        cases_=st.lists(cases(mask="none"), min_size=1, max_size=4),
        recall=RECALLS,
    )
    def test_shared_threshold_gives_the_mean_recall(
        self, cases_: list[Case], recall: float
    ) -> None:
        numbers = control(recall, seed=3)
        histograms = []
        for case in cases_:
            x = case.make()
            histograms.append(ref.planned(x.q, x.k, x.v, numbers, **x.options).histogram)
        before = numbers.clone()
        shared = ops.shared_threshold(ops.mean_energy(histograms), numbers)
        assert torch.equal(numbers, before)
        assert shared[[c.CONTROL_TARGET, c.CONTROL_FIXED, c.CONTROL_SEED]].tolist() == [
            numbers[c.CONTROL_TARGET].item(),
            1,
            3,
        ]
        results = [
            ref.planned(x.q, x.k, x.v, shared, **x.options) for x in (k.make() for k in cases_)
        ]
        logs = {result.measures[c.MEASURE_LOG2_THRESHOLD].item() for result in results}
        assert logs == {shared[c.CONTROL_LOG2_THRESHOLD].item()}
        mean = sum(r.measures[c.MEASURE_ESTIMATE].item() for r in results) / len(results)
        # Histograms are in float32: 256 bins and a mean of four of them.
        rounding = 300 * 2**-24
        assert mean >= numbers[c.CONTROL_TARGET].item() - rounding
        edge = int(c.edge_bin(shared[c.CONTROL_LOG2_THRESHOLD]))
        if edge < c.TOP_BIN:
            higher = torch.stack([h[0, edge + 1 :].sum() for h in histograms]).mean().item()
            assert higher < numbers[c.CONTROL_TARGET].item() + rounding

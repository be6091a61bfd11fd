"""The backend on small models: run-time numbers, regional graphs, shapes, caches, errors."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path

import models
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import cef_compile
from cef_compile import Balanced, Decision, Reason, Rules, Uniform

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SDPA = torch._C._nn.scaled_dot_product_attention


class Counting:
    """An inner compiler that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm, example_inputs, **kwargs):
        self.graphs.append(gm)
        self.kwargs = kwargs
        return gm.forward


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --- finding and binding -------------------------------------------------------------------------


def spelled(target, positional: int, masked: bool):
    """A function that calls SDPA with some arguments by position and the rest by name."""

    def call(q, k, v, mask):
        names = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal"]
        values = [q, k, v, mask if masked else None, 0.0, False]
        by_name = dict(zip(names[positional:], values[positional:], strict=True))
        return target(*values[:positional], **by_name, scale=0.25)

    return call


@given(
    target=st.sampled_from(
        [
            F.scaled_dot_product_attention,
            torch.ops.aten.scaled_dot_product_attention,
            torch.ops.aten.scaled_dot_product_attention.default,
        ]
    ),
    positional=st.integers(0, 6),
    masked=st.booleans(),
)
def test_arguments_are_bound_by_name_however_they_are_passed(target, positional, masked) -> None:
    torch._dynamo.reset()
    inner = Counting()
    backend = cef_compile.backend(recall=1.0, inner=inner, min_kv_len=0)
    q, k, v = torch.randn(3, 2, 2, 70, 8, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(70) < 50)[None, None, None]
    function = spelled(target, positional, masked)
    if target is not F.scaled_dot_product_attention and positional < 3:
        positional = 3  # the aten ops have no such names for the first three in every version
        function = spelled(target, positional, masked)
    with torch.no_grad():
        got = torch.compile(function, backend=backend)(q, k, v, mask)
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask if masked else None, scale=0.25
    )
    assert_close(got, expected)
    (node,) = backend.report.nodes
    assert node.decision == "filtered"
    assert node.mask == ("key_padding" if masked else "none")
    assert SDPA not in [n.target for n in inner.graphs[0].graph.nodes]


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 1, 1, 640), (1, 1, 1, 640), (640, 640), (2, 2, 640, 640)])
def test_key_padding_masks_in_every_broadcast_form(shape) -> None:
    row = torch.arange(640) < 500
    mask = row.expand(shape)  # stride 0 wherever it is broadcast
    model, x = models.Attention(), models.tokens(batch=2)
    backend = cef_compile.backend(recall=1.0, inner="eager")
    assert_close(torch.compile(model, backend=backend)(x, mask), model(x, mask))
    assert [node.mask for node in backend.report.filtered] == ["key_padding"]


# --- what stays dense, and why -------------------------------------------------------------------


def attention_report(q, k, v, grad=False, strict=False, min_kv_len=0, policy=None, **options):
    backend = cef_compile.backend(
        policy=policy or (lambda node: 0.9), inner="eager", strict=strict, min_kv_len=min_kv_len
    )

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **options)

    with nullcontext() if grad else torch.no_grad():
        got = torch.compile(function, backend=backend)(q, k, v)
        torch.testing.assert_close(got, function(q, k, v))
    (node,) = backend.report.nodes
    return node


def heads(length: int = 640, count: int = 2, dim: int = 8, **options) -> torch.Tensor:
    return torch.randn(1, count, length, dim, **options)


UNSUPPORTED = {
    Reason.GRADIENT: lambda: ((heads(requires_grad=True), heads(), heads()), {"grad": True}),
    Reason.CAUSAL: lambda: ((heads(), heads(), heads()), {"is_causal": True}),
    Reason.MASK: lambda: (
        (heads(), heads(), heads()),
        {"attn_mask": torch.randn(640, 640)},
    ),
    Reason.LAYOUT: lambda: ((heads()[0], heads()[0], heads()[0]), {}),
    Reason.HEADS: lambda: ((heads(), heads(count=1), heads(count=1)), {}),
}


@pytest.mark.parametrize("reason", UNSUPPORTED, ids=lambda reason: reason.name)
def test_what_cannot_be_filtered_stays_dense_with_its_reason(reason) -> None:
    inputs, options = UNSUPPORTED[reason]()
    node = attention_report(*inputs, **options)
    assert (node.decision, node.reason) == ("dense", str(reason))
    assert node.detail


@pytest.mark.parametrize("reason", UNSUPPORTED, ids=lambda reason: reason.name)
def test_strict_names_node_reason_and_remedy(reason) -> None:
    inputs, options = UNSUPPORTED[reason]()
    with pytest.raises(cef_compile.UnsupportedNodeError) as raised:
        attention_report(*inputs, strict=True, **options)
    assert raised.value.reason == str(reason)
    assert str(reason) in str(raised.value)
    assert reason.remedy in str(raised.value)


@torch.no_grad()
def test_a_general_bool_mask_and_dropout_stay_dense() -> None:
    x = models.tokens()
    backend = cef_compile.backend(recall=0.9, inner="eager")
    band = (torch.arange(640)[:, None] - torch.arange(640)).abs() < 200
    model = models.Attention()
    assert_close(torch.compile(model, backend=backend)(x, band), model(x, band))
    assert [n.reason for n in backend.report.nodes] == [str(Reason.MASK)]
    dropping = models.Attention(dropout_p=0.5)
    backend = cef_compile.backend(recall=0.9, inner="eager")
    torch.compile(dropping, backend=backend)(x)
    assert [n.reason for n in backend.report.nodes] == [str(Reason.DROPOUT)]


@torch.no_grad()
def test_short_nodes_stay_dense_below_min_kv_len() -> None:
    for least, decision in ((641, "dense"), (640, "filtered")):
        torch._dynamo.reset()
        node = attention_report(heads(), heads(), heads(), policy=Uniform(1.0), min_kv_len=least)
        assert node.decision == decision
    assert attention_report(heads(), heads(64), heads(64), policy=Uniform(0.5)).reason == str(
        Reason.CROSS_ATTENTION
    )


def test_strict_lets_the_policy_keep_nodes_dense() -> None:
    model, inputs = models.wan()
    backend = cef_compile.backend(recall=0.9, strict=True, inner="eager")
    with torch.no_grad():
        torch.compile(model, backend=backend)(**inputs)
    assert {node.reason for node in backend.report.dense} == {str(Reason.CROSS_ATTENTION)}


# --- wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (ValueError, {"recall": 0.0}, "recall must be in (0, 1], got 0.0"),
        (ValueError, {"recall": 1.5}, "got 1.5"),
        (ValueError, {"recall": float("nan")}, "got nan"),
        (TypeError, {"recall": "0.9"}, "str '0.9'"),
        (TypeError, {"recall": True}, "bool"),
        (ValueError, {"recall": 0.9, "policy": Balanced(0.9)}, "not both"),
        (TypeError, {"policy": 0.9}, "got 0.9"),
        (TypeError, {"policy": Balanced}, "policy must have a method decide"),
        (ValueError, {"inner": "no-such-backend"}, "'no-such-backend'"),
        (ValueError, {"inner": "cef"}, "itself"),
        (TypeError, {"inner": 3}, "got 3"),
        (ValueError, {"min_kv_len": -1}, "got -1"),
        (TypeError, {"min_kv_len": 0.5}, "got 0.5"),
    ],
)
def test_wrong_arguments_say_what_was_got(error, options, words) -> None:
    with pytest.raises(error) as raised:
        cef_compile.backend(**options)
    assert words in str(raised.value)


@pytest.mark.parametrize("answer", ["0.9", 1.5, True, object()])
def test_a_policy_that_answers_nonsense_is_named(answer) -> None:
    backend = cef_compile.backend(policy=lambda node: answer, inner="eager")
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match="policy's answer for node"):
        torch.compile(models.Attention(), backend=backend)(models.tokens())


def test_no_attention_warns_once_and_points_at_explain() -> None:
    backend = cef_compile.backend(recall=0.9, inner="eager")
    with pytest.warns(UserWarning, match="no attention.*explain"):
        torch.compile(torch.nn.Linear(4, 4), backend=backend)(torch.randn(2, 4))


@torch.no_grad()
@pytest.mark.parametrize("regional", [False, True])
def test_rules_that_match_nothing_are_warned_of_and_reported(regional: bool) -> None:
    backend = cef_compile.backend(
        policy=Rules({"blocks.*": 0.9, "blok.*": 0.5, "*": None}), inner="eager"
    )
    model = models.Stack()
    for module in model.blocks if regional else [model]:
        module.compile(backend=backend)
    with pytest.warns(UserWarning, match="'blok") as caught:
        for _ in range(3):
            model(models.tokens())
    assert len(caught) == 1
    assert list(backend.report.unmatched_rules) == ["blok.*"]
    assert "blok.*" in str(backend.report)


# --- run-time numbers ----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_dense_and_recall_change_without_compiling_again(inner: str) -> None:
    model, x = models.Stack(), models.tokens()
    compiled_graphs = []

    def counting(gm, example_inputs):
        compiled_graphs.append(gm)
        if inner == "inductor":
            return torch._inductor.compile(gm, example_inputs)
        return torch._dynamo.lookup_backend(inner)(gm, example_inputs)

    backend = cef_compile.backend(recall=0.5, inner=counting)
    compiled = torch.compile(model, backend=backend)
    expected = model(x)
    assert_close(compiled(x), expected)  # the pass that fills the histograms
    filtered = compiled(x)
    assert not torch.allclose(filtered, expected, atol=1e-3)
    with backend.dense():
        assert_close(compiled(x), expected)
        with backend.dense():
            assert_close(compiled(x), expected)
        assert_close(compiled(x), expected)
    backend.set_recall(1.0)
    assert_close(compiled(x), expected)
    backend.set_recall(0.5)
    backend.reset()
    assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled(x), filtered, rtol=0, atol=0)
    assert len(compiled_graphs) == 1


@torch.no_grad()
def test_balanced_gives_all_nodes_one_threshold_and_the_mean_recall() -> None:
    class Parallel(models.Stack):
        """Nodes whose attention does not depend on what the others dropped."""

        def forward(self, x):
            return sum(block(x) for block in self.blocks)

    model, x = Parallel(4), models.tokens(1100)
    backend = cef_compile.backend(recall=0.7, inner="eager")
    compiled = torch.compile(model, backend=backend)
    outputs = [compiled(x) for _ in range(3)]
    nodes = backend.report.filtered
    assert len({node.threshold for node in nodes}) == 1
    mean = sum(node.estimated_recall for node in nodes) / len(nodes)
    assert mean >= 0.7
    # The next higher threshold would miss the target: histograms hold energy by threshold.
    (state,) = backend._states
    energy = torch.stack([node.histogram[0] for node in state.nodes]).mean(0).double()
    applied = round((torch.tensor(nodes[0].threshold).log2().item() + 16) * 16)
    assert energy[applied:].sum() >= 0.7 > energy[applied + 1 :].sum()
    backend.reset()
    again = [compiled(x) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))


@torch.no_grad()
def test_a_fixed_threshold_is_applied_as_given() -> None:
    decision = Decision(0.9, threshold=2.0**-6)
    backend = cef_compile.backend(policy=lambda node: decision, inner="eager")
    compiled = torch.compile(models.Stack(), backend=backend)
    for _ in range(2):
        compiled(models.tokens())
    assert {node.threshold for node in backend.report.filtered} == {2.0**-6}


@torch.no_grad()
def test_certified_online_never_misses_its_target() -> None:
    for certify, bound in itertools.product(("mean", "row"), (False, True)):
        policy = Uniform(0.8, filter="online", certify=certify, bound=bound)
        backend = cef_compile.backend(policy=policy, inner="eager")
        compiled = torch.compile(models.Stack(), backend=backend)
        with backend.audit() as audit:
            compiled(models.tokens())
        assert all(node.recall >= 0.8 for node in audit.nodes)
        assert any(node.density < 1 for node in audit.nodes)
        if bound:  # the ledger is below what the audit finds, and the report says so
            assert all(
                0.8 <= node.estimate < node.recall for node in audit.nodes if node.density < 1
            )
            assert "3 filtered with bound=True" in str(backend.report)
        else:
            assert all(node.estimate == node.recall for node in audit.nodes)
            assert "bound=True" not in str(backend.report)


@torch.no_grad()
def test_inference_mode_and_no_grad_may_alternate() -> None:
    model, x = models.Stack(), models.tokens()
    backend = cef_compile.backend(recall=1.0, inner="eager")
    compiled = torch.compile(model, backend=backend)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode(), backend.audit() as audit:
            assert_close(compiled(x), model(x))
        assert audit.recall == pytest.approx(1.0)


@torch.no_grad()
def test_audits_change_nothing_and_can_be_nested() -> None:
    model, x = models.Stack(), models.tokens()
    backend = cef_compile.backend(policy=Uniform(0.8), inner="eager")
    compiled = torch.compile(model, backend=backend)
    plain = compiled(x)
    random_state = torch.get_rng_state()
    with backend.audit() as outer:
        assert torch.equal(compiled(x), plain)
        with backend.audit() as nested:
            assert torch.equal(compiled(x), plain)
        with backend.dense():
            compiled(x)
    assert torch.equal(compiled(x), plain)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [node.calls for node in outer.nodes] == [2, 2, 2]
    assert [node.calls for node in nested.nodes] == [1, 1, 1]


# --- which layer, which model --------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_one_regional_graph_serves_layers_with_different_recalls(inner: str) -> None:
    counter = Counting()
    rules = {"blocks.0": 1.0, "blocks.1": None, "re:blocks\\.[2-9]": 0.5}
    backend = cef_compile.backend(
        policy=Rules(rules), inner=counter if inner == "eager" else "inductor"
    )
    model, x = models.Stack(4), models.tokens()
    for block in model.blocks:
        block.compile(backend=backend)
    for _ in range(2):
        model(x)
    by_path = {node.path: node for node in backend.report.nodes}
    assert [by_path[f"blocks.{i}"].recall for i in range(4)] == [1.0, None, 0.5, 0.5]
    assert by_path["blocks.0"].density == 1.0
    assert by_path["blocks.1"].reason == str(Reason.POLICY)
    assert by_path["blocks.1"].calls == 0
    assert by_path["blocks.2"].density < 1
    assert by_path["blocks.2"].density != by_path["blocks.3"].density
    if inner == "eager":
        assert len(counter.graphs) == 1


@torch.no_grad()
def test_balanced_under_regional_compilation_equals_the_whole_model() -> None:
    whole, regional, x = models.Stack(4), models.Stack(4), models.tokens()
    regional.load_state_dict(whole.state_dict())
    one = cef_compile.backend(recall=0.7, inner="eager")
    two = cef_compile.backend(recall=0.7, inner="eager")
    compiled = torch.compile(whole, backend=one)
    for block in regional.blocks:
        block.compile(backend=two)
    for _ in range(3):
        assert_close(compiled(x), regional(x))
    a, b = one.report.to_dict()["nodes"], two.report.to_dict()["nodes"]
    assert [n["path"] for n in a] == [n["path"] for n in b]
    assert [n["threshold"] for n in a] == [n["threshold"] for n in b]


@torch.no_grad()
@pytest.mark.parametrize("regional", [False, True])
def test_two_models_of_one_backend_do_not_mix(regional: bool) -> None:
    def run(backend, *stacks, passes=3):
        for stack in stacks:
            for module in stack.blocks if regional else [stack]:
                module.compile(backend=backend)
        return [[stack(x) for stack in stacks] for _ in range(passes)]

    def pair():
        torch.manual_seed(0)
        first, second = models.Stack(), models.Stack()
        for parameter in second.parameters():
            parameter.mul_(1.5)
        return first, second

    x = models.tokens()
    together = cef_compile.backend(recall=0.7, inner="eager")
    both = run(together, *pair())
    alone = [run(cef_compile.backend(recall=0.7, inner="eager"), stack) for stack in pair()]
    for step, outputs in enumerate(both):
        for output, separate in zip(outputs, alone, strict=True):
            assert torch.equal(output, separate[step][0])
    names = {node.model for node in together.report.nodes}
    assert names == {"Stack 1", "Stack 2"}


@torch.no_grad()
def test_layers_that_want_another_filter_than_their_graph_fall_back_or_raise() -> None:
    policy = Rules({"blocks.0": 0.9, "*": Decision(0.9, filter="online")})
    for strict in (False, True):
        torch._dynamo.reset()
        backend = cef_compile.backend(policy=policy, inner="eager", strict=strict)
        model = models.Stack()
        for block in model.blocks:
            block.compile(backend=backend)
        if strict:
            with pytest.raises(cef_compile.UnsupportedNodeError, match="another filter"):
                model(models.tokens())
        else:
            model(models.tokens())
            reasons = [node.reason for node in backend.report.nodes]
            assert reasons == ["", str(Reason.SHARED_GRAPH), str(Reason.SHARED_GRAPH)]


@torch.no_grad()
def test_a_policy_may_change_and_what_cannot_follow_is_said() -> None:
    model, x = models.Stack(), models.tokens()
    backend = cef_compile.backend(policy=Rules({"blocks.0": None, "*": 0.5}), inner="eager")
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    backend.set_policy(Uniform(1.0))
    assert_close(compiled(x), model(x))
    assert [node.reason for node in backend.report.nodes] == [str(Reason.FIXED), "", ""]
    backend.set_policy(Uniform(0.5, filter="online", bound=True))
    assert [node.detail for node in backend.report.nodes] == [
        "compiled dense",
        *["compiled planned/threshold/none/grid"] * 2,
    ]
    with pytest.raises(TypeError, match="no single recall"):
        cef_compile.backend(policy=Rules({"*": 0.5})).set_recall(0.9)


@torch.no_grad()
def test_two_attentions_under_one_path_are_decided_apart() -> None:
    """As of Wan's image to video, whose cross attention sees text and image one after the other."""

    class Twice(models.Attention):
        def forward(self, x):
            return super().forward(x) + super().forward(x + 1)

    class Model(models.Stack):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(Twice() for _ in range(2))

    model, x = Model(), models.tokens()
    expected = model(x)
    for regional in (False, True):
        torch._dynamo.reset()
        backend = cef_compile.backend(policy=lambda n: 1.0 if n.ordinal else None, inner="eager")
        call = model if regional else torch.compile(model, backend=backend)
        if regional:
            for block in model.blocks:
                block.compile(backend=backend)
        assert_close(call(x), expected)
        found = {(n.path, n.ordinal): n.decision for n in backend.report.nodes}
        assert found == {
            (f"blocks.{i}", j): "filtered" if j else "dense" for i in range(2) for j in range(2)
        }


@torch.no_grad()
def test_a_graph_break_keeps_every_node() -> None:
    class Broken(models.Stack):
        def forward(self, x):
            for block in self.blocks:
                x = x + block(x)
                torch._dynamo.graph_break()
            return x

    model, x = Broken(), models.tokens()
    backend = cef_compile.backend(recall=1.0, inner="eager")
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        assert_close(compiled(x), model(x))
    assert sorted(node.path for node in backend.report.filtered) == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
    ]


# --- shapes, dtypes, modes, caches ---------------------------------------------------------------


@torch.no_grad()
def test_dynamic_shapes_compile_once() -> None:
    counter = Counting()
    model = models.Stack()
    backend = cef_compile.backend(recall=1.0, inner=counter)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for length in (640, 700, 1025, 640):
        x = models.tokens(length)
        assert_close(compiled(x), model(x))
    assert len(counter.graphs) == 1


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_two_resolutions_compile_at_most_once_each(inner: str) -> None:
    graphs = []

    def counting(gm, example_inputs):
        graphs.append(gm)
        return torch._dynamo.lookup_backend(inner)(gm, example_inputs)

    model = models.Stack()
    compiled = torch.compile(model, backend=cef_compile.backend(recall=1.0, inner=counting))
    for length in (640, 1280, 640, 1280):
        x = models.tokens(length)
        assert_close(compiled(x), model(x))
    assert len(graphs) <= 2


@torch.no_grad()
@pytest.mark.parametrize(
    "scale",
    [
        lambda q, k: q.shape[-1] ** -0.5,
        lambda q, k: 1 / math.sqrt(q.shape[-1]),
        lambda q, k: math.log(k.shape[-2]) / 20,  # another at every length
    ],
)
def test_a_scale_that_follows_from_dynamic_sizes(scale) -> None:
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=scale(q, k))

    backend = cef_compile.backend(policy=lambda node: 1.0, inner="eager", min_kv_len=0)
    compiled = torch.compile(function, backend=backend, dynamic=True)
    for length in (128, 160, 128):
        q, k, v = torch.randn(3, 1, 2, length, 8)
        assert_close(compiled(q, k, v), function(q, k, v))
    assert all(node.decision == "filtered" for node in backend.report.nodes)
    assert sum(node.calls for node in backend.report.nodes) == 3


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_autocast_casts_what_sdpa_would(inner: str) -> None:
    model, x = models.Attention(), models.tokens()
    backend = cef_compile.backend(recall=1.0, inner=inner)

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    q, k, v = (part.contiguous() for part in torch.randn(3, 1, 2, 640, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = function(q, k, v)
        got = torch.compile(function, backend=backend)(q, k, v)
        whole = torch.compile(model, backend=backend)(x)
        assert whole.dtype == model(x).dtype
    assert got.dtype == expected.dtype == torch.bfloat16
    # One bfloat16 rounding of the output, 2^-8, and the inputs' roundings are the same.
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)
    assert {node.dtype for node in backend.report.nodes} == {"bfloat16"}


@torch.no_grad()
def test_grouped_queries_agree() -> None:
    q, k, v = heads(count=4), heads(count=2), heads(count=2)
    node = attention_report(q, k, v, policy=Uniform(1.0), enable_gqa=True)
    assert node.decision == "filtered"


@torch.no_grad()
def test_mode_and_options_reach_the_inner_compiler() -> None:
    counter = Counting()
    backend = cef_compile.backend(recall=0.9, inner=counter)
    torch.compile(models.Stack(), backend=backend, options={"max_fusion_size": 8})(models.tokens())
    assert counter.kwargs == {"options": {"max_fusion_size": 8}}
    torch._dynamo.reset()
    torch.compile(models.Stack(), backend=backend, mode="max-autotune")(models.tokens())
    assert counter.kwargs == {"mode": "max-autotune"}
    torch._dynamo.reset()
    backend = cef_compile.backend(recall=1.0)
    model, x = models.Stack(), models.tokens()
    compiled = torch.compile(model, backend=backend, mode="reduce-overhead")
    assert_close(compiled(x), model(x))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no_such_option"):
        torch.compile(model, backend=backend, options={"no_such_option": 1})(x)


@torch.no_grad()
def test_the_registered_name_takes_our_options_and_inductors() -> None:
    model, x = models.Stack(), models.tokens()
    options = {"recall": 1.0, "inner": "eager"}
    compiled = torch.compile(model, backend="cef", options=options)
    assert_close(compiled(x), model(x))
    report = cef_compile.named_backend(**options).report
    assert [node.recall for node in report.filtered] == [1.0] * 3


CACHE_PROBE = """
    import sys, torch, cef_compile
    sys.path.insert(0, {tests!r})
    import models
    from torch._dynamo.utils import counters
    torch.manual_seed(0)
    model, x = models.Stack(2), models.tokens()
    policy = cef_compile.Uniform(float(sys.argv[1]), filter=sys.argv[2])
    with torch.no_grad():
        torch.compile(model, backend=cef_compile.backend(policy=policy))(x)
    aot, fx = counters["aot_autograd"], counters["inductor"]
    print(aot["autograd_cache_hit"], aot["autograd_cache_miss"], aot["autograd_cache_bypass"],
          fx["fxgraph_cache_miss"], fx["fxgraph_cache_bypass"])
"""


def test_a_second_process_hits_the_caches_and_another_filter_does_not(tmp_path: Path) -> None:
    script = textwrap.dedent(CACHE_PROBE.format(tests=str(Path(__file__).parent)))

    def counts(recall: str, filter_: str) -> list[int]:
        run = subprocess.run(
            [sys.executable, "-c", script, recall, filter_],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        return [int(word) for word in run.stdout.split()[-5:]]

    assert counts("0.9", "planned") == [0, 1, 0, 1, 0]
    # Another recall is another input, not another graph.
    assert counts("0.8", "planned") == [1, 0, 0, 0, 0]
    assert counts("0.9", "online") == [0, 1, 0, 1, 0]


def test_importing_costs_neither_triton_nor_diffusers() -> None:
    code = (
        "import sys, cef_compile; print([m for m in ('triton', 'diffusers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

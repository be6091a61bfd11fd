"""Whole diffusers models through the backend: right, found, filtered, and said so."""

from __future__ import annotations

import json

import models
import pytest
import torch

import cef_compile

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SDPA = torch._C._nn.scaled_dot_product_attention
# float32 rounding through a few layers, relative to the largest output.
FP32 = 1e-5

MODELS = {
    "wan": (models.wan, {"self": 2, "cross": 2}),
    "flux": (models.flux, {"joint": 2}),
    "cogvideox": (models.cogvideox, {"joint": 2}),
    "sd3": (models.sd3, {"joint": 2, "self": 1}),
    "ltx": (models.ltx, {"self": 1, "cross": 1}),
    "hunyuan_video": (models.hunyuan_video, {"joint": 2, "self": 1}),
}


@pytest.fixture(params=MODELS, ids=str)
def built(request: pytest.FixtureRequest):
    make, kinds = MODELS[request.param]
    return (*make(), kinds)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_recall_1_agrees_with_eager(built, inner: str) -> None:
    model, inputs, kinds = built
    backend = cef_compile.backend(recall=1.0, inner=inner)
    expected = model(**inputs)[0]
    got = torch.compile(model, backend=backend)(**inputs)[0]
    assert relative_error(got, expected) <= FP32
    found = [node.kind for node in backend.report.nodes]
    assert {kind: found.count(kind) for kind in kinds} == kinds
    assert sum(kinds.values()) == len(found)
    assert all(node.density == 1.0 for node in backend.report.filtered)
    assert backend.report.filtered


@torch.no_grad()
def test_recall_1_agrees_through_inductor() -> None:
    model, inputs = models.wan()
    backend = cef_compile.backend(recall=1.0)
    expected = model(**inputs)[0]
    compiled = torch.compile(model, backend=backend)
    assert relative_error(compiled(**inputs)[0], expected) <= FP32
    with backend.dense():
        assert relative_error(compiled(**inputs)[0], expected) <= FP32


@torch.no_grad()
def test_filtered_nodes_are_gone_and_dense_ones_stay(built) -> None:
    model, inputs, _ = built
    seen = []

    def inner(gm, example_inputs):
        targets = [node.target for node in gm.graph.nodes]
        seen.append((targets.count(SDPA), targets.count(torch.ops.cef.attention.default)))
        gm.graph.lint()
        return gm.forward

    backend = cef_compile.backend(recall=0.9, inner=inner)
    torch.compile(model, backend=backend)(**inputs)
    report = backend.report
    assert [sum(counts) for counts in zip(*seen, strict=True)] == [
        len(report.dense),
        len(report.filtered),
    ]


@torch.no_grad()
def test_a_graph_that_stays_dense_is_not_touched(built) -> None:
    model, inputs, _ = built
    given, compiled_with = [], []

    def inner(gm, example_inputs):
        compiled_with.append((gm, len(example_inputs)))
        return gm.forward

    backend = cef_compile.backend(policy=lambda node: None, inner=inner)

    def spy(gm, example_inputs):
        given.append((gm, len(example_inputs)))
        return backend(gm, example_inputs)

    torch.compile(model, backend=spy)(**inputs)
    assert [(id(gm), n) for gm, n in given] == [(id(gm), n) for gm, n in compiled_with]
    assert {node.reason for node in backend.report.nodes} == {"the policy says dense"}


@torch.no_grad()
def test_report_and_audit_say_what_was_done(built) -> None:
    model, inputs, _ = built
    backend = cef_compile.backend(recall=0.8, inner="eager")
    compiled = torch.compile(model, backend=backend)
    compiled(**inputs)
    with backend.audit() as audit:
        compiled(**inputs)
    report = backend.report
    assert len({(node.path, node.ordinal) for node in report.nodes}) == len(report.nodes)
    module_names = {name for name, _ in model.named_modules()}
    assert all(node.path in module_names for node in report.nodes)
    assert all(node.reason for node in report.dense)
    assert not any(node.reason for node in report.filtered)
    assert [(n.path, n.ordinal) for n in audit.nodes] == [
        (n.path, n.ordinal) for n in report.filtered
    ]
    for node in audit.nodes:
        assert node.interval[0] <= node.recall <= node.interval[1]
        assert 0 < node.density <= 1
    for text in (str(report), str(audit)):
        assert all(node.path in text for node in audit.nodes)
    json.dumps([report.to_dict(), audit.to_dict()], allow_nan=False)


@torch.no_grad()
def test_masked_joint_attention_ignores_padding() -> None:
    """HunyuanVideo's padded text must not reach the filtered result, whatever it holds."""
    model, inputs = models.hunyuan_video()
    backend = cef_compile.backend(recall=1.0, inner="eager")
    compiled = torch.compile(model, backend=backend)
    first = compiled(**inputs)[0]
    text = inputs["encoder_hidden_states"].clone()
    text[:, 7:] = 100.0
    second = compiled(**{**inputs, "encoder_hidden_states": text})[0]
    torch.testing.assert_close(first, second, rtol=FP32, atol=FP32)
    assert "key_padding" in {node.mask for node in backend.report.filtered}


@torch.no_grad()
def test_explain_needs_no_weights_and_says_what_a_gpu_would_do() -> None:
    real, inputs = models.ltx()
    with torch.device("meta"):
        model = type(real).from_config(real.config)
    meta = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in inputs.items()}
    on_gpu = cef_compile.explain(model, recall=0.9, min_kv_len=0, **meta)
    here = cef_compile.explain(real, recall=0.9, min_kv_len=0, **inputs)
    assert [(n.path, n.kind, n.mask) for n in on_gpu.nodes] == [
        (n.path, n.kind, n.mask) for n in here.nodes
    ]
    # float32 is slow on a GPU but not wrong; head_dim 8 is the least that the kernels take.
    assert [node.decision for node in on_gpu.nodes] == ["filtered", "dense"]


@torch.no_grad()
def test_explain_computes_nothing_and_leaves_no_traces() -> None:
    model, inputs = models.wan()
    outputs = []

    class Watch(torch.nn.Module):
        def forward(self, **inputs):
            outputs.append(model(**inputs)[0])
            torch._dynamo.graph_break()
            return outputs[-1]

    report = cef_compile.explain(Watch(), **inputs)
    assert report.filtered
    assert all(node.calls == 0 and node.density is None for node in report.nodes)
    assert outputs
    assert not outputs[0].any()

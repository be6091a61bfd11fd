"""Whole pipelines of diffusers, from a prompt to pixels, with one line added."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import cef_compile
from cef_compile.diffusers import DenseUntil

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import tiny_pipelines

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

PIPELINES = ["wan21", "wan22_14b", "flux", "hunyuan_video", "cogvideox"]
# Two steps through the transformer and a decoder, in fp32: pixels are in [0, 1].
TOLERANCE = 1e-4


def run(pipe, name: str, seed: int = 0, **more):
    arguments = {"num_inference_steps": 2, "output_type": "pt", "max_sequence_length": 16}
    if name.startswith("wan") or name == "cogvideox":
        arguments |= {"negative_prompt": "snow", "guidance_scale": 4.0}
    generator = torch.Generator().manual_seed(seed)
    sizes = tiny_pipelines.SIZES[name]
    result = pipe(tiny_pipelines.PROMPT, generator=generator, **arguments, **sizes, **more)
    return result[0]


def transformers_of(pipe) -> list[torch.nn.Module]:
    both = (pipe.transformer, getattr(pipe, "transformer_2", None))
    return [model for model in both if model is not None]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_from_prompt_to_pixels(name: str) -> None:
    pipe = tiny_pipelines.build(name)
    expected = run(pipe, name)
    backend = cef_compile.backend(recall=1.0, inner="eager")
    for transformer in transformers_of(pipe):
        transformer.compile(backend=backend)
    assert (run(pipe, name) - expected).abs().max() <= TOLERANCE
    report = backend.report
    assert report.filtered
    assert all(node.calls for node in report.filtered)
    backend.set_recall(0.5)
    backend.reset()
    filtered = run(pipe, name)
    assert filtered.isfinite().all()
    assert not torch.equal(filtered, expected)
    with backend.dense():
        assert (run(pipe, name) - expected).abs().max() <= TOLERANCE
    backend.reset()
    assert torch.equal(run(pipe, name), filtered)


@pytest.mark.parametrize("name", ["wan21", "flux", "hunyuan_video"])
def test_repeated_blocks_alone(name: str) -> None:
    pipe = tiny_pipelines.build(name)
    expected = run(pipe, name)
    backend = cef_compile.backend(recall=1.0, inner="eager")
    pipe.transformer.compile_repeated_blocks(backend=backend)
    assert (run(pipe, name) - expected).abs().max() <= TOLERANCE
    assert [node.path for node in backend.report.filtered]


def test_two_experts_have_a_report_each() -> None:
    pipe = tiny_pipelines.build("wan22_14b")
    backend = cef_compile.backend(recall=0.8, inner="eager")
    for transformer in transformers_of(pipe):
        transformer.compile(backend=backend)
    run(pipe, "wan22_14b", guidance_scale_2=3.0)
    names = {node.model for node in backend.report.nodes}
    assert len(names) == 2
    for name in names:
        nodes = [n for n in backend.report.filtered if n.model == name]
        assert [n.path for n in nodes] == ["blocks.0.attn1", "blocks.1.attn1"]
        assert all(n.calls == 2 for n in nodes)  # one step, with and without the prompt


def test_guidance_in_two_calls_or_in_one_batch() -> None:
    # Wan calls its transformer twice, under two cache contexts; CogVideoX once with both.
    for name, calls, batch in (("wan21", 4, 1), ("cogvideox", 2, 2)):
        torch._dynamo.reset()
        pipe = tiny_pipelines.build(name)
        backend = cef_compile.backend(recall=0.8, inner="eager")
        pipe.transformer.compile(backend=backend)
        run(pipe, name)
        assert {node.calls for node in backend.report.filtered} == {calls}
        assert {node.q_shape[0] for node in backend.report.filtered} == {batch}


def test_warm_up_as_a_callback() -> None:
    pipe = tiny_pipelines.build("flux")
    expected = run(pipe, "flux")
    backend = cef_compile.backend(recall=0.5, inner="eager")
    pipe.transformer.compile(backend=backend)
    # The second of two steps of flow matching has half the noise.
    dense = run(pipe, "flux", callback_on_step_end=DenseUntil(backend, sigma=0.1))
    assert (dense - expected).abs().max() <= TOLERANCE
    assert {node.calls for node in backend.report.filtered} == {0}
    run(pipe, "flux", callback_on_step_end=DenseUntil(backend, sigma=0.9))
    assert {node.calls for node in backend.report.filtered} == {1}
    run(pipe, "flux")
    assert {node.calls for node in backend.report.filtered} == {3}


def test_an_audit_of_a_pipeline() -> None:
    pipe = tiny_pipelines.build("wan21")
    backend = cef_compile.backend(recall=0.8, inner="eager")
    pipe.transformer.compile(backend=backend)
    with backend.audit() as audit:
        run(pipe, "wan21")
    assert 0.7 < audit.recall <= 1
    assert [node.path for node in audit.nodes] == ["blocks.0.attn1", "blocks.1.attn1"]

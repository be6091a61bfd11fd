"""Warm-up by noise level, and the backend beside other features of diffusers."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import diffusers
import models
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models.attention_processor import AttnProcessor

import cef_compile
from cef_compile.diffusers import DenseUntil, noise_level

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def is_dense(backend: cef_compile.Backend) -> bool:
    return backend._switches.dense > 0


def pipeline(scheduler, steps: int = 5):
    scheduler.set_timesteps(steps)
    return SimpleNamespace(scheduler=scheduler)


def dense_steps(backend, pipe, callback) -> list[bool]:
    """Which steps ran dense, called as diffusers' loops call it."""
    seen = []
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        seen.append(is_dense(backend))
        kwargs = {"latents": torch.zeros(1)}
        assert callback(pipe, step, timestep, kwargs) is kwargs
    return seen


SCHEDULERS = {
    "flow matching": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow sigmas": lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "ddim": diffusers.DDIMScheduler,
    "cogvideox": diffusers.CogVideoXDPMScheduler,
    "dpm": diffusers.DPMSolverMultistepScheduler,
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("sigma", [0.3, 0.86, 0.97])
def test_steps_with_more_noise_are_dense(name: str, sigma: float) -> None:
    backend = cef_compile.backend(recall=0.9)
    pipe = pipeline(SCHEDULERS[name]())
    levels = [noise_level(pipe.scheduler, float(t)) for t in pipe.scheduler.timesteps]
    assert levels == sorted(levels, reverse=True)
    assert 0 <= levels[-1] < levels[0] <= 1
    expected = [level > sigma for level in levels]
    expected[0] = True
    assert dense_steps(backend, pipe, DenseUntil(backend, sigma=sigma)) == expected
    assert not is_dense(backend)


def test_flow_matching_levels_are_the_schedulers_sigmas() -> None:
    scheduler = pipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)).scheduler
    levels = [noise_level(scheduler, float(t)) for t in scheduler.timesteps]
    assert levels == pytest.approx(scheduler.sigmas[:-1].tolist())


def test_ddpm_levels_are_the_share_of_noise() -> None:
    scheduler = pipeline(diffusers.DDIMScheduler()).scheduler
    kept = scheduler.alphas_cumprod[400]
    assert noise_level(scheduler, 400.0) == pytest.approx(float((1 - kept).sqrt()))
    assert noise_level(scheduler, 1000.0) <= 1


def test_sigma_1_keeps_nothing_dense() -> None:
    backend = cef_compile.backend(recall=0.9)
    pipe = pipeline(diffusers.FlowMatchEulerDiscreteScheduler())
    assert not any(dense_steps(backend, pipe, DenseUntil(backend, sigma=1)))


def test_a_level_that_is_never_reached_ends_with_the_call() -> None:
    backend = cef_compile.backend(recall=0.9)
    pipe = pipeline(diffusers.FlowMatchEulerDiscreteScheduler())
    assert all(dense_steps(backend, pipe, DenseUntil(backend, sigma=1e-6)))
    assert not is_dense(backend)


def test_it_ends_when_closed_left_or_forgotten() -> None:
    backend = cef_compile.backend(recall=0.9)
    with DenseUntil(backend, sigma=0.5):
        assert is_dense(backend)
    assert not is_dense(backend)
    warm_up = DenseUntil(backend, sigma=0.5)
    warm_up.close()
    warm_up.close()
    assert not is_dense(backend)
    with pytest.raises(KeyError), DenseUntil(backend, sigma=0.5):
        raise KeyError
    assert not is_dense(backend)
    DenseUntil(backend, sigma=0.5)  # dropped at once, as after an error in a pipeline
    assert not is_dense(backend)


def test_it_nests_in_a_dense_block() -> None:
    backend = cef_compile.backend(recall=0.9)
    pipe = pipeline(diffusers.FlowMatchEulerDiscreteScheduler())
    with backend.dense():
        assert all(dense_steps(backend, pipe, DenseUntil(backend, sigma=0.9)))
        assert is_dense(backend)
    assert not is_dense(backend)


def test_one_object_serves_one_call() -> None:
    backend = cef_compile.backend(recall=0.9)
    pipe = pipeline(diffusers.FlowMatchEulerDiscreteScheduler())
    warm_up = DenseUntil(backend, sigma=0.5)
    dense_steps(backend, pipe, warm_up)
    with pytest.raises(RuntimeError, match="one call"):
        dense_steps(backend, pipe, warm_up)


@pytest.mark.parametrize(
    ("error", "backend", "sigma", "words"),
    [
        (TypeError, "cef", 0.5, "'cef'"),
        (TypeError, None, "0.5", "str '0.5'"),
        (ValueError, None, 0.0, "got 0.0"),
        (ValueError, None, 1.5, "got 1.5"),
    ],
)
def test_wrong_arguments_say_what_was_got(error, backend, sigma, words) -> None:
    with pytest.raises(error) as raised:
        DenseUntil(backend or cef_compile.backend(), sigma=sigma)
    assert words in str(raised.value)


@torch.no_grad()
def test_nothing_is_compiled_again() -> None:
    graphs = []

    def inner(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    model, x = models.Stack(), models.tokens()
    backend = cef_compile.backend(recall=0.5, inner=inner)
    compiled = torch.compile(model, backend=backend)
    pipe = pipeline(diffusers.FlowMatchEulerDiscreteScheduler(), steps=4)
    warm_up = DenseUntil(backend, sigma=0.6)
    changes = []  # also not in the first filtered step, which finds the threshold
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        changes.append(not torch.allclose(compiled(x), model(x), rtol=1e-5, atol=1e-5))
        warm_up(pipe, step, timestep, {})
    assert changes == [False, False, False, True]
    assert len(graphs) == 1


def test_importing_it_imports_no_diffusers() -> None:
    code = "import sys, cef_compile.diffusers; print('diffusers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


# --- beside other features -----------------------------------------------------------------------


def wan_steps(model, inputs, steps: int = 3) -> torch.Tensor:
    """A few forward passes, each from the last one's result, as a sampler makes them."""
    x = inputs["hidden_states"]
    for _ in range(steps):
        x = x - 0.1 * model(**{**inputs, "hidden_states": x})[0]
    return x


@torch.no_grad()
@pytest.mark.parametrize("regional", [False, True])
def test_first_block_cache(regional: bool) -> None:
    model, inputs = models.wan()
    for threshold in (1e-9, 1e9):  # never from the cache, and always after the first step
        torch._dynamo.reset()
        plain, ours = (models.wan()[0] for _ in range(2))
        for each in (plain, ours):
            each.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        backend = cef_compile.backend(recall=1.0, inner="eager")
        if regional:
            ours.compile_repeated_blocks(backend=backend)
        else:
            ours.compile(backend=backend)
        with plain.cache_context("cond"):
            expected = wan_steps(plain, inputs)
        with ours.cache_context("cond"):
            got = wan_steps(ours, inputs)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert backend.report.filtered
    assert not torch.allclose(expected, wan_steps(model, inputs), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(kind: str) -> None:
    model, inputs = models.wan()
    expected = model(**inputs)[0]
    more = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type=kind, **more)
    backend = cef_compile.backend(recall=1.0, inner="eager", min_kv_len=65)
    model.compile(backend=backend)
    # The hooks of leaf_level break the graph at every layer, and one piece of code serves them all:
    # with Dynamo's default limit of 8 versions of it, the attention would run outside of any graph.
    with torch._dynamo.config.patch(recompile_limit=64):
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
    # Each by its name, though the pieces between the hooks hold no parameter.
    assert {node.path: node.calls for node in backend.report.filtered} == {
        "blocks.0.attn1": 1,
        "blocks.1.attn1": 1,
    }
    assert {found.model for found in backend.report.breaks} == {"WanTransformer3DModel"}
    assert "torch.compiler.disable" in str(backend.report)


class Adapted(torch.nn.Module):
    """A linear layer with a low-rank addition, as LoRA puts in its place."""

    def __init__(self, base: torch.nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, rank, bias=False)
        self.up = torch.nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + 0.5 * self.up(self.down(x))


@torch.no_grad()
@pytest.mark.parametrize("regional", [False, True])
def test_projections_with_adapters(regional: bool) -> None:
    model, inputs = models.wan()
    torch.manual_seed(1)
    for block in model.blocks:
        for name in ("to_q", "to_k", "to_v"):
            setattr(block.attn1, name, Adapted(getattr(block.attn1, name)))
    expected = model(**inputs)[0]
    backend = cef_compile.backend(recall=1.0, inner="eager")
    if regional:
        model.compile_repeated_blocks(backend=backend)
    else:
        model.compile(backend=backend)
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
    assert [(n.path, n.kind) for n in backend.report.filtered] == [
        ("blocks.0.attn1", "self"),
        ("blocks.1.attn1", "self"),
    ]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_close_as_eager(dtype: torch.dtype) -> None:
    model, inputs = models.wan()
    exact = model(**inputs)[0]
    model.to(dtype)
    inputs = {
        k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    eager = (model(**inputs)[0].float() - exact).norm()
    backend = cef_compile.backend(recall=1.0, inner="eager")
    got = torch.compile(model, backend=backend)(**inputs)[0]
    assert got.dtype == dtype
    assert (got.float() - exact).norm() <= 2 * eager
    assert {n.dtype for n in backend.report.filtered} == {str(dtype).removeprefix("torch.")}


@torch.no_grad()
def test_autocast_of_a_whole_model() -> None:
    model, inputs = models.flux()
    exact = model(**inputs)[0]
    backend = cef_compile.backend(recall=1.0, inner="eager")
    compiled = torch.compile(model, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = (model(**inputs)[0].float() - exact).norm()
        got = compiled(**inputs)[0]
    assert (got.float() - exact).norm() <= 2 * eager
    assert len(backend.report.filtered) == 2


@torch.no_grad()
def test_two_resolutions_of_a_model_compile_twice_at_most() -> None:
    model, inputs = models.wan()
    graphs = []

    def inner(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(model, backend=cef_compile.backend(recall=1.0, inner=inner))
    for width in (32, 40, 32, 48):
        x = {**inputs, "hidden_states": inputs["hidden_states"].new_ones(1, 4, 4, 32, width)}
        torch.testing.assert_close(compiled(**x)[0], model(**x)[0], rtol=1e-5, atol=1e-5)
    assert len(graphs) <= 2


@torch.no_grad()
def test_the_old_processors_of_a_unet() -> None:
    """SDXL's kind of network with diffusers' processors from before SDPA: baddbmm and bmm."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
    ).eval()
    unet.set_attn_processor(AttnProcessor())
    inputs = {
        "sample": torch.randn(1, 4, 32, 32),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 8, 16),
        "return_dict": False,
    }
    expected = unet(**inputs)[0]
    backend = cef_compile.backend(recall=1.0, inner="eager", min_kv_len=65)
    got = torch.compile(unet, backend=backend)(**inputs)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    filtered = backend.report.filtered
    assert filtered
    assert all(n.path.endswith("attn1") and n.kind == "self" for n in filtered)
    assert all(n.path.endswith("attn2") and n.kind == "cross" for n in backend.report.dense)

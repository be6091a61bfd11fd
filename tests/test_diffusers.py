"""Warm-up by noise level: when attention is dense and when it filters, and that it always ends."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import diffusers
import models
import pytest
import torch

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
    changes = []
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        changes.append(not torch.allclose(compiled(x), model(x), rtol=1e-5, atol=1e-5))
        warm_up(pipe, step, timestep, {})
    assert changes == [False, False, True, True]
    assert len(graphs) == 1


def test_importing_it_imports_no_diffusers() -> None:
    code = "import sys, cef_compile.diffusers; print('diffusers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"

"""The backend on a real GPU: CUDA graphs, no synchronisation, agreement with dense."""

from __future__ import annotations

import models
import pytest
import torch
from torch._dynamo.utils import counters

import cef_compile

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_dynamo")]

LENGTH, WIDTH = 2100, 128  # ragged in both tile sizes


def stack(depth: int = 3) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = models.Stack(depth, width=WIDTH).to("cuda", torch.bfloat16).eval()
    return model, models.tokens(LENGTH, WIDTH).to("cuda", torch.bfloat16)


def steps(compiled, backend, x):
    """A run as a sampler makes it: dense warm-up, then a recall that changes on the way."""
    outputs = []
    with backend.dense():
        outputs.append(compiled(x).clone())
    for recall in (0.9, 0.9, 0.7, 0.95):
        backend.set_recall(recall)
        outputs += [compiled(x).clone() for _ in range(3)]
    return outputs


@torch.no_grad()
@pytest.mark.parametrize("regional", [False, True])
def test_cuda_graphs_replay_what_plain_launches_compute(regional: bool) -> None:
    results = []
    for mode in (None, "reduce-overhead"):
        torch._dynamo.reset()
        counters.clear()
        model, x = stack()
        backend = cef_compile.backend(recall=0.9, min_kv_len=0)
        if regional:
            for block in model.blocks:
                block.compile(backend=backend, mode=mode)
            compiled = model
        else:
            compiled = torch.compile(model, backend=backend, mode=mode)
        results.append(steps(compiled, backend, x))
        assert counters["inductor"]["cudagraph_skips"] == 0
    for plain, replayed in zip(*results, strict=True):
        assert torch.equal(plain, replayed)


@torch.no_grad()
def test_steps_do_not_wait_for_the_device() -> None:
    model, x = stack()
    backend = cef_compile.backend(recall=0.9, min_kv_len=0)
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with backend.audit():
            for _ in range(3):
                compiled(x)
        with backend.dense():
            compiled(x)
        compiled(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
@pytest.mark.parametrize("make", [models.wan, models.hunyuan_video], ids=["wan", "hunyuan_video"])
def test_recall_1_is_as_close_to_float64_as_dense_bf16(make) -> None:
    model, inputs = make()
    # The op takes head_dims that are multiples of 8; both models have others.
    if make is models.wan:
        model = type(model).from_config({**model.config, "attention_head_dim": 16}).eval()
    else:
        config = {**model.config, "attention_head_dim": 16, "rope_axes_dim": (4, 6, 6)}
        model = type(model).from_config(config).eval()

    def cast(dtype):
        return {
            name: value.to("cuda", dtype)
            if torch.is_tensor(value) and value.is_floating_point()
            else value.cuda()
            if torch.is_tensor(value)
            else value
            for name, value in inputs.items()
        }

    exact = model.cuda().float()(**cast(torch.float32))[0].double()
    model.bfloat16()
    low = cast(torch.bfloat16)
    dense = model(**low)[0].double()
    backend = cef_compile.backend(recall=1.0, min_kv_len=0)
    got = torch.compile(model, backend=backend)(**low)[0].double()
    assert backend.report.filtered
    assert (got - exact).abs().max() <= 2 * (dense - exact).abs().max()


@torch.no_grad()
def test_balanced_delivers_the_mean_recall_on_the_device() -> None:
    model, x = stack(4)
    backend = cef_compile.backend(recall=0.8, min_kv_len=0)
    compiled = torch.compile(model, backend=backend)
    for _ in range(3):
        compiled(x)
    with backend.audit() as audit:
        compiled(x)
    nodes = backend.report.filtered
    assert len({node.threshold for node in nodes}) == 1
    assert sum(node.estimated_recall for node in nodes) / len(nodes) >= 0.8
    for node in audit.nodes:
        assert node.interval[0] - 0.05 <= node.estimate <= node.interval[1] + 0.05

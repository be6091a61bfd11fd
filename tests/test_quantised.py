"""Beside torchao and peft: projections that are quantised, or have real LoRA adapters on them."""

from __future__ import annotations

import models
import pytest
import torch
from peft import LoraConfig
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

import cef_compile

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


def compiled(model, regional: bool, recall: float = 1.0) -> cef_compile.Backend:
    """The model is compiled in place."""
    backend = cef_compile.backend(recall=recall, inner="aot_eager")
    if regional:
        model.compile_repeated_blocks(backend=backend)
    else:
        model.compile(backend=backend)
    return backend


def assert_all_seen(backend: cef_compile.Backend) -> None:
    assert [(n.path, n.kind) for n in backend.report.filtered] == [
        ("blocks.0.attn1", "self"),
        ("blocks.1.attn1", "self"),
    ]
    assert [(n.path, n.kind) for n in backend.report.dense] == [
        ("blocks.0.attn2", "cross"),
        ("blocks.1.attn2", "cross"),
    ]


@torch.no_grad()
@pytest.mark.parametrize("regional", [False, True])
def test_weights_quantised_by_torchao(regional: bool) -> None:
    model, inputs = models.wan()
    exact = model(**inputs)[0]
    quantize_(model, Int8WeightOnlyConfig())
    expected = model(**inputs)[0]
    assert not torch.allclose(expected, exact, atol=1e-4)
    backend = compiled(model, regional)
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
    assert_all_seen(backend)


@torch.no_grad()
def test_activations_quantised_by_torchao() -> None:
    """Rounding to int8 as it runs makes steps of the last bits: as close to fp32 as eager is."""
    model, inputs = models.wan()
    exact = model(**inputs)[0]
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    eager = (model(**inputs)[0] - exact).norm()
    assert eager > 0
    backend = compiled(model, regional=False)
    assert (model(**inputs)[0] - exact).norm() <= 1.5 * eager
    assert_all_seen(backend)


@torch.no_grad()
@pytest.mark.parametrize("regional", [False, True])
def test_adapters_of_peft(regional: bool) -> None:
    model, inputs = models.wan()
    plain = model(**inputs)[0]
    torch.manual_seed(1)
    model.add_adapter(
        LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=PROJECTIONS)
    )
    model.eval()
    expected = model(**inputs)[0]
    assert not torch.allclose(expected, plain, atol=1e-2)
    backend = compiled(model, regional)
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
    assert_all_seen(backend)
    model.disable_adapters()  # compiles again, and is the same layers in the report
    torch.testing.assert_close(model(**inputs)[0], plain, rtol=1e-5, atol=1e-5)
    assert {n.path for n in backend.report.filtered} == {"blocks.0.attn1", "blocks.1.attn1"}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear")  # they cannot be merged
def test_adapters_on_quantised_projections() -> None:
    model, inputs = models.wan()
    quantize_(model, Int8WeightOnlyConfig())
    torch.manual_seed(1)
    model.add_adapter(
        LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=PROJECTIONS)
    )
    model.eval()
    expected = model(**inputs)[0]
    backend = compiled(model, regional=True)
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
    assert_all_seen(backend)

"""What the op says that it can compute, and that its kernels know what a policy may name."""

from __future__ import annotations

import pytest
import torch

from cef_compile import AttentionNode, Reason, ops
from cef_compile.kernels import config as c
from cef_compile.policy import CERTIFICATES, FILTER_RULES


def node_of(q: torch.Tensor) -> AttentionNode:
    """A self attention of ``q`` to itself."""
    return AttentionNode(
        path="attn",
        ordinal=0,
        q_shape=tuple(q.shape),
        k_shape=tuple(q.shape),
        v_shape=tuple(q.shape),
        q_stride=q.stride(),
        k_stride=q.stride(),
        v_stride=q.stride(),
        dtype=q.dtype,
        device=q.device,
        scale=None,
        is_causal=False,
        dropout_p=0.0,
        enable_gqa=False,
        mask="none",
        kind="self",
        requires_grad=False,
    )


def test_the_kernels_know_the_rules_that_a_decision_may_name() -> None:
    assert {"planned": c.PLANNED_RULES, "online": c.ONLINE_RULES} == FILTER_RULES
    assert c.CERTIFICATES == CERTIFICATES


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (torch.float32, 128, None),
        (torch.float32, 136, Reason.HEAD_DIM),
        (torch.bfloat16, 256, None),
        (torch.bfloat16, 264, Reason.HEAD_DIM),
        (torch.bfloat16, 100, Reason.HEAD_DIM),
        (torch.float16, 8, None),
        (torch.float64, 64, Reason.DTYPE),
    ],
)
def test_what_a_gpu_takes(dtype: torch.dtype, head_dim: int, reason: Reason | None) -> None:
    # On the meta device a model is planned for a GPU.
    problem = ops.unsupported(node_of(torch.empty(1, 2, 64, head_dim, dtype=dtype, device="meta")))
    assert (problem[0] if problem else None) is reason


def test_a_device_without_kernels_is_a_reason() -> None:
    node = node_of(torch.empty(1, 2, 64, 8, device="cpu"))
    assert ops.unsupported(node) is None
    elsewhere = AttentionNode(**{**vars(node), "device": torch.device("xpu")})
    assert ops.unsupported(elsewhere) == (Reason.DEVICE, "xpu")

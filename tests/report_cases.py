"""Nodes of a report, one filtered and one dense, and a node as the compiler knows it."""

from __future__ import annotations

from dataclasses import replace

import torch

from cef_compile.policy import AttentionNode, Reason
from cef_compile.report import ReportedNode

FILTERED = ReportedNode(
    model="Wan",
    path="blocks.0.attn1",
    ordinal=0,
    kind="self",
    q_shape=(1, 2, 4096, 64),
    kv_shape=(1, 2, 8192, 64),
    dtype="bfloat16",
    device="cpu",
    mask="none",
    decision="filtered",
    filter="planned",
    rule="threshold",
    certify="none",
    engine="triton",
    recall=0.9,
    group="balanced",
    reason="",
    detail="",
    calls=3,
    density=0.25,
    estimated_recall=0.91,
    threshold=0.01,
    form="softmax(bmm)",
    order="grid",
    grid=(8, 16, 32),
    grid_source="graph",
)
DENSE = replace(
    FILTERED,
    path="blocks.0.attn2",
    ordinal=1,
    kind="cross",
    decision="dense",
    filter="",
    rule="",
    certify="",
    engine="sdpa",
    recall=None,
    group=None,
    reason=str(Reason.CROSS_ATTENTION),
    detail="77 keys",
    calls=0,
    density=None,
    estimated_recall=None,
    threshold=None,
)

NODE = AttentionNode(
    path="a",
    ordinal=0,
    q_shape=(1, 1, 4, 8),
    k_shape=(1, 1, 4, 8),
    v_shape=(1, 1, 4, 8),
    q_stride=(1, 1, 1, 1),
    k_stride=(1, 1, 1, 1),
    v_stride=(1, 1, 1, 1),
    dtype=torch.float32,
    device=torch.device("cpu"),
    scale=None,
    is_causal=False,
    dropout_p=0.0,
    enable_gqa=False,
    mask="none",
    kind="self",
    requires_grad=False,
)

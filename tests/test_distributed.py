"""Sequence parallelism by diffusers, Ulysses and ring, on several processes and one model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import ranks
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanTransformer3DModel

import cef_compile

HEADS = 4
RECALL = 0.9
CALLS = 3
"""The first finds each node's own threshold, the second runs at the shared one."""


FILTERED = ("filtered", RECALL, False, "eager")
RUNS = {
    2: (("whole", 1.0, False, "aot_eager"), ("regional", 1.0, True, "eager"), FILTERED),
    4: (FILTERED,),
}
"""By number of ranks: name, recall, whether blocks are compiled one by one, inner compiler."""


def build() -> tuple[WanTransformer3DModel, dict[str, Any]]:
    model, inputs = models.wan()
    torch.manual_seed(0)
    config = {**model.config, "num_attention_heads": HEADS}
    return WanTransformer3DModel.from_config(config).eval(), inputs


def calls(
    model: WanTransformer3DModel, inputs: dict[str, Any], backend: cef_compile.Backend
) -> tuple[torch.Tensor, cef_compile.Audit]:
    """The last of several calls, and its audit."""
    for _ in range(CALLS - 1):
        model(**inputs)
    with backend.audit() as audit:
        return model(**inputs)[0], audit


def error_of(model: WanTransformer3DModel, inputs: dict[str, Any], **options: Any) -> str:
    torch._dynamo.reset()
    backend = cef_compile.backend(inner="eager", group=dist.group.WORLD, **options)
    try:
        torch.compile(model, backend=backend)(**inputs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fail(node: cef_compile.AttentionNode) -> float:
    raise ValueError("no opinion")


def as_they_come(node: cef_compile.AttentionNode) -> cef_compile.Decision:
    """What ``Balanced`` decides, with tiles cut in raster order."""
    return replace(cef_compile.Balanced(RECALL).decide(node), order="raster")


def sequence_parallel(rank: int, world: int) -> dict[str, Any]:
    model, inputs = build()
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
    found: dict[str, Any] = {"dense": model(**inputs)[0]}
    for name, recall, regional, inner in RUNS[world]:
        torch._dynamo.reset()
        backend = cef_compile.backend(recall=recall, inner=inner, group=dist.group.WORLD)
        if regional:
            model.compile_repeated_blocks(backend=backend)
            compiled = model
        else:
            compiled = torch.compile(model, backend=backend)
        found[name], audit = calls(compiled, inputs, backend)
        found[f"{name} own audit"] = audit.to_dict()
        found[f"{name} audit"] = cef_compile.gather_audit(audit)
        found[f"{name} nodes"] = backend.report.nodes
        for block in model.blocks:
            block._compiled_call_impl = None
    # The same change on all ranks is taken, another one on each by none.
    backend.set_recall(0.8)
    with pytest.raises(cef_compile.RankError, match="the ranks decide differently on Wan"):
        backend.set_recall(0.5 + rank / 10)
    found["policy"] = backend.policy
    found["frozen"] = backend.frozen_policy()

    found["ring"], audit, found["ring nodes"] = ring(world)
    found["ring audit"] = cef_compile.gather_audit(audit)

    last = rank == world - 1
    found["error"] = error_of(model, inputs, policy=fail if last else cef_compile.Uniform(0.9))
    found["other policy"] = error_of(model, inputs, recall=0.8 if last else 0.9)
    return found


def ring(world: int) -> tuple[torch.Tensor, cef_compile.Audit, list[cef_compile.ReportedNode]]:
    """A ring of two, and of four ranks two times two, by Ulysses."""
    model, inputs = build()
    # No fused op with a log-sum-exp that diffusers uses runs on a CPU; filtered, none has to.
    model.set_attention_backend("_native_flash")
    model.enable_parallelism(config=ContextParallelConfig(ring_degree=2, ulysses_degree=world // 2))
    torch._dynamo.reset()
    backend = cef_compile.backend(recall=RECALL, inner="eager", group=dist.group.WORLD)
    out, audit = calls(torch.compile(model, backend=backend), inputs, backend)
    return out, audit, backend.report.filtered


@pytest.mark.parametrize("world", [2, 4])
def test_sequence_parallel(world: int, tmp_path: Path, fresh_dynamo: None) -> None:
    found = ranks.run(sequence_parallel, world, tmp_path)
    model, inputs = build()
    backend = cef_compile.backend(recall=RECALL, inner="eager")
    with torch.no_grad():
        dense = model(**inputs)[0]
        filtered, audit = calls(torch.compile(model, backend=backend), inputs, backend)
        torch._dynamo.reset()
        raster = cef_compile.backend(policy=as_they_come, inner="eager")
        in_raster, raster_audit = calls(torch.compile(model, backend=raster), inputs, raster)

    assert 0 < (filtered - dense).norm() / dense.norm() < 0.05
    self_attention = [f"blocks.{i}.attn1" for i in range(len(model.blocks))]
    for rank in found:
        torch.testing.assert_close(rank["dense"], dense, rtol=1e-5, atol=1e-5)
        # One threshold for all ranks, so that it does not matter how many there are.
        torch.testing.assert_close(rank["filtered"], filtered, rtol=1e-5, atol=1e-5)
        for name, recall, *_ in RUNS[world]:
            if recall == 1:
                torch.testing.assert_close(rank[name], dense, rtol=1e-5, atol=1e-5)
            nodes = [node for node in rank[f"{name} nodes"] if node.decision == "filtered"]
            assert [node.path for node in nodes] == self_attention
            # Each rank sees the full sequence, in the order of its grid, and its part of the heads.
            assert {node.grid for node in nodes} == {(4, 16, 16)}
            assert {node.q_shape for node in nodes} == {(1, HEADS // world, 1024, 12)}
        assert rank["policy"] == cef_compile.Balanced(0.8)
        assert rank["frozen"].nodes == found[0]["frozen"].nodes
        # A ring's rank has its part of the queries, and all keys: their order is left alone.
        torch.testing.assert_close(rank["ring"], in_raster, rtol=1e-5, atol=1e-5)
        shapes = {(n.q_shape, n.kv_len, n.form) for n in rank["ring nodes"]}
        assert shapes == {((1, 2 * HEADS // world, 512, 12), 1024, "ring of 2 flash_attention")}

    for name, alone in (("filtered audit", audit), ("ring audit", raster_audit)):
        gathered = found[0][name]
        assert all(rank[name] is None for rank in found[1:])
        assert [n.path for n in gathered.nodes] == self_attention
        for whole, single in zip(gathered.nodes, alone.nodes, strict=True):
            for field in ("recall", "density", "estimate", "threshold", "target"):
                assert getattr(whole, field) == pytest.approx(getattr(single, field), rel=1e-4)
    gathered = found[0]["filtered audit"]
    parts = [rank["filtered own audit"]["recall"] for rank in found]
    assert max(parts) - min(parts) > 1e-4  # the ranks have other heads
    assert gathered.recall == pytest.approx(sum(parts) / world)
    assert f"rank {world - 1}" in str(gathered).splitlines()[-4]

    for name, own, other in (
        ("error", "ValueError: no opinion", f"RankError: rank {world - 1} failed: ValueError: no"),
        ("other policy", "RankError: the ranks decide differently on Wan", "RankError: the ranks"),
    ):
        assert found[-1][name].startswith(own)
        assert all(rank[name].startswith(other) for rank in found[:-1])

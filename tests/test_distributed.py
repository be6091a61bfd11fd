"""Sequence parallelism: diffusers' Ulysses attention, on several processes and one model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import ContextParallelConfig, WanTransformer3DModel

import cef_compile

HEADS = 4
SPREAD = 0.08
"""How far a rank's recall may be from the target: its few heads of random weights are nearly
uniform, and then a step of threshold takes or leaves many tiles at once."""


def build() -> tuple[WanTransformer3DModel, dict[str, Any]]:
    model, inputs = models.wan()
    torch.manual_seed(0)
    config = {**model.config, "num_attention_heads": HEADS}
    return WanTransformer3DModel.from_config(config).eval(), inputs


@torch.no_grad()
def work(rank: int, world: int, folder: str) -> None:
    """What one rank does; its findings go to a file."""
    torch.set_num_threads(1)
    # diffusers counts accelerators to choose a device, and divides by their number.
    torch.accelerator.device_count = lambda: 1
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    model, inputs = build()
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
    found: dict[str, Any] = {"dense": model(**inputs)[0]}
    for name, recall, regional in (
        ("whole", 1.0, False),
        ("regional", 1.0, True),
        ("filtered", 0.9, False),
    ):
        torch._dynamo.reset()
        backend = cef_compile.backend(recall=recall, inner="aot_eager")
        if regional:
            model.compile_repeated_blocks(backend=backend)
            compiled = model
        else:
            compiled = torch.compile(model, backend=backend)
        compiled(**inputs)
        with backend.audit() as audit:
            found[name] = compiled(**inputs)[0]
        found[f"{name} recall"] = audit.recall
        found[f"{name} nodes"] = [
            (node.path, node.q_shape, node.kind, node.decision) for node in backend.report.nodes
        ]
        for block in model.blocks:
            block._compiled_call_impl = None
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_ulysses_filters_the_heads_of_each_rank(world: int, tmp_path: Path) -> None:
    mp.spawn(work, args=(world, str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world)]
    model, inputs = build()
    with torch.no_grad():
        single = model(**inputs)[0]
    self_attention = [f"blocks.{i}.attn1" for i in range(len(model.blocks))]
    for found in ranks:
        for name in ("dense", "whole", "regional"):
            torch.testing.assert_close(found[name], single, rtol=1e-5, atol=1e-5)
        assert found["whole recall"] == found["regional recall"] == pytest.approx(1.0)
        # The last collective gathers the output, so that every rank holds the whole of it.
        assert torch.equal(found["filtered"], ranks[0]["filtered"])
        assert abs(found["filtered recall"] - 0.9) < SPREAD
        for name in ("whole", "regional", "filtered"):
            nodes = found[f"{name} nodes"]
            filtered = [path for path, *_, decision in nodes if decision == "filtered"]
            assert filtered == self_attention
            # Each rank sees the full sequence and its part of the heads.
            assert {shape for path, shape, *_ in nodes if path in filtered} == {
                (1, HEADS // world, 1024, 12)
            }
    error = (ranks[0]["filtered"] - single).norm() / single.norm()
    assert 0 < error < 0.05

"""CFG parallel, tensor parallel and FSDP2: each rank's part of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import cef_compile

WIDTH, HEADS, DEPTH, RECALL = 32, 2, 3, 0.9
WORLD = 2


class Block(nn.Module):
    """Self attention with projections of its own for q, k and v, as tensor parallelism wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[B, L, width]`` in and out."""
        q, k, v = (
            project(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Several blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[B, L, width]`` in and out."""
        for block in self.blocks:
            x = block(x)
        return x


def build() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def measured(model: nn.Module, x: Tensor, regional: bool, group: Any) -> dict[str, Any]:
    """A model's third call, filtered, and its gathered audit."""
    torch._dynamo.reset()
    backend = cef_compile.backend(recall=RECALL, inner="eager", group=group)
    for module in model.blocks if regional else [model]:
        module.compile(backend=backend)
    for _ in range(2):
        model(x)
    with backend.audit() as audit:
        out = model(x)
    gathered = cef_compile.gather_audit(audit) if group else audit
    nodes = [(node.path, node.q_shape, node.decision) for node in backend.report.nodes]
    return {"out": out, "audit": gathered and gathered.to_dict(), "nodes": nodes}


def tensor_parallel(mesh: Any, regional: bool) -> nn.Module:
    model = build()
    plan = {**{name: ColwiseParallel() for name in "qkv"}, "o": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    return model


def sharded(mesh: Any) -> nn.Module:
    model = build()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def job(rank: int, world: int) -> dict[str, Any]:
    mesh, group = init_device_mesh("cpu", (world,)), dist.group.WORLD
    batch = models.tokens(batch=world)
    mine = batch[rank : rank + 1]  # its branch of classifier-free guidance, its clip
    found = {
        "tensor parallel": measured(tensor_parallel(mesh, False), batch, False, group),
        "tensor parallel, blocks": measured(tensor_parallel(mesh, True), batch, True, group),
        "fsdp": measured(sharded(mesh), mine, False, group),
        "fsdp, blocks": measured(sharded(mesh), mine, True, group),
        "cfg": measured(build(), mine, False, group),
    }
    for name in ("fsdp", "fsdp, blocks", "cfg"):
        parts = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(parts, found[name]["out"])
        found[name]["out"] = torch.cat(parts)
    return found


def test_each_part_is_filtered_as_in_the_whole(tmp_path: Path, fresh_dynamo: None) -> None:
    found = ranks.run(job, WORLD, tmp_path)
    batch = models.tokens(batch=WORLD)
    with torch.no_grad():
        single = measured(build(), batch, False, None)
    paths = [f"blocks.{i}" for i in range(DEPTH)]
    length, dim = batch.shape[1], WIDTH // HEADS
    for name in found[0]:
        heads_parted = name.startswith("tensor")
        shape = (WORLD, HEADS // WORLD) if heads_parted else (1, HEADS)
        for rank in found:
            nodes = [(path, (*shape, length, dim), "filtered") for path in paths]
            assert rank[name]["nodes"] == nodes, name
            torch.testing.assert_close(rank[name]["out"], single["out"], rtol=1e-5, atol=1e-5)
        whole = found[0][name]["audit"]
        assert found[1][name]["audit"] is None
        for node, wanted in zip(whole["nodes"], single["audit"]["nodes"], strict=True):
            for field in ("recall", "density", "estimate", "threshold"):
                torch.testing.assert_close(node[field], wanted[field], rtol=1e-4, atol=1e-4)

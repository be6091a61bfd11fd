"""Jobs on several gloo processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Job = Callable[[int, int], dict[str, Any]]
PRELOADED = [
    "torch._dynamo",
    "torch.distributed.tensor",
    "diffusers.models.transformers.transformer_wan",
    "cef_compile",
]


def run(job: Job, world: int, folder: Path) -> list[dict[str, Any]]:
    """What ``job(rank, world)`` returns on each of ``world`` ranks.

    The processes are forked from a server that has imported what takes long, once.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    mp.start_processes(
        _work, args=(world, str(folder), job), nprocs=world, start_method="forkserver"
    )
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def _work(rank: int, world: int, folder: str, job: Job) -> None:
    torch.set_num_threads(1)
    # diffusers counts accelerators to choose a device, and divides by their number.
    torch.accelerator.device_count = lambda: 1
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    with torch.no_grad():
        torch.save(job(rank, world), f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()

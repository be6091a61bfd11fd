"""Versions and devices that a result depends on. Imports nothing heavy but torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import torch

PACKAGES: Final = ("cef-compile", "torch", "triton", "diffusers", "numpy")


def environment() -> dict[str, Any]:
    """Versions (``None``: not installed), platform, CPU threads and CUDA devices, for JSON."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"cores": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "cuda": {
            "built_for": torch.version.cuda,
            "devices": [
                {
                    "name": gpu.name,
                    "memory_gib": round(gpu.total_memory / 2**30, 1),
                    "capability": f"{gpu.major}.{gpu.minor}",
                }
                for gpu in gpus
            ],
        },
    }


def rows(env: Mapping[str, Any]) -> list[tuple[str, str]]:
    """:func:`environment` as names and texts for a reader."""
    found = [(name, text or "not installed") for name, text in env["versions"].items()]
    found += [("python", env["python"]), ("platform", env["platform"])]
    found.append(("cpu", f"{env['cpu']['cores']} cores, {env['cpu']['torch_threads']} threads"))
    found.append(("cuda build", env["cuda"]["built_for"] or "none (CPU build of torch)"))
    for gpu in env["cuda"]["devices"]:
        text = f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}"
        found.append(("gpu", text))
    if not env["cuda"]["devices"]:
        found.append(("gpu", "none found"))
    return found


def describe(env: Mapping[str, Any]) -> str:
    """:func:`environment` as lines for a terminal."""
    lines = rows(env)
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

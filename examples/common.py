"""What the examples share: their arguments, loading a pipeline, writing the result."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

PROMPT = "a fox runs through fresh snow at dawn"


def arguments(description: str, *, model: str, steps: int, out: str) -> argparse.Namespace:
    """The command line of an example.

    Args:
        description: of the example.
        model, steps, out: defaults.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--model", default=model, help="on the Hugging Face hub, or a folder")
    parser.add_argument("--recall", type=fraction, default=0.95, help="1 is dense")
    parser.add_argument(
        "--warm-up", type=fraction, default=0.86, help="steps with more noise are dense"
    )
    parser.add_argument("--steps", type=positive, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--inner", help="what compiles the rest; inductor unless --dry-run")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny random weights on the CPU, two steps"
    )
    options = parser.parse_args()
    if not options.out.parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.parent}")
    if options.dry_run:
        options.steps = 2
    options.inner = options.inner or ("eager" if options.dry_run else "inductor")
    return options


def fraction(text: str) -> float:
    """A number in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text}")
    return value


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def load(name: str, pipeline: Any, options: argparse.Namespace) -> Any:
    """The pipeline with its weights on the GPU in bfloat16, or the tiny one of a dry run.

    Args:
        name: of the example.
        pipeline: class of diffusers.
        options: of the command line.
    """
    import torch

    if options.dry_run:
        import tiny_pipelines

        return tiny_pipelines.build(name)
    return pipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16).to("cuda")


@contextmanager
def join_ranks(options: argparse.Namespace) -> Iterator[Any]:
    """The process group of all ranks that torchrun has started, each with a GPU of its own.

    Args:
        options: of the command line; a dry run has no GPU.
    """
    import torch
    import torch.distributed as dist

    if not options.dry_run:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if options.dry_run else "nccl")
    yield dist.group.WORLD
    dist.destroy_process_group()


def spread(transformer: Any, options: argparse.Namespace) -> Any:
    """The transformer with its sequence spread over all ranks, by Ulysses.

    Args:
        transformer: of diffusers.
        options: of the command line.
    """
    import torch
    import torch.distributed as dist
    from diffusers import ContextParallelConfig

    # diffusers takes a rank's GPU from their number, by which it divides.
    one = mock.patch.object(torch.accelerator, "device_count", return_value=1)
    with one if options.dry_run else nullcontext():
        config = ContextParallelConfig(ulysses_degree=dist.get_world_size())
        transformer.enable_parallelism(config=config)
    return transformer


def call_arguments(name: str, options: argparse.Namespace, **sizes: int) -> dict[str, Any]:
    """What the pipeline is called with.

    Args:
        name: of the example.
        options: of the command line.
        sizes: of the real picture or video.
    """
    import torch

    if options.dry_run:
        import tiny_pipelines

        sizes = {**tiny_pipelines.SIZES[name], "max_sequence_length": 16}
    return {
        "prompt": options.prompt,
        "num_inference_steps": options.steps,
        "generator": torch.Generator().manual_seed(options.seed),
        "output_type": "pil",
        **sizes,
    }


def save(pictures: Any, path: Path, fps: int = 16) -> None:
    """Write a picture, or frames as a GIF or a video, by the ending of the path."""
    from diffusers.utils import export_to_gif, export_to_video

    if not isinstance(pictures, list):
        pictures.save(path)
    elif path.suffix == ".gif":
        export_to_gif(pictures, str(path), fps=fps)
    else:
        export_to_video(pictures, str(path), fps=fps)
    print(f"wrote {path}")

"""The demo itself: one clip, three ways to run the model, one folder of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any, Final

import torch
from torch import Tensor, nn
from tqdm import tqdm

import cef_compile
from cef_compile.backend import Backend
from cef_compile.demo.data import load_clip, load_model
from cef_compile.demo.latents import shuffle, unshuffle
from cef_compile.demo.measure import Cost, process_peak_bytes, seconds, steady
from cef_compile.demo.metrics import Video
from cef_compile.demo.outcome import Outcome, Quality
from cef_compile.demo.pictures import side_by_side, write_animation, write_still
from cef_compile.demo.sampler import Model, add_noise, noise_levels, sample
from cef_compile.demo.settings import Settings
from cef_compile.report import Audit, TileMap
from cef_compile.report.environment import environment
from cef_compile.tile_maps import tile_maps

BRANCHES: Final = ("text", "no text")
"""The calls of a guided step, in their order."""
PICTURED_NODES: Final = 3
"""Nodes whose tile maps are made: those furthest below their target."""
TIMED_STEPS: Final = 5
"""Steps timed after the video is done, spread over its noise levels, the last of which is the last.
They are not the video's own, because those are audited, and an audit costs time."""


@torch.no_grad()
def run_demo(settings: Settings) -> Outcome:
    """Denoise the clip eager, compiled and filtered, and write everything to ``settings.out``.

    Each way runs one step first (which compiles, and is the calibration pass of the policy), then
    the whole video (audited, where it is filtered), then :data:`TIMED_STEPS` steps for the clock.

    Returns:
        The outcome that ``report.json`` and ``report.txt`` in the folder hold.
    """
    device, dtype = settings.device, settings.dtype
    clip, text = load_clip(settings.clip, settings.frames, settings.size)
    start = add_noise(unshuffle(clip)[None], settings.seed).to(device)
    text = text.to(device, dtype)
    levels = noise_levels(settings.steps)

    model = load_model(device, dtype)
    backend = cef_compile.backend(policy=settings.make_policy())
    # At the demo's size a GPU is done with a kernel before the next one is launched, so that times
    # would be those of the launches; CUDA graphs replay them all at once.
    mode = "reduce-overhead" if device.type == "cuda" else None
    ways = {
        "eager": model,
        "compiled": torch.compile(model, mode=mode),
        "filtered": torch.compile(model, backend=backend, mode=mode),
    }
    videos: dict[str, Video] = {}
    costs: dict[str, Cost] = {}
    with tqdm(total=len(ways) * (1 + settings.steps + TIMED_STEPS), unit="step") as bar:
        for name, way in ways.items():
            bar.set_description(name)
            told = (bar.update, backend.set_noise_level)
            one_step = partial(sample, way, start, text, levels[:2], *told)
            first_step_s = seconds(one_step, device)
            with backend.audit() as audit:  # sees nothing until the last way, the filtered one
                video = sample(_labelled(way, audit), start, text, levels, *told)
                videos[name] = to_video(video)
            steps = iter(spread(levels, TIMED_STEPS))
            one_step = partial(_next_step, steps, way, start, text, told)
            costs[name] = Cost(first_step_s, *steady(one_step, TIMED_STEPS, device))

    late = add_noise(unshuffle(clip)[None], settings.seed, levels[-2]).to(device)
    frames = side_by_side(videos["eager"], videos["filtered"])
    write_still(settings.out / "frames.png", frames)
    write_animation(settings.out / "frames.gif", frames)
    outcome = Outcome(
        settings=settings,
        environment=environment(),
        costs=costs,
        process_peak_bytes=process_peak_bytes(),
        filtered=Quality.of(videos["eager"], videos["filtered"]),
        floor=Quality.of(videos["eager"], videos["compiled"]),
        report=backend.report.to_dict(),
        audit=audit.to_dict(),
        tile_maps=[
            found.to_dict() for found in _tile_maps(backend, audit, model, late, text, levels[-2])
        ],
    )
    outcome.write(settings.out)
    return outcome


def _next_step(
    steps: Iterator[Sequence[float]],
    model: Model,
    latents: Tensor,
    text: Tensor,
    told: tuple[Callable[[], object], Callable[[float], object]],
) -> Tensor:
    return sample(model, latents, text, next(steps), *told)


def spread(levels: Sequence[float], count: int) -> list[Sequence[float]]:
    """``count`` steps (two neighbouring levels each) from the first to the last."""
    last = len(levels) - 2
    first = [round(i * last / (count - 1)) for i in range(count)]
    return [levels[at : at + 2] for at in first]


def to_video(latents: Tensor) -> Video:
    """``[1, 48, F, h, w]`` latents to fp32 frames ``[F, 4h, 4w, 3]``, clamped to 0..1."""
    pixels = shuffle(latents[0]).clamp(-1, 1) / 2 + 0.5
    video: Video = pixels.permute(1, 2, 3, 0).float().cpu().numpy()
    return video


def _labelled(model: Model, audit: Audit) -> Model:
    """``model``, whose calls tell the audit which step and branch they are."""
    calls = count()

    def call(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        step, branch = divmod(next(calls), len(BRANCHES))
        audit.label(step + 1, BRANCHES[branch])
        return model(*args, **kwargs)

    return call


def _tile_maps(
    backend: Backend, audit: Audit, model: nn.Module, latents: Tensor, text: Tensor, level: float
) -> list[TileMap]:
    """Maps of the worst nodes in the last step without text, the backend's last call."""
    now = {(node.path, node.ordinal) for node in backend.report.filtered}  # at its noise level
    nodes = [node for node in audit.nodes if (node.path, node.ordinal) in now]
    worst = sorted(nodes, key=lambda node: node.recall - node.target)[:PICTURED_NODES]
    if not worst:
        return []
    timestep = torch.tensor([1000 * level], device=latents.device)
    inputs = (latents.to(text.dtype), timestep, torch.zeros_like(text))
    paths = {node.path for node in worst}
    return tile_maps(backend, model, *inputs, nodes=paths, return_dict=False)

"""Sampled video against dense, for every method over its range: quality per millisecond.

    python bench/quality.py [--methods NAME ...] [--out bench/results/quality.json]

The trained tiny Wan is sampled in full, from noise and from real clips, dense and with each
method, paired by seed. A row has PSNR, SSIM and flicker against dense, the achieved recall and
density, and on a GPU the time of attention calls of the run, in CUDA graphs, beside cuDNN's on the
same tensors: those of the middle step of the first video from noise and of the first clip. The
floor is dense with another kernel. Rows that the output holds already are not run again, so that
an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import cef_compile
from cef_compile import Balanced, Decision, Uniform
from cef_compile.demo.data import load_clip, load_model
from cef_compile.demo.latents import unshuffle
from cef_compile.demo.metrics import Video, psnr, ssim
from cef_compile.demo.run import to_video
from cef_compile.demo.sampler import add_noise, euler_step, noise_levels
from cef_compile.ops import Phase
from cef_compile.policy.decision import ask
from cef_compile.report.environment import environment

CLIP_START = 0.75
"""Noise level at which real clips enter."""
TIMED_SCENES = ("noise 0", "clip 0")
BALANCED = "balanced"
"""Group of the methods that share one threshold between all nodes."""

Method = Callable[[float], cef_compile.Policy | Callable[[Any], Any]]


def same(**options: Any) -> Callable[[Any], Decision | None]:
    """A policy of one decision for every self attention."""
    decision = Decision(**options)
    return lambda node: decision if node.kind == "self" else None


def in_raster_order(policy: Any) -> Callable[[Any], Decision]:
    """The same decisions, without regard to the grid of the tokens."""
    return lambda node: replace(ask(policy, node), order="raster")


METHODS: dict[str, tuple[Method, tuple[float, ...]]] = {
    "planned, balanced": (Balanced, (0.95, 0.906, 0.9, 0.86, 0.8)),
    "planned, balanced, compensated": (
        lambda x: same(recall=x, group=BALANCED, compensate=True),
        (0.9, 0.8),
    ),
    "planned, each node": (Uniform, (0.95, 0.9, 0.8)),
    "planned, each query tile (top-p)": (lambda x: same(recall=x, rule="top_p"), (0.95, 0.9, 0.8)),
    "planned, fixed density (top-k)": (
        lambda x: same(recall=1.0, rule="top_k", density=x),
        (0.5, 0.35, 0.25),
    ),
    "online, certified": (lambda x: Uniform(x, filter="online"), (0.95, 0.9, 0.8)),
    "online, certified, bound": (
        lambda x: Uniform(x, filter="online", bound=True),
        (0.9, 0.7, 0.5, 0.3),
    ),
    "2606.16317 rule": (
        lambda x: same(recall=0.9, filter="online", rule="lse", bound=True, threshold=2.0**x),
        (-10, -9, -8, -7),
    ),
    "BLASST rule": (
        lambda x: same(
            recall=0.9, filter="online", rule="max", bound=True, threshold=float(np.exp(x))
        ),
        (-4, -3, -2),
    ),
}
"""By name: the policy of a parameter, and the parameters to run. The literature's rules decide the
same with bounds, which are faster."""


@dataclass(frozen=True)
class Scene:
    """Something to sample: where from, under which condition, through which noise levels."""

    name: str
    start: Tensor
    text: Tensor
    levels: list[float]


def scenes(
    given: argparse.Namespace, device: torch.device, dtype: torch.dtype, *, first_seed: int = 0
) -> list[Scene]:
    """Videos from noise, one for each seed, and both clips from :data:`CLIP_START`."""
    found = []
    for seed in range(given.seeds):
        video, text = load_clip(seed % 2, given.frames, given.size)
        noise = add_noise(unshuffle(video)[None], first_seed + seed, level=1.0)
        found.append(Scene(f"noise {seed}", noise, text, noise_levels(given.steps, 1.0)))
    for clip in range(given.clips):
        video, text = load_clip(clip, given.frames, given.size)
        start = add_noise(unshuffle(video)[None], first_seed + clip, level=CLIP_START)
        found.append(Scene(f"clip {clip}", start, text, noise_levels(given.steps, CLIP_START)))
    return [Scene(s.name, s.start.to(device), s.text.to(device, dtype), s.levels) for s in found]


def sample(model: Callable[..., Any], scene: Scene, before: Callable[[int, float], Any]) -> Video:
    """The video of a scene; each step runs inside ``before(step, level)``."""
    latents = scene.start
    for step, (level, following) in enumerate(zip(scene.levels, scene.levels[1:], strict=False)):
        with before(step, level):
            latents = euler_step(model, latents, scene.text, level, following)
    return to_video(latents)


def flicker(video: Video) -> float:
    """Mean absolute difference of neighbouring frames."""
    return float(np.abs(np.diff(video, axis=0)).mean())


class Recorder:
    """An inner compiler that runs graphs as they are and, of some scenes, keeps the op's inputs."""

    def __init__(self) -> None:
        self.scene: str | None = None
        self.calls: dict[str, list[tuple[Any, ...]]] = {}

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        """The graph, to be called."""
        recording = _Recording(gm, self)
        return lambda *args: recording.run(*args) if self.scene else gm(*args)


class _Recording(torch.fx.Interpreter):
    def __init__(self, gm: torch.fx.GraphModule, recorder: Recorder) -> None:
        super().__init__(gm)
        self._recorder = recorder

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.cef.attention.default:
            calls = self._recorder.calls.setdefault(self._recorder.scene or "", [])
            calls.append(tuple(x.clone() if isinstance(x, Tensor) else x for x in args))
        return super().call_function(target, args, kwargs)


def graph_ms(call: Callable[[], Any], repeats: int = 10) -> float:
    """Median time of a call replayed as a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def attention_ms(calls: list[tuple[Any, ...]]) -> tuple[float, float]:
    """Time of recorded calls of the op, and of cuDNN's dense attention on the same tensors.

    The calls are not audited when they are timed, as they are not in use.
    """
    filtered = dense = 0.0
    for q, k, v, attn_mask, control, _phase, *options in calls:
        args = (q, k, v, attn_mask, control, int(Phase.FILTERED), *options)
        filtered += graph_ms(lambda args=args: torch.ops.cef.attention.default(*args))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            dense += graph_ms(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v))
    return filtered, dense


class Study:
    """The model, the scenes, and their dense videos."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.given = given
        self.model = load_model(self.device, dtype)
        self.scenes = scenes(given, self.device, dtype)
        with self._kernel(0):
            self.dense = [self._sample(self.model, scene) for scene in self.scenes]

    def floor(self) -> dict[str, Any]:
        """Dense against dense with another kernel."""
        with self._kernel(1):
            videos = [self._sample(self.model, scene) for scene in self.scenes]
        return {"method": "dense, another kernel", "parameter": 0.0, **self._quality(videos)}

    def row(self, name: str, parameter: float, dense_above: float) -> dict[str, Any]:
        """One method at one parameter, on all scenes."""
        policy = METHODS[name][0](parameter)
        if self.given.raster:
            policy = in_raster_order(policy)
        recorder = Recorder()
        backend = cef_compile.backend(policy=policy, inner=recorder, min_kv_len=0)
        torch._dynamo.reset()
        videos = []
        with backend.audit() as audit:
            compiled = torch.compile(self.model, backend=backend)

            @contextmanager
            def before(step: int, level: float) -> Iterator[None]:
                timed = step == len(scene.levels) // 2 and scene.name in TIMED_SCENES
                recorder.scene = scene.name if timed else None
                with backend.dense() if level > dense_above else nullcontext():
                    yield

            for scene in self.scenes:
                backend.reset()
                videos.append(sample(compiled, scene, before))
        row = {"method": name, "parameter": parameter, "dense_above": dense_above}
        row |= {"recall": audit.recall, "density": audit.density, **self._quality(videos)}
        if self.device.type == "cuda":
            times = {scene: attention_ms(calls) for scene, calls in recorder.calls.items()}
            for scene, (ms, cudnn_ms) in times.items():
                row[f"{scene.split()[0]}_speed"] = cudnn_ms / ms
            filtered, dense = (sum(part) for part in zip(*times.values(), strict=True))
            row |= {"attention_ms": filtered, "cudnn_ms": dense, "speed": dense / filtered}
        return row

    def _sample(self, model: nn.Module, scene: Scene) -> Video:
        return sample(model, scene, lambda step, level: nullcontext())

    def _kernel(self, which: int) -> Any:
        kernels = {
            "cuda": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
            "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
        }
        return sdpa_kernel(kernels[self.device.type][which])

    def _quality(self, videos: list[Video]) -> dict[str, Any]:
        quality: dict[str, Any] = {}
        for kind in ("noise", "clip"):
            pairs = [
                (dense, video)
                for scene, dense, video in zip(self.scenes, self.dense, videos, strict=True)
                if scene.name.startswith(kind)
            ]
            if pairs:
                quality[f"{kind}_psnr"] = statistics.mean(psnr(a, b) for a, b in pairs)
                quality[f"{kind}_ssim"] = statistics.mean(ssim(a, b) for a, b in pairs)
                quality[f"{kind}_flicker"] = statistics.mean(
                    flicker(b) / flicker(a) for a, b in pairs
                )
        return quality


def add_setting(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is sampled."""
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3, help="videos from noise")
    parser.add_argument("--clips", type=int, default=2)


def show(row: dict[str, Any]) -> str:
    """A row as a line."""
    numbers = {key: value for key, value in row.items() if key not in ("method", "parameter")}
    cells = "  ".join(f"{key} {value:.3f}" for key, value in numbers.items())
    return f"{row['method']:34} {row['parameter']:7.2f}  {cells}"


@torch.no_grad()
def main() -> None:
    """Run the rows that are missing, and write all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--parameters", nargs="+", type=float, help="in place of the methods' own")
    add_setting(parser)
    parser.add_argument("--dense-above", type=float, default=1.0, help="noise level of warm-up")
    parser.add_argument("--raster", action="store_true", help="tiles of tokens as they come")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "quality.json"
    )
    given = parser.parse_args()
    setting = {k: v for k, v in vars(given).items() if k not in ("methods", "parameters", "out")}
    done = json.loads(given.out.read_text()) if given.out.exists() else {"rows": []}
    if done["rows"] and done["setting"] != setting:
        parser.error(f"{given.out} holds rows of another setting: {done['setting']}")
    rows = done["rows"]
    known = {(row["method"], row["parameter"]) for row in rows}
    study = Study(given)

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(show(row), flush=True)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        found = {"environment": environment(), "setting": setting, "rows": rows}
        given.out.write_text(json.dumps(found, indent=1) + "\n")

    if not rows:
        add(study.floor())
    for name in given.methods:
        for parameter in given.parameters or METHODS[name][1]:
            if (name, float(parameter)) not in known:
                add(study.row(name, float(parameter), given.dense_above))


if __name__ == "__main__":
    main()

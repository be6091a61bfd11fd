"""The demo's parts: data, latents, sampler, metrics, pictures, settings, report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report_cases import DENSE, FILTERED

from cef_compile.demo import data, defaults, latents, metrics, pictures, sampler
from cef_compile.demo.measure import Cost
from cef_compile.demo.outcome import Outcome, Quality
from cef_compile.demo.settings import Settings, SettingsError
from cef_compile.report import Report
from cef_compile.report.environment import environment
from cef_compile.report.record import MEANS

SEEDS = st.integers(0, 2**31 - 1)


def random_video(seed: int, frames: int = 2, size: int = 16) -> metrics.Video:
    return np.random.default_rng(seed).random((frames, size, size, 3), dtype=np.float32)


class TestData:
    def test_clips_are_what_the_defaults_say(self) -> None:
        with np.load(data.data_folder() / "clips.npz") as file:
            names = sorted(file)
            shapes = {file[f"frames_{i}"].shape for i in range(defaults.CLIPS)}
        assert names == ["frames_0", "frames_1", "text_0", "text_1"]
        pixels = defaults.CLIP_PIXELS
        assert shapes == {(defaults.CLIP_FRAMES, pixels, pixels, 3)}

    @pytest.mark.parametrize("clip", range(defaults.CLIPS))
    def test_full_clip_is_unchanged(self, clip: int) -> None:
        video, text = data.load_clip(clip, defaults.CLIP_FRAMES, defaults.CLIP_PIXELS)
        with np.load(data.data_folder() / "clips.npz") as file:
            pixels = ((video + 1) * 127.5).round().permute(1, 2, 3, 0).numpy()
            np.testing.assert_array_equal(pixels, file[f"frames_{clip}"])
        assert text.shape == (1, 8, 64)

    def test_smaller_clip_has_the_same_colours(self) -> None:
        large, _ = data.load_clip(0, 2, 256)
        small, _ = data.load_clip(0, 2, 64)
        assert small.shape == (3, 2, 64, 64)
        torch.testing.assert_close(small.mean((2, 3)), large.mean((2, 3)))


class TestLatents:
    @given(frames=st.integers(1, 4), height=st.integers(1, 5), width=st.integers(1, 5), seed=SEEDS)
    def test_round_trip(self, frames: int, height: int, width: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        video = torch.randn(3, frames, 4 * height, 4 * width, generator=generator)
        packed = latents.unshuffle(video)
        assert packed.shape == (48, frames, height, width)
        assert torch.equal(latents.shuffle(packed), video)
        assert torch.equal(latents.unshuffle(latents.shuffle(packed)), packed)

    def test_channels_are_colour_then_row_then_column(self) -> None:
        video = torch.arange(3 * 2 * 8 * 8).view(3, 2, 8, 8)
        packed = latents.unshuffle(video)
        assert packed[1 * 16 + 2 * 4 + 3, 1, 0, 1] == video[1, 1, 0 * 4 + 2, 1 * 4 + 3]

    def test_agrees_with_torch_frame_by_frame(self) -> None:
        video = torch.randn(3, 2, 8, 12)
        frames = torch.nn.functional.pixel_unshuffle(video.transpose(0, 1), 4)
        assert torch.equal(latents.unshuffle(video), frames.transpose(0, 1))

    def test_tokens(self) -> None:
        assert latents.tokens(16, 256) == 16_384


class TestSampler:
    @given(steps=st.integers(1, 40))
    def test_levels_fall_from_start_to_zero(self, steps: int) -> None:
        levels = sampler.noise_levels(steps)
        assert len(levels) == steps + 1
        assert levels[0] == pytest.approx(sampler.START)
        assert levels[-1] == 0
        assert all(a > b for a, b in pairwise(levels))

    def test_from_pure_noise_the_schedule_is_the_shifted_one(self) -> None:
        assert sampler.noise_levels(4, start=1.0) == pytest.approx([1, 0.9, 0.75, 0.5, 0])

    def test_noise_depends_on_the_seed_alone(self) -> None:
        clip = torch.zeros(1, 48, 2, 4, 4)
        assert torch.equal(sampler.add_noise(clip, 3), sampler.add_noise(clip, 3))
        assert not torch.equal(sampler.add_noise(clip, 3), sampler.add_noise(clip, 4))
        assert torch.equal(sampler.add_noise(clip + 1, 0, level=0.0), clip + 1)

    @given(steps=st.integers(1, 12), seed=SEEDS)
    def test_the_true_velocity_leads_to_the_clip(self, steps: int, seed: int) -> None:
        clip = torch.randn(1, 48, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
        start = sampler.add_noise(clip, seed)
        noise = (start - (1 - sampler.START) * clip) / sampler.START
        calls = []

        def model(hidden, timestep, condition, return_dict):
            level = timestep.item() / 1000
            torch.testing.assert_close(hidden, (1 - level) * clip + level * noise)
            calls.append(bool(condition.any()))
            return (noise - clip,)

        text = torch.ones(1, 8, 64)
        end = sampler.sample(model, start, text, sampler.noise_levels(steps))
        torch.testing.assert_close(end, clip, rtol=0, atol=1e-4)
        assert calls == [True, False] * steps

    def test_guidance_extrapolates_from_the_unconditional_velocity(self) -> None:
        def model(hidden, timestep, condition, return_dict):
            return (torch.full_like(hidden, 3.0 if condition.any() else 1.0),)

        start = torch.zeros(1, 48, 1, 2, 2)
        end = sampler.euler_step(model, start, torch.ones(1, 8, 64), 0.5, 0.3)
        torch.testing.assert_close(end, torch.full_like(start, -0.2 * (1 + 2 * (3 - 1))))


class TestMetrics:
    @given(seed=SEEDS)
    def test_identical_videos(self, seed: int) -> None:
        video = random_video(seed)
        assert metrics.psnr(video, video) == math.inf
        assert metrics.ssim(video, video) == pytest.approx(1)

    @given(seed=SEEDS)
    def test_symmetric(self, seed: int) -> None:
        a, b = random_video(seed), random_video(seed + 1)
        assert metrics.psnr(a, b) == pytest.approx(metrics.psnr(b, a))
        assert metrics.ssim(a, b) == pytest.approx(metrics.ssim(b, a))

    @given(seed=SEEDS, step=st.floats(0.001, 0.5))
    def test_psnr_of_a_constant_error(self, seed: int, step: float) -> None:
        video = random_video(seed) / 2
        expected = -20 * math.log10(step)
        assert metrics.psnr(video, video + np.float32(step)) == pytest.approx(expected, abs=0.01)

    @given(seed=SEEDS)
    def test_more_noise_is_worse(self, seed: int) -> None:
        video = random_video(seed)
        noise = random_video(seed + 1) - 0.5
        near, far = video + 0.1 * noise, video + 0.2 * noise
        assert metrics.psnr(video, near) > metrics.psnr(video, far)
        assert metrics.ssim(video, near) > metrics.ssim(video, far)


class TestPictures:
    def test_panels_are_dense_filtered_and_amplified_difference(self) -> None:
        dense = np.full((2, 256, 256, 3), 0.5, np.float32)
        (frame, _) = pictures.side_by_side(dense, dense + np.float32(0.02))
        middle = pictures.HEADER_PIXELS + 128
        panel = pictures.PANEL_PIXELS + pictures.GAP_PIXELS
        levels = [frame.getpixel((128 + i * panel, middle)) for i in range(3)]
        assert levels == [(128,) * 3, (133,) * 3, (51,) * 3]

    @pytest.mark.parametrize(("frames", "rows"), [(1, 1), (2, 2), (8, 3)])
    def test_files(self, tmp_path: Path, frames: int, rows: int) -> None:
        video = random_video(0, frames, 64)
        panels = pictures.side_by_side(video, random_video(1, frames, 64))
        pictures.write_still(tmp_path / "a.png", panels)
        pictures.write_animation(tmp_path / "a.gif", panels)
        with Image.open(tmp_path / "a.png") as still:
            side, gap = pictures.PANEL_PIXELS, pictures.GAP_PIXELS
            header = pictures.HEADER_PIXELS
            assert still.size == (3 * side + 2 * gap, header + rows * side + (rows - 1) * gap)
        with Image.open(tmp_path / "a.gif") as animation:
            assert getattr(animation, "n_frames", 1) == frames


class TestSettings:
    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"recall": 0.0}, r"recall must be in \(0, 1\], got 0.0"),
            ({"recall": 1.01}, "got 1.01"),
            ({"recall": math.nan}, "got nan"),
            ({"steps": 0}, "steps must be at least 1, got 0"),
            ({"size": 100}, "multiple of 8"),
            ({"size": 0}, "got 0"),
            ({"size": 264}, "to 256"),
            ({"frames": 17}, "from 1 to 16"),
            ({"frames": 0}, "got 0"),
            ({"clip": 2}, "from 0 to 1, got 2"),
            ({"seed": -1}, "seed must be"),
            ({"device": "tpu"}, "auto, cpu or cuda, got 'tpu'"),
        ],
    )
    def test_errors_name_what_was_got(self, tmp_path: Path, wrong: dict, message: str) -> None:
        out = tmp_path / "out"
        with pytest.raises(SettingsError, match=message):
            Settings.resolve(**{"out": out, "device": "cpu", **wrong})
        assert not out.exists()

    def test_absent_cuda(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SettingsError, match="finds no CUDA device"):
            Settings.resolve(device="cuda", out=tmp_path)

    def test_unwritable_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(SettingsError, match="cannot write to the folder"):
            Settings.resolve(out=tmp_path / "file" / "out")

    def test_defaults_follow_the_device(self, tmp_path: Path) -> None:
        settings = Settings.resolve(device="cpu", out=tmp_path / "new" / "folder")
        assert (settings.size, settings.frames, settings.dtype) == (128, 8, torch.float32)
        assert settings.tokens == 8 * 16 * 16
        assert settings.out.is_dir()


NODES = (
    replace(FILTERED, model="Wan", path="a", ordinal=0),
    replace(DENSE, model="Wan", path="a", ordinal=1, reason="short"),
)
AUDITED = {
    "model": "Wan",
    "path": "a",
    "ordinal": 0,
    "target": 0.9,
    "recall": 0.9,
    "interval": [0.8, 1.0],
    "error": 0.1,
    "error_interval": [0.1, 0.1],
    "density": 0.5,
    "calls": 1,
    "recalls": [0.9],
    "errors": [0.1],
    "densities": [0.5],
    "passes": [0],
}
PASSES = [{"model": "Wan", "step": "1", "branch": ""}]


class TestOutcome:
    def outcome(self, out: Path, audit: dict) -> Outcome:
        return Outcome(
            settings=Settings.resolve(device="cpu", out=out),
            environment=environment(),
            costs={"eager": Cost(2.0, 1.0, None), "filtered": Cost(2.0, 0.5, 2**30)},
            process_peak_bytes=2**31,
            filtered=Quality(40.0, 0.99),
            floor=Quality(math.inf, 1.0),
            report=Report("Balanced(0.9)", NODES).to_dict(),
            audit=audit,
        )

    def test_nodes_and_audits_are_joined_by_path_and_ordinal(self, tmp_path: Path) -> None:
        audit = {"recall": 0.9, "error": 0.1, "density": 0.5, "passes": PASSES, "nodes": [AUDITED]}
        first, second = self.outcome(tmp_path, audit).record["nodes"]
        assert first["audit"] == AUDITED
        assert second["audit"] is None

    def test_files(self, tmp_path: Path) -> None:
        audit = {"recall": 0.9, "error": 0.1, "density": 0.5, "passes": PASSES, "nodes": [AUDITED]}
        outcome = self.outcome(tmp_path, audit)
        for name in ("frames.png", "frames.gif"):
            Image.new("RGB", (2, 2)).save(tmp_path / name)
        outcome.write(tmp_path)
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["quality"]["floor"] == {"psnr_db": None, "ssim": 1.0}
        assert report["mean"] == {"recall": 0.9, "error": 0.1, "density": 0.5}
        assert report["settings"]["tokens"] == 2048
        assert report["environment"]["versions"]["torch"] == environment()["versions"]["torch"]
        text = (tmp_path / "report.txt").read_text()
        assert str(outcome) in text
        assert "the times mean nothing" in text
        assert "0.800 .. 1.000" in text
        assert "dense: short" in text

    def test_nothing_filtered_is_null_in_json(self, tmp_path: Path) -> None:
        nothing = dict.fromkeys(MEANS, math.nan)
        outcome = self.outcome(tmp_path, {**nothing, "passes": [], "nodes": []})
        assert outcome.to_dict()["mean"] == dict.fromkeys(MEANS)
        assert "no node was filtered" in str(outcome)

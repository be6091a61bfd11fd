"""What the demo is asked to do, checked before any work."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from cef_compile.demo.defaults import (
    CLIP_FRAMES,
    CLIP_PIXELS,
    CLIPS,
    FRAMES,
    OUT,
    RECALL,
    SIZE,
    STEPS,
    TOKEN_PIXELS,
)
from cef_compile.demo.latents import tokens


class SettingsError(ValueError):
    """A setting that cannot be carried out; the message says what was got and what is possible."""


@dataclass(frozen=True)
class Settings:
    """A checked request. Make it with :meth:`resolve`."""

    recall: float
    """Wanted mean share of the attention energy, over 0 and at most 1."""
    steps: int
    """Euler steps."""
    size: int
    """Height and width of a frame in pixels."""
    frames: int
    clip: int
    seed: int
    device: torch.device
    out: Path

    @property
    def dtype(self) -> torch.dtype:
        """Of the model: bf16 where the hardware is made for it, fp32 on a CPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def tokens(self) -> int:
        """Length of the sequence that self attention sees."""
        return tokens(self.frames, self.size)

    @classmethod
    def resolve(
        cls,
        *,
        recall: float = RECALL,
        steps: int = STEPS,
        size: int | None = None,
        frames: int | None = None,
        clip: int = 0,
        seed: int = 0,
        device: str = "auto",
        out: Path = OUT,
    ) -> Settings:
        """Fill in what depends on the device, check everything, make the folder ``out``.

        Raises:
            SettingsError: naming the setting, what was got and what is possible.
        """
        chosen = _device(device)
        size = SIZE[chosen.type] if size is None else size
        frames = FRAMES[chosen.type] if frames is None else frames
        _check(0 < recall <= 1, f"recall must be in (0, 1], got {recall}")
        _check(steps >= 1, f"steps must be at least 1, got {steps}")
        _check(
            size % TOKEN_PIXELS == 0 and TOKEN_PIXELS <= size <= CLIP_PIXELS,
            f"size must be a multiple of {TOKEN_PIXELS} from {TOKEN_PIXELS} to {CLIP_PIXELS} "
            f"(the clips' own size), got {size}",
        )
        _check(
            1 <= frames <= CLIP_FRAMES,
            f"frames must be from 1 to {CLIP_FRAMES} (the clips' length), got {frames}",
        )
        _check(0 <= clip < CLIPS, f"clip must be from 0 to {CLIPS - 1}, got {clip}")
        _check(0 <= seed < 2**63, f"seed must be from 0 to 2^63 - 1, got {seed}")
        _make_folder(out)
        return cls(recall, steps, size, frames, clip, seed, chosen, out)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise SettingsError(message)


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    _check(name in SIZE, f"device must be auto, cpu or cuda, got {name!r}")
    _check(name != "cuda" or available, "device is cuda, but torch finds no CUDA device")
    return torch.device(name)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise SettingsError(f"cannot write to the folder {out}: {error.strerror}") from error

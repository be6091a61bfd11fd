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
from cef_compile.errors import PolicyFormatError
from cef_compile.policy import Balanced, PolicyLike, load_policy


class SettingsError(ValueError):
    """A setting that cannot be carried out; the message says what was got and what is possible."""


@dataclass(frozen=True)
class Settings:
    """A checked request. Make it with :meth:`resolve`."""

    recall: float | None
    """Wanted mean share of the attention energy, over 0 and at most 1; None with a policy."""
    policy: Path | None
    """A policy file in place of a recall."""
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

    def make_policy(self) -> PolicyLike:
        """What decides about each node."""
        if self.policy is not None:
            return _read_policy(self.policy)
        assert self.recall is not None, "one of the two is given"
        return Balanced(self.recall)

    @classmethod
    def resolve(
        cls,
        *,
        recall: float | None = None,
        policy: Path | None = None,
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
        chosen = find_device(device)
        size = SIZE[chosen.type] if size is None else size
        frames = FRAMES[chosen.type] if frames is None else frames
        _check(recall is None or policy is None, "give a recall or a policy, not both")
        if policy is not None:
            _read_policy(policy)
        else:
            recall = RECALL if recall is None else recall
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
        return cls(recall, policy, steps, size, frames, clip, seed, chosen, out)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise SettingsError(message)


def _read_policy(path: Path) -> PolicyLike:
    try:
        return load_policy(path)
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except PolicyFormatError as error:
        raise SettingsError(error) from error


def find_device(name: str) -> torch.device:
    """The device of "auto", "cpu" or "cuda".

    Raises:
        SettingsError: there is none.
    """
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

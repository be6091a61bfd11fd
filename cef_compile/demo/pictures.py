"""Dense, filtered and their amplified difference side by side, as a still and as an animation."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cef_compile.demo.metrics import Video

AMPLIFY: Final = 10
"""Factor on the difference; without one it would be black."""
PANEL_PIXELS: Final = 256
"""Smaller frames are enlarged to this, pixel by pixel."""
HEADER_PIXELS: Final = 28
GAP_PIXELS: Final = 4
STILLS: Final = 3
"""Frames in the still: first, middle, last."""
FRAME_MS: Final = 125
"""Time of a frame in the animation."""


def side_by_side(dense: Video, filtered: Video) -> list[Image.Image]:
    """One picture per frame: dense | filtered | amplified difference, with a header."""
    difference = np.clip(AMPLIFY * np.abs(filtered - dense), 0, 1)
    return [_frame(panels) for panels in zip(dense, filtered, difference, strict=True)]


def write_still(path: Path, frames: list[Image.Image]) -> None:
    """First, middle and last frame one above the other, as PNG."""
    chosen = sorted({round(i * (len(frames) - 1) / (STILLS - 1)) for i in range(STILLS)})
    rows = [frames[i] if n == 0 else _without_header(frames[i]) for n, i in enumerate(chosen)]
    height = sum(row.height for row in rows) + GAP_PIXELS * (len(rows) - 1)
    still = Image.new("RGB", (rows[0].width, height), "white")
    top = 0
    for row in rows:
        still.paste(row, (0, top))
        top += row.height + GAP_PIXELS
    still.save(path, optimize=True)


def write_animation(path: Path, frames: list[Image.Image]) -> None:
    """All frames as an endless GIF."""
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)


def _frame(panels: tuple[Video, ...]) -> Image.Image:
    names = ("dense", "filtered", f"difference x {AMPLIFY}")
    pictures = [_panel(panel) for panel in panels]
    width = pictures[0].width
    frame = Image.new(
        "RGB", (3 * width + 2 * GAP_PIXELS, HEADER_PIXELS + pictures[0].height), "white"
    )
    draw = ImageDraw.Draw(frame)
    font = ImageFont.load_default(size=16)
    for i, (name, picture) in enumerate(zip(names, pictures, strict=True)):
        left = i * (width + GAP_PIXELS)
        frame.paste(picture, (left, HEADER_PIXELS))
        draw.text((left + width / 2, HEADER_PIXELS / 2), name, "black", font, anchor="mm")
    return frame


def _panel(pixels: Video) -> Image.Image:
    picture = Image.fromarray((pixels * 255).round().astype(np.uint8))
    factor = max(1, -(-PANEL_PIXELS // picture.width))
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )


def _without_header(frame: Image.Image) -> Image.Image:
    return frame.crop((0, HEADER_PIXELS, frame.width, frame.height))

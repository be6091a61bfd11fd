"""Defaults of the demo and what its clips admit. Imports nothing, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Final

RECALL: Final = 0.9
STEPS: Final = 10
SIZE: Final = {"cpu": 128, "cuda": 256}
"""Pixels by device: the clips' own size, or one that two CPU cores denoise in minutes."""
FRAMES: Final = {"cpu": 8, "cuda": 16}
OUT: Final = Path("demo-out")

CLIPS: Final = 2
"""Clips in the file."""
CLIP_FRAMES: Final = 16
"""Frames of each."""
CLIP_PIXELS: Final = 256
"""Height and width of each frame."""
UNSHUFFLE: Final = 4
"""A latent position holds so many pixels in each direction."""
TOKEN_PIXELS: Final = 2 * UNSHUFFLE
"""A token (patch of 2 x 2 latent positions) covers so many pixels in each direction."""

"""How far a video is from another one, by scikit-image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Video = NDArray[np.float32]
"""Frames, height, width, RGB; 0 to 1."""


def psnr(reference: Video, other: Video) -> float:
    """Peak signal-to-noise ratio over all frames in dB; ``inf`` when they are identical."""
    from skimage.metrics import peak_signal_noise_ratio

    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(reference, other, data_range=1.0))


def ssim(reference: Video, other: Video) -> float:
    """Structural similarity (at most 1), mean over frames of at least 7 x 7 pixels."""
    from skimage.metrics import structural_similarity

    frames = zip(reference, other, strict=True)
    values = [structural_similarity(a, b, data_range=1.0, channel_axis=-1) for a, b in frames]
    return float(np.mean(values))

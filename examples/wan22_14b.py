"""Wan 2.2 14B: text to video with filtered attention.

python examples/wan22_14b.py "a prompt" --recall 0.95
python examples/wan22_14b.py --dry-run --out wan22_14b.gif
"""

from common import arguments, call_arguments, load, save
from diffusers import WanPipeline

import cef_compile
from cef_compile.diffusers import DenseUntil


def main() -> None:
    """Run the example."""
    assert __doc__
    options = arguments(
        __doc__.splitlines()[0],
        model="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        steps=40,
        out="wan22_14b.mp4",
    )
    pipe = load("wan22_14b", WanPipeline, options)
    backend = cef_compile.backend(recall=options.recall, inner=options.inner)
    # One expert denoises the noisy steps and one the others: one policy, a report for each.
    pipe.transformer.compile(backend=backend)
    pipe.transformer_2.compile(backend=backend)
    inputs = call_arguments("wan22_14b", options, height=720, width=1280, num_frames=81)
    with DenseUntil(backend, sigma=options.warm_up) as warm_up:
        frames = pipe(**inputs, callback_on_step_end=warm_up).frames[0]
    save(frames, options.out, fps=16)
    print(backend.report)


if __name__ == "__main__":
    main()

"""Wan 2.1 14B: text to video with filtered attention.

python examples/wan21.py "a prompt" --recall 0.95
python examples/wan21.py --dry-run --out wan21.gif
"""

from common import arguments, call_arguments, load, save
from diffusers import WanPipeline

import cef_compile
from cef_compile.diffusers import DenseUntil


def main() -> None:
    """Run the example."""
    assert __doc__
    options = arguments(
        __doc__.splitlines()[0], model="Wan-AI/Wan2.1-T2V-14B-Diffusers", steps=50, out="wan21.mp4"
    )
    pipe = load("wan21", WanPipeline, options)
    backend = cef_compile.backend(recall=options.recall, inner=options.inner)
    pipe.transformer.compile(backend=backend)
    inputs = call_arguments("wan21", options, height=720, width=1280, num_frames=81)
    with DenseUntil(backend, sigma=options.warm_up) as warm_up:
        frames = pipe(**inputs, callback_on_step_end=warm_up).frames[0]
    save(frames, options.out, fps=16)
    print(backend.report)


if __name__ == "__main__":
    main()

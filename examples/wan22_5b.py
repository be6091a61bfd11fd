"""Wan 2.2 5B: text to video with filtered attention.

python examples/wan22_5b.py "a prompt" --recall 0.95
python examples/wan22_5b.py --dry-run --out wan22_5b.gif
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
        model="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        steps=50,
        out="wan22_5b.mp4",
    )
    pipe = load("wan22_5b", WanPipeline, options)
    backend = cef_compile.backend(recall=options.recall, inner=options.inner)
    pipe.transformer.compile(backend=backend)
    inputs = call_arguments("wan22_5b", options, height=704, width=1280, num_frames=121)
    with DenseUntil(backend, sigma=options.warm_up) as warm_up:
        frames = pipe(**inputs, callback_on_step_end=warm_up).frames[0]
    save(frames, options.out, fps=24)
    print(backend.report)


if __name__ == "__main__":
    main()

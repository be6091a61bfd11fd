"""LTX-Video: text to video with filtered attention.

python examples/ltx_video.py "a prompt" --recall 0.95
python examples/ltx_video.py --dry-run --out ltx_video.gif
"""

from common import arguments, call_arguments, load, save
from diffusers import LTXPipeline

import cef_compile
from cef_compile.diffusers import DenseUntil


def main() -> None:
    """Run the example."""
    assert __doc__
    options = arguments(
        __doc__.splitlines()[0], model="Lightricks/LTX-Video", steps=50, out="ltx_video.mp4"
    )
    pipe = load("ltx_video", LTXPipeline, options)
    backend = cef_compile.backend(recall=options.recall, inner=options.inner)
    pipe.transformer.compile(backend=backend)
    inputs = call_arguments("ltx_video", options, height=704, width=1216, num_frames=121)
    with DenseUntil(backend, sigma=options.warm_up) as warm_up:
        frames = pipe(**inputs, callback_on_step_end=warm_up).frames[0]
    save(frames, options.out, fps=24)
    print(backend.report)


if __name__ == "__main__":
    main()

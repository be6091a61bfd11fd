"""HunyuanVideo: text to video with filtered attention.

python examples/hunyuan_video.py "a prompt" --recall 0.95
python examples/hunyuan_video.py --dry-run --out hunyuan_video.gif
"""

from common import arguments, call_arguments, load, save
from diffusers import HunyuanVideoPipeline

import cef_compile
from cef_compile.diffusers import DenseUntil


def main() -> None:
    """Run the example."""
    assert __doc__
    options = arguments(
        __doc__.splitlines()[0],
        model="hunyuanvideo-community/HunyuanVideo",
        steps=50,
        out="hunyuan_video.mp4",
    )
    pipe = load("hunyuan_video", HunyuanVideoPipeline, options)
    backend = cef_compile.backend(recall=options.recall, inner=options.inner)
    # Block by block: one graph serves the layers of a class, and compiling takes seconds.
    pipe.transformer.compile_repeated_blocks(backend=backend)
    inputs = call_arguments("hunyuan_video", options, height=720, width=1280, num_frames=129)
    with DenseUntil(backend, sigma=options.warm_up) as warm_up:
        frames = pipe(**inputs, callback_on_step_end=warm_up).frames[0]
    save(frames, options.out, fps=24)
    print(backend.report)


if __name__ == "__main__":
    main()

"""CogVideoX 5B: text to video with filtered attention.

python examples/cogvideox.py "a prompt" --recall 0.95
python examples/cogvideox.py --dry-run --out cogvideox.gif
"""

from common import arguments, call_arguments, load, save
from diffusers import CogVideoXPipeline

import cef_compile
from cef_compile.diffusers import DenseUntil


def main() -> None:
    """Run the example."""
    assert __doc__
    options = arguments(
        __doc__.splitlines()[0], model="THUDM/CogVideoX-5b", steps=50, out="cogvideox.mp4"
    )
    pipe = load("cogvideox", CogVideoXPipeline, options)
    backend = cef_compile.backend(recall=options.recall, inner=options.inner)
    pipe.transformer.compile(backend=backend)
    inputs = call_arguments("cogvideox", options, height=480, width=720, num_frames=49)
    with DenseUntil(backend, sigma=options.warm_up) as warm_up:
        frames = pipe(**inputs, callback_on_step_end=warm_up).frames[0]
    save(frames, options.out, fps=8)
    print(backend.report)


if __name__ == "__main__":
    main()

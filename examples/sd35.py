"""Stable Diffusion 3.5 Large: text to image with filtered attention.

python examples/sd35.py "a prompt" --recall 0.95
python examples/sd35.py --dry-run
"""

from common import arguments, call_arguments, load, save
from diffusers import StableDiffusion3Pipeline

import cef_compile
from cef_compile.diffusers import DenseUntil


def main() -> None:
    """Run the example."""
    assert __doc__
    options = arguments(
        __doc__.splitlines()[0],
        model="stabilityai/stable-diffusion-3.5-large",
        steps=28,
        out="sd35.png",
    )
    pipe = load("sd35", StableDiffusion3Pipeline, options)
    backend = cef_compile.backend(recall=options.recall, inner=options.inner)
    pipe.transformer.compile(backend=backend)
    inputs = call_arguments("sd35", options, height=1440, width=1440)
    with DenseUntil(backend, sigma=options.warm_up) as warm_up:
        image = pipe(**inputs, callback_on_step_end=warm_up).images[0]
    save(image, options.out)
    print(backend.report)


if __name__ == "__main__":
    main()

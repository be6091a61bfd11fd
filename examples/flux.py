"""Flux.1 dev: text to image with filtered attention.

python examples/flux.py "a prompt" --recall 0.95
python examples/flux.py --dry-run
"""

from common import arguments, call_arguments, load, save
from diffusers import FluxPipeline

import cef_compile
from cef_compile.diffusers import DenseUntil


def main() -> None:
    """Run the example."""
    assert __doc__
    options = arguments(
        __doc__.splitlines()[0], model="black-forest-labs/FLUX.1-dev", steps=28, out="flux.png"
    )
    pipe = load("flux", FluxPipeline, options)
    backend = cef_compile.backend(recall=options.recall, inner=options.inner)
    pipe.transformer.compile(backend=backend)
    inputs = call_arguments("flux", options, height=2048, width=2048)
    with DenseUntil(backend, sigma=options.warm_up) as warm_up:
        image = pipe(**inputs, callback_on_step_end=warm_up).images[0]
    save(image, options.out)
    print(backend.report)


if __name__ == "__main__":
    main()

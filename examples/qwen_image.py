"""Qwen-Image: text to image with filtered attention.

python examples/qwen_image.py "a prompt" --recall 0.95
python examples/qwen_image.py --dry-run
"""

from common import arguments, call_arguments, load, save
from diffusers import QwenImagePipeline

import cef_compile
from cef_compile.diffusers import DenseUntil


def main() -> None:
    """Run the example."""
    assert __doc__
    options = arguments(
        __doc__.splitlines()[0], model="Qwen/Qwen-Image", steps=50, out="qwen_image.png"
    )
    pipe = load("qwen_image", QwenImagePipeline, options)
    backend = cef_compile.backend(recall=options.recall, inner=options.inner)
    pipe.transformer.compile(backend=backend)
    inputs = call_arguments("qwen_image", options, height=1328, width=1328)
    with DenseUntil(backend, sigma=options.warm_up) as warm_up:
        image = pipe(**inputs, callback_on_step_end=warm_up).images[0]
    save(image, options.out)
    print(backend.report)


if __name__ == "__main__":
    main()

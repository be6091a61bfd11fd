"""Wan 2.2 14B on several GPUs: Ulysses sequence parallelism with filtered attention.

torchrun --nproc-per-node 8 examples/wan22_multi_gpu.py "a prompt" --recall 0.95
torchrun --nproc-per-node 2 examples/wan22_multi_gpu.py --dry-run --out wan22_multi_gpu.gif
"""

from common import arguments, call_arguments, join_ranks, load, save, spread
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
        out="wan22_multi_gpu.mp4",
    )
    with join_ranks(options) as ranks:
        pipe = load("wan22_14b", WanPipeline, options)
        backend = cef_compile.backend(recall=options.recall, inner=options.inner, group=ranks)
        for expert in (pipe.transformer, pipe.transformer_2):
            spread(expert, options).compile(backend=backend)
        inputs = call_arguments("wan22_14b", options, height=720, width=1280, num_frames=81)
        with DenseUntil(backend, sigma=options.warm_up) as warm_up, backend.audit() as audit:
            frames = pipe(**inputs, callback_on_step_end=warm_up).frames[0]
        whole = cef_compile.gather_audit(audit)
        if whole is not None:  # on the first rank
            save(frames, options.out, fps=16)
            print(backend.report, whole, sep="\n\n")


if __name__ == "__main__":
    main()

"""Small cases of every kernel, or of one engine's, to run under compute-sanitizer: `make sanitize`.

python tests/gpu/sanitize.py [ENGINE]
"""

import sys

import torch

from cef_compile.kernels import config as c
from cef_compile.kernels import launch
from cef_compile.kernels.engines import Call, lacks
from cef_compile.kernels.order import Layout

CASES = ((2, 4, 2, 200, 257, 64, True), (1, 2, 2, 129, 320, 128, False))


def main() -> None:
    for batch, heads, kv_heads, q_len, kv_len, dim, masked in CASES:
        q = torch.randn(batch, heads, q_len, dim, device="cuda").bfloat16()
        k, v = torch.randn(2, batch, kv_heads, kv_len, dim, device="cuda").bfloat16()
        mask = torch.rand(batch, kv_len, device="cuda") < 0.7 if masked else None
        engine = sys.argv[1] if len(sys.argv) > 1 else None
        options = {"scale": dim**-0.5, "key_mask": mask, "audited": True, "engine": engine}
        numbers = torch.tensor([0.7, 0.0, 0.0, 1.0], device="cuda")
        for rule in c.PLANNED_RULES:
            launch.planned(
                q, k, v, numbers, rule=rule, compensate=True, **{**options, "engine": None}
            )
            launch.planned(q, k, v, numbers, rule=rule, **options)
        for certify in c.CERTIFICATES:
            for bound in (False, True):
                launch.online(q, k, v, numbers, certify=certify, bound=bound, **options)
        eight = Call(launch._architecture(q.device), q.dtype, dim, dim, scores="int8")
        if engine is None and not lacks("hopper-int8", eight):
            wanted = {"scores": "int8", "engine": "hopper-int8"}
            launch.planned(q, k, v, numbers, **{**options, **wanted})
        # A grid of 4 x 7 x 7 tokens with text after it, queries and keys alike.
        options["layout"] = Layout(0, 4, 7, 7, kv_len - 4 * 7 * 7)
        more = torch.randn(batch, heads, kv_len, dim, device="cuda").bfloat16()
        launch.planned(more, k, v, numbers, **options)
        launch.online(more, k, v, numbers, **options)
        torch.cuda.synchronize()
    print("ran")


if __name__ == "__main__":
    main()

"""Where there is no GPU, the kernels run in Triton's interpreter, on the CPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported, so it must be set before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl
from triton.runtime.jit import JITFunction

if not torch.cuda.is_available() and isinstance(tl.max, JITFunction):
    raise pytest.UsageError(
        "Triton was imported before tests/kernels/conftest.py could switch it to its interpreter: "
        "run with TRITON_INTERPRET=1"
    )

"""Compiles a Gluon kernel for Hopper, which needs no GPU, and says what came out.

    python compile_hopper.py attend HEAD_DIM VALUE_DIM OTHER
    python compile_hopper.py int8 VALUE_DIM OTHER
    python compile_hopper.py judge HEAD_DIM BOUND CERTIFIED OTHER
    python compile_hopper.py plan HEAD_DIM KEY_TILES OTHER

OTHER: True with a key mask and in a token order, False without.

Apart from the tests, whose process may run Triton's interpreter.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from cef_compile.kernels import config as c
from cef_compile.kernels import hopper, hopper_judge, hopper_plan
from cef_compile.kernels.gluon_parts import block_layout, tile_block

POINTERS = {
    "tokens": "i32",
    "q": "bf16", "out": "bf16", "lse": "fp32", "index": "i16", "count": "i32", "order": "i32",
    "queue": "i32", "key_mask": "i1", "control": "fp32", "recall": "fp32", "kept": "i32",
    "sums": "i64", "bins": "u8", "judged": "u8", "energy": "fp32", "histogram": "i64",
    "row_scale": "fp32", "row_shift": "fp32", "key_scale": "fp32",
}  # fmt: skip
ALIGNED = {*POINTERS, "q_b", "q_h", "q_l", "out_b", "out_h", "out_l"}
INSTRUCTION_BYTES = 16
Built = triton.compiler.CompiledKernel


def attend(head_dim: int, value_dim: int, other: bool) -> Built:
    """The kernel as ``hopper.attend`` launches it."""
    given = hopper.constants(head_dim, value_dim, masked=other, ordered=other)
    given |= {"row_scale": None, "row_shift": None, "key_scale": None}
    return build(hopper._attend, given, tiles_of(64), hopper.OPTIONS)


def int8(value_dim: int, other: bool) -> Built:
    """The same with scores in 8 bits."""
    given = hopper.constants(128, value_dim, masked=other, ordered=other, int8=True)
    blocks = {**tiles_of(64), "k_desc": tile_block(128)}
    types = {"q": "i8", "k_desc": "i8"}
    return build(hopper._attend, given, blocks, hopper.OPTIONS, types)


def judge(head_dim: int, bound: bool, certified: bool, other: bool) -> Built:
    """The kernel as ``hopper_judge.judge`` launches it."""
    given = hopper_judge.constants(
        head_dim,
        ragged=other,
        masked=other,
        same_length=True,
        ordered=other,
        exact=other,
        rule="share",
        certify="mean" if certified else "none",
        bound=bound,
    )
    return build(
        hopper_judge._judge,
        given,
        {"k_desc": tile_block(head_dim)},
        hopper_judge.OPTIONS,
    )


def plan(head_dim: int, key_tiles: int, other: bool) -> Built:
    """The kernel as ``hopper_plan.plan`` launches it."""
    given = hopper_plan.constants(
        head_dim, key_tiles, keep_energy=other, ordered=other, exact=other
    )
    width = 2 * c.padded_dim(head_dim)
    blocks = {"stats_desc": hopper_plan.step_block(width)}
    return build(hopper_plan._plan, given, blocks, hopper_plan.options(key_tiles))


def tiles_of(width: int) -> dict[str, list[int]]:
    """Blocks of k and v: so many channels of a tile."""
    return {"k_desc": tile_block(width), "v_desc": tile_block(width)}


def build(
    kernel: Any,
    given: dict[str, Any],
    blocks: dict[str, list[int]],
    options: dict[str, Any],
    types: dict[str, str] | None = None,
) -> Built:
    """A kernel for contiguous rows; of each descriptor the block it copies."""
    pointers = {**POINTERS, **(types or {})}
    given = {**given, "q_d": 1, "mask_l": 1}
    signature, constants, attributes = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in given:
            signature[name] = "constexpr"
            constants[at,] = given[name]
        elif name.endswith("_desc"):
            block, type_ = blocks[name], pointers.get(name, "bf16")
            layout = block_layout(block, 8 if type_ == "i8" else 16)
            signature[name] = f"tensordesc<{type_}{block},{layout!r}>"
        elif name in pointers:
            signature[name] = f"*{pointers[name]}"
        else:
            signature[name] = "fp32" if name in ("scale", "even") else "i32"
        if name in ALIGNED and name not in given:
            attributes[at,] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def machine_code(kernel: Built) -> list[str]:
    """Instructions, one a line."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(.*?);", text, re.MULTILINE)


def _waits_beside_product(code: list[str]) -> list[int]:
    """Where scores are awaited while the product before runs on."""
    return [
        at
        for at, line in enumerate(code)
        if "WARPGROUP.DEPBAR.LE gsb0, 0x" in line and "0x0" not in line
    ]


def beside_products(code: list[str]) -> list[int]:
    """Exponentials between the wait for the scores and the wait for the product that runs on."""
    found = []
    for at in _waits_beside_product(code):
        rest = code[at + 1 :]
        until = next(i for i, other in enumerate(rest) if "WARPGROUP.DEPBAR" in other)
        found.append(sum("MUFU.EX2" in other for other in rest[:until]))
    return found


def in_steps(code: list[str], *operations: str) -> int:
    """How many of these operations stand in the loops over steps."""
    loops = []
    for end, line in enumerate(code):
        branch = re.search(r"BRA 0x([0-9a-f]+)", line)
        if branch and (begin := int(branch[1], 16) // INSTRUCTION_BYTES) < end:
            loops.append(range(begin, end))
    # The shortest loop around each wait that lets a product run on.
    steps = [min((s for s in loops if at in s), key=len) for at in _waits_beside_product(code)]
    return sum(name in code[at] for step in steps for at in step for name in operations)


def main() -> None:
    name, *given = sys.argv[1:]
    make = {"attend": attend, "int8": int8, "judge": judge, "plan": plan}[name]
    kernel = make(*map(ast.literal_eval, given))
    code = machine_code(kernel)
    print(
        json.dumps(
            {
                "shared": kernel.metadata.shared,
                "products": sum("GMMA.64x" in line for line in code),
                "copies": sum("UTMALDG" in line for line in code),
                "spills": sum("STL" in line for line in code),
                "spills_in_steps": in_steps(code, "STL", "LDL"),
                "beside": beside_products(code),
                "waits": sum("WARPGROUP.DEPBAR" in line for line in code),
            }
        )
    )


if __name__ == "__main__":
    main()

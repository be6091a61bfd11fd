"""Step 4 of the planned filter on Hopper: what ``attend`` does, one level lower, in Gluon.

A program is three groups of warps that run on their own, as in FlashAttention-3 (arXiv 2407.08608):
one warp brings listed tiles of k and v into shared memory, and two groups of 4 warps take half of
the query tile each. A group computes the scores of one step while the weights of the step before
meet their values, so that the tensor cores work while exponentials are taken. A step is two listed
tiles: products of 128 keys use the tensor cores better than those of 64.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from cef_compile.kernels import config as c
from cef_compile.kernels.gluon_parts import GROUPS, PAIR, describe, line, tile_block, width
from cef_compile.kernels.hopper_consumer import consume
from cef_compile.kernels.hopper_producer import produce

_STAGES: Final = 3
"""Steps of k and v that shared memory holds: with head_dim 128 no more fit."""
_INT8_STAGES: Final = 4
"""The same where keys have 8 bits."""
OPTIONS: Final = {"num_warps": 4, "maxnreg": 168}
"""Warps of a group that computes, and registers of a thread when the program starts: three times 4
warps share 65,536."""
_CONSUMER_REGISTERS: Final = 240
"""Of a thread that computes, once the copying warp has given up its own."""
_PRODUCER_REGISTERS: Final = 24


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    order: Tensor,
    queue: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    tokens: Tensor | None = None,
    int8: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each query tile over the key tiles of its list.

    Args:
        q: ``[B, H, q_len, D]``, any strides; k ``[B, Hk, kv_len, D]``, v ``[B, Hk, kv_len, Dv]``,
            strides that TMA takes; bf16 or fp16; ``D`` and ``Dv`` multiples of 8 up to 128.
            With ``int8`` q and k are int8, and ``D`` is 128.
        index, count, order, queue: of :class:`~cef_compile.kernels.schedule.Lists`.
        scale: factor of the scores.
        key_mask: bool ``[B or 1, kv_len]``, any strides.
        tokens: int32 ``[length]``, a token order: as for the Triton kernel.
        int8: ``row_scale``, ``row_shift`` and ``key_scale`` of q and k in 8 bits, all contiguous:
            see :class:`~cef_compile.kernels.eight_bits.EightBits`.

    Returns:
        out ``[B, H, q_len, Dv]`` in (B, q_len, H, Dv) memory order, and lse float32
        ``[B, H, q_len]`` of the listed tiles.
    """
    batch, heads, q_len, head_dim = q.shape
    _, key_heads, kv_len, value_dim = v.shape
    positions = q_len if tokens is None else len(tokens)
    n_m, n_n = c.tiles(positions, c.BLOCK_M), c.tiles(kv_len, c.BLOCK_N)
    out = v.new_empty(batch, q_len, heads, value_dim).transpose(1, 2)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    total = batch * heads * n_m
    _attend[(min(total, _multiprocessors(q.device)),)](
        q,
        describe(k, tile_block(line(k))),
        describe(v, tile_block(line(v))),
        q if key_mask is None else key_mask,
        index if tokens is None else tokens,
        index,
        count,
        order,
        queue,
        out,
        lse,
        q_len,
        positions,
        kv_len,
        n_m,
        n_n,
        heads,
        heads // key_heads,
        total,
        scale,
        *q.stride(),
        *out.stride()[:3],
        *c.mask_strides(key_mask),
        *(int8 or (None, None, None)),
        **constants(
            head_dim,
            value_dim,
            masked=key_mask is not None,
            ordered=tokens is not None,
            int8=int8 is not None,
        ),
        **OPTIONS,
    )
    return out, lse


def constants(
    head_dim: int, value_dim: int, *, masked: bool, ordered: bool, int8: bool = False
) -> dict[str, object]:
    """What the kernel is compiled for."""
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_M": c.BLOCK_M,
        "BLOCK_N": c.BLOCK_N,
        "STAGES": _INT8_STAGES if int8 else _STAGES,
        "HAS_MASK": masked,
        "ORDERED": ordered,
        "INT8": int8,
        "CONSUMER_REGISTERS": _CONSUMER_REGISTERS,
        "PRODUCER_REGISTERS": _PRODUCER_REGISTERS,
    }


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@gluon.jit(
    do_not_specialize=[
        "q_len",
        "positions",
        "kv_len",
        "n_m",
        "n_n",
        "heads",
        "heads_per_key_head",
        "total_tiles",
    ]
)
def _attend(
    q, k_desc, v_desc, key_mask, tokens, index, count, order, queue, out, lse,
    q_len, positions, kv_len, n_m, n_n, heads, heads_per_key_head, total_tiles, scale,
    q_b, q_h, q_l, q_d, out_b, out_h, out_l, mask_b, mask_l, row_scale, row_shift, key_scale,
    HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, HAS_MASK: gl.constexpr, ORDERED: gl.constexpr, INT8: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program per multiprocessor: memory and barriers, then three groups of warps."""
    dtype: gl.constexpr = v_desc.dtype
    k_type: gl.constexpr = k_desc.dtype
    KEYS: gl.constexpr = PAIR * BLOCK_N
    K_WIDTH: gl.constexpr = width(HEAD_DIM)
    V_WIDTH: gl.constexpr = width(VALUE_DIM)
    BITS: gl.constexpr = k_type.primitive_bitwidth
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    k_layout: gl.constexpr = gl.NVMMASharedLayout(128, BITS, 2)
    one: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    rows = gl.allocate_shared_memory(
        dtype, [GROUPS, BLOCK_M // GROUPS, max(K_WIDTH, V_WIDTH)], layout
    )
    q_rows = rows
    if INT8:
        q_rows = rows._reinterpret(k_type, [2 * GROUPS, BLOCK_M // GROUPS, K_WIDTH], k_layout)
    k_steps = gl.allocate_shared_memory(k_type, [STAGES, KEYS, K_WIDTH], k_layout)
    v_steps = gl.allocate_shared_memory(dtype, [STAGES, KEYS, V_WIDTH], layout)
    # The same memory as TMA fills it: for each row of 128 bytes one tile of keys after the other.
    K_CHANNELS: gl.constexpr = k_desc.block_type.shape[3]
    V_CHANNELS: gl.constexpr = v_desc.block_type.shape[3]
    K_COPIES: gl.constexpr = STAGES * PAIR * K_WIDTH // K_CHANNELS
    V_COPIES: gl.constexpr = STAGES * PAIR * V_WIDTH // V_CHANNELS
    k_tiles = k_steps._reinterpret(k_type, [K_COPIES, 1, 1, BLOCK_N, K_CHANNELS], k_desc.layout)
    v_tiles = v_steps._reinterpret(dtype, [V_COPIES, 1, 1, BLOCK_N, V_CHANNELS], v_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=GROUPS)
        mbarrier.init(v_empty.index(stage), count=GROUPS)
    slots = gl.allocate_shared_memory(gl.int32, [1], one)
    slot_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    slot_empty = gl.allocate_shared_memory(gl.int64, [1], bar)
    mbarrier.init(slot_full, count=1)
    mbarrier.init(slot_empty, count=GROUPS)
    blanked = gl.allocate_shared_memory(gl.int64, [1], bar)
    mbarrier.init(blanked, count=GROUPS)
    fence_async_shared()

    bars = (k_full, k_empty, v_full, v_empty, slot_full, slot_empty, blanked)
    lists = (index, count, order)
    sizes = (n_m, n_n, heads, heads_per_key_head, total_tiles, q_len, positions, kv_len)
    mask = (key_mask, mask_b, mask_l)
    query = (q, q_b, q_h, q_l, q_d)
    eight = (row_scale, row_shift, key_scale) if INT8 else ()
    output = (out, out_b, out_h, out_l)
    gl.warp_specialize(
        [
            (consume, (
                q_rows, rows, k_steps, v_steps, bars, lists, sizes, slots, mask, tokens,
                query, eight, output, lse, scale,
                0, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, STAGES, HAS_MASK, ORDERED, INT8,
            )),
            (consume, (
                q_rows, rows, k_steps, v_steps, bars, lists, sizes, slots, mask, tokens,
                query, eight, output, lse, scale,
                1, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, STAGES, HAS_MASK, ORDERED, INT8,
            )),
            (produce, (
                k_desc, v_desc, k_tiles, v_tiles, bars, lists, sizes, queue, slots,
                K_WIDTH, V_WIDTH, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip

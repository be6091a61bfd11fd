"""The warp that brings listed tiles into shared memory, for the attention over lists on Hopper."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from cef_compile.kernels.gluon_parts import PAIR, SWIZZLE, place


@gluon.jit
def _copy(
    desc, batch, key_head, keys, tiles, stage, full, empty, free,
    WIDTH: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Two tiles of k or v into the memory of a step, once that is free."""
    CHANNELS: gl.constexpr = desc.block_type.shape[3]
    PARTS: gl.constexpr = WIDTH // CHANNELS
    mbarrier.wait(empty.index(stage), free)
    mbarrier.expect(full.index(stage), PAIR * BLOCK_N * PARTS * 2 * SWIZZLE)
    for part in gl.static_range(PARTS):
        for i in gl.static_range(PAIR):
            tma.async_copy_global_to_shared(
                desc,
                [batch, key_head, keys[i], part * CHANNELS],
                full.index(stage),
                tiles.index((stage * PARTS + part) * PAIR + i),
            )


@gluon.jit
def produce(
    k_desc, v_desc, k_tiles, v_tiles, bars, lists, sizes, queue, slots,
    K_WIDTH: gl.constexpr, V_WIDTH: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: takes query tiles from the queue and copies their listed tiles of k and v."""
    k_full, k_empty, v_full, v_empty, slot_full, slot_empty, _blanked = bars
    index, count, order = lists
    n_m, n_n, heads, heads_per_key_head, total_tiles, _q_len, _positions, _kv_len = sizes
    one_layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    step = 0
    turn = 0
    slot = gl.program_id(0)
    while slot < total_tiles:
        _tile, batch, head, row = place(slot, order, n_m, heads)
        key_head = head // heads_per_key_head
        listed = gl.load(count + row)
        here = index + row * n_n
        last = gl.maximum(listed - 1, 0)
        # The numbers of the next tiles are read one step ahead. Where a list has an odd length its
        # last tile comes twice, and the second is masked.
        one = gl.load(here).to(gl.int32)
        two = gl.load(here + gl.minimum(1, last)).to(gl.int32)
        for first in range(0, listed, PAIR):
            keys = (one * BLOCK_N, two * BLOCK_N)
            one = gl.load(here + gl.minimum(first + 2, last)).to(gl.int32)
            two = gl.load(here + gl.minimum(first + 3, last)).to(gl.int32)
            stage = step % STAGES
            free = (step // STAGES) & 1 ^ 1
            _copy(
                k_desc, batch, key_head, keys, k_tiles, stage, k_full, k_empty, free,
                K_WIDTH, BLOCK_N,
            )  # fmt: skip
            _copy(
                v_desc, batch, key_head, keys, v_tiles, stage, v_full, v_empty, free,
                V_WIDTH, BLOCK_N,
            )  # fmt: skip
            step += 1
        slot = gl.num_programs(0) + gl.atomic_add(queue, 1, sem="relaxed")
        mbarrier.wait(slot_empty, (turn & 1) ^ 1)
        slots.store(gl.full([1], 0, gl.int32, one_layout) + slot)
        mbarrier.arrive(slot_full, count=1)
        turn += 1

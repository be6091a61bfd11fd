"""Step 4 of the planned filter by FlashAttention-4, where that is installed and asked for."""

from __future__ import annotations

import torch
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from flash_attn.cute.interface import _flash_attn_fwd
from torch import Tensor

from cef_compile.kernels import config as c


def attend(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each query tile over the key tiles of its list.

    Args:
        q: ``[B, H, q_len, D]``; k, v ``[B, Hk, kv_len, D]``; bf16 or fp16. Where their strides are
            not to FlashAttention-4's liking, it copies them.
        index, count: of :class:`~cef_compile.kernels.schedule.Lists`. A tile that reaches beyond
            kv_len is the last of its list, where FlashAttention-4 looks for hidden keys.
        scale: factor of the scores.

    Returns:
        out ``[B, H, q_len, D]`` in (B, q_len, H, D) memory order, and lse float32 ``[B, H, q_len]``
        of the listed tiles.
    """
    listed = count[0]
    nothing = torch.zeros_like(listed)
    lists = BlockSparseTensorsTorch(
        mask_block_cnt=nothing,
        mask_block_idx=nothing[..., None],
        full_block_cnt=listed,
        full_block_idx=index.int(),
        block_size=(c.BLOCK_M, c.BLOCK_N),
    )
    out, lse = _flash_attn_fwd(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        softmax_scale=scale,
        tile_mn=(c.BLOCK_M, c.BLOCK_N),
        block_sparse_tensors=lists,
        return_lse=True,
    )[:2]
    return out.transpose(1, 2), lse

"""The two filters in plain PyTorch: the oracle of every kernel and the CPU path of the op.

Source: arXiv 2606.16317 (cumulative-energy filtering) for the online filter; the planned filter,
the certificates and the audit are this project's own. Work is proportional to the density, and no
tensor of size q_len x kv_len is made. float64 inputs are computed in float64, all others in
float32.

Shapes: ``q [B, H, q_len, D]``, ``k [B, Hk, kv_len, D]``, ``v [B, Hk, kv_len, Dv]`` with ``H`` a
multiple of ``Hk`` (grouped queries); ``key_mask`` bool ``[B, kv_len]``, true where a key takes
part; ``Tm`` query tiles of :data:`~cef_compile.kernels.config.BLOCK_M` rows, ``Tn`` key tiles of
:data:`~cef_compile.kernels.config.BLOCK_N` keys; any strides. With a
token order (:class:`~cef_compile.kernels.order.Layout`) tiles, and what is counted in them, are
those of the order; rows are not.
"""

from cef_compile.kernels.reference.audit import (
    Audited,
    audit,
    exact_attention,
    exact_lse,
    tile_energies,
)
from cef_compile.kernels.reference.common import Result, new_output, work_dtype
from cef_compile.kernels.reference.eight_bits import EightBits, attend_eight_bits, eight_bits
from cef_compile.kernels.reference.online import first_tile, online
from cef_compile.kernels.reference.places import Places
from cef_compile.kernels.reference.planned import (
    Centroids,
    Plan,
    attend,
    centroids,
    choose,
    plan,
    planned,
)

__all__ = [
    "Audited",
    "Centroids",
    "EightBits",
    "Places",
    "Plan",
    "Result",
    "attend",
    "attend_eight_bits",
    "audit",
    "centroids",
    "choose",
    "eight_bits",
    "exact_attention",
    "exact_lse",
    "first_tile",
    "new_output",
    "online",
    "plan",
    "planned",
    "tile_energies",
    "work_dtype",
]

"""An attention node as a policy sees it, and the reasons for which one stays dense."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

import torch

Kind = Literal["self", "cross", "joint"]
MaskKind = Literal["none", "key_padding", "bool", "float"]

GridSource = Literal["", "graph", "call", "given"]
"""Where a grid of tokens was found: in the graph, in the arguments of the call that was running
when the graph was compiled, or given by the user."""

SHORT_CONTEXT = 1024
"""A cross attention to fewer keys than this is taken for one to text: the text encoders of today's
models give 77 to 512 tokens, and 16 tiles leave nothing worth dropping."""


class Reason(str, Enum):
    """Why a node is dense; the value is what reports print."""

    POLICY = "the policy says dense"
    CROSS_ATTENTION = "cross attention to a short context"
    SHORT_KV_LEN = "kv_len is below the break-even"
    GRADIENT = "a gradient is needed"
    DROPOUT = "dropout is on"
    CAUSAL = "the attention is causal"
    MASK = "the mask is not one of key padding"
    DTYPE = "the dtype is not supported"
    HEAD_DIM = "the head_dim is not supported"
    LAYOUT = "the inputs are not 4-D (batch, heads, length, head_dim)"
    HEADS = "query heads are not a multiple of key heads"
    DEVICE = "the device is not supported"
    SCALE = "the scale is not a positive number known when compiling"
    SHARED_GRAPH = "layers that share this compiled graph use another filter"
    NESTED_GRAPH = "the node is inside a higher-order operator"
    FIXED = "the node was compiled dense"
    UNKNOWN_FORM = "the attention is written in a form that is not recognised"
    INTERMEDIATES = "scores or weights of the attention are used elsewhere"
    PARTIAL = "it is a part of an attention whose parts are merged later"
    SUBCLASS = "the inputs are tensors of another class"
    PACKED = "several sequences may be packed into one"
    MULTI_HEAD = "the attention is inside multi_head_attention_forward"
    FLEX = "the attention is a flex_attention"

    def __str__(self) -> str:
        return self.value

    @property
    def remedy(self) -> str:
        """What a user can do about it; one sentence."""
        return _REMEDIES.get(self, "Give this node a recall of None.")


_REMEDIES = {
    Reason.GRADIENT: "Run the model under torch.no_grad() or torch.inference_mode().",
    Reason.DROPOUT: "Call model.eval() or set dropout_p to 0.",
    Reason.CAUSAL: "Give this node a recall of None: causal attention is not filtered.",
    Reason.MASK: "Pass a boolean mask of shape (B, 1, 1, kv_len) or (1, 1, 1, kv_len), or none.",
    Reason.DTYPE: "Run the model in bfloat16 or float16.",
    Reason.HEADS: "Pass enable_gqa=True with query heads a multiple of key heads.",
    Reason.LAYOUT: "Reshape q, k and v to (batch, heads, length, head_dim).",
    Reason.SCALE: "Pass scale as a positive Python float.",
    Reason.SHARED_GRAPH: "Use one filter, rule and certificate for all layers of a class.",
    Reason.UNKNOWN_FORM: "Call scaled_dot_product_attention in its place.",
    Reason.INTERMEDIATES: "Call scaled_dot_product_attention, and compute the weights apart.",
    Reason.PARTIAL: "Use Ulysses in place of ring attention.",
    Reason.SUBCLASS: "Let q, k and v be plain tensors, of a DTensor its to_local().",
    Reason.PACKED: "Call scaled_dot_product_attention, or flash_attn_func, for each sequence.",
    Reason.MULTI_HEAD: "Project q, k and v and call scaled_dot_product_attention.",
    Reason.FLEX: "Call scaled_dot_product_attention in its place.",
    Reason.FIXED: "Call torch.compile again with the new policy.",
}


@dataclass(frozen=True)
class AttentionNode:
    """One scaled-dot-product attention call of a model.

    Attributes:
        path: dotted path of the module that makes the call, as of ``model.named_modules()``; empty
            where it is not known (after a graph break inside a block).
        ordinal: 0 for the first call under this path in its graph, 1 for the second, and so on.
        q_shape, k_shape, v_shape: (batch, heads, length, head_dim); symbolic where dynamic,
            -1 where it depends on data.
        q_stride, k_stride, v_stride: in elements.
        dtype: of the output, which under autocast may differ from that of the inputs.
        device: of the inputs.
        scale: factor of the scores; None means ``head_dim ** -0.5``, NaN that it is computed in the
            graph from more than sizes.
        is_causal, dropout_p, enable_gqa: as passed to SDPA; dropout_p NaN if computed in the graph.
        mask: "none", "key_padding" (bool, the same for every query and head), "bool" or "float".
        kind: "self", "cross", or "joint" (several token sequences concatenated).
        requires_grad: whether the output would need a gradient.
        form: how the model writes it: "sdpa", "softmax(matmul)" and its like for attention that is
            spelled out, the name of another op.
        grid: (frames, height, width) of the tokens that are not text; None where it is not known,
            and tiles are cut as the tokens come.
        segments: number of tokens of each of the sequences that were joined; empty where it is one.
        grid_source: where the grid was found.
    """

    path: str
    ordinal: int
    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    v_shape: tuple[int, ...]
    q_stride: tuple[int, ...]
    k_stride: tuple[int, ...]
    v_stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    scale: float | None
    is_causal: bool
    dropout_p: float
    enable_gqa: bool
    mask: MaskKind
    kind: Kind
    requires_grad: bool
    form: str = "sdpa"
    grid: tuple[int, int, int] | None = None
    segments: tuple[int, ...] = ()
    grid_source: GridSource = ""

    @property
    def q_len(self) -> int:
        """Number of queries."""
        return self.q_shape[-2]

    @property
    def kv_len(self) -> int:
        """Number of keys."""
        return self.k_shape[-2]

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.q_shape[-1]

    @property
    def rows(self) -> int:
        """Number of query rows, over all batches and heads."""
        return math.prod(self.q_shape[:-1])

    @property
    def key(self) -> tuple[str, int]:
        """What identifies the node in its model: (path, ordinal)."""
        return (self.path, self.ordinal)

    def at(self, path: str) -> AttentionNode:
        """The same call of another layer."""
        return replace(self, path=path)

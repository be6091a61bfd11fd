"""Masks: key padding in every form, padding of queries too, and others described."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_cases import LENGTH, assert_refused, assert_taken, compile_at_recall_1, qkv
from torch import Tensor

import cef_compile
from cef_compile import Reason

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def repeated(keys: Tensor, rows: Tensor) -> Tensor:
    """As HunyuanVideo 1.5 writes it."""
    batch, length = keys.shape
    first = keys.view(batch, 1, 1, length).repeat(1, 1, length, 1)
    return (first & first.transpose(2, 3)).bool()


OUTER = {
    "repeated": repeated,
    "expanded": lambda keys, rows: (
        keys[:, None, None].expand(-1, 1, LENGTH, -1) & keys[:, None, None].mT
    ),
    "broadcast": lambda keys, rows: keys[:, None, None, :] & rows[:, None, :, None],
    "rows first": lambda keys, rows: torch.logical_and(rows[:, None, :, None], keys[:, None, None]),
    "method": lambda keys, rows: keys[:, None, None].bitwise_and(rows[:, None, :, None]),
    "copied": lambda keys, rows: (
        keys[:, None, None].repeat(1, 1, LENGTH, 1).contiguous() & rows[:, None, :, None]
    ),
    "permuted": lambda keys, rows: (
        keys[:, None, None] & rows[:, None, None].repeat(1, 1, LENGTH, 1).permute(0, 1, 3, 2)
    ),
}


def masked(make):
    def function(q, k, v, keys, rows):
        return F.scaled_dot_product_attention(q, k, v, make(keys, rows))

    return function


@pytest.mark.parametrize("form", OUTER)
@settings(max_examples=6)  # each is compiled
@given(data=st.data())
def test_padding_of_keys_and_queries(form: str, data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 2))
    lengths = st.lists(st.integers(0, LENGTH), min_size=batch, max_size=batch)
    keys, rows = (
        torch.arange(LENGTH) < torch.tensor(data.draw(lengths))[:, None] for _ in range(2)
    )
    compiled = assert_taken(masked(OUTER[form]), *qkv(batch=batch), keys, rows)
    assert compiled.node.mask == "key_padding"


def test_hidden_queries_are_zero_whatever_is_filtered() -> None:
    q, k, v = qkv(batch=1)
    keys, rows = ((torch.arange(LENGTH) < n)[None] for n in (120, 70))
    backend = cef_compile.backend(policy=lambda node: 0.5, inner="eager", min_kv_len=0)
    with torch.no_grad():
        out = torch.compile(masked(OUTER["broadcast"]), backend=backend)(q, k, v, keys, rows)
    assert backend.report.filtered[0].density < 1
    assert not out[:, :, 70:].any()
    assert out[:, :, :70].abs().min() > 0


def test_padding_of_both_with_two_lengths() -> None:
    assert_taken(
        masked(OUTER["broadcast"]), *qkv(batch=1), *torch.ones(2, 1, LENGTH).bool(), dynamic=True
    )


POSITIONS = torch.arange(LENGTH)
SEGMENTS = (POSITIONS // 50)[None]
OTHERS = {
    "segments": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, (SEGMENTS[:, :, None] == SEGMENTS[:, None, :])[:, None]
        ),
        "bool mask, block-diagonal: by segment",
    ),
    "window": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, (POSITIONS[:, None] - POSITIONS).abs() <= 20
        ),
        "bool mask, by position, as of windows",
    ),
    "window as numbers": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, torch.where((POSITIONS[:, None] - POSITIONS).abs() <= 20, 0.0, -torch.inf)
        ),
        "float mask, by position, as of windows",
    ),
    "window as numbers, in place": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, window()),
        "float mask, by position, as of windows",
    ),
    "changed in place": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, changed(POSITIONS < 70)),
        "bool mask, ",
    ),
    "keys changed in place": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, changed_keys(POSITIONS < 70) & (POSITIONS < 90)[None, None, :, None]
        ),
        "bool mask, ",
    ),
    "or": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, (POSITIONS < 70)[None, None, None] | (POSITIONS < 90)[None, None, :, None]
        ),
        "bool mask, ",
    ),
    "rows and a window": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, (POSITIONS[:, None] <= POSITIONS)[None, None] & (POSITIONS < 70)[:, None]
        ),
        "bool mask, by position, as of windows",
    ),
}


def changed(visible: Tensor) -> Tensor:
    """As the token refiner of HunyuanVideo writes it."""
    rows = visible.view(1, 1, 1, LENGTH).repeat(1, 1, LENGTH, 1)
    mask = (rows & rows.transpose(2, 3)).bool()
    mask[:, :, :, 0] = True
    return mask


def window() -> Tensor:
    """As ACE-Step writes it."""
    near = (POSITIONS[:, None] - POSITIONS).abs() <= 20
    mask = torch.full(near.shape, -torch.inf)
    mask.masked_fill_(near, 0.0)
    return mask


def changed_keys(visible: Tensor) -> Tensor:
    keys = visible.view(1, 1, 1, LENGTH).repeat(1, 1, LENGTH, 1)
    keys[:, :, 3] = True
    return keys


@pytest.mark.parametrize("form", OTHERS)
def test_other_masks_are_described_and_left_alone(form: str) -> None:
    function, detail = OTHERS[form]
    assert_refused(function, *qkv(), reason=Reason.MASK, detail=detail)


def test_a_mask_from_outside_is_described_as_such() -> None:
    mask = torch.rand(LENGTH, LENGTH) < 0.9
    compiled = compile_at_recall_1(F.scaled_dot_product_attention, *qkv(), mask)
    assert compiled.node.reason == str(Reason.MASK)
    assert compiled.node.detail == "bool mask, not the same for every query"

"""Graphs from torch.export: the same forms in aten's spelling, and exporting filtered attention."""

from __future__ import annotations

import io

import models
import pytest
import torch
import torch.nn.functional as F
from pattern_cases import LENGTH, qkv
from torch import nn

import cef_compile
from cef_compile.decide import Decider
from cef_compile.graph import find_sites, rewrite
from cef_compile.ops import Phase, new_control
from cef_compile.policy import Decision

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

VISIBLE = torch.arange(LENGTH) < 100
FORMS = {
    "sdpa": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m[None, None, None]),
    "scaled and filled": lambda q, k, v, m: (
        (q @ k.transpose(-2, -1) * 0.3).masked_fill(~m, -torch.inf).softmax(-1) @ v
    ),
    "scaled on q, divided": lambda q, k, v, m: (((q * 0.3) @ k.mT) / 3).softmax(-1) @ v,
    "added": lambda q, k, v, m: (q @ k.mT + torch.where(m, 0.0, -torch.inf)).softmax(-1) @ v,
    "permuted": lambda q, k, v, m: (q @ k.permute(0, 1, 3, 2)).softmax(-1).contiguous() @ v,
    "dropout": lambda q, k, v, m: F.dropout((q @ k.mT).softmax(-1), 0.2, training=False) @ v,
    "bmm": lambda q, k, v, m: torch.bmm(
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1)
    ),
    "einsum": lambda q, k, v, m: torch.einsum(
        "bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v
    ),
}


class Call(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_found_in_an_exported_graph(form: str) -> None:
    exported = torch.export.export(Call(FORMS[form]), (*qkv(), VISIBLE))
    (site,) = find_sites(exported.graph_module)
    assert site.problem is None
    products = form if form in ("bmm", "einsum") else "matmul"
    assert site.node.form == ("sdpa" if form == "sdpa" else f"softmax({products})")
    assert site.node.mask == (
        "key_padding" if form in ("sdpa", "scaled and filled", "added") else "none"
    )


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_an_exported_program_can_be_compiled(form: str) -> None:
    arguments = (*qkv(), VISIBLE)
    program = torch.export.export(Call(FORMS[form]), arguments).module()
    backend = cef_compile.backend(policy=lambda node: 1.0, inner="eager", min_kv_len=0)
    got = torch.compile(program, backend=backend)(*arguments)
    torch.testing.assert_close(got, FORMS[form](*arguments), rtol=1e-5, atol=1e-5)
    assert len(backend.report.filtered) == 1


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_an_exported_graph_can_be_rewritten(form: str) -> None:
    arguments = (*qkv(), VISIBLE)
    exported = torch.export.export(Call(FORMS[form]), arguments)
    decision = Decision(1.0)
    control = new_control(decision, torch.device("cpu"))
    sites = find_sites(exported.graph_module)
    program = rewrite(
        exported.graph_module,
        arguments,
        [(site, decision) for site in sites],
        [control],
        Phase.FILTERED,
    )
    got, histogram, measures = program.module(*arguments, control, int(Phase.FILTERED))
    torch.testing.assert_close(got, FORMS[form](*arguments), rtol=1e-5, atol=1e-5)
    assert histogram[0].sum() == pytest.approx(1, abs=1e-3)
    assert measures.isfinite().any()


@torch.no_grad()
def test_filtered_attention_can_be_exported_and_saved() -> None:
    class Filtered(models.Attention):
        def forward(self, x):
            q, k, v = (
                part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
            )
            return cef_compile.attention(q, k, v, recall=0.8).transpose(1, 2).flatten(2)

    model, x = Filtered(), models.tokens()
    exported = torch.export.export(model, (x,))
    assert torch.ops.cef.attention.default in [n.target for n in exported.graph.nodes]
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


# --- lengths that depend on data -----------------------------------------------------------------


def joint_with_kept_text(x, text, keep):
    """Mochi's attention: a video's tokens and those of a text that are not padding."""
    both = torch.cat((x, text[:, :, keep.nonzero().flatten()]), 2)
    return F.scaled_dot_product_attention(both, both, both)


def video_and_text(kept: int = 30) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(1, 2, 200, 8), torch.randn(1, 2, 40, 8), torch.arange(40) < kept


@torch.no_grad()
def test_a_length_that_depends_on_data_is_a_number_to_a_policy_and_not_a_short_one() -> None:
    exported = torch.export.export(Call(joint_with_kept_text), video_and_text())
    (site,) = find_sites(exported.graph_module)
    assert (site.node.q_len, site.node.kv_len) == (-1, -1)
    assert site.node.v_shape == (1, 2, -1, 8)
    # The length is from 200 to 240: whether it is below these cannot be known, and above is enough.
    for least in (220, 65):
        decider = Decider(lambda node: 0.5 if node.kv_len < 230 else None, False, least)
        assert decider.decide(site, "") == Decision(0.5)


@torch.no_grad()
def test_attention_over_a_length_that_depends_on_data_is_filtered() -> None:
    backend = cef_compile.backend(recall=1.0, inner="aot_eager", strict=True, min_kv_len=220)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(joint_with_kept_text, backend=backend, fullgraph=True)
        for kept in (30, 7, 0):
            arguments = video_and_text(kept)
            expected = joint_with_kept_text(*arguments)
            torch.testing.assert_close(compiled(*arguments), expected, rtol=1e-5, atol=1e-5)
    (node,) = backend.report.nodes
    assert (node.decision, node.calls) == ("filtered", 3)
    assert (node.q_shape, node.kv_shape) == ((1, 2, -1, 8), (1, 2, -1, 8))

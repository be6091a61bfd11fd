"""Module paths: the same whichever way Dynamo spells them."""

from __future__ import annotations

import pytest

from cef_compile.graph.find import source_path

HOOKED = "L['function_reference'].forward.__self__"


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self'].blocks.0.attn1", "blocks.0.attn1"),
        ("L['self'].__dict__['_modules']['blocks'].0.attn1", "blocks.0.attn1"),
        ("L['self']._modules['blocks']._modules['0']._modules['attn1']", "blocks.0.attn1"),
        ('L["self"].attn', "attn"),
        ("G['model'].blocks.3", "blocks.3"),
        ("L['self']", ""),
        # Hooks: on the model, on a block in it, and a hook's own frame.
        (f"{HOOKED}.__dict__['_modules']['blocks'].1.attn1", "blocks.1.attn1"),
        (
            f"{HOOKED}.__dict__['_modules']['blocks'].0.forward.func.__closure__[0]"
            ".cell_contents.forward.__self__.attn1",
            "blocks.0.attn1",
        ),
        ("L['self'].fn_ref.original_forward.__self__.attn1", "attn1"),
        ("L['self'].fn_ref.original_forward.__self__._modules['attn1']", "attn1"),
    ],
)
def test_dynamo_sources_become_module_paths(source: str, path: str) -> None:
    assert source_path(source) == path

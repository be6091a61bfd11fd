"""Compile time: which attention nodes a graph holds, whose they are, and swapping in the op."""

from cef_compile.graph.anchor import Anchor, find_anchor
from cef_compile.graph.breaks import Break, find_break, find_split, worth_saying
from cef_compile.graph.find import Site, concrete, find_sites
from cef_compile.graph.grids import check_grid, with_grids
from cef_compile.graph.owner import NO_OWNER, Owner, compiled_module
from cef_compile.graph.rewrite import Rewritten, rewrite

__all__ = [
    "NO_OWNER",
    "Anchor",
    "Break",
    "Owner",
    "Rewritten",
    "Site",
    "check_grid",
    "compiled_module",
    "concrete",
    "find_anchor",
    "find_break",
    "find_sites",
    "find_split",
    "rewrite",
    "with_grids",
    "worth_saying",
]

"""Compile time: which attention nodes a graph holds, whose they are, and swapping in the op."""

from cef_compile.graph.find import Site, concrete, find_sites
from cef_compile.graph.owner import NO_OWNER, Owner, find_owner, parameter_name
from cef_compile.graph.rewrite import Rewritten, rewrite

__all__ = [
    "NO_OWNER",
    "Owner",
    "Rewritten",
    "Site",
    "concrete",
    "find_owner",
    "find_sites",
    "parameter_name",
    "rewrite",
]

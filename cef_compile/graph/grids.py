"""Grids for attentions whose graph shows none: given by the user, or told by the running call."""

from __future__ import annotations

from collections.abc import Sequence

from cef_compile.graph.call import Grid, running_grids
from cef_compile.graph.find import Site
from cef_compile.policy import GridSource


def with_grids(sites: Sequence[Site], given: Grid | None) -> list[Site]:
    """The sites with the grid that was given, or else one for each layout that has none.

    Args:
        sites: of one graph.
        given: (frames, height, width) in place of what was found; None for none.
    """
    if given is not None:
        return [_with_grid(site, given, "given") for site in sites]
    wanted = {site.layout.ungridded for site in sites if site.layout is not None} - {0}
    found = running_grids(wanted) if wanted else {}
    return [
        _with_grid(site, found[site.layout.ungridded], "call")
        if site.layout is not None and site.layout.ungridded in found
        else site
        for site in sites
    ]


def _with_grid(site: Site, grid: Grid, source: GridSource) -> Site:
    layout = None if site.layout is None else site.layout.with_grid(grid, source)
    return site if layout is None else site.laid_out(layout)


def check_grid(site: Site, given: Grid | None) -> None:
    """Check the grid that was given against a site that is to be filtered in its order.

    Raises:
        ValueError: no sequence of the attention has so many tokens.
    """
    if given is None or site.layout is None or site.node.grid_source == "given":
        return
    frames, height, width = given
    sizes = " + ".join(map(str, site.layout.sizes))
    raise ValueError(
        f"grid {given} has {frames * height * width} tokens, but attention node {site.place} has"
        f" {sizes}. Give the frames, height and width of its tokens after patching, or a decision"
        ' with order="raster" for a node with other tokens.'
    )

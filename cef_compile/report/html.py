"""The report as one page of HTML that needs nothing else: no network, no other file.

What is read first (the summary, the tables, the pictures) is plain HTML; heat maps, distributions
and tile maps are drawn by the page's own script from the data that is embedded as JSON.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from cef_compile.report.audit import Audit
from cef_compile.report.environment import environment as this_environment
from cef_compile.report.environment import rows as environment_rows
from cef_compile.report.record import CALL_FIELDS, MEANS, join
from cef_compile.report.summary import Report
from cef_compile.report.table import ERROR_DIGITS, number
from cef_compile.report.tiles import TileMap
from cef_compile.report.words import sentences, token_words

PICTURE_TYPES: Final = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"GIF8": "image/gif",
    b"\xff\xd8\xff": "image/jpeg",
    b"RIFF": "image/webp",
}
"""First bytes of the kinds of pictures that every browser shows."""
COLUMNS: Final = (
    ("node", "text", "module path and number of the call in it"),
    ("kind", "text", "self, cross or joint attention"),
    ("form", "text", "how the model writes the attention"),
    ("queries", "number", "query tokens"),
    ("keys", "number", "key tokens"),
    ("tokens", "text", "frames x height x width of their grid, where it is known, and text"),
    ("decision", "text", "filtered, or dense and why"),
    ("density", "number", "tiles computed / all tiles"),
    ("target", "number", "wanted recall; of a group its mean counts"),
    ("recall", "number", "achieved recall, from exact energies of a sample"),
    ("low", "number", "lower end of the 95 % interval of recall"),
    ("high", "number", "upper end of the 95 % interval of recall"),
    ("error", "number", "of the output: ||out - exact|| / ||exact|| over the same sample"),
    ("error low", "number", "lower end of the 95 % interval of error"),
    ("error high", "number", "upper end of the 95 % interval of error"),
    ("calls", "number", "audited calls"),
)
"""Name, type and explanation of the node table's columns."""


@dataclass(frozen=True)
class Table:
    """A table of the caller's own on the page, for instance of quality or times.

    Attributes:
        title: its heading.
        header: names of the columns.
        rows: text cells, as many in each row.
        note: a sentence below it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def write_html(
    path: str | Path,
    report: Report,
    audit: Audit | None = None,
    *,
    title: str = "Attention report",
    frames: Mapping[str, str | Path | bytes] | None = None,
    tables: Sequence[Table] = (),
    tile_maps: Sequence[TileMap] = (),
    environment: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``report.html``: what was decided and delivered, in one page.

    Args:
        path: file to write; its folder must exist.
        report: ``backend.report``.
        audit: of a whole generation. Without one the page has no achieved recall.
        title: heading of the page.
        frames: pictures to show side by side by caption, each PNG, GIF, JPEG or WebP, as a file
            or as its bytes.
        tables: tables of your own.
        tile_maps: from :func:`cef_compile.tile_maps.tile_maps`, for the nodes that you chose.
        environment: what ``cef-compile env --json`` printed where it ran; None for this machine.

    Returns:
        ``path``.

    Raises:
        ValueError: a picture is of another type, or a table's row has not as many cells as its
            header; nothing is written.
        OSError: a picture cannot be read or the page not be written.
    """
    record = join(report.to_dict(), None if audit is None else audit.to_dict())
    page = render(
        {**record, "environment": environment or this_environment()},
        title=title,
        frames=frames or {},
        tables=tables,
        tile_maps=[tile_map.to_dict() for tile_map in tile_maps],
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def render(
    record: Mapping[str, Any],
    *,
    title: str,
    frames: Mapping[str, str | Path | bytes],
    tables: Sequence[Table],
    tile_maps: Sequence[Mapping[str, Any]],
) -> str:
    """The page of a record, see :mod:`cef_compile.report.record`; the rest as :func:`write_html`.

    ``record["environment"]`` may be missing.
    """
    parts = {
        "title": html.escape(title),
        "style": _asset("page.css"),
        "summary": "\n".join(f"<p>{html.escape(text)}</p>" for text in sentences(record)),
        "tables": "\n".join(map(_table, tables)),
        "frames": _frames(frames),
        "nodes": _nodes(record),
        "environment": _environment(record.get("environment")),
        "data": _json(_data(record, tile_maps)),
        "script": _asset("page.js"),
    }
    page = _asset("page.html")
    # One pass, so that nothing that is put in is taken for a place to put something.
    first, *rest = page.split("{{")
    for piece in rest:
        name, _, text = piece.partition("}}")
        first += parts[name] + text
    return first


def _data(record: Mapping[str, Any], tile_maps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the script draws: the audited nodes, call by call."""
    several = len({node["model"] for node in record["nodes"]}) > 1
    names = {id(node): _name(node, several) for node in record["nodes"]}
    nodes = [
        {
            "model": node["model"],
            "name": names[id(node)],
            "path": node["path"],
            "ordinal": node["ordinal"],
            **{
                field: node["audit"][field]
                for field in ("target", *MEANS, "interval", "error_interval", *CALL_FIELDS)
            },
            "passes": node["audit"]["passes"],
        }
        for node in record["nodes"]
        if node["audit"]
    ]
    return {"passes": record["passes"], "nodes": nodes, "tileMaps": list(tile_maps)}


def _json(data: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _name(node: Mapping[str, Any], several: bool) -> str:
    path = f"{node['path'] or '(unnamed)'}#{node['ordinal']}"
    return f"{node['model']}: {path}" if several else path


def _nodes(record: Mapping[str, Any]) -> str:
    several = len({node["model"] for node in record["nodes"]}) > 1
    head = "".join(
        f'<th scope="col" data-type="{kind}" title="{html.escape(about)}">'
        f'<button type="button">{name}</button></th>'
        for name, kind, about in COLUMNS
    )
    body = "\n".join(_node_row(node, several) for node in record["nodes"])
    return f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"


def _node_row(node: Mapping[str, Any], several: bool) -> str:
    audit = node["audit"] or {}
    nothing = (None, None)
    error = (audit.get("error"), *audit.get("error_interval", nothing))
    why = f"{node['reason']} ({node['detail']})" if node["detail"] else node["reason"]
    filtered = node["decision"] == "filtered"
    bound = "bound" if node.get("bound") else ""
    how = ", ".join(part for part in (node["filter"], bound, node["engine"]) if part)
    cells = [
        _name(node, several),
        node["kind"],
        node["form"],
        _size(node["q_len"]),
        _size(node["kv_len"]),
        token_words(node),
        f"filtered ({how})" if filtered else f"dense: {why}",
        number(audit.get("density", node["density"])),
        number(audit.get("target", node["recall"])),
        number(audit.get("recall")),
        *map(number, audit.get("interval", nothing)),
        *(number(value, ERROR_DIGITS) for value in error),
        str(audit.get("calls", "")),
    ]
    columns = zip(COLUMNS, cells, strict=True)
    text = "".join(
        f'<td class="{kind} {name.replace(" ", "-")}">{html.escape(cell)}</td>'
        for (name, kind, _), cell in columns
    )
    return f'<tr data-decision="{"filtered" if filtered else "dense"}">{text}</tr>'


def _size(length: int) -> str:
    return "" if length < 0 else str(length)


def _table(table: Table) -> str:
    for row in table.rows:
        if len(row) != len(table.header):
            raise ValueError(
                f"table {table.title!r} has {len(table.header)} columns, but a row has {len(row)}"
                f" cells: {list(row)!r}"
            )
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.header)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in table.rows
    )
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f"<section><h2>{html.escape(table.title)}</h2>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        f"</div>{note}</section>"
    )


def _frames(frames: Mapping[str, str | Path | bytes]) -> str:
    if not frames:
        return ""
    figures = "".join(
        f'<figure><img alt="{html.escape(caption)}" src="{_picture(caption, source)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, source in frames.items()
    )
    return f'<section><h2>Frames</h2><div class="frames">{figures}</div></section>'


def _picture(caption: str, source: str | Path | bytes) -> str:
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    for start, kind in PICTURE_TYPES.items():
        if content.startswith(start):
            return f"data:{kind};base64,{base64.b64encode(content).decode()}"
    raise ValueError(
        f"picture {caption!r} must be PNG, GIF, JPEG or WebP, but begins with {content[:8]!r}"
    )


def _environment(environment: Mapping[str, Any] | None) -> str:
    if environment is None:
        return "<p>Not recorded.</p>"
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(text)}</td></tr>'
        for name, text in environment_rows(environment)
    )
    return f'<table class="plain"><tbody>{rows}</tbody></table>'


def _asset(name: str) -> str:
    return (files("cef_compile.report") / "page" / name).read_text(encoding="utf-8")

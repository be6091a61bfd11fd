"""Reports in JSON files, and the pages made of them later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cef_compile.report.html import Table, render
from cef_compile.report.record import RecordError, check


def read(path: Path) -> dict[str, Any]:
    """A record from a JSON file: the demo's ``report.json``, or a report's ``to_dict()``.

    Raises:
        RecordError: it cannot be read, or is not one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecordError(f"cannot read {path}: {reason}") from error
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise RecordError(f"{path} is not JSON: {error.msg} at {place}") from error
    try:
        return check(data)
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from error


def write_page(source: Path, out: Path) -> None:
    """Write the page of a record in a file; pictures are looked for beside it.

    Raises:
        RecordError: ``source`` is no record, or the page cannot be made of it or written.
    """
    record = read(source)
    page = record["page"]
    try:
        text = render(
            record,
            title=page["title"],
            frames={caption: source.parent / name for caption, name in page["frames"].items()},
            tables=[Table(**table) for table in page["tables"]],
            tile_maps=record["tile_maps"],
        )
    except KeyError as error:
        raise RecordError(f"{source}: environment has no {error}") from error
    except (TypeError, ValueError) as error:
        raise RecordError(f"{source}: {error}") from error
    except OSError as error:
        raise RecordError(f"cannot read {error.filename}: {error.strerror}") from error
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecordError(f"cannot write {out}: {error.strerror}") from error

"""JSON files read strictly: whatever is not as it should be is an error that names its place."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from cef_compile.errors import PolicyFormatError

T = TypeVar("T")


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a key given twice is seen."""


@dataclass(frozen=True)
class _NotJson:
    """NaN or an infinity, which Python's reader takes and JSON does not know."""

    text: str


@dataclass(frozen=True)
class Place:
    """A value in a file, and where it is.

    Attributes:
        file: the file.
        path: where, as in ``nodes[3].recall``; empty for the whole.
        value: what is there.

    Every method raises :class:`PolicyFormatError` where the value is not what it asks for.
    """

    file: Path
    path: str
    value: Any

    def fail(self, message: str) -> NoReturn:
        """Raise the error of this place."""
        raise PolicyFormatError(self.file, self.path, message)

    def is_null(self) -> bool:
        """Whether the value is null."""
        return self.value is None

    def is_object(self) -> bool:
        """Whether the value is an object."""
        return isinstance(self.value, _Object)

    def at(self, key: str) -> Place:
        """The value of one key of an object."""
        found = self._pairs()
        return found[key] if key in found else self.fail(f"the key {key!r} is missing")

    def fields(self, *names: str, **later: Any) -> dict[str, Place]:
        """The values of an object that has exactly these keys.

        Args:
            names: the keys.
            later: of them those that older files lack, and the value that it means.
        """
        found = self._pairs()
        for name in names:
            if name not in found and name in later:
                found[name] = self._child(name, later[name])
            if name not in found:
                self.fail(f"the key {name!r} is missing")
        for name, place in found.items():
            if name not in names:
                place.fail(f"unknown key; known here: {', '.join(names)}")
        return found

    def items(self) -> list[Place]:
        """The values of a list."""
        if isinstance(self.value, _Object) or not isinstance(self.value, list):
            self._wrong("a list")
        return [Place(self.file, f"{self.path}[{i}]", value) for i, value in enumerate(self.value)]

    def string(self, choices: Iterable[str] | None = None) -> str:
        """A string, one of ``choices`` if given."""
        if not isinstance(self.value, str):
            self._wrong("a string")
        if choices is not None and self.value not in (known := list(choices)):
            self.fail(f"must be one of {', '.join(map(repr, known))}, got {self.value!r}")
        return str(self.value)

    def boolean(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            self._wrong("true or false")
        return bool(self.value)

    def integer(self, least: int = 0) -> int:
        """An integer of at least ``least``."""
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            self._wrong("an integer")
        if self.value < least:
            self.fail(f"must be at least {least}, got {self.value}")
        return int(self.value)

    def number(self) -> float:
        """A finite number of at least 0."""
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            self._wrong("a number")
        try:
            value = float(self.value)
        except OverflowError:
            value = math.inf
        if not 0 <= value < math.inf:
            self.fail(f"must be at least 0 and finite, got {_short(self.value)}")
        return value

    def fraction(self) -> float:
        """A number in (0, 1]."""
        value = self.number()
        if not 0 < value <= 1:
            self.fail(f"must be in (0, 1], got {self.value!r}")
        return value

    def optional(self, read: Callable[[Place], T]) -> T | None:
        """None for null, else what ``read`` makes of the value."""
        return None if self.is_null() else read(self)

    def make(self, function: Callable[[], T]) -> T:
        """What ``function`` returns; its TypeError or ValueError is this place's."""
        try:
            return function()
        except (TypeError, ValueError) as error:
            self.fail(str(error))

    def _pairs(self) -> dict[str, Place]:
        if not isinstance(self.value, _Object):
            self._wrong("an object")
        found: dict[str, Place] = {}
        for name, value in self.value:
            place = self._child(name, value)
            if name in found:
                place.fail("the key is given twice")
            found[name] = place
        return found

    def _child(self, name: str, value: Any) -> Place:
        return Place(self.file, f"{self.path}.{name}" if self.path else name, value)

    def _wrong(self, wanted: str) -> NoReturn:
        self.fail(f"must be {wanted}, got {_short(self.value)}")


def read_json(path: str | os.PathLike[str]) -> Place:
    """The whole of a JSON file.

    Raises:
        PolicyFormatError: it is no JSON; the place is a line and column.
        OSError: it cannot be read.
    """
    file = Path(path)
    content = file.read_bytes()
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=_Object, parse_constant=_NotJson
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise PolicyFormatError(file, where, f"no JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise PolicyFormatError(file, f"byte {error.start}", "no UTF-8") from error
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond reason
        raise PolicyFormatError(file, "", f"no JSON that can be read: {error}") from error
    return Place(file, "", value)


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write plain data as JSON; the file is replaced at once, so that it is never half written.

    Raises:
        OSError: it cannot be written.
    """
    file = Path(path)
    text = json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    new = file.with_name(f"{file.name}.{os.getpid()}.new")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)


def _short(value: Any) -> str:
    if isinstance(value, _Object):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, _NotJson):
        return value.text
    if isinstance(value, int) and abs(value) > 10**18:
        return "a huge integer"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""What has been measured so far, in a file, so that an interruption loses little."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cef_compile.policy import Candidate, NodeEntry
from cef_compile.policy.files import read_candidate
from cef_compile.policy.json_files import Place, read_json, write_json

FORMAT = "cef_compile calibration"
VERSION = 1


@dataclass
class MeasuredCall:
    """One call of the model.

    Attributes:
        noise_level: that was set; None where none was.
        norm: of the dense output, by which a resumed run is recognised.
        nodes: the candidates of the nodes that are done, in the order of the nodes.
    """

    noise_level: float | None
    norm: float
    nodes: list[tuple[Candidate, ...]] = field(default_factory=list)


class Checkpoint:
    """The measured calls, and the file that keeps them.

    Args:
        path: the file, read if it exists; None keeps everything in memory.

    Raises:
        PolicyFormatError: the file is damaged.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._path = path
        self._settings: dict[str, Any] | None = None
        self.calls: list[MeasuredCall] = []
        if path is not None and os.path.exists(path):
            self._settings, self.calls = _read(read_json(path))

    def check(self, model: str, entries: Sequence[NodeEntry], candidates: Sequence[float]) -> None:
        """Take the settings of this calibration, or compare them with those of the file.

        Raises:
            ValueError: they differ.
        """
        settings = {
            "model": model,
            "candidates": list(candidates),
            "nodes": [
                {
                    "path": entry.path,
                    "ordinal": entry.ordinal,
                    "q_shape": list(entry.q_shape),
                    "k_shape": list(entry.k_shape),
                    "dtype": entry.dtype,
                }
                for entry in entries
            ],
        }
        if self._settings is None:
            self._settings = settings
        for name, now in settings.items():
            then = self._settings[name]
            if then != now:
                raise ValueError(
                    f"the checkpoint {self._path} is of another calibration: its {name} are"
                    f" {then!r}, now {now!r}. Name another file or delete this one"
                )

    def write(self) -> None:
        """Bring the file up to date, if there is one."""
        if self._path is None:
            return
        calls = [
            {
                "noise_level": call.noise_level,
                "norm": call.norm,
                "nodes": [[dict(vars(one)) for one in node] for node in call.nodes],
            }
            for call in self.calls
        ]
        assert self._settings is not None, "checked before anything is measured"
        head = {"format": FORMAT, "version": VERSION}
        write_json(self._path, {**head, **self._settings, "calls": calls})


def _read(whole: Place) -> tuple[dict[str, Any], list[MeasuredCall]]:
    whole.at("format").string([FORMAT])
    version = whole.at("version")
    if version.integer() != VERSION:
        version.fail(f"this release reads version {VERSION}, got {version.value}")
    found = whole.fields("format", "version", "model", "candidates", "nodes", "calls")
    settings: dict[str, Any] = {
        "model": found["model"].string(),
        "candidates": [recall.fraction() for recall in found["candidates"].items()],
        "nodes": [_node(node) for node in found["nodes"].items()],
    }
    calls = [_call(call, settings) for call in found["calls"].items()]
    return settings, calls


def _node(place: Place) -> dict[str, Any]:
    found = place.fields("path", "ordinal", "q_shape", "k_shape", "dtype")
    return {
        "path": found["path"].string(),
        "ordinal": found["ordinal"].integer(),
        "q_shape": [size.integer(least=-1) for size in found["q_shape"].items()],
        "k_shape": [size.integer(least=-1) for size in found["k_shape"].items()],
        "dtype": found["dtype"].string(),
    }


def _call(place: Place, settings: dict[str, Any]) -> MeasuredCall:
    found = place.fields("noise_level", "norm", "nodes")
    nodes = [
        tuple(read_candidate(one) for one in candidates.items())
        for candidates in found["nodes"].items()
    ]
    if len(nodes) > len(settings["nodes"]):
        found["nodes"].fail(f"there are {len(settings['nodes'])} nodes, got {len(nodes)}")
    for i, node in enumerate(nodes):
        if [one.recall for one in node] != settings["candidates"]:
            found["nodes"].items()[i].fail("the recalls are not those of the candidates")
    return MeasuredCall(found["noise_level"].optional(Place.number), found["norm"].number(), nodes)

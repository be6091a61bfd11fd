"""What is left of racecheck's reports: text alone, so without a GPU."""

from __future__ import annotations

import pytest
from races import KERNELS, is_guarded, reports


def place(kernel: str, access: str, file: str, text: str, more: int = 0) -> str:
    """How racecheck names the line of a file that holds a text."""
    lines = (KERNELS / file).read_text(encoding="utf-8").splitlines()
    at = next(i for i, line in enumerate(lines, 1) if text in line) + more
    return f"{access} access at {kernel}+0x1c0 in {file}:{at}"


def report(*places: str) -> list[str]:
    first, *rest = places
    lines = [f"========= Error: Race reported between {first}"]
    return lines + [f"=========     and {each} [8 hazards]" for each in rest]


SLOT = (
    place("_attend", "Write", "hopper_producer.py", "slots.store("),
    place("_attend", "Read", "hopper_consumer.py", "slots.load("),
)
IN_KERNEL = SLOT[1].replace("hopper_consumer.py", "hopper.py")
START = (
    place("_attend", "Read", "hopper.py", "def _attend("),
    place("_attend", "Write", "hopper.py", "gl.warp_specialize("),
)
OUTPUT = "\n".join(
    ["========= COMPUTE-SANITIZER", *report(*SLOT), "=========", *report(*START, START[0]),
     "========= ", "ran", "========= RACECHECK SUMMARY: 2 hazards displayed"]
)  # fmt: skip


def test_reports_are_found_apart() -> None:
    assert list(reports(OUTPUT.splitlines())) == [report(*SLOT), report(*START, START[0])]


@pytest.mark.parametrize("places", [SLOT, (*SLOT, IN_KERNEL), START, (*START, START[0])])
def test_what_barriers_guard_is_left_out(places: tuple[str, ...]) -> None:
    assert is_guarded(report(*places))


@pytest.mark.parametrize(
    "places",
    [
        (SLOT[0], START[0]),
        (*SLOT, place("_attend", "Write", "hopper_consumer.py", "own.store(")),
        (SLOT[0], place("_attend", "Read", "hopper_consumer.py", "slots.load(", more=1)),
        (SLOT[0], IN_KERNEL.replace("hopper.py", "hopper_judge.py")),
        ("Write access at _judge+0x10 in hopper_judge.py:1",),
        ("Write access at _attend+0x10", SLOT[1]),
        ("Write access at _attend+0x10 in hopper.py:99999", SLOT[1]),
    ],
)
def test_any_other_is_not(places: tuple[str, ...]) -> None:
    assert not is_guarded(report(*places))

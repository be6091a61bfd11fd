"""racecheck of the small cases, less what it reports for want of following barriers.

python tests/gpu/races.py [ENGINE]

compute-sanitizer does not follow memory barriers that groups of warps wait for, nor Triton's start
of such groups, and reports what these guard: in the attention over lists in Gluon, the hand-over
of a query tile's number, and of the arguments to the groups. A report that is of nothing else is
left out; any other fails.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from cef_compile.kernels import config

CASES = Path(__file__).with_name("sanitize.py")
KERNELS = Path(config.__file__).parent
GUARDED = (
    (("hopper_producer.py", "slots.store("), ("hopper_consumer.py", "slots.load(")),
    (("hopper.py", "def _attend("), ("hopper.py", "gl.warp_specialize(")),
)
"""Lines that a report may name together: files, and what stands there."""
_KERNEL = "hopper.py"
"""Named for the code of the first group, whichever file it is in: it is part of the kernel."""
_PLACE = re.compile(r"access at \S+ in (\S+):(\d+)")


def reports(lines: Iterable[str]) -> Iterator[list[str]]:
    """The lines of each report in racecheck's output."""
    report: list[str] = []
    for line in lines:
        if "Race reported between" in line:
            if report:
                yield report
            report = [line]
        elif report and _PLACE.search(line):
            report.append(line)
    if report:
        yield report


def is_guarded(report: list[str]) -> bool:
    """Whether all that a report names is guarded by barriers that racecheck does not follow."""
    places = [match.groups() for line in report if (match := _PLACE.search(line))]
    return len(places) == len(report) and any(
        all(any(_stands(text, file, *place) for file, text in known) for place in places)
        for known in GUARDED
    )


def _stands(text: str, file: str, name: str, at: str) -> bool:
    """Whether a text stands in a line of a file, and that is the one meant by a name."""
    if name not in (file, _KERNEL):
        return False
    lines = (KERNELS / file).read_text(encoding="utf-8").splitlines()
    return int(at) <= len(lines) and text in lines[int(at) - 1]


def main() -> None:
    command = ["compute-sanitizer", "--tool", "racecheck", sys.executable, str(CASES)]
    found = subprocess.run(
        [*command, *sys.argv[1:]],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    left = [report for report in reports(found.stdout.splitlines()) if not is_guarded(report)]
    if found.returncode or "RACECHECK SUMMARY" not in found.stdout or "ran" not in found.stdout:
        sys.exit(f"racecheck did not come to its end:\n{found.stdout}")
    if left:
        sys.exit("\n\n".join("\n".join(report) for report in left))
    print("no races")


if __name__ == "__main__":
    main()

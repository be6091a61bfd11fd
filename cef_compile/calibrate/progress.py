"""A progress bar where tqdm is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(label: str, total: int, shown: bool) -> Iterator[Callable[[], object]]:
    """Yields what to call after each of ``total`` parts of the work."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        shown = False
    if not shown or not total:
        yield lambda: None
        return
    with tqdm(total=total, desc=label, leave=False) as bar:
        yield bar.update

"""How far long work is, on stderr: a bar on a terminal; else nothing, but for the lines of an import, which can take long in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from taskplatform.cli.output import remark

T = TypeVar("T")

#: Fewer have no bar.
_MANY = 20


@contextmanager
def bytes_read(what: str, size: int | None) -> Iterator[Callable[[int], None]]:
    """Shows how many bytes of a file were read. None: its size is not known."""
    if not sys.stderr.isatty():
        yield _lines_of_progress(size)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=size)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def counting(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Shows how many are done. None: nobody knows of how many."""
    if not sys.stderr.isatty():
        yield lambda done: None  # noqa: ARG005
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def steps(what: str, items: Sequence[T]) -> Iterator[T]:
    """The items, and how many of them are done, where they are many and what is said of each goes elsewhere."""
    if len(items) < _MANY or sys.stdout.isatty():
        # on one terminal the lines about each item are the progress
        yield from items
        return
    with counting(what, len(items)) as progress:
        for done, item in enumerate(items):
            progress(done)
            yield item
        progress(len(items))


def _lines_of_progress(size: int | None) -> Callable[[int], None]:
    """A line for each tenth of the file, or for each ten megabytes where its size is not known."""
    step = size / 10 if size else 10_000_000
    due = step

    def progress(done: int) -> None:
        nonlocal due
        if done >= due:
            remark(f"{done:,} of {size:,} bytes read" if size else f"{done:,} bytes read")
            due = (done // step + 1) * step

    return progress

"""What a long job says while it works: a bar on a terminal with rich, plain lines otherwise."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

T = TypeVar("T")


class Progress:
    """Says nothing; the base of those that do."""

    def say(self, text: str) -> None:
        """One line about what happened."""

    def track(self, items: Collection[T], label: str) -> Iterator[T]:
        """The items, one by one, while the reader sees how far the work is."""
        yield from items


class PlainProgress(Progress):
    """One line for every stage of the work.

    Args:
        stream: where to; None: standard error.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def say(self, text: str) -> None:
        print(text, file=self._stream or sys.stderr, flush=True)

    def track(self, items: Collection[T], label: str) -> Iterator[T]:
        self.say(f"{label} ({len(items)}) ...")
        yield from items


class RichProgress(Progress):
    """A bar for the stage at work.

    Args:
        bar: a ``rich.progress.Progress`` that is running.
    """

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def track(self, items: Collection[T], label: str) -> Iterator[T]:
        task = self._bar.add_task(label, total=len(items))
        try:
            for item in items:
                yield item
                self._bar.advance(task)
        finally:
            self._bar.remove_task(task)


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Progress on standard error in the best way that it and the installed packages allow."""
    if not sys.stderr.isatty():
        yield PlainProgress()
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar
    except ImportError:
        yield PlainProgress()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        yield RichProgress(bar)

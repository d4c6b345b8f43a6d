"""Progress bars with an estimate of the time left; silent when the output is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def track(
    items: Iterable[T],
    label: str,
    *,
    total: int | None = None,
    completed: int = 0,
    status: Callable[[], str] | None = None,
) -> Iterator[T]:
    """Yield ``items`` behind a bar with rate and ETA.

    Args:
        items: What to go through.
        label: What is being done, a few words.
        total: Number of items including ``completed``; taken from ``len`` when it can be.
        completed: How many were done by an earlier, interrupted run.
        status: Asked after each item for a few words to show at the end of the line.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if total is None and isinstance(items, Sized):
        total = completed + len(items)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(label, total=total, completed=completed, status="")
        for item in items:
            yield item
            bars.update(task, advance=1, status=status() if status else "")

"""How far is a command? A bar on a terminal, while it lasts; nothing elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def bar(what: str, *, of_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that moves a bar on stderr."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn() if of_bytes else MofNCompleteColumn()
    shown = console.is_terminal  # elsewhere rich would print an empty line at the end
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)

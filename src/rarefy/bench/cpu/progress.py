"""A progress bar with time left, on the error stream."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Steps", "steps_bar"]


@dataclass
class Steps:
    """say: the words beside the bar. tick: so many more steps are done."""

    say: Callable[[str], object]
    tick: Callable[[int], object]


@contextmanager
def steps_bar(total: int) -> Iterator[Steps]:
    """A bar of `total` steps for the block; where nobody watches, nothing is written."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("· left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield Steps(lambda text: progress.update(task, description=text), lambda n: progress.advance(task, n))

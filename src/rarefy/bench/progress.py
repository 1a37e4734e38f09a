"""A progress bar with time left, on the error stream: results stay alone on the output stream."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rarefy.bench.runner import Reporter
from rarefy.bench.runs import Run

__all__ = ["Bar", "bar", "tracked", "without_bars"]


class Bar(Reporter):
    """What people watch."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._task = progress.add_task("", total=None)

    def plan(self, work: int) -> None:
        """The length of the bar."""
        self._progress.update(self._task, total=work)

    def start(self, run: Run) -> None:
        """The words beside the bar."""
        self._progress.update(self._task, description=str(run))

    def tick(self, batches: int) -> None:
        """The bar moves."""
        self._progress.advance(self._task, batches)

    def note(self, text: str) -> None:
        """A line above the bar, plain and unwrapped."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def bar() -> Iterator[Bar]:
    """A bar that is there for the block and gone after it. Where nobody watches, only notes are written."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("· left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Bar(progress)


@contextmanager
def tracked(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """What to call with (done, all, name of the next): a bar moves on a terminal, and is gone after the block."""
    console = Console(stderr=True)
    left = (TextColumn("· left"), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), *left)
    quiet = not console.is_terminal
    # Blocks of a large model take minutes each: the time left is judged by the last hour.
    with Progress(*columns, console=console, transient=True, disable=quiet, speed_estimate_period=3600) as progress:
        task = progress.add_task(title, total=None)

        def tell(done: int, count: int, name: str) -> None:
            progress.update(task, completed=done, total=count, description=f"{title} {name}")

        yield tell


@contextmanager
def without_bars() -> Iterator[None]:
    """transformers draws a bar for each model that is read, between the lines of ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

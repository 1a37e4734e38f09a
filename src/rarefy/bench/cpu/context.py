"""What all measurements of a run share: threads, plan, limits of the machine, peers, who is told how far it is."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rarefy.bench.cpu.machine import Machine
from rarefy.bench.cpu.peers.deepsparse import Engine, Server
from rarefy.bench.cpu.peers.environments import Peers
from rarefy.bench.cpu.peers.graphs import save
from rarefy.bench.cpu.timing import Plan

__all__ = ["Context", "open_context"]

_SILENT: Callable[[str], object] = lambda text: None  # noqa: E731 - a default, not a function of its own


@dataclass
class Context:
    """threads: of every candidate. folder: for graphs, gone at the end. say: is told what is being measured."""

    threads: int
    plan: Plan
    machine: Machine
    peers: Peers
    folder: Path
    say: Callable[[str], object] = _SILENT
    server: Server | None = None
    problems: dict[str, str] = field(default_factory=dict)

    def deepsparse(self, graph: bytes | str, batch: int, below: int = 0) -> Engine | str:
        """The graph (its bytes, or the path of its file) compiled by DeepSparse, or why it is not.

        below: inputs are random whole numbers below this, not random reals.
        """
        if self.server is None:
            return self.peers.missing.get("deepsparse", "DeepSparse's process could not be started")
        path = graph if isinstance(graph, str) else save(graph, str(self.folder / "deepsparse.onnx"))
        try:
            return self.server.load(path, batch, below)
        except RuntimeError as error:
            return str(error)

    def forget(self) -> None:
        """Free what DeepSparse's process holds."""
        if self.server is not None:
            with contextlib.suppress(RuntimeError):
                self.server.forget()


@contextmanager
def open_context(
    threads: int, plan: Plan, machine: Machine, peers: Peers, say: Callable[[str], object] = _SILENT
) -> Iterator[Context]:
    """A context for the block; DeepSparse's process and the files end with it."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = None
        if peers.deepsparse is not None:
            server = stack.enter_context(Server(peers.deepsparse, threads))
        yield Context(threads, plan, machine, peers, folder, say, server)

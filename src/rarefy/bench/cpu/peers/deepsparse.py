"""DeepSparse in a process of its own: it needs older packages, and takes its times itself.

A server (deepsparse_server.py, run by that environment's python) reads one JSON object per line and answers with one.
"""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Engine", "Server"]

_PROGRAM = Path(__file__).with_name("deepsparse_server.py")


class Server:
    """The other process. To be used as a context: it ends with it."""

    def __init__(self, python: Path, threads: int) -> None:
        environment = dict(os.environ, NM_DISABLE_ANALYTICS="True", PYTHONWARNINGS="ignore")
        self._process = subprocess.Popen(
            [str(python), "-I", str(_PROGRAM), str(threads)],  # -I: this folder is not on its search path
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request and its answer. Raises RuntimeError with the server's words where it could not do it."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("DeepSparse's process was started without pipes")
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError as error:
            raise RuntimeError(f"DeepSparse's process has ended: {error}") from error
        if not line:
            raise RuntimeError(f"DeepSparse's process has ended with code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"DeepSparse: {answer['error']}")
        return answer

    def load(self, graph: str, batch: int, below: int = 0) -> "Engine":
        """Compile the ONNX file `graph` for random inputs of that batch, whole numbers below `below` unless it is 0."""
        return Engine(self, int(self.ask(do="load", graph=graph, batch=batch, seed=0, below=below)["engine"]))

    def forget(self) -> None:
        """Drop all engines and their memory."""
        self.ask(do="forget")

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


@dataclass
class Engine:
    """A compiled graph in the other process: a candidate that is timed there, without the way to and fro."""

    server: Server
    number: int

    def seconds(self, calls: int) -> float:
        """Seconds of so many runs."""
        return float(self.server.ask(do="time", engine=self.number, calls=calls)["seconds"])

    def outputs(self, inputs: list[list[float]]) -> list[list[float]]:
        """The first output for these inputs (nested lists), to check it with."""
        return self.server.ask(do="run", engine=self.number, inputs=inputs)["outputs"]

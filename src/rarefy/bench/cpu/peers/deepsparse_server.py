"""Runs in DeepSparse's own environment, with numpy and deepsparse alone: answers requests for deepsparse.py.

A request is one line of JSON. {"do": "load", "graph", "batch", "seed", "below"} gives {"engine"}; its inputs are random
numbers, whole ones below `below` unless that is 0. {"do": "time", "engine", "calls"} gives {"seconds"}; {"do": "run",
"engine", "inputs"} gives {"outputs"}; {"do": "forget"} drops all engines. What cannot be done gives {"error"}.
"""

import importlib
import json
import os
import sys
import time
from typing import Any

import numpy as np


class Engines:
    """The compiled graphs, with random inputs for each."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.engines: list[tuple[Any, list[np.ndarray]]] = []

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request asks."""
        return getattr(self, f"do_{request.pop('do')}")(**request)

    def do_load(self, graph: str, batch: int, seed: int, below: int) -> dict[str, Any]:
        engine = importlib.import_module("deepsparse").Engine(graph, batch_size=batch, num_cores=self.threads)
        source = np.random.default_rng(seed)
        inputs = [self._draw(source, shape, below) for shape in engine.input_shapes]
        self.engines.append((engine, inputs))
        return {"engine": len(self.engines) - 1}

    @staticmethod
    def _draw(source: np.random.Generator, shape: Any, below: int) -> np.ndarray:
        if below:
            return source.integers(0, below, tuple(shape))
        return source.standard_normal(tuple(shape)).astype(np.float32)

    def do_time(self, engine: int, calls: int) -> dict[str, Any]:
        run, inputs = self.engines[engine]
        begin = time.perf_counter()
        for _ in range(calls):
            run.run(inputs, val_inp=False)
        return {"seconds": time.perf_counter() - begin}

    def do_run(self, engine: int, inputs: list[Any]) -> dict[str, Any]:
        made = self.engines[engine][0].run([np.asarray(x, np.float32) for x in inputs])
        return {"outputs": made[0].tolist()}

    def do_forget(self) -> dict[str, Any]:
        self.engines.clear()
        return {}


def serve(threads: int) -> None:
    """Answer until the input ends. The library's own words go to the error stream, answers alone to the output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engines = Engines(threads)
    for line in sys.stdin:
        try:
            answer = engines.answer(json.loads(line))
        except Exception as error:  # noqa: BLE001 - whatever it is, the other process must hear of it
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]))

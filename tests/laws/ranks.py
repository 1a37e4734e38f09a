"""Work done by several processes that form a group: `on_ranks(function, folder)` returns what each of them returned.

Each rank is a fresh interpreter, so that it imports what it runs by name; what it returns (tensors and JSON values)
comes back through a file. A rank that fails, or that hangs, fails the test with what it wrote.
"""

import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 300  # seconds for all of it, on a busy machine too


def on_ranks(work: Callable[[int], Any], folder: Path, *, world: int = 2, tcp: bool = False) -> list[Any]:
    """Run `work(rank)` in `world` processes; `tcp`: they meet at a port of this machine, not in a file."""
    meet = f"tcp://127.0.0.1:{_free_port()}" if tcp else f"file://{folder / 'meeting'}"
    command = [sys.executable, "-W", "error", __file__, work.__module__, work.__name__, meet, str(folder), str(world)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    ranks = [_started([*command, str(rank)], environment, folder / f"{rank}.txt") for rank in range(world)]
    try:
        for process in ranks:
            process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{work.__name__} hangs:\n{_written(folder, world)}") from None
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert not any(process.returncode for process in ranks), _written(folder, world)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _started(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def _written(folder: Path, world: int) -> str:
    return "\n".join(f"rank {rank}:\n{(folder / f'{rank}.txt').read_text()[-3000:]}" for rank in range(world))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _main(module: str, function: str, meet: str, folder: str, world: str, rank: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo", init_method=meet, rank=int(rank), world_size=int(world), timeout=timedelta(seconds=TIMEOUT / 2)
    )
    found = getattr(importlib.import_module(module), function)(int(rank))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])

"""Where the peers are installed, with exactly which versions, and whether they are there.

`python -m rarefy.bench.cpu peers install` makes two virtual environments. llama.cpp and sparseprop are compiled for the
processor at hand, which takes minutes and needs a C++ compiler and cmake; a package that cannot be installed is left
out, and the columns of it say so.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["Peers", "Step", "folder", "install", "need", "peers", "steps"]

VARIABLE = "RAREFY_PEERS"
_DEFAULT = Path(".peers")

TOOLS = ("setuptools==80.9.0", "wheel==0.48.0", "pybind11==2.13.6", "numpy==2.4.6", "scipy==1.17.1")
ONNX = ("onnxruntime==1.31.1", "onnx==1.23.2")
OPENVINO = ("openvino==2026.4.1",)
LLAMA = ("llama-cpp-python==0.3.36", "gguf==0.19.0")
SPARSEPROP = ("sparseprop==0.1.14",)
DEEPSPARSE = ("deepsparse==1.8.0", "numpy==1.26.4", "onnx==1.14.1", "protobuf==7.36.2")


def folder() -> Path:
    """The folder of the peers' environments: RAREFY_PEERS, else .peers."""
    return Path(os.environ.get(VARIABLE) or _DEFAULT)


@dataclass(frozen=True)
class Step:
    """One command of the installation: pip, in the environment `venv`. options: further options of pip."""

    venv: str
    packages: tuple[str, ...]
    options: tuple[str, ...] = ()


def steps() -> list[Step]:
    """What `install` does, in order. No peer needs torch, and the constraint makes sure that none brings its own."""
    return [
        Step("overlay", TOOLS),
        Step("overlay", ONNX),
        Step("overlay", OPENVINO, ("--no-deps",)),  # beside numpy it names a package that counts its users
        # Its build looks for pybind11 in the python on the path and does not say so: no isolated build.
        Step("overlay", SPARSEPROP, ("--no-build-isolation", "--no-deps")),
        Step("overlay", LLAMA),
        Step("deepsparse", DEEPSPARSE),
    ]


def install(where: Path, *, jobs: int = 2, say: Callable[[str], object] = lambda text: None) -> list[str]:
    """Make the environments in `where`; returns what could not be installed and why, nothing where all went well.

    jobs: compilers that run at once. say: is told what is being done.
    """
    where = where.resolve()
    where.mkdir(parents=True, exist_ok=True)
    constraints = where / "constraints.txt"
    constraints.write_text("torch<0\n")
    problems: list[str] = []
    for step in steps():
        say(f"{step.venv}: {', '.join(step.packages)}")
        try:
            _pip(where / step.venv, constraints, step, jobs)
        except subprocess.CalledProcessError as error:
            last = "\n".join((error.stderr or error.stdout or "").strip().splitlines()[-3:])
            problems.append(f"{', '.join(step.packages)} could not be installed: {last or error}")
    return problems


def _pip(venv: Path, constraints: Path, step: Step, jobs: int) -> None:
    if not (venv / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, capture_output=True, text=True)
    environment = dict(
        os.environ,
        PATH=f"{venv / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        CMAKE_BUILD_PARALLEL_LEVEL=str(jobs),
        CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TOOLS=OFF "
        "-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF",
    )
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", *step.options]
    command += ["-c", str(constraints), *step.packages]
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment)


@dataclass(frozen=True)
class Peers:
    """What of the peers is there. versions: of the packages found. missing: peer to the reason why it is left out."""

    versions: dict[str, str]
    missing: dict[str, str]
    deepsparse: Path | None = None
    """The python of DeepSparse's own environment."""

    def has(self, peer: str) -> bool:
        """Whether that peer can be used."""
        return peer in self.versions


@cache
def peers() -> Peers:
    """Find the peers, once a process, and put the overlay on the module search path (behind everything else)."""
    where = folder().resolve()
    versions: dict[str, str] = {}
    missing: dict[str, str] = {}
    overlay = _site(where / "overlay")
    if overlay is not None and str(overlay) not in sys.path:
        sys.path.append(str(overlay))
    for package in ("onnxruntime", "onnx", "openvino", "sparseprop", "llama-cpp-python", "gguf"):
        _look(package, sys.path, versions, missing)
    own = _site(where / "deepsparse")
    _look("deepsparse", [] if own is None else [str(own)], versions, missing)
    python = where / "deepsparse" / "bin" / "python"
    return Peers(versions, missing, python if "deepsparse" in versions else None)


def need(module: str) -> Any:
    """Import a module of a peer, which type checkers do not see. Raises ModuleNotFoundError where it is absent."""
    return importlib.import_module(module)


def _site(venv: Path) -> Path | None:
    return next(iter(sorted(venv.glob("lib/python3*/site-packages"))), None)


def _look(package: str, path: Sequence[str], versions: dict[str, str], missing: dict[str, str]) -> None:
    found = next(iter(metadata.distributions(name=package, path=list(path))), None)
    if found is None:
        missing[package] = (
            f"not installed: python -m rarefy.bench.cpu peers install {folder()}, and {VARIABLE}={folder()}"
        )
    else:
        versions[package] = found.version

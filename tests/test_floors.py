"""The house stands: imports run downwards only, rooms stay small, tests mirror the tree, nothing is unpickled."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SRC = REPOSITORY / "src"
PACKAGE = SRC / "rarefy"
TESTS = REPOSITORY / "tests"

# From the ground up; "" is rarefy/__init__.py, the face that a user imports.
FLOORS = [{"axes"}, {"core"}, {"methods", "runtime"}, {"io", "integrations"}, {""}, {"bench"}, {"cli", "__main__"}]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
STRANGERS = [{"methods", "runtime"}]  # on one floor, and never import each other

LONGEST_FILE = 320

# Rooms whose every module (or the package that it is in) has a test file of its name; the others are tested by theme.
TESTED_BY_FILE = ("axes",)

# Absolute paths into folders that another machine has not.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|opt|tmp|work|mnt|Users)/\w")
TOLD_TO_ALL = ["*.md", "*.toml", "*.txt", "Makefile", ".ci/run", "kernels/*", "src/**/*.py", "tests/**/*.py"]

SOURCES = sorted(PACKAGE.rglob("*.py"))
KERNELS = sorted((REPOSITORY / "kernels").iterdir())


def name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def room(module: str) -> str:
    """The room of a module: `rarefy.core.method` -> core, `rarefy` -> "" (the face)."""
    return [*module.split("."), ""][1]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each module that a file imports from this package, wherever in the file it does."""
    package = path.parent.relative_to(SRC).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (above, node.module) if part)
            # `from rarefy import core` imports the room, not the face.
            names = [f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base for alias in node.names]
        else:
            continue
        yield from ((node.lineno, each) for each in names if each.split(".")[0] == "rarefy")


def is_module(dotted: str) -> bool:
    path = SRC.joinpath(*dotted.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_room_is_on_a_floor(path: Path):
    assert room(module_of(path)) in FLOOR


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_run_downwards_only(path: Path):
    here = room(module_of(path))
    for line, module in imported(path):
        there = room(module)
        assert FLOOR[there] <= FLOOR[here], f"{name(path)}:{line} imports {module}, which stands above it"
        for strangers in STRANGERS:
            assert here == there or not {here, there} <= strangers, f"{name(path)}:{line} imports {module}"


@pytest.mark.parametrize("path", SOURCES + KERNELS, ids=name)
def test_a_file_is_one_room(path: Path):
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST_FILE, f"{name(path)} has {lines} lines: would a newcomer find two rooms in it?"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nothing_is_unpickled(path: Path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    assert not modules & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        unsafe = {
            "torch.load": given.get("weights_only") != "True",
            "np.load": given.get("allow_pickle", "False") != "False",
        }
        assert not unsafe.get(ast.unparse(call.func)), f"{name(path)}:{call.lineno} may unpickle"


def test_tests_mirror_the_tree():
    """A folder of tests is named as the folder that it tests, and every room has one. `laws` run through all rooms,
    `kernels` are beside the package."""
    tested = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")} - {Path("laws"), Path("kernels")}
    assert all((PACKAGE / folder).is_dir() for folder in tested), f"no counterpart in src/rarefy for one of {tested}"
    rooms = {path.relative_to(PACKAGE).parts[0] for path in SOURCES if path.parent != PACKAGE}
    assert rooms <= {folder.parts[0] for folder in tested if folder.parts}, f"no tests for a room: {rooms} and {tested}"


@pytest.mark.parametrize("room", TESTED_BY_FILE)
def test_every_module_has_tests_of_its_name(room: str):
    for path in (path for path in (PACKAGE / room).rglob("*.py") if path.name != "__init__.py"):
        names = [path.stem, *path.relative_to(PACKAGE / room).parent.parts]
        found = [test for each in names for test in (TESTS / room).rglob(f"test_{each}*.py")]
        assert found, f"{name(path)} has no test file of its name or its package's in {name(TESTS / room)}"


def test_no_word_of_one_machine():
    for path in (path for pattern in TOLD_TO_ALL for path in REPOSITORY.glob(pattern)):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not MACHINE_PATH.search(line), f"{name(path)}:{number} names a folder of one machine: {line.strip()}"

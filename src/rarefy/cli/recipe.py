"""A method from what a user writes: `wanda`, `magnitude+dsnot`, `sparsegpt` with a pattern and an allocation."""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

from rarefy.axes import PerLayer
from rarefy.bench.lineup import known_names, method_class
from rarefy.core.method import Driver, Method
from rarefy.methods import Random

__all__ = ["make_recipe", "per_layer", "usable_names"]

_DATA = frozenset({"data"})


def usable_names() -> list[str]:
    """Methods that need no training, by the names that `rarefy methods` lists."""
    own = {name: method_class(name) for name in known_names()}
    return [name for name, cls in own.items() if _usable(cls) and name.replace("-", "") == cls.__name__.lower()]


def make_recipe(
    text: str,
    *,
    sparsity: float | None,
    pattern: str,
    allocation: Any,
    refit: bool,
) -> Method:
    """The method that `text` names: one, or several joined by "+", of which each refines the mask of the one before.

    allocation: None for a method's own. refit: least squares on the mask at the end. Raises ValueError for methods that
    are not known, need training, or do not take what was asked for.
    """
    first, *refiners = [part.strip() for part in text.split("+")]
    cls = _class(first)
    if _refines(cls):
        refiners.insert(0, first)
        cls = _class("wanda")
    asked = {"sparsity": sparsity, "pattern": pattern, "allocation": allocation}
    method = cls(**_taken(cls, {name: x for name, x in asked.items() if x is not None}))
    for name in [*refiners, *(["refit"] if refit else [])]:
        outer = _class(name)
        if not _refines(outer):
            raise ValueError(f"--method {text}: {name} chooses a mask of its own and cannot refine one; write it first")
        method = outer(method=method)
    return method


def per_layer(text: str) -> PerLayer:
    """Sparsities by name or glob, from JSON or a file of it. Raises ValueError for anything else."""
    path = Path(text)
    try:
        content = json.loads(text if text.lstrip().startswith("{") else path.read_text())
    except OSError as error:
        raise ValueError(
            f"--per-layer {text}: no JSON object and no file that can be read ({error.strerror})"
        ) from None
    except ValueError as error:
        raise ValueError(f"--per-layer {text}: no JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f'--per-layer {text}: an object of sparsities is needed, such as {{"*.mlp.*": 0.6}}')
    return PerLayer(content)


def _class(name: str) -> Any:
    found = method_class(name)
    if not _usable(found):
        needs = ", ".join(sorted(found.needs - _DATA)) or "training"
        raise ValueError(f"--method {name}: it needs {needs}; a directory is pruned by {', '.join(usable_names())}")
    return found


def _usable(cls: type[Method] | type[Driver]) -> bool:
    return issubclass(cls, Method) and cls.needs <= _DATA and (cls.stage == "one shot" or cls is Random)


def _refines(cls: Any) -> bool:
    return "method" in _fields(cls)


def _taken(cls: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """What the method takes; what it does not take and is not as usual is refused."""
    fields = _fields(cls)
    for name, x in asked.items():
        if name not in fields and x != "unstructured":
            raise ValueError(f"--{name} {x}: {cls.__name__} takes {', '.join(sorted(fields))}")
    return {name: x for name, x in asked.items() if name in fields}


def _fields(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cast(Any, cls))}

"""Values that hold tensors: tuples, lists, mappings and dataclasses, as models pass and return them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor

Path = tuple[Any, ...]


class Mark:
    """Stands in a tree in place of a tensor: a leaf, even if it is a dataclass."""


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf with its path, in order.

    >>> [path for path, _ in leaves((1, {"a": 2}))]
    [(0,), (1, 'a')]
    """
    if not _is_tree(value):
        yield path, value
    for key, child in _children(value):
        yield from leaves(child, (*path, key))


def tensors(value: Any) -> Iterator[tuple[Path, Tensor]]:
    """The leaves that are tensors."""
    return ((path, leaf) for path, leaf in leaves(value) if isinstance(leaf, Tensor))


def replaced(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same tree with every leaf changed; fresh containers."""
    if not _is_tree(value):
        return change(value)
    changed = {key: replaced(child, change) for key, child in _children(value)}
    if isinstance(value, tuple):
        kind = cast(Any, type(cast(object, value)))
        return kind(*changed.values()) if hasattr(kind, "_fields") else tuple(changed.values())
    if isinstance(value, list):
        return list(changed.values())
    if type(value) is dict:
        return changed
    fresh = copy.copy(value)
    for key, child in changed.items():
        if isinstance(value, Mapping):
            fresh[key] = child
        else:
            object.__setattr__(fresh, key, child)
    return fresh


def at(value: Any, path: Path) -> Any:
    """The leaf at a path."""
    for key in path:
        value = dict(_children(value))[key]
    return value


def _is_tree(value: Any) -> bool:
    if isinstance(value, tuple | list | Mapping):
        return True
    return dataclasses.is_dataclass(value) and not isinstance(value, type | Mark)


def _children(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(cast(Mapping[Any, Any], value).items())
    if isinstance(value, tuple | list):
        return list(enumerate(cast(list[Any], value)))
    if _is_tree(value):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return []

"""Shorthand: "erdos_renyi" for `ErdosRenyi()`, a dict for the value that it describes."""

import difflib
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

from rarefy.axes.value import Value, from_dict

Kind = TypeVar("Kind", bound=Value)


def parse_named(x: object, base: type[Kind], names: Mapping[str, Callable[[], Kind]], what: str) -> Kind:
    """`x` as a value of class `base`: such a value itself, the dict of one, or one of `names`.

    what: how an error calls it ("an allocation"). Raises ValueError for anything else, naming near matches.
    """
    if isinstance(x, Mapping):
        x = from_dict(cast(Mapping[str, Any], x))
    if isinstance(x, base):
        return x
    if isinstance(x, str) and x in names:
        return names[x]()
    hint = suggest(x if isinstance(x, str) else "", names)
    raise ValueError("; ".join(filter(None, (f"{reprlib.repr(x)} is not {what}", hint))))


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: what may have been meant, or else what there is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"known are {', '.join(map(repr, known))}" if known else ""

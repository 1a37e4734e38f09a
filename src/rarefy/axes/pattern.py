"""Patterns: where zeros may lie. Every pattern is one file in `patterns/`; this is the door to all of them."""

from collections.abc import Mapping
from typing import Annotated, Any, cast

import pydantic

from rarefy.axes.patterns.base import Pattern, Pool, Shape
from rarefy.axes.patterns.block import Block
from rarefy.axes.patterns.channel import Channel
from rarefy.axes.patterns.constant_fan_in import ConstantFanIn
from rarefy.axes.patterns.n_m import NM
from rarefy.axes.patterns.unstructured import Unstructured
from rarefy.axes.value import from_dict, registered

__all__ = [
    "NM",
    "Block",
    "Channel",
    "ConstantFanIn",
    "Pattern",
    "PatternField",
    "Pool",
    "Shape",
    "Unstructured",
    "parse_pattern",
]


def parse_pattern(what: object) -> Pattern:
    """A pattern from its shorthand, its dict or itself.

    Raises ValueError for anything else, naming what can be written.

    >>> parse_pattern("2:4"), parse_pattern("4x1"), parse_pattern("channel")
    (NM(n=2, m=4), Block(rows=4, columns=1), Channel())
    """
    made = what
    if isinstance(what, Mapping):
        made = from_dict(cast(Mapping[str, Any], what))
    elif isinstance(what, str):
        made = next(filter(None, (kind.from_text(what.strip()) for kind in registered(Pattern))), None)
    if not isinstance(made, Pattern):
        known = ", ".join(kind.shorthand for kind in registered(Pattern) if kind.shorthand)
        raise ValueError(f"unknown pattern {what!r}; write {known}, or a Pattern")
    return made


PatternField = Annotated[Any, pydantic.BeforeValidator(parse_pattern)]
"""The type of a value's field that holds a pattern and takes its shorthand."""

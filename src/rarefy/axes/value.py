"""Values: small frozen objects that name what is done, are checked when made, and survive a trip through JSON.

A method, a pattern or a schedule is a *value*: a frozen dataclass of plain numbers, strings and other values. pydantic
checks the fields; its errors are retold as a plain `ValueError` that says what was asked, what was seen and what would
work. Every value class is registered by its name, so that a result file can name exactly what ran.

>>> @value
... class Blur(Value):
...     radius: int
...     share: Share = 0.5
>>> Blur(3).to_dict()
{'kind': 'Blur', 'radius': 3, 'share': 0.5}
>>> from_dict({"kind": "Blur", "radius": 3}) == Blur(3)
True
>>> str(Blur(3))
'Blur(radius=3)'
>>> Blur(3, share=1.5)
Traceback (most recent call last):
ValueError: Blur(radius=3, share=1.5): share must be in [0, 1), got 1.5
"""

import dataclasses
import difflib
import functools
import inspect
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar, cast, dataclass_transform

import pydantic
from pydantic_core import ErrorDetails

Made = TypeVar("Made", bound="Value")

_registry: dict[str, type["Value"]] = {}
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60

# Strict: True is not 1, "0.9" is not 0.9. Defaults are validated so that they may be written in shorthand.
_config = pydantic.ConfigDict(
    extra="forbid", strict=True, validate_default=True, allow_inf_nan=False, arbitrary_types_allowed=True
)


class Value:
    """Base of everything that is described by its fields alone. Subclasses are decorated with `@value`."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, under the class's name as `kind`; `from_dict` is the exact inverse.

        Raises ValueError for a field that JSON cannot hold (a callable, a tensor, an infinite number).
        """
        return {"kind": type(self).__name__, **{name: _encode(x, name) for name, x in _fields(self).items()}}

    def __str__(self) -> str:
        shown = (f"{name}={x if isinstance(x, Value) else repr(x)}" for name, x in self._unusual().items())
        return f"{type(self).__name__}({', '.join(shown)})"

    def __hash__(self) -> int:
        return hash((type(self), *map(_hashable, _fields(self).values())))

    def _unusual(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        fields = _fields(self)
        required = {f.name: fields[f.name] for f in dataclasses.fields(cast(Any, self)) if _required(f)}
        try:  # defaults may be written in shorthand, so compare with a value whose defaults have been parsed
            usual = _fields(type(self)(**required))
        except ValueError:  # the defaults do not go together with these required fields
            return fields
        return {name: x for name, x in fields.items() if name in required or x != usual[name]}


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, pydantic.Field))
def value(cls: type[Made]) -> type[Made]:
    """Class decorator: a frozen, validated dataclass, registered by its name.

    Fields of a decorated base are inherited; `name = default` in the class body, with or without its annotation (which
    type checkers want), changes a default.
    Raises ValueError if another class already has the name.
    """
    _adopt_annotations(cls)
    if "__hash__" not in vars(cls):  # or the dataclass would write one that fails on fields holding a mapping
        cls.__hash__ = Value.__hash__
    make = cast(Callable[..., type[Made]], pydantic.dataclasses.dataclass)
    made = make(cls, frozen=True, config=_config)
    _explain_errors(made)
    _register(made)
    return made


def from_dict(d: Mapping[str, Any]) -> Value:
    """The value that `to_dict` wrote. Lists become tuples, nested dicts with a `kind` become values.

    Raises ValueError for an unknown kind (naming near ones), unknown fields and fields out of range.
    """
    kind = d.get("kind")
    if not isinstance(kind, str):
        raise ValueError(f"from_dict({_short.repr(dict(d))}): a value needs a 'kind', the name of its class")
    if kind not in _registry:
        raise ValueError(f"from_dict: unknown kind {kind!r}; {_suggest(kind, _registry)}")
    return _registry[kind](**{name: _decode(x) for name, x in d.items() if name != "kind"})


def registered(base: type[Made]) -> tuple[type[Made], ...]:
    """Every registered class that is `base` or derives from it, in the order of definition."""
    return tuple(cls for cls in _registry.values() if issubclass(cls, base))


def _share(x: float) -> float:
    if not 0 <= x < 1:
        raise ValueError("must be in [0, 1)")
    return x


Share = Annotated[float, pydantic.AfterValidator(_share)]
"""A sparsity: the share of zeros, 0 ≤ s < 1."""


def _fields(v: Value) -> dict[str, Any]:
    return {f.name: getattr(v, f.name) for f in dataclasses.fields(cast(Any, v))}


def _required(f: "dataclasses.Field[Any]") -> bool:
    default: Any = f.default
    if isinstance(default, pydantic.fields.FieldInfo):
        return default.is_required()
    return default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _adopt_annotations(cls: type[Value]) -> None:
    """Let `name = default` re-default an inherited field: give it the annotation of the base."""
    own = inspect.get_annotations(cls)
    inherited: dict[str, Any] = getattr(cls, "__dataclass_fields__", {})
    for name in inherited.keys() & vars(cls).keys() - own.keys():
        own[name] = next(a[name] for a in map(inspect.get_annotations, cls.__mro__[1:]) if name in a)
    cls.__annotations__ = own


def _register(cls: type[Value]) -> None:
    other = _registry.get(cls.__name__)
    same = other and (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)
    if other and not same:  # the same place again is a reloaded module or notebook cell
        raise ValueError(
            f"@value class {cls.__qualname__} of {cls.__module__}: {other.__module__} already has a value of the name "
            f"{cls.__name__!r}, and a file tells values apart by name; choose another name"
        )
    _registry[cls.__name__] = cls


def _encode(x: Any, where: str) -> Any:
    if isinstance(x, Value):
        return x.to_dict()
    if x is None or isinstance(x, (str, bool, int)):
        return x
    if isinstance(x, float) and math.isfinite(x):
        return float(x)
    if isinstance(x, (tuple, list)):
        return [_encode(item, where) for item in cast(Iterable[Any], x)]
    if isinstance(x, Mapping):
        return _encode_mapping(cast(Mapping[Any, Any], x), where)
    raise ValueError(
        f"to_dict: {where} holds {_short.repr(x)}, which JSON cannot; use finite numbers, strings, tuples or values "
        "(register a function under a name and give the name)"
    )


def _encode_mapping(x: Mapping[Any, Any], where: str) -> dict[str, Any]:
    if not all(isinstance(key, str) for key in x) or isinstance(x.get("kind"), str):
        raise ValueError(f"to_dict: {where} = {_short.repr(dict(x))} needs string keys and no 'kind' among them")
    return {key: _encode(item, f"{where}[{key!r}]") for key, item in x.items()}


def _decode(x: Any) -> Any:
    if isinstance(x, Mapping):
        mapping = cast(Mapping[str, Any], x)
        if isinstance(mapping.get("kind"), str):
            return from_dict(mapping)
        return {key: _decode(item) for key, item in mapping.items()}
    if isinstance(x, (list, tuple)):
        return tuple(_decode(item) for item in cast(Iterable[Any], x))
    return x


def _hashable(x: Any) -> Any:
    if isinstance(x, Mapping):
        return frozenset((key, _hashable(item)) for key, item in cast(Mapping[Any, Any], x).items())
    if isinstance(x, (list, tuple)):
        return tuple(_hashable(item) for item in cast(Iterable[Any], x))
    return x


def _suggest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(known) or 'none'}"


# --- errors ----------------------------------------------------------------------------------------------------------


def _explain_errors(cls: type[Value]) -> None:
    checked = cls.__init__

    @functools.wraps(checked)
    def init(self: Value, *args: Any, **kwargs: Any) -> None:
        try:
            checked(self, *args, **kwargs)
        except pydantic.ValidationError as error:
            message = _explain(cls, args, kwargs, error.errors(include_url=False))
        else:
            return
        raise ValueError(message)  # outside of the handler: the user sees one error, not two

    cls.__init__ = init


def _explain(cls: type[Value], args: tuple[Any, ...], kwargs: dict[str, Any], errors: list[ErrorDetails]) -> str:
    names = [f.name for f in dataclasses.fields(cast(Any, cls))]
    positions = [*names, *(f"argument {i + 1}" for i in range(len(names), len(args)))]
    asked = {**dict(zip(positions, args, strict=False)), **kwargs}
    problems: dict[str, list[ErrorDetails]] = {}
    for error in errors:  # each branch of a union reports; they are one problem
        problems.setdefault(_path(error["loc"], asked, positions), []).append(error)
    lines = dict.fromkeys(_problem(path, names, found) for path, found in problems.items())
    call = ", ".join(f"{name}={_short.repr(x)}" for name, x in asked.items())
    return f"{cls.__name__}({call}): " + "\n".join(lines)


def _path(loc: tuple[int | str, ...], asked: dict[str, Any], positions: list[str]) -> str:
    """`('layers', 'fc1')` → "layers['fc1']"; names of union branches, which are no place in the input, are left out."""
    if not loc:
        return ""
    path = positions[loc[0]] if isinstance(loc[0], int) else loc[0]
    here = asked.get(path)
    for part in loc[1:]:
        try:
            here, path = cast(Any, here)[part], f"{path}[{part!r}]"
        except (TypeError, KeyError, IndexError):
            continue
    return path


def _problem(path: str, names: list[str], found: list[ErrorDetails]) -> str:
    first = found[0]
    if first["type"] == "missing":
        return f"{path} is missing"
    if first["type"] == "unexpected_keyword_argument":
        return f"there is no field {path!r}; {_suggest(path, names)}"
    if first["type"] == "unexpected_positional_argument":
        return f"takes {len(names)} arguments ({', '.join(names)})"
    wanted = list(dict.fromkeys(map(_wanted, found)))
    if all(w.startswith("must be ") for w in wanted):
        either = " or ".join([wanted[0], *(w.removeprefix("must be ") for w in wanted[1:])])
        return f"{path} {either}, got {_short.repr(first['input'])}"
    return ": ".join(filter(None, (path, "; ".join(wanted))))


_phrases = {
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be finite",
    "bool_type": "must be True or False",
    "string_type": "must be a string",
    "tuple_type": "must be a tuple",
    "dict_type": "must be a dict",
    "none_required": "must be None",
    "is_instance_of": "must be a {class}",
    "dataclass_type": "must be a {class_name}",
    "dataclass_exact_type": "must be a {class_name}",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
}


def _wanted(error: ErrorDetails) -> str:
    context: dict[str, Any] = error.get("ctx", {})
    if error["type"] in ("value_error", "assertion_error"):
        return str(context["error"])
    if error["type"] in _phrases:
        return _phrases[error["type"]].format(**context)
    return error["msg"].replace("Input should", "must", 1)

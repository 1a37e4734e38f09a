"""The names by which a comparison calls methods, and the value behind each at a sparsity, in the pace of a task.

Every registered method is known by its own name; the table below adds better titles and variants. Intervals follow the
task: a schedule made for 10 000 steps would make two updates in 1 500.

>>> from rarefy.bench.tasks import Digits
>>> make_method("rigl", Digits(), 0.95).every
Every(interval=50, until=0.75)
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import rarefy
from rarefy.axes import Cosine, Cubic, Every, OneShot
from rarefy.bench.tasks import Task
from rarefy.core.method import Driver, Method, all_methods

__all__ = ["BASELINES", "DEMO", "known_names", "make_method", "method_class", "parse_names", "title"]

BASELINES = ("dense", "random", "random-search", "magnitude")
"""In every table, asked for or not."""

DEMO = ("synflow", "snip", "set", "rigl", "gmp", "granet")


@dataclass(frozen=True)
class _Entry:
    title: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)


# A name that is also a class's is how that class is called; the others are variants.
_ENTRIES = {
    "random": _Entry("random ERK", "Random"),
    "random-uniform": _Entry("random uniform", "Random", {"allocation": "uniform"}),
    "random-search": _Entry("random search", "RandomSearch"),
    "dense": _Entry("dense", "Dense"),
    "magnitude": _Entry("magnitude", "Magnitude"),
    "magnitude-uniform": _Entry("magnitude per layer", "Magnitude", {"allocation": "uniform"}),
    "magnitude-init": _Entry("magnitude at start", "GMP", {"allocation": "global", "schedule": OneShot(at=1)}),
    "gmp-global": _Entry("GMP global", "GMP", {"allocation": "global"}),
    # As calibrated for these tasks: masks that change to the last step would leave weights that were never trained.
    "set": _Entry("SET", "SET", {"fraction": Cosine(0.3), "every": Every(until=0.75)}),
    "set-itop": _Entry("SET-ITOP", "ITOP", {"grow": "random"}),
    "sr-ste": _Entry("SR-STE", "SRSTE", {"pattern": "unstructured"}),
    # With one density for all layers it diverges at these learning rates: weights outside of the forward set grow for
    # `every` steps without being felt, then enter it all at once.
    "top-kast": _Entry("Top-KAST ERK", "TopKAST", {"allocation": "erdos_renyi_kernel"}),
}


def known_names() -> list[str]:
    """All names: those of the registered methods, then those of variants."""
    entries = {_plain(name): name for name in _ENTRIES}
    own = [entries.get(_plain(kind), kind.lower()) for kind in all_methods()]
    return [*own, *(name for name in _ENTRIES if name not in own)]


def parse_names(names: str) -> list[str]:
    """The names in `a,b,c`, as `known_names` writes them. Case, hyphens and underscores do not matter.

    Raises ValueError for a name that is not known, naming near ones.

    >>> parse_names("RigL, random_search")
    ['rigl', 'random-search']
    """
    return [_known(name) for name in map(str.strip, names.split(",")) if name]


def title(name: str) -> str:
    """How tables call it; a name from another version stays as it is."""
    if name in _ENTRIES:
        return _ENTRIES[name].title
    return next((kind for kind in all_methods() if _plain(kind) == _plain(name)), name)


def method_class(name: str) -> type[Method] | type[Driver]:
    """The class behind a name. Raises ValueError for a name that is not known."""
    entry = _ENTRIES.get(_known(name))
    return next(cls for kind, cls in all_methods().items() if _plain(kind) == _plain(entry.kind if entry else name))


def make_method(name: str, task: Task, sparsity: float) -> Method | Driver:
    """The method at this sparsity, its masks changing every `task.every` steps. Raises ValueError where none can be."""
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity {sparsity:g} must be above 0 and below 1: the share of weights that are zero")
    kind = method_class(name)
    entry = _ENTRIES.get(_known(name))
    fields = {f.name for f in dataclasses.fields(cast(Any, kind))}
    asked: dict[str, Any] = {"sparsity": sparsity} if "sparsity" in fields else {}
    if "method" in fields:  # a stage goes on from another method's mask
        asked["method"] = rarefy.Wanda(sparsity)
    return _paced(kind(**asked, **(entry.options if entry else {})), task.every)


def _paced(method: Any, every: int) -> Any:
    changes: dict[str, Any] = {}
    for field_ in dataclasses.fields(method):
        x = getattr(method, field_.name)
        if isinstance(x, Every):
            changes[field_.name] = dataclasses.replace(x, interval=every)
        elif isinstance(x, Cubic):
            changes[field_.name] = dataclasses.replace(x, every=every)
        elif field_.name == "every":
            changes["every"] = every
    return dataclasses.replace(method, **changes)


def _known(name: str) -> str:
    names = {_plain(known): known for known in known_names()}
    if _plain(name) in names:
        return names[_plain(name)]
    near = [names[n] for n in difflib.get_close_matches(_plain(name), names, n=3)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(names.values())}"
    raise ValueError(f"no method is named {name!r}; {hint}")


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")

"""Sites: which weight tensors of a model may be sparse, found by name, and their stable hash."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from rarefy.axes import Layout, Pattern, Unstructured
from rarefy.core import bits
from rarefy.core.held import Held, full, local, whole
from rarefy.core.layouts import DEFAULT_LAYERS, is_default, layout_of
from rarefy.core.sparse.linear import SparseLinear

Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A parameter or module name, a glob over either, a module class, or a predicate of (parameter name, module)."""


@dataclass(eq=False)
class Site:
    """A weight tensor that may be sparse. `name` is its first name in `model.state_dict()`; tied weights make one site.

    `memory` belongs to the method: tensors and JSON values only, saved with the handle.
    """

    name: str
    module: nn.Module
    held: Held
    layout: Layout
    index: int = 0
    pattern: Pattern = field(default_factory=Unstructured)
    followers: list[Held] = field(default_factory=list[Held])
    master: Tensor | None = None
    asked: int | None = None
    explored: Tensor | None = None  # one bit a weight: kept at some time
    memory: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def parameter(self) -> nn.Parameter:
        return self.held.parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel), whatever order the module stores it in."""
        return tuple(self.layout.canonical(torch.empty(self.stored_shape, device="meta")).shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the weight as the module stores it."""
        return tuple(self.parameter.shape)

    @property
    def kind(self) -> str:
        return type(self.module).__name__

    @property
    def numel(self) -> int:
        return self.parameter.numel()

    @property
    def mask(self) -> Tensor:
        """Boolean, in the parameter's shape: the support of the weight that the forward pass uses. A fresh tensor."""
        return self._decoded(self.held.keep)

    @property
    def trainable(self) -> Tensor:
        """Boolean, in the parameter's shape: where gradients reach the optimizer. A fresh tensor."""
        return self._decoded(self.held.train)

    def explored_bits(self) -> Tensor | None:
        """One bit a weight, as `bits.pack` packs them: kept at some time."""
        return self.explored

    def explore(self, packed: Tensor) -> int:
        """Remember these bits as kept at some time; returns how many are set."""
        self.explored = packed
        return bits.count_packed(packed)

    def _decoded(self, keep: Tensor | None) -> Tensor:
        if keep is None:
            return torch.ones(self.parameter.shape, dtype=torch.bool, device=self.parameter.device)
        return bits.decode(whole(keep, self.parameter))

    @property
    def gradient(self) -> Tensor:
        """The gradient that the optimizer will see, here (this rank's shard); writable in `on_gradients`."""
        if self.parameter.grad is None:
            raise RuntimeError(f"{self.name!r} has no gradient in this step: the backward pass did not reach it.")
        return local(self.parameter.grad)

    @property
    def weight(self) -> Tensor:
        """The whole weight that methods score: the master where there is one, else the parameter. Not to be written."""
        if self.master is not None:
            return whole(self.master, self.parameter)
        return full(self.parameter).detach()

    def reached_weight(self) -> Tensor:
        """The weight that gradients reach, zero elsewhere: this rank's shard, a fresh tensor."""
        found = local(self.master if self.master is not None else self.parameter).detach().clone()
        if self.held.train is not None:
            bits.clear_(found, self.held.train)
        return found

    def canonical(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as (out, in, *kernel); patterns that need no order skip the trip."""
        return tensor if self.pattern.elementwise else self.layout.canonical(tensor)

    def restore(self, tensor: Tensor) -> Tensor:
        """The inverse of `canonical`."""
        return tensor if self.pattern.elementwise else self.layout.restore(tensor)

    @property
    def pattern_shape(self) -> tuple[int, ...]:
        """The shape in which the pattern sees the weight."""
        return self.stored_shape if self.pattern.elementwise else self.shape


def find_sites(
    model: nn.Module,
    *,
    only: Selector | Iterable[Selector] | None = None,
    skip: Selector | Iterable[Selector] | None = None,
) -> list[Site]:
    """The sites of `model`, in the order of its parameters.

    By default: weights of Linear, Conv1d–3d, ConvTranspose1d–3d and transformers' Conv1D, and the stacked matrices of
    fused experts (three-axis parameters of a module whose class name ends in "Experts"). `only` chooses among all
    tensors with two or more axes (embeddings and attention projections too); `skip` leaves some out. Raises ValueError
    when a selector matches nothing or nothing is left, and for weights that are computed from other parameters.

    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    >>> [site.name for site in find_sites(model, skip="2")]
    ['1.weight']
    >>> [site.name for site in find_sites(model, only=[nn.Embedding, "2"])]
    ['0.weight', '2.weight']
    """
    wanted, unwanted = _listed(only), _listed(skip)
    candidates = _candidates(model)
    chosen = [c for c in candidates if c.default] if only is None else _matching(candidates, wanted, "only")
    if skip is not None:
        left_out = {id(c) for c in _matching(candidates, unwanted, "skip")}
        chosen = [c for c in chosen if id(c) not in left_out]
    _refuse_computed(model, None if only is None else wanted, unwanted)
    if not chosen:
        raise ValueError(
            f"no site: {type(model).__name__} has {len(candidates)} weight tensors with two or more axes"
            f"{_list(c.name for c in candidates)}, and only={only!r}, skip={skip!r} left none of "
            f"{', '.join(m.__name__ for m in DEFAULT_LAYERS)}. Name some in only=."
        )
    sites = [c.site(index) for index, c in enumerate(chosen)]
    for site in sites:
        _refuse_unfit(site)
    return sites


def site_hash(sites: Sequence[Site]) -> str:
    """A short hash of names and shapes: the same list on any machine and version."""
    listed = [[s.name, list(s.stored_shape)] for s in sites]
    return hashlib.sha256(json.dumps(listed, separators=(",", ":")).encode()).hexdigest()[:16]


@dataclass
class _Candidate:
    name: str
    parameter: nn.Parameter
    owners: list[tuple[str, nn.Module]]  # (full parameter name, module): several for tied weights

    @property
    def default(self) -> bool:
        return any(is_default(name, module, self.parameter) for name, module in self.owners)

    def matches(self, selector: Selector) -> bool:
        return any(_matches(selector, name, module) for name, module in self.owners)

    def site(self, index: int) -> Site:
        name, module = next((o for o in self.owners if is_default(*o, self.parameter)), self.owners[0])
        return Site(self.name, module, Held(self.name, self.parameter), layout_of(name, module, self.parameter), index)


def _candidates(model: nn.Module) -> list[_Candidate]:
    found: dict[int, _Candidate] = {}
    for prefix, module in _modules(model):
        for short, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{short}" if prefix else short
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f"{name!r} has no shape yet (a lazy module): run one batch through the model first.")
            if parameter.ndim >= 2:
                found.setdefault(id(parameter), _Candidate(name, parameter, [])).owners.append((name, module))
    return list(found.values())


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """With their names; a shared module goes by all of them."""
    return cast(Any, model).named_modules(remove_duplicate=False)


def _listed(selectors: Selector | Iterable[Selector] | None) -> list[Selector]:
    if selectors is None:
        return []
    if isinstance(selectors, str | type) or callable(selectors):
        return [selectors]
    return list(selectors)


def _matches(selector: Selector, name: str, module: nn.Module) -> bool:
    if isinstance(selector, str):
        owner = name.rpartition(".")[0]
        return any(fnmatch.fnmatchcase(candidate, selector) for candidate in (name, owner)) or owner.startswith(
            selector + "."
        )
    if isinstance(selector, type):
        return isinstance(module, selector)
    return bool(selector(name, module))


def _matching(candidates: list[_Candidate], selectors: list[Selector], asked: str) -> list[_Candidate]:
    chosen: list[_Candidate] = []
    for selector in selectors:
        hits = [c for c in candidates if c.matches(selector)]
        if not hits:
            names = [n for c in candidates for n, _ in c.owners]
            near = difflib.get_close_matches(str(selector), names + [n.rpartition(".")[0] for n in names], n=3)
            raise ValueError(
                f"{asked}={selector!r} matches no weight tensor with two or more axes"
                + (f"; near: {', '.join(near)}" if near else _list(names))
            )
        chosen += [c for c in hits if not any(c is other for other in chosen)]
    order = {id(c): i for i, c in enumerate(candidates)}
    return sorted(chosen, key=lambda c: order[id(c)])


def _list(names: Iterable[str]) -> str:
    shown = list(names)
    return f" ({', '.join(shown[:8])}{', …' if len(shown) > 8 else ''})" if shown else ""


def _refuse_computed(model: nn.Module, only: list[Selector] | None, skip: list[Selector]) -> None:
    """A default layer whose `weight` is no parameter (weight norm, parametrize, torch's prune) cannot hold zeros."""
    for name, module in _modules(model):
        if isinstance(module, SparseLinear):  # `sparsify` has refused those that a handle may own
            continue
        if not isinstance(module, DEFAULT_LAYERS) or "weight" in dict(module.named_parameters(recurse=False)):
            continue
        full_name = f"{name}.weight" if name else "weight"
        if only is not None and not any(_matches(s, full_name, module) for s in only):
            continue
        if any(_matches(s, full_name, module) for s in skip):
            continue
        raise ValueError(
            f"{full_name!r} is computed from other parameters (weight norm, a parametrization, torch.nn.utils.prune): "
            f"zeros cannot be held in it. Remove that first, or skip={name!r}."
        )


def _refuse_unfit(site: Site) -> None:
    p = site.parameter
    if p.is_meta:
        raise ValueError(f"{site.name!r} is on the meta device and has no values: load the weights first.")
    if not p.dtype.is_floating_point:
        raise ValueError(f"{site.name!r} has dtype {p.dtype}: a site needs real floating-point weights. skip it.")

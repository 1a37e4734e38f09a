"""The repeated blocks of a model, found by themselves: chains of modules, and what lies outside of any."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from rarefy.core.sites import Site

_CONTAINERS = (nn.ModuleList, nn.Sequential)


@dataclass(eq=False)
class Block:
    """One member of a chain of repeated blocks, or a part of the model that is not repeated; with its sites, if any."""

    name: str
    module: nn.Module
    sites: tuple[Site, ...]


@dataclass(eq=False)
class Chain:
    """Blocks that run one after the other; those without sites too. `repeated`: members of a container."""

    blocks: list[Block]
    repeated: bool = True
    sites: list[Site] = field(default_factory=list[Site])


def blocks_of(model: nn.Module, sites: Sequence[Site], blocks: str | Iterable[str] | None = None) -> list[Block]:
    """The blocks that hold sites, chain by chain in the model's order, then what lies outside of chains.

    blocks: names or globs, of containers whose members are the blocks, or of the blocks themselves; None: found.
    Raises ValueError for a name that matches no module with sites.

    >>> from rarefy.core.sites import find_sites
    >>> model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(2)), "head": nn.Linear(2, 3)})
    >>> [block.name for block in blocks_of(model, find_sites(model))]
    ['layers.0', 'layers.1', 'head']
    """
    return [block for chain in chains_of(model, sites, blocks) for block in chain.blocks if block.sites]


def default_sites(model: nn.Module, sites: Sequence[Site], blocks: str | Iterable[str] | None = None) -> list[Site]:
    """What a block-wise method prunes unless told: sites inside chains of composite blocks, where there are any.

    A chain of bare layers (a classifier's nn.Sequential) makes no such choice. Weights that two modules own (an output
    head tied to an embedding) are never meant.
    """
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    free = [site for site in sites if len(owners.get(id(site.parameter), ())) < 2]
    chains = [c for c in chains_of(model, free, blocks) if c.repeated]
    composite = [c for c in chains if any(b.sites and _is_composite(b.module) for b in c.blocks)]
    inside = {site for chain in (chains if blocks is not None else composite) for site in chain.sites}
    return [site for site in free if site in inside] if inside else free


def chains_of(model: nn.Module, sites: Sequence[Site], blocks: str | Iterable[str] | None = None) -> list[Chain]:
    """Chains in the model's order, then one chain of a single block for each other module that owns sites."""
    known = {id(site.parameter) for site in sites}
    listed = list(_containers(model, known)) if blocks is None else _named(model, blocks, known)
    left = {id(site.parameter): site for site in sites}
    chains = [_chain(members, left) for members in listed]
    chains = [chain for chain in chains if chain.sites]
    names = {id(m): n for n, m in cast(Iterable[tuple[str, nn.Module]], cast(Any, model).named_modules())}
    outside: dict[int, list[Site]] = {}
    for site in left.values():
        outside.setdefault(id(site.module), []).append(site)
    for found in outside.values():
        module = found[0].module
        block = Block(names.get(id(module), found[0].name), module, tuple(found))
        chains.append(Chain([block], repeated=False, sites=found))
    return chains


_Members = list[tuple[str, nn.Module]]


def _chain(members: _Members, left: dict[int, Site]) -> Chain:
    """Takes its sites out of `left`: one that two blocks share belongs to the first."""
    chain = Chain([])
    for name, module in members:
        ids = [id(p) for p in module.parameters() if id(p) in left]
        held = tuple(left.pop(i) for i in ids)
        chain.blocks.append(Block(name, module, held))
        chain.sites += held
    return chain


def _containers(module: nn.Module, known: set[int], prefix: str = "") -> Iterator[_Members]:
    """Outermost containers; where the members of one do not repeat (stages), those a level down if any there does."""
    for outer in _outermost(module, known, prefix):
        level = [outer]
        while level and not any(_repeats(members) for members in level):
            inside = [child for members in level for child in members]
            level = [m for name, child in inside for m in _outermost(child, known, name)]
        yield from level or [outer]


def _outermost(module: nn.Module, known: set[int], prefix: str) -> Iterator[_Members]:
    members = _members(module, prefix)
    if isinstance(module, _CONTAINERS):
        if _holds(module, known):
            yield members
        return
    for name, child in members:
        yield from _outermost(child, known, name)


def _members(module: nn.Module, prefix: str) -> _Members:
    children = cast(Iterable[tuple[str, nn.Module | None]], cast(Any, module)._modules.items())  # one listed twice too
    return [(f"{prefix}.{name}" if prefix else name, child) for name, child in children if child is not None]


def _holds(module: nn.Module, known: set[int]) -> bool:
    return any(id(p) in known for p in module.parameters())


def _repeats(members: _Members) -> bool:
    """Whether two composite members are alike: of one class, with matrices of the same shapes."""
    kinds = [(type(module), _shapes(module)) for _, module in members if _is_composite(module)]
    return len(set(kinds)) < len(kinds)


def _is_composite(module: nn.Module) -> bool:
    return next(iter(module.children()), None) is not None


def _shapes(module: nn.Module) -> tuple[tuple[int, ...], ...]:
    """Of its matrices; embeddings may belong to a first block alone (relative positions)."""
    owners = (m for m in module.modules() if not isinstance(m, nn.Embedding))
    found: Iterator[Tensor] = (p for m in owners for p in m.parameters(recurse=False))
    return tuple(tuple(p.shape) for p in found if p.ndim > 1)


def _named(model: nn.Module, blocks: str | Iterable[str], known: set[int]) -> list[_Members]:
    """One list of members for each name or glob: a matching container's members, or the matching modules."""
    found: list[_Members] = []
    everything = cast(list[tuple[str, nn.Module]], list(cast(Any, model).named_modules()))
    for asked in [blocks] if isinstance(blocks, str) else blocks:
        matches = [(n, m) for n, m in everything if fnmatch.fnmatchcase(n, asked) and _holds(m, known)]
        outer = [(n, m) for n, m in matches if not any(n.startswith(other + ".") for other, _ in matches)]
        if not outer:
            raise ValueError(
                f"blocks={asked!r} matches no module that holds sites: name a container (model.layers) or the blocks "
                "themselves (model.layers.*)."
            )
        if all(isinstance(m, _CONTAINERS) for _, m in outer):
            found += [_members(m, n) for n, m in outer]
        else:
            found.append(outer)
    return found

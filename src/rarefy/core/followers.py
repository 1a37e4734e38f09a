"""Followers: the bias and the norm scale and shift that belong to an output channel, masked with it, not counted.

With them at zero a masked channel gives exactly zero after its norm, so that it can be removed later. The norm of a
layer is the one that consumes its output directly, and no other site's. It is read off a symbolic trace; where a model
cannot be traced, off the order of definition (a norm of the right width that stands right behind its layer in the same
container).
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

from torch import fx, nn

from rarefy.core.held import Held
from rarefy.core.sites import Site
from rarefy.core.undisturbed import undisturbed

_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
)


def find_followers(model: nn.Module, sites: Sequence[Site]) -> None:
    """Fill `site.followers` for every site: bias, and scale and shift of the norm behind it.

    A parameter that would follow several sites (a norm shared by two layers) follows none: it has no one mask.
    """
    norms = _norms_behind(model, sites)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [_vectors(site, [site.module, *norms.get(id(site.module), [])]) for site in sites]
    claims = Counter(key for vectors in found for key in vectors)
    for site, vectors in zip(sites, found, strict=True):
        site.followers = [Held(names[key], p) for key, p in vectors.items() if claims[key] == 1]


def _vectors(site: Site, modules: Sequence[nn.Module]) -> dict[int, nn.Parameter]:
    """By identity, once each: what the modules hold per output channel of the site."""
    own = [dict(m.named_parameters(recurse=False)) for m in modules]
    held = [p for named in own for short in ("weight", "bias") if (p := named.get(short)) is not None]
    return {id(p): p for p in held if p is not site.parameter and tuple(p.shape) == (site.shape[0],)}


def _norms_behind(model: nn.Module, sites: Sequence[Site]) -> dict[int, list[nn.Module]]:
    try:
        with undisturbed(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = cast(Any, _Tracer(sites)).trace(model)
    except Exception:  # noqa: BLE001  tracing runs the model's own forward: whatever it raises says "cannot be traced"
        return _by_order(model)
    modules: dict[str, nn.Module] = dict(cast(Any, model).named_modules())
    found: dict[int, list[nn.Module]] = {}
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[str(node.target)], _NORMS):
            continue
        source: Any = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and source.op == "call_module":
            found.setdefault(id(modules[str(source.target)]), []).append(modules[str(node.target)])
    return found


class _Tracer(fx.Tracer):
    """Sites and norms are leaves, whatever a wrapper made of their class; no hook is run (sharded modules gather)."""

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        self._sites = {id(site.module) for site in sites}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = id(m) in self._sites or isinstance(m, _NORMS)
        return leaf or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        return super().call_module(m, m.forward, args, kwargs)


def _by_order(model: nn.Module) -> dict[int, list[nn.Module]]:
    found: dict[int, list[nn.Module]] = {}
    for parent in model.modules():
        children = list(parent.children())
        for layer, norm in itertools.pairwise(children):
            if isinstance(norm, _NORMS):
                found.setdefault(id(layer), []).append(norm)
    return found

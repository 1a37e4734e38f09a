"""Followers: the bias and the norm scale and shift that belong to an output channel, masked with it, outside the counts.

With them at zero a masked channel gives exactly zero after its norm, so that it can be removed later. The norm of a layer
is the one that consumes its output directly. It is read off a symbolic trace; where a model cannot be traced, off the
order of definition (a norm of the right width that stands right behind its layer in the same container).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import fx, nn

from rarefy.core.held import Held
from rarefy.core.sites import Site

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
    """Fill `site.followers` for every site: bias, and scale and shift of the norm behind it."""
    norms = _norms_behind(model)
    names = {id(p): name for name, p in model.named_parameters()}
    for site in sites:
        modules = [site.module, *norms.get(id(site.module), [])]
        found = [m.get_parameter(short) for m in modules for short in ("weight", "bias") if _has(m, short)]
        site.followers = [
            Held(names[id(p)], p) for p in found if p is not site.parameter and tuple(p.shape) == (site.shape[0],)
        ]


def _has(module: nn.Module, short: str) -> bool:
    return isinstance(module._parameters.get(short), nn.Parameter)


def _norms_behind(model: nn.Module) -> dict[int, list[nn.Module]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _Tracer().trace(model)
    except Exception:  # tracing runs the model's own forward: whatever it raises means "cannot be traced"
        return _by_order(model)
    modules = dict(model.named_modules())
    found: dict[int, list[nn.Module]] = {}
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[str(node.target)], _NORMS):
            continue
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and source.op == "call_module":
            found.setdefault(id(modules[str(source.target)]), []).append(modules[str(node.target)])
    return found


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _NORMS) or super().is_leaf_module(m, module_qualified_name)


def _by_order(model: nn.Module) -> dict[int, list[nn.Module]]:
    found: dict[int, list[nn.Module]] = {}
    for parent in model.modules():
        children = list(parent.children())
        for layer, norm in zip(children, children[1:], strict=False):
            if isinstance(norm, _NORMS):
                found.setdefault(id(layer), []).append(norm)
    return found

"""The way into truly sparse execution and out of it, and what is refused before anything is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from rarefy.core.held import Held
from rarefy.core.method import Method
from rarefy.core.optimizers import ELEMENTWISE
from rarefy.core.sites import Site
from rarefy.core.sparse.linear import DTYPES, SparseLinear, restore, to_sparse
from rarefy.core.sparse.move import gather_state, scatter_state
from rarefy.core.sparse.site import SparseSite
from rarefy.core.sparse.structure import LIMIT, Structure

if TYPE_CHECKING:
    import rarefy.core.sparsity

Execution = Literal["simulated", "sparse"]

_INSTEAD = 'or train with execution="simulated"'


def refuse(execution: Any, method: Method, model: nn.Module, sites: Sequence[Site]) -> None:
    """Raise ValueError for anything that cannot run sparse, naming what would work."""
    if execution == "simulated":
        return
    if execution != "sparse":
        raise ValueError(f'execution={execution!r}: "simulated" (dense tensors that hold zeros) or "sparse".')
    _refuse_method(method)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f'execution="sparse" runs in one process, and this is one of {dist.get_world_size()} ranks: run it alone, '
            f"{_INSTEAD}."
        )
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for site in sites:
        reason = _unfit(site, names[id(site.parameter)])
        if reason is not None:
            raise ValueError(
                f'execution="sparse": {site.name!r} {reason}. skip={site.name!r} leaves it dense, {_INSTEAD}.'
            )


def _refuse_method(method: Method) -> None:
    if "sparse" not in method.executions:
        raise ValueError(
            f'execution="sparse" keeps nothing but the non-zeros, in a layer always as many of them; {method} needs '
            "more. Choose masks once (Random, Magnitude, SNIP, GraSP, SynFlow, ...), exchange weights at equal "
            f"sparsity (SET, RigL, ITOP), {_INSTEAD}."
        )
    pattern = getattr(method, "pattern", None)
    if pattern is None:
        return
    moves = method.labels[0] != "static"
    if str(pattern) == "channel" or (moves and not pattern.elementwise):
        works = "unstructured" if moves else "any but channel"
        raise ValueError(
            f'execution="sparse" with {type(method).__name__} takes the pattern {works}, got {pattern}: change it, '
            f"{_INSTEAD}."
        )


def _unfit(site: Site, names: int) -> str | None:
    """Why this site cannot run sparse, if it cannot."""
    module, parameter = site.module, site.parameter
    if type(module) is not nn.Linear:
        return f"belongs to a {type(module).__name__}, and only nn.Linear itself runs sparse"
    if site.name.rpartition(".")[2] != "weight":
        return "is not the weight of its nn.Linear"
    if "forward" in vars(module):
        return "belongs to a layer whose forward was replaced, by a wrapper that would see no sparse weight"
    if names > 1:
        return f"is tied: the model uses it under {names} names"
    if type(parameter) is not nn.Parameter or parameter.device.type != "cpu":
        return f"is a {type(parameter).__name__} on {parameter.device}, and only plain parameters on the CPU run sparse"
    if parameter.dtype not in DTYPES:
        return f"is {parameter.dtype}, and only float32 and float64 run sparse"
    if max(parameter.shape) > LIMIT:
        return f"has shape {tuple(parameter.shape)}, and 16-bit indices reach {LIMIT} rows and columns"
    return None


def refuse_optimizers(optimizers: Iterable[Optimizer], held: Iterable[Held]) -> None:
    """Raise ValueError for optimizers of sites that are not known to treat every weight by itself."""
    sites = {id(item.parameter): item.name for item in held}
    for optimizer in optimizers:
        if type(optimizer) in ELEMENTWISE:
            continue
        theirs = [sites[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in sites]
        if theirs:
            known = ", ".join(sorted(kind.__name__ for kind in ELEMENTWISE))
            raise ValueError(
                f'execution="sparse" gives optimizers the vector of the non-zeros, and {type(optimizer).__name__}, '
                f"which holds {theirs[0]!r}, is not known to work on such: it may need matrices (Muon), factor its "
                f"state (Adafactor), or keep copies. Those of torch.optim that work: {known}; {_INSTEAD}."
            )


def refuse_sparse_layers(model: nn.Module) -> None:
    """Raise RuntimeError if layers of the model run sparse already: their handle owns them."""
    modules: Iterable[tuple[str, nn.Module]] = cast(Any, model).named_modules()
    name = next((name for name, module in modules if isinstance(module, SparseLinear)), None)
    if name is not None:
        raise RuntimeError(
            f"layer {name!r} of this {type(model).__name__} runs sparse already: end() the handle that made it so, "
            "or, where that is gone, rarefy.core.sparse.to_dense(model)."
        )


def enter(s: rarefy.core.sparsity.Sparsity, *, resumed: bool) -> None:
    """Masks are chosen: from now on the layers of all sites run sparse.

    resumed: the weights of the saved moment may have to be loaded yet; until then, no step.
    """
    found: list[Site] = []
    for site in s.sites:
        module, mask = site.module, site.mask
        assert isinstance(module, nn.Linear)
        foreign = resumed and bool((site.parameter.detach().ne(0) & ~mask).any())
        site.held.detach()
        layer = to_sparse(module, Structure.of_mask(mask))
        layer.waits = foreign
        found.append(SparseSite.of(site, layer))
    s.sites = tuple(found)


def leave(s: rarefy.core.sparsity.Sparsity, optimizers: Sequence[Optimizer]) -> None:
    """The layers are nn.Linear again, with exact zeros; optimizers go on with the state that they have."""
    s.sites = tuple(_plain(site, optimizers) if isinstance(site, SparseSite) else site for site in s.sites)


def _plain(site: SparseSite, optimizers: Sequence[Optimizer]) -> Site:
    layer, mask = site.layer, site.mask
    scatter_state(site, optimizers)
    plain = site.plain(layer, site.parameter)
    restore(layer)
    plain.held.set(mask)
    return plain


def take_in(s: rarefy.core.sparsity.Sparsity, optimizers: Sequence[Optimizer]) -> None:
    """State that these optimizers hold of dense weights becomes that of the non-zeros."""
    for site in s.sites:
        if isinstance(site, SparseSite):
            gather_state(site, optimizers)


def refuse_waiting(sites: Iterable[Site]) -> None:
    """Raise RuntimeError while weights of a resumed run have not been loaded."""
    waiting = next((s.name for s in sites if isinstance(s, SparseSite) and s.layer.waits), None)
    if waiting is not None:
        raise RuntimeError(
            f"{waiting!r} was resumed, but holds the weights of another moment: after sparsify(..., resume=state, "
            'execution="sparse") call model.load_state_dict() and optimizer.load_state_dict() with what was saved then.'
        )

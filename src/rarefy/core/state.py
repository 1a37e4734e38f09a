"""The handle's state as data: tensors and JSON values, so that it can be stored without pickling anything."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rarefy.core import bits
from rarefy.core.commit import follow
from rarefy.core.held import Held, full, shard, whole
from rarefy.core.ledger import Ledger
from rarefy.core.method import method_from_dict
from rarefy.core.sites import Site, site_hash
from rarefy.core.sparse.linear import SparseLinear
from rarefy.core.sparse.site import SparseSite
from rarefy.core.sparse.structure import Structure

if TYPE_CHECKING:
    import rarefy.core.sparsity

VERSION = 1
_KEYS = ("method", "sites", "steps", "step", "seed", "ended", "generator", "ledger", "memory", "per_site")
_SITE_KEYS = ("asked", "mask", "explored", "memory")


def dump(s: rarefy.core.sparsity.Sparsity) -> dict[str, Any]:
    """See `Sparsity.state_dict`. Nothing in it is shared with the handle."""
    return {
        "version": VERSION,
        "method": s.method.to_dict(),
        "sites": site_hash(s.sites),
        "steps": s.steps,
        "step": s.step,
        "seed": s.seed,
        "ended": s.ended,
        "generator": s.generator.get_state(),
        "ledger": s.ledger.state_dict(),
        "memory": copy.deepcopy(s.memory),
        "per_site": {site.name: _dump_site(site) for site in s.sites},
    }


def _dump_site(site: Site) -> dict[str, Any]:
    held = site.held
    saved: dict[str, Any] = {
        "asked": site.asked,
        "mask": site.structure.bits() if isinstance(site, SparseSite) else bits.pack(site.mask).cpu(),
        "explored": None if (explored := site.explored_bits()) is None else explored.clone(),
        "memory": copy.deepcopy(site.memory),
    }
    if held.train is not held.keep:
        saved["trainable"] = bits.pack(site.trainable).cpu()
    if site.master is not None:
        saved["master"] = whole(site.master, site.parameter).clone()
    return saved


# -- reading ---------------------------------------------------------------------------------------------------------


@dataclass
class _Read:
    """One site's part of a saved state, checked."""

    mask: Tensor
    trainable: Tensor | None
    explored: Tensor | None
    master: Tensor | None


def load(s: rarefy.core.sparsity.Sparsity, saved: Mapping[str, Any], *, same_weights: bool = True) -> None:
    """See `Sparsity.load_state_dict`: everything is checked before anything is taken over.

    same_weights: whether the model must hold the weights of the moment when the state was made.
    """
    _refuse_other(s, saved)
    generator = _read_generator(saved["generator"])
    ledger = _read_ledger(s, saved["ledger"])
    read = [_read_site(site, saved["per_site"][site.name], ledger) for site in s.sites]
    if same_weights:
        for site, found in zip(s.sites, read, strict=True):
            _refuse_weights(site, found)
    for site, found in zip(s.sites, read, strict=True):
        _adopt(site, found, saved["per_site"][site.name])
    s.steps, s.step, s.seed, s.ended = saved["steps"], saved["step"], saved["seed"], saved["ended"]
    s.generator, s.ledger, s.memory = generator, ledger, copy.deepcopy(saved["memory"])


def _adopt(site: Site, found: _Read, saved: Mapping[str, Any]) -> None:
    if isinstance(site, SparseSite):
        site.asked, site.memory = saved["asked"], copy.deepcopy(saved["memory"])
        if found.explored is not None:
            site.explore(found.explored)
        return
    site.held.set(found.mask, found.trainable)
    for follower in site.followers:
        follow(site, follower, found.mask)
    site.asked, site.memory = saved["asked"], copy.deepcopy(saved["memory"])
    site.master = None if found.master is None else shard(found.master, site.parameter).clone()
    site.explored = found.explored


def _read_site(site: Site, saved: Mapping[str, Any], ledger: Ledger) -> _Read:
    missing = [key for key in _SITE_KEYS if key not in saved]
    if missing:
        raise _damaged(f"{site.name!r} lacks {', '.join(missing)}")
    shape, device = torch.Size(site.stored_shape), site.parameter.device
    mask = _read_mask(site, saved["mask"], "mask")
    trainable = _read_mask(site, saved["trainable"], "trainable") if "trainable" in saved else None
    _refuse_counts(site, mask, saved["explored"], ledger)
    master = saved.get("master")
    if master is not None and (not isinstance(master, Tensor) or master.shape != shape):
        raise _damaged(f"the master of {site.name!r} is no tensor of shape {tuple(shape)}")
    return _Read(
        mask.to(device),
        None if trainable is None else trainable.to(device),
        None if saved["explored"] is None else saved["explored"].detach().cpu().clone(),
        None if master is None else master.detach().to(device, site.parameter.dtype),
    )


def _read_mask(site: Site, packed: Any, what: str) -> Tensor:
    if not isinstance(packed, Tensor):
        raise _damaged(f"the {what} of {site.name!r} is {type(packed).__name__}, not a tensor")
    return bits.unpack(packed.detach().cpu(), site.stored_shape)


def _refuse_counts(site: Site, mask: Tensor, explored: Tensor | None, ledger: Ledger) -> None:
    """The ledger knows how many entries every mask has: flipped bits show."""
    if ledger.entries and bits.count(mask) != ledger.entries[-1].kept[site.index]:
        raise _damaged(
            f"the mask of {site.name!r} keeps {bits.count(mask)} weights, its ledger says "
            f"{ledger.entries[-1].kept[site.index]}"
        )
    if explored is not None and not bool((_read_mask(site, explored, "explored") | ~mask).all()):
        raise _damaged(f"{site.name!r} keeps weights that it never explored")


def _read_generator(saved: Any) -> torch.Generator:
    generator = torch.Generator("cpu")
    try:
        generator.set_state(saved.cpu())
    except (AttributeError, TypeError, RuntimeError) as error:
        raise _damaged(f"no state of a random generator ({error})") from None
    return generator


def _read_ledger(s: rarefy.core.sparsity.Sparsity, saved: Any) -> Ledger:
    ledger = Ledger(s.ledger.names, s.ledger.sizes, s.ledger.dense_backward)
    try:
        ledger.load_state_dict(saved)
        same = (list(saved["names"]), list(saved["sizes"])) == (ledger.names, ledger.sizes)
        lengths = {len(counts) for entry in ledger.entries for counts in (entry.kept, entry.trainable)}
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(f"no ledger ({type(error).__name__}: {error})") from None
    if not same or not lengths <= {len(s.sites)}:
        raise _damaged("the ledger counts other sites")
    return ledger


def _damaged(what: str) -> ValueError:
    return ValueError(f"the saved state is damaged: {what}. Nothing was changed: take another checkpoint.")


def _refuse_other(s: rarefy.core.sparsity.Sparsity, saved: Mapping[str, Any]) -> None:
    if "version" in saved and saved["version"] != VERSION:
        raise ValueError(f"state of version {saved['version']}; this rarefy reads version {VERSION}.")
    missing = {"version", *_KEYS} - set(saved)
    if missing:
        raise ValueError(f"this is no state of a rarefy handle: it lacks {', '.join(sorted(missing))}.")
    if saved["method"] != s.method.to_dict():
        raise ValueError(
            f"the state was made by {_named(saved['method'])}, but {s.method} was asked for: resume with the same one."
        )
    if saved["sites"] != site_hash(s.sites) or set(saved["per_site"]) != {site.name for site in s.sites}:
        raise ValueError(
            f"the state belongs to {_sites(list(saved['per_site']))}, hash {saved['sites']}; this model has "
            f"{_sites([site.name for site in s.sites])}, hash {site_hash(s.sites)}: another model, wrapped otherwise "
            "(names are those of its state_dict), or other only= and skip=."
        )
    if not isinstance(saved["step"], int) or saved["step"] < 0:
        raise _damaged(f"step={saved['step']!r}")


def _named(method: Any) -> str:
    try:
        return str(method_from_dict(method))
    except (AttributeError, TypeError, ValueError):
        return repr(method)


def _sites(names: Sequence[str]) -> str:
    return f"{len(names)} sites ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"


def _refuse_weights(site: Site, found: _Read) -> None:
    """Raise ValueError if the model's weights are not those of the saved moment, as far as the state can tell."""
    if isinstance(site, SparseSite):
        _refuse_structure(site, found)
        return
    weight = full(site.parameter).detach()
    wrong = int((weight.ne(0) & ~found.mask).sum())
    if wrong:
        raise ValueError(
            f"{wrong} weights of {site.name!r} are not zero where the saved mask says so: "
            "load the model's own state_dict from the same moment first."
        )
    if found.master is None:
        return
    wrong = int((weight.ne(found.master) & found.mask).sum())
    if wrong:
        raise ValueError(
            f"{wrong} kept weights of {site.name!r} differ from the dense weights saved behind them: "
            "load the model's own state_dict from the same moment first."
        )


def _refuse_structure(site: SparseSite, found: _Read) -> None:
    """A layer that runs sparse brings its structure with its weights."""
    if not site.structure.same_as(Structure.of_mask(found.mask)) or found.trainable is not None:
        raise ValueError(
            f"{site.name!r} runs sparse, and its structure is not the saved mask: "
            "load the model's own state_dict from the same moment first."
        )


def copied_sites(sites: Sequence[Site], model: nn.Module) -> list[Site]:
    """The same sites on a copy of the model, without masks but those of layers that run sparse."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [_copied(site, model.get_submodule(site.name.rpartition(".")[0]), parameters) for site in sites]


def _copied(site: Site, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Site:
    if isinstance(site, SparseSite):
        return SparseSite.of(replace(site, memory={}), cast(SparseLinear, module))
    return replace(
        site,
        module=module,
        held=Held(site.name, parameters[site.name]),
        followers=[Held(f.name, parameters[f.name]) for f in site.followers],
        master=None,
        memory={},
    )

"""The handle's state as data: tensors and JSON values, so that it can be stored without pickling anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rarefy.core import bits
from rarefy.core.commit import follow
from rarefy.core.held import Held, local, shard, whole
from rarefy.core.sites import Site, site_hash

if TYPE_CHECKING:
    import rarefy.core.sparsity

VERSION = 1


def dump(s: rarefy.core.sparsity.Sparsity) -> dict[str, Any]:
    """See `Sparsity.state_dict`."""
    return {
        "version": VERSION,
        "method": s.method.to_dict(),
        "sites": site_hash(s.sites),
        "steps": s.steps,
        "step": s.step,
        "seed": s.seed,
        "generator": s.generator.get_state(),
        "ledger": s.ledger.state_dict(),
        "memory": dict(s.memory),
        "per_site": {site.name: _dump_site(site) for site in s.sites},
    }


def _dump_site(site: Site) -> dict[str, Any]:
    held = site.held
    saved: dict[str, Any] = {
        "pattern": site.pattern.to_dict(),
        "asked": site.asked,
        "mask": bits.pack(site.mask),
        "explored": site.explored,
        "memory": dict(site.memory),
    }
    if held.train is not held.keep:
        saved["trainable"] = bits.pack(site.trainable)
    if site.master is not None:
        saved["master"] = whole(site.master, site.parameter).clone()
    return saved


def load(s: rarefy.core.sparsity.Sparsity, saved: Mapping[str, Any]) -> None:
    """See `Sparsity.load_state_dict`: everything is checked before anything is taken over."""
    _refuse_other(s, saved)
    per_site = saved["per_site"]
    masks = {site.name: bits.unpack(per_site[site.name]["mask"], site.parameter.shape) for site in s.sites}
    trainable = {
        site.name: bits.unpack(per_site[site.name]["trainable"], site.parameter.shape)
        for site in s.sites
        if "trainable" in per_site[site.name]
    }
    for site in s.sites:
        refuse_nonzero(site, masks[site.name])
    for site in s.sites:
        _load_site(site, per_site[site.name], masks[site.name], trainable.get(site.name))
    s.steps, s.step, s.seed = saved["steps"], int(saved["step"]), int(saved["seed"])
    s.generator.set_state(saved["generator"].cpu())
    s.ledger.load_state_dict(saved["ledger"])
    s.memory = dict(saved["memory"])


def _load_site(site: Site, saved: Mapping[str, Any], mask: Tensor, trainable: Tensor | None) -> None:
    device = site.parameter.device
    mask = mask.to(device)
    site.held.set(mask, None if trainable is None else trainable.to(device))
    for follower in site.followers:
        follow(site, follower, mask)
    site.asked = saved["asked"]
    site.memory = dict(saved["memory"])
    master = saved.get("master")
    site.master = None if master is None else shard(master.to(device), site.parameter).clone()
    site.explored = saved["explored"]


def _refuse_other(s: rarefy.core.sparsity.Sparsity, saved: Mapping[str, Any]) -> None:
    missing = {"version", "method", "sites", "steps", "step", "seed", "generator", "ledger", "per_site"} - set(saved)
    if missing:
        raise ValueError(f"this is no state of a rarefy handle: it lacks {', '.join(sorted(missing))}.")
    if saved["version"] != VERSION:
        raise ValueError(f"state of version {saved['version']}; this rarefy reads version {VERSION}.")
    if saved["method"] != s.method.to_dict():
        raise ValueError(
            f"the state was made by {saved['method']}, but {s.method.to_dict()} was asked for: resume it with the same method."
        )
    if saved["sites"] != site_hash(s.sites) or set(saved["per_site"]) != {site.name for site in s.sites}:
        raise ValueError(
            f"the state belongs to sites {saved['sites']} ({', '.join(list(saved['per_site'])[:4])}, …), this model "
            f"has {site_hash(s.sites)} ({', '.join(site.name for site in s.sites[:4])}, …): "
            "another model, or other only= and skip=."
        )


def refuse_nonzero(site: Site, mask: Tensor) -> None:
    """Raise ValueError if the weight is not zero where `mask` is false."""
    wrong = int((local(site.parameter).detach().ne(0) & ~shard(mask.to(site.parameter.device), site.parameter)).sum())
    if wrong:
        raise ValueError(
            f"{wrong} weights of {site.name!r} are not zero where the saved mask says so: "
            "load the model's own state_dict from the same moment first."
        )


def copied_sites(sites: Sequence[Site], model: nn.Module) -> list[Site]:
    """The same sites on a copy of the model, without masks."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    return [
        replace(
            site,
            module=modules[site.name.rpartition(".")[0]],
            held=Held(site.name, parameters[site.name]),
            followers=[Held(f.name, parameters[f.name]) for f in site.followers],
            master=None,
            memory={},
        )
        for site in sites
    ]

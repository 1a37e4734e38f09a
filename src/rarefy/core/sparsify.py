"""The one verb: `sparsify(model, method, ...)`, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.capture import default_sites
from rarefy.core.choose import refuse_infinite
from rarefy.core.commit import reshard
from rarefy.core.followers import find_followers
from rarefy.core.held import full, local
from rarefy.core.live import refuse_second_handle
from rarefy.core.method import Driver, Journal, Method, Progress
from rarefy.core.sites import Selector, find_sites
from rarefy.core.sparse import execute
from rarefy.core.sparse.execute import Execution
from rarefy.core.sparsity import Sparsity

Loss = Callable[[Any, Any], Tensor]


def sparsify(
    model: nn.Module,
    method: Method,
    *,
    optimizer: Any = None,
    steps: int | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    only: Selector | Iterable[Selector] | None = None,
    skip: Selector | Iterable[Selector] | None = None,
    seed: int = 0,
    resume: Mapping[str, Any] | None = None,
    execution: Execution = "simulated",
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> Sparsity:
    """Make `model` sparse in place by `method`, now or during the training that follows.

    Args:
        optimizer: one torch optimizer or a sequence; with it the returned handle is attached: zeros stay zeros and the
            method's schedule runs inside the ordinary loop.
        steps: optimizer steps of the whole run; floats in schedules are fractions of it.
        data: batches for methods that need them: a tensor is passed as model(batch), a tuple as model(*batch), a
            mapping as model(**batch). Replicas give the model that DistributedDataParallel wraps, each its own
            batches: scores are averaged. Otherwise every rank must be given the same batches.
        loss: loss(model, batch) -> scalar tensor, for scores that need gradients.
        only, skip: which weights may be sparse: names, globs, module classes or predicates (name, module) -> bool. By
            default all of Linear and convolutions; block-wise methods (Wanda and its like) mean those in the repeated
            blocks of a model that has some, and leave its embeddings and head alone.
        seed: of everything random here; global seeds are never touched.
        resume: the `state_dict()` of a handle: nothing is chosen and the model is left as it is.
        execution: "simulated" trains dense tensors that hold zeros. "sparse" trains the non-zeros alone: once masks are
            chosen the nn.Linear layers of all sites become `SparseLinear` in place, their Parameters (the same objects)
            the vectors of the values, until `end()`. On the CPU, with elementwise optimizers. A resumed run is made
            sparse first, then model and optimizer load what they saved.
        progress: told (blocks done, blocks, name of the next) by block-wise methods.
        journal: where block-wise methods note finished blocks (`rarefy.io.Journal`): an interrupted call, made again
            with the model as it was, continues there.

    Returns the handle. Raises ValueError, TypeError or RuntimeError, with the model untouched, on anything that cannot
    be: NaN weights, no site, a pattern that does not fit, missing data, another live handle.

    >>> model = nn.Linear(8, 4)
    >>> from rarefy import Magnitude
    >>> round(sparsify(model, Magnitude(sparsity=0.75)).sparsity, 2)
    0.75
    """
    _refuse_no_method(method)
    execute.refuse_sparse_layers(model)
    reshard(model)
    sites = find_sites(model, only=only, skip=skip)
    if method.scope == "blocks" and only is None:
        sites = default_sites(model, sites)
    refuse_second_handle(model)
    execute.refuse(execution, method, model, sites)
    s = Sparsity(model, method, sites, steps=None, seed=seed, execution=execution)
    _fit_pattern(s, model)
    for site in sites:
        refuse_infinite(site.name, full(site.parameter).detach(), "weights")
    if resume is not None:
        s.load_state_dict(resume)
        _refuse_other_steps(s, steps)
    else:
        _refuse_missing(method, data, loss)
    _refuse_unfit(s, optimizer, steps)
    if resume is None:
        s.progress, s.journal = progress, journal
        _begin(s, data, loss, steps)
    if execution == "sparse" and not s.ended:
        execute.enter(s, resumed=resume is not None)
    if optimizer is not None:
        s.attach(optimizer, steps)
    return s


def _refuse_unfit(s: Sparsity, optimizer: Any, steps: int | None) -> None:
    """What `attach` would refuse, while the model is still untouched."""
    if optimizer is not None:
        s.fit(optimizer, steps)
    elif steps is not None:
        s.checked_steps(steps)


def _begin(s: Sparsity, data: Iterable[Any] | None, loss: Loss | None, steps: int | None) -> None:
    """Choose the first masks. Whatever raises leaves the model untouched: masks are staged until all are known."""
    s.steps, s.data, s.loss = steps, data, loss
    for site in s.sites:
        kept = torch.ones((), dtype=torch.bool, device=site.parameter.device)
        s.keep(site, kept.expand(site.stored_shape))  # what begin() passes over stays dense
        if "master" in s.method.needs:
            site.master = local(site.parameter).detach().clone()
    try:
        s.method.begin(s)
        s.commit()
    finally:
        s.data = s.loss = s.progress = s.journal = None


def _fit_pattern(s: Sparsity, model: nn.Module) -> None:
    pattern = getattr(s.method, "pattern", None)
    if pattern is None:
        return
    for site in s.sites:
        site.pattern = pattern
        reason = pattern.fits(site.pattern_shape)
        if reason is not None:
            raise ValueError(f"{site.name!r}: {reason} (skip={site.name!r}).")
    if not any(pattern.whole(site.pattern_shape) for site in s.sites):
        shapes = ", ".join(f"{site.name} {site.shape}" for site in s.sites[:4])
        raise ValueError(f"pattern {pattern} has no whole group in any site ({shapes}): choose smaller groups.")
    if str(pattern) == "channel":
        find_followers(model, s.sites)


def _refuse_no_method(method: Any) -> None:
    if isinstance(method, Driver):
        raise TypeError(
            f"{method} runs training itself, several times: call method.run(model, train), where "
            "train(model, sparsity) calls sparsity.attach(optimizer, steps)."
        )
    if not isinstance(method, Method):
        raise TypeError(f"method={method!r} is no method value: pass one, such as rarefy.Magnitude(sparsity=0.9).")


def _refuse_missing(method: Method, data: Any, loss: Any) -> None:
    if "data" in method.needs and data is None:
        raise ValueError(f"{method} needs data=, an iterable of batches.")
    if "loss" in method.needs and loss is None:
        raise ValueError(f"{method} needs loss=, a callable loss(model, batch) that returns a scalar tensor.")


def _refuse_other_steps(s: Sparsity, steps: int | None) -> None:
    if "steps" in s.method.needs and None not in (steps, s.steps) and steps != s.steps:
        raise ValueError(f"steps={steps}, but the saved run has {s.steps} steps: give the same number.")

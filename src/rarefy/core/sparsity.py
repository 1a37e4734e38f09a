"""The handle: everything that changes while a model is sparse, and what methods and users ask of it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.axes import Allocation, Interval, resolve
from rarefy.core import choose, live, state
from rarefy.core.commit import Staged, commit, find_parameters, rebind, refuse_misfit, reset_masked_state, settle
from rarefy.core.held import Everywhere, Held
from rarefy.core.ledger import Ledger
from rarefy.core.method import Journal, Method, Progress
from rarefy.core.optimizers import as_sequence, learning_rate, refuse_unfit
from rarefy.core.replicas import compare_at_first_step
from rarefy.core.sites import Site, site_hash
from rarefy.core.sparse import execute
from rarefy.core.sparse.execute import Execution
from rarefy.core.sparse.site import SparseSite
from rarefy.core.watch import Watch


class Sparsity:
    """What `rarefy.sparsify` returns. Users read `masks`, `sparsity`, `density`, `step`, `ledger` and call `attach`,
    `detach`, `end`, `state_dict`; the rest is what methods use.

    The parameter always holds the weight that the forward pass uses; its masked entries are +0.0 after every step.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        sites: Sequence[Site],
        *,
        steps: int | None = None,
        seed: int = 0,
        execution: Execution = "simulated",
    ) -> None:
        self.model = model
        self.method = method
        self.sites: tuple[Site, ...] = tuple(sites)
        self.steps = steps
        self.step = 0
        self.seed = seed
        self.execution: Execution = execution
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.ledger = Ledger([s.name for s in sites], [s.numel for s in sites], method.dense_backward)
        self.memory: dict[str, Any] = {}
        self.data: Any = None
        self.loss: Any = None
        self.progress: Progress | None = None
        self.journal: Journal | None = None
        self.ready: tuple[Site, ...] = ()
        self.deciding = True
        self.ended = False
        self._staged: dict[int, Staged] = {}
        self._watch: Watch | None = None
        self._release: weakref.finalize[..., Sparsity] | None = None
        self._replicas: list[Any] = []
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # ever attached: they may hold state of the sites

    # -- what a user reads ---------------------------------------------------------------------------------------

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name in `model.state_dict()` → boolean mask of its shape, true where the weight is kept. Copies."""
        return {site.name: site.mask for site in self.sites}

    @property
    def sparsity(self) -> float:
        """Share of masked weights over all sites, now."""
        return 1 - sum(self.kept(site) for site in self.sites) / max(1, sum(site.numel for site in self.sites))

    def density(self, name: str) -> float:
        """Share of kept weights of one site. Raises KeyError naming the sites."""
        site = next((s for s in self.sites if s.name == name), None)
        if site is None:
            raise KeyError(f"no site {name!r}; the sites are {', '.join(s.name for s in self.sites)}")
        return self.kept(site) / site.numel

    @property
    def attached(self) -> bool:
        """Whether optimizers are being watched, so that zeros stay zeros while training."""
        return self._watch is not None

    @property
    def site_hash(self) -> str:
        return site_hash(self.sites)

    def __repr__(self) -> str:
        at = f"step {self.step}" + (f" of {self.steps}" if self.steps is not None else "")
        return f"<Sparsity {self.method}: {self.sparsity:.2%} of {len(self.sites)} sites, {at}>"

    # -- life ----------------------------------------------------------------------------------------------------

    def attach(self, optimizer: Any, steps: int | None = None) -> Sparsity:
        """Watch one or several optimizers, so that zeros stay zeros and the method's schedule runs.

        steps: optimizer steps of the whole run; fixed once it has begun. May be called again with a new optimizer;
        parameters are found anew by name, and masked weights written to meanwhile are zero again. Raises, changing
        nothing: RuntimeError if this handle has ended or another live one holds the same model, ValueError or TypeError
        for unfit optimizers, steps and missing parameters. Replicas with different masks raise at the first step.
        """
        optimizers, steps, parameters = self.fit(optimizer, steps)
        live.refuse_second_handle(self.model, but=self)
        self.detach()
        rebind(self, parameters)
        settle(self)
        self.steps = steps
        self._known.update(optimizers)
        execute.take_in(self, optimizers)
        self._replicas = compare_at_first_step(self, optimizers)
        self._watch = Watch(self, optimizers)
        self._release = weakref.finalize(self, _let_go, self.held())
        self._release.atexit = False
        live.enter(self)
        reset_masked_state(self)
        return self

    def fit(self, optimizer: Any, steps: int | None) -> tuple[tuple[Optimizer, ...], int | None, Mapping[str, Any]]:
        """Optimizers, steps and parameters as `attach` will take them; raises as it does."""
        if self.ended:
            raise RuntimeError("this handle has ended: call rarefy.sparsify again for another run.")
        optimizers = as_sequence(optimizer)
        steps = self.checked_steps(steps)
        parameters = find_parameters(self, self.model)
        held = [Held(name, p) for name, p in parameters.items()]
        refuse_unfit(optimizers, held)
        if self.execution == "sparse":
            execute.refuse_optimizers(optimizers, held)
        self.method.wants_dense_gradient(self.step, steps)  # schedules that cannot be raise here
        return optimizers, steps, parameters

    def checked_steps(self, steps: int | None) -> int | None:
        """`steps`, or those given before. Raises ValueError for what the method cannot run with."""
        steps = self.steps if steps is None else steps
        if steps is not None and (type(steps) is not int or steps < 0):
            raise ValueError(f"steps={steps!r}: the number of optimizer steps of the whole run, an int, 0 or more.")
        if "steps" in self.method.needs:
            if steps is None:
                raise ValueError(f"{self.method} needs steps=, the optimizer steps of the whole run, for its schedule.")
            if self.steps is not None and self.step > 0 and steps != self.steps:
                raise ValueError(
                    f"steps={steps}, but step {self.step} of a run of {self.steps} is complete: keep steps."
                )
        return steps

    def detach(self) -> None:
        """Stop watching; masks and state stay. Nothing holds zeros any more until `attach`."""
        for hook in self._replicas:
            hook.remove()
        if self._watch is not None:
            self._watch.remove()
        if self._release is not None:
            self._release.detach()
        self._watch, self._release, self._replicas = None, None, []
        live.leave(self)

    def end(self) -> None:
        """Finish: exact zeros and a plain model stay behind, nothing is watched any more; masks can still be read.

        Layers that ran sparse are nn.Linear again, their Parameters (the same objects) dense; state of the optimizers
        that were attached goes along.
        """
        if self.ended:
            return
        self.method.end(self)
        self.commit()
        self.detach()
        execute.leave(self, tuple(self._known))
        for site in self.sites:
            site.master = None
        for held in self.held():
            held.clear_weight()
        self.ended = True

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as tensors and JSON values: masks one bit a weight, step, generator, memory.

        Of a sharded model it is whole, the same on every rank: all of them must call this, and any may save it.
        """
        return state.dump(self)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over a saved state; the model must hold the weights of the same moment already.

        Raises ValueError, changing nothing, if the state is damaged or belongs to other sites or another method.
        """
        rebind(self, find_parameters(self, self.model))
        # A run that is about to be made sparse loads its weights afterwards, with their structure.
        later = self.execution == "sparse" and not saved.get("ended") and not isinstance(self.sites[0], SparseSite)
        state.load(self, saved, same_weights=not later)
        if self.ended:
            self.detach()
            execute.leave(self, tuple(self._known))
        elif self.attached:
            self.attach(self.optimizers)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sparsity:
        """A copy bound to the copied model (copy both in one deepcopy), attached to nothing."""
        model = copy.deepcopy(self.model, memo)
        sites = state.copied_sites(self.sites, model)
        twin = Sparsity(model, self.method, sites, steps=self.steps, seed=self.seed, execution=self.execution)
        state.load(twin, state.dump(self), same_weights=False)
        return twin

    # -- what a method asks --------------------------------------------------------------------------------------

    def keep(self, site: Site, mask: Tensor, trainable: Tensor | Everywhere | None = None) -> None:
        """Stage a new mask; all staged masks take effect together once the method's hook has returned.

        mask: boolean, in the weight's shape; or what `choose.exchanged` returns. trainable: where gradients reach the
        optimizer (default: the mask).
        """
        for tensor in (mask, trainable):
            if isinstance(tensor, Tensor):
                refuse_misfit(site, tensor)
        if isinstance(site, SparseSite):
            mask, trainable = site.positions_of(mask, trainable), None
        self._staged[site.index] = (mask, trainable)

    def project(
        self,
        scores: Mapping[Site, Tensor],
        allocation: Allocation,
        sparsity: float | None,
        *,
        pool: Any = "mean_abs",
        nested: Mapping[Site, Tensor] | None = None,
    ) -> dict[Site, Tensor]:
        """pattern.project(score, budget): masks for scores of the weights' shapes; remembers what was asked.

        nested: masks (now) whose false units must stay false."""
        return choose.project(scores, pool, allocation, sparsity, nested=nested, into=self.spill)

    def dense_gradient(self, site: Site) -> Tensor:
        """The gradient at all positions, in steps announced by `wants_dense_gradient`. Raises unless finite."""
        gradient = site.held.dense_gradient()
        choose.refuse_infinite(site.name, gradient, "gradients")
        return gradient

    def dense_gradient_rows(self, site: Site) -> Iterator[Tensor]:
        """The same in chunks of rows, from the first, for `choose.exchanged`; under sparse execution never whole."""
        if not isinstance(site, SparseSite):
            yield self.dense_gradient(site)
            return
        for rows in site.gradient_rows():
            choose.refuse_infinite(site.name, rows, "gradients")
            yield rows

    def require_finite_gradient(self, site: Site) -> None:
        """Raise ValueError unless the dense gradient of this step is finite, before the optimizer spreads it."""
        if not isinstance(site, SparseSite) or not site.has_finite_gradient():
            self.dense_gradient(site)

    def skip_optimizer_step(self) -> None:
        """Void the user's optimizer step that is about to happen; it still counts as a step."""
        if self._watch is not None:
            self._watch.skip = True

    def at(self, when: Interval, what: str = "a fraction of the run") -> int:
        """An int is a step; a float is that fraction of `steps`."""
        return resolve(when, self.steps, what)

    def learning_rate(self, site: Site) -> float:
        """Of the optimizer that updates the site, now."""
        return learning_rate(self.optimizers, site.parameter)

    def kept(self, site: Site) -> int:
        """Kept weights of a site."""
        return self.ledger.entries[-1].kept[site.index] if self.ledger.entries else site.numel

    # -- what the core asks --------------------------------------------------------------------------------------

    @property
    def lean(self) -> bool:
        """Whether what is finished leaves memory: while a run begins whose journal wants that."""
        return self.journal is not None and self.journal.lean

    def spill(self, tensor: Tensor) -> Tensor:
        """A tensor's bits out of memory where the run is lean, else the tensor itself."""
        return tensor if self.journal is None else self.journal.spill(tensor)

    def held(self) -> list[Held]:
        """Every parameter under a mask: sites and their followers."""
        return [h for site in self.sites for h in (site.held, *site.followers)]

    def commit(self) -> None:
        """Let all staged masks take effect."""
        staged, self._staged = self._staged, {}
        if staged:
            commit(self, staged)

    def restart(self, step: int) -> None:
        """A driver begins another round at `step`, with another optimizer to come; the ledger goes on."""
        self.detach()
        self.step, self.steps = step, None

    def drop_staged(self) -> None:
        self._staged.clear()

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """Those being watched."""
        return self._watch.optimizers if self._watch is not None else ()


def _let_go(held: Sequence[Held]) -> None:
    """Nobody can reach the handle any more: its model trains on as a plain one."""
    for each in held:
        each.detach()

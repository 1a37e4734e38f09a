"""One run from first weights to result: make the network sparse in the method's way, train it, judge it, count."""

import hashlib
import math
import time
from typing import Any

import safetensors.torch
from torch import Tensor, nn

import rarefy
from rarefy.axes import count
from rarefy.bench.account import Phase, Trained, counted_forwards, dense_phase, parameters, phase, train_section
from rarefy.bench.controls import Given, narrowed, shuffled
from rarefy.bench.data import Data
from rarefy.bench.environment import Environment
from rarefy.bench.results import Result
from rarefy.bench.runs import Run
from rarefy.bench.seeds import stream
from rarefy.bench.train import Tick, Training, balanced, loss
from rarefy.core import bits
from rarefy.core.flops import measure
from rarefy.core.method import Driver
from rarefy.core.sites import find_sites

__all__ = ["Masks", "execute", "pack_masks", "trained", "unpack_masks"]

_PER_CLASS = 10  # of the one batch on which masks are scored before training

Masks = dict[str, Tensor]


def execute(
    run: Run, data: Data, environment: Environment, *, parent: Masks | None = None, tick: Tick = lambda _: None
) -> tuple[Result, bytes]:
    """Make the run. parent: the final masks of `run.parent`, where there is one.

    Returns the result and the file of final masks that belongs beside it. Methods see training images only; the test
    images are looked at once, after the last step. Raises what the method raises.
    """
    if run.parent is not None and parent is None:
        raise ValueError(f"{run} needs the final masks of {run.parent}; make that run first")
    trained = _train(_Job(run, data, tick), parent)
    trained.sparsity.end()
    rarefy.check(trained.model, trained.sparsity)
    masks = pack_masks(trained.sparsity.masks)
    result = Result(
        key=run.key(data, environment),
        run=run.section(data),
        method=run.method.to_dict(),
        train=train_section(run.task, trained, data, hashlib.sha256(masks).hexdigest()),
        environment=environment,
    )
    return result, masks


def trained(run: Run, data: Data) -> Trained:
    """The network of a run, trained as `execute` does it, for those who want the network itself. Controls need more."""
    found = _train(_Job(run, data, lambda _: None), None)
    found.sparsity.end()
    return found


def pack_masks(masks: Masks) -> bytes:
    """A safetensors file: one bit a weight."""
    return safetensors.torch.save({name: bits.pack(mask) for name, mask in masks.items()})


def unpack_masks(file: bytes, model: nn.Module) -> Masks:
    """The inverse of `pack_masks`, in the shapes of the model's parameters."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return {name: bits.unpack(packed, shapes[name]) for name, packed in safetensors.torch.load(file).items()}


class _Job:
    """A run with what all ways of training need."""

    def __init__(self, run: Run, data: Data, tick: Tick):
        self.run, self.data, self.tick = run, data, tick
        self.model = _network(run)
        self.dense = measure(self.model, data.train.inputs[:1])

    def training(self, model: nn.Module) -> Training:
        run = self.run
        return Training(model, self.data.train, run.task, seed=run.seed, steps=run.steps, tick=self.tick)

    def phase(self, sparsity: Any) -> Phase:
        return phase(sparsity, self.dense, self.run.task.batch)


def _train(job: _Job, parent: Masks | None) -> Trained:
    method = job.run.method
    if parent is not None:
        return _train_from_start(job, _given(job, parent))
    if isinstance(method, Driver):
        return _drive(job, method)
    return _train_then_prune(job, method) if method.stage == "one shot" else _train_from_start(job, method)


def _train_from_start(job: _Job, method: Any) -> Trained:
    training = job.training(job.model)
    sparsity, scoring, seconds = _sparsify(job, method, training, job.run.steps)
    training.advance(job.run.steps)
    return Trained(
        job.model, sparsity, [job.phase(sparsity)], tuple(method.labels), training.seconds + seconds, scoring
    )


def _train_then_prune(job: _Job, method: Any) -> Trained:
    """A one-shot method prunes a network trained for a part of the steps; the others fine-tune it."""
    run = job.run
    training = job.training(job.model)
    first = round(run.task.prune_at * run.steps)
    training.advance(first)
    sparsity, scoring, seconds = _sparsify(job, method, training, run.steps - first)
    training.advance(run.steps)
    phases = [dense_phase(job.model, job.dense, first, run.task.batch), job.phase(sparsity)]
    labels = ("static", "dense-to-sparse", "simulated")
    return Trained(job.model, sparsity, phases, labels, training.seconds + seconds, scoring)


def _drive(job: _Job, driver: Any) -> Trained:
    """A driver trains several times; its ledger goes on from round to round, so every round is paid for."""
    seconds: list[float] = []

    def train(model: nn.Module, sparsity: Any) -> None:
        training = job.training(model)
        training.done = sparsity.step
        sparsity.attach(training.optimizer, job.run.steps)
        training.advance(job.run.steps)
        seconds.append(training.seconds)

    sparsity = driver.run(job.model, train)
    return Trained(job.model, sparsity, [job.phase(sparsity)], tuple(driver.labels), math.fsum(seconds))


def _sparsify(job: _Job, method: Any, training: Training, steps: int) -> tuple[Any, float, float]:
    """(handle, FLOPs, seconds) of choosing the first masks."""
    begin = time.perf_counter()
    with counted_forwards(job.model, job.dense) as spent:
        material = _material(method.needs, job.data, job.run.seed)
        sparsity = rarefy.sparsify(
            job.model, method, optimizer=training.optimizer, steps=steps, seed=stream("masks", job.run.seed), **material
        )
    return sparsity, math.fsum(spent), time.perf_counter() - begin


def _material(needs: frozenset[str], data: Data, seed: int) -> dict[str, Any]:
    """`data` and `loss`: one balanced batch of training images, without labels for methods that only run the model."""
    images, labels = balanced(data.train, _PER_CLASS, seed)
    if "data" in needs and "loss" not in needs:
        return {"data": [images]}
    return {"data": [(images, labels)], "loss": loss}


# --- controls --------------------------------------------------------------------------------------------------------


def _network(run: Run) -> nn.Module:
    if run.control == "small_dense":
        return run.task.build(run.seed, width=_small_width(run))
    return run.task.build(stream("other weights", run.seed) if run.control == "reinitialised" else run.seed)


def _small_width(run: Run) -> int:
    """The widest dense network with no more parameters than the sparse one has non-zeros, biases and norms included."""
    model = run.task.build(0)
    prunable = sum(site.numel for site in find_sites(model))
    budget = parameters(model) - prunable + count(run.sparsity, prunable)
    return narrowed(lambda width: parameters(run.task.build(0, width=width)), budget)


def _given(job: _Job, parent: Masks) -> Given:
    """The parent's masks, shuffled if that is the control."""
    masks = dict(parent)
    if job.run.control == "shuffled":
        for site in find_sites(job.model):
            site.pattern = getattr(job.run.method, "pattern", None) or site.pattern
            masks[site.name] = shuffled(site, masks[site.name], job.run.seed)
    return Given.of(masks)

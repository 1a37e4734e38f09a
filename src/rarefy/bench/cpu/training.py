"""Steps of training an MLP, batch 128, SGD with momentum: dense, sparseprop, and truly sparse.

A step is forward, loss, backward, optimizer and zero_grad. Memory is counted over live storages: weights, gradients,
optimizer state and indices of the Linears but the last, which stays dense in all of them, over their non-zeros.
"""

import gc
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.bench.cpu.cases import Zeros
from rarefy.bench.cpu.context import Context
from rarefy.bench.cpu.document import LAYER, Row, make_row
from rarefy.bench.cpu.grids import Grid, digits, times_faster
from rarefy.bench.cpu.matrices import sort_out
from rarefy.bench.cpu.peers import propagation
from rarefy.bench.cpu.timing import measure
from rarefy.bench.seeds import generator

__all__ = ["TrainingCase", "measure_training", "training_cases", "training_grid"]

_BATCH = 128
_STEPS = 1_000_000  # of a run that is never finished


@dataclass(frozen=True)
class TrainingCase:
    """An MLP by its widths, and the sparsity of all its layers but the last."""

    widths: tuple[int, ...]
    sparsity: float

    @property
    def name(self) -> str:
        """As in 784-1000-1000-10."""
        return "-".join(map(str, self.widths))


def training_cases(*, quick: bool = False) -> list[TrainingCase]:
    """Two networks, four sparsities."""
    shares = (0.9, 0.99) if quick else (0.8, 0.9, 0.95, 0.99)
    return [TrainingCase(w, s) for w in ((784, 1000, 1000, 10), (3072, 4096, 4096, 10)) for s in shares]


def measure_training(case: TrainingCase, context: Context) -> Row:
    """One row: all candidates train the same network on the same images, interleaved."""
    context.say(f"{case.name} {100 * case.sparsity:g} %")
    source = generator(f"cpu training {case.name}", 0)
    images = torch.randn(_BATCH, case.widths[0], generator=source)
    labels = torch.randint(0, case.widths[-1], (_BATCH,), generator=source)
    offers: dict[str, Any] = {
        "torch fp32": [_step(*_dense(case), images, labels)],
        "torch bf16 autocast": [_step(*_dense(case), images, labels, autocast=True)],
    }
    reference = _dense(case)
    handle = _sparsify(case, reference, "simulated")
    masks = {name: mask.clone() for name, mask in handle.masks.items()}
    nonzeros = sum(int(mask.sum()) for mask in masks.values())
    offers["sparseprop"] = (
        [_step(*_propagating(reference[0], masks), images, labels)]
        if context.peers.has("sparseprop")
        else context.peers.missing["sparseprop"]
    )
    facts: dict[str, float | str] = {}
    sparse = _dense(case)
    try:
        _sparsify(case, sparse, "sparse")
        step = _step(*sparse, images, labels)
        step()
        F.cross_entropy(sparse[0](images), labels).backward()  # a step forgets gradients, but needs room for them
        facts = {"bytes per non-zero": round(_bytes(*sparse) / nonzeros, 3)}
        offers[LAYER] = [step]
    except (RuntimeError, ValueError, NotImplementedError) as error:
        offers[LAYER] = str(error)
    candidates, left_out = sort_out(offers)
    samples, slow = measure(candidates, context.plan)
    zeros = Zeros("unstructured", case.sparsity)
    row = Row(
        section="training", name=case.name, batch=_BATCH, regime="hot", dtype="fp32", pattern=zeros.pattern,
        sparsity=zeros.sparsity, nonzeros=nonzeros, left_out={**left_out, **slow}, facts=facts,
    )  # fmt: skip
    return make_row(row, samples, {})


def _sparsify(
    case: TrainingCase, trained: tuple[nn.Module, torch.optim.Optimizer], execution: Literal["simulated", "sparse"]
) -> rarefy.Sparsity:
    """Random masks of one share in every layer but the last, of ten outputs, which stays dense."""
    model, optimizer = trained
    method = rarefy.Random(sparsity=case.sparsity, allocation="uniform")
    last = str(2 * (len(case.widths) - 2))
    return rarefy.sparsify(model, method, optimizer=optimizer, steps=_STEPS, skip=last, execution=execution)


def _dense(case: TrainingCase) -> tuple[nn.Module, torch.optim.Optimizer]:
    layers: list[nn.Module] = []
    source = generator(f"cpu weights {case.name}", 0)
    for inputs, outputs in zip(case.widths, case.widths[1:], strict=False):
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            layer.weight.normal_(0, (2 / inputs) ** 0.5, generator=source)
            layer.bias.zero_()
        layers += [layer, nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    return model, _sgd(model)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def _propagating(model: nn.Module, masks: dict[str, Tensor]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The masked network with sparseprop's modules in the place of its sparse layers."""
    layers: list[nn.Module] = []
    for name, layer in model.named_children():
        mask = masks.get(f"{name}.weight")
        if isinstance(layer, nn.Linear) and mask is not None and not bool(mask.all()):
            layers.append(propagation.sparse_linear(layer.weight, layer.bias))
        else:
            layers.append(layer)
    twin = nn.Sequential(*layers)
    return twin, _sgd(twin)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, *, autocast: bool = False
) -> Callable[[], object]:
    def step() -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), warnings.catch_warnings():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def _bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of live storages for the sparse layers: values, gradients, optimizer state, indices."""
    gc.collect()
    sparse = [m for m in model.children() if not isinstance(m, nn.ReLU)][:-1]
    tensors: list[Tensor] = []
    for module in sparse:
        parameters = [p for name, p in module.named_parameters() if name != "bias"]
        tensors += [*parameters, *(p.grad for p in parameters if p.grad is not None)]
        tensors += [t for p in parameters for t in optimizer.state[p].values() if isinstance(t, Tensor)]
        tensors += _held(module)
    return storage_bytes(tensors)


def _held(module: nn.Module) -> Iterable[Tensor]:
    """All other tensors that hang on a module, wherever it keeps them."""
    seen: list[Any] = [v for k, v in vars(module).items() if k not in ("_parameters", "_modules")]
    known: set[int] = set()
    while seen:
        value = seen.pop()
        if id(value) in known:
            continue
        known.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            seen += value.values()
        elif isinstance(value, (list, tuple)):
            seen += value
        elif type(value).__module__.startswith("rarefy."):
            seen += [getattr(value, name) for name in getattr(value, "__slots__", ()) if hasattr(value, name)]
            seen += getattr(value, "__dict__", {}).values()


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind these tensors, each storage once.

    >>> x = torch.zeros(8)
    >>> storage_bytes([x, x[2:], torch.zeros(2)])
    40
    """
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def training_grid(rows: Sequence[Row]) -> Grid:
    """ms per step and bytes per non-zero."""
    columns = (
        "network",
        "zeros",
        "torch fp32",
        "torch bf16 autocast",
        "sparseprop",
        LAYER,
        "× torch",
        "× sparseprop",
        "B/non-zero",
    )
    cells = []
    for row in (row for row in rows if row.section == "training"):
        times = [row.times.get(name) for name in columns[2:6]]
        cells.append((
            row.name, f"{100 * row.sparsity:g} %", *("–" if t is None else digits(t.median / 1000) for t in times),
            times_faster(row.ratios.get("torch fp32"), interval=True),
            times_faster(row.ratios.get("sparseprop"), interval=True), str(row.facts.get("bytes per non-zero", "–")),
        ))  # fmt: skip
    note = f"Medians in ms per step, batch {_BATCH}, SGD with momentum; the last layer is dense in all of them."
    return Grid("Training", columns, tuple(cells), left=2, note=note)

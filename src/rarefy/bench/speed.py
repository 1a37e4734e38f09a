"""What `rarefy speed` measures: a network, dense against packed, and which kernels were chosen for its layers.

Built-in networks have random weights with zeros drawn per layer: how fast they run depends on where zeros are, not on
values. Timing is the packer's own: interleaved pairs in one process, median and a 95 % interval.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from rarefy.bench.data import Data
from rarefy.bench.execute import trained
from rarefy.bench.leaderboard import Table
from rarefy.bench.lineup import title
from rarefy.bench.models import mlp, quiet
from rarefy.bench.runs import Run
from rarefy.core.method import Driver
from rarefy.io.file import load
from rarefy.runtime import PackReport, pack
from rarefy.runtime.pack import Progress
from rarefy.runtime.report import duration, size

__all__ = ["NETWORKS", "Demonstrated", "Subject", "demonstrate", "load_subject", "speed", "thinned"]


@dataclass(frozen=True)
class Subject:
    """What is packed: a model with zeros, and the shape of one sample."""

    name: str
    model: nn.Module
    sample: tuple[int, ...]


def _pointwise() -> nn.Module:
    """The 1×1 convolutions of a MobileNet at 14×14, with ReLU."""
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Conv2d(256, 256, 1), nn.ReLU()]
    return nn.Sequential(*layers)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "digits-mlp": (lambda: mlp((64, 300, 100, 10)), (64,)),
    "lenet-300-100": (lambda: mlp((784, 300, 100, 10)), (784,)),
    "mlp-1024": (lambda: mlp((1024,) * 5), (1024,)),
    "mlp-4096": (lambda: mlp((4096,) * 5), (4096,)),
    "pointwise-256": (_pointwise, (256, 14, 14)),
}


def speed(
    subject: Subject,
    *,
    batches: list[int],
    dtype: str | None = None,
    quantize: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Pack the subject's model, in place, for batches of these sizes. Raises ValueError as `rarefy.pack` does."""
    if not batches or min(batches) < 1:
        raise ValueError(f"--batch {','.join(map(str, batches))}: whole numbers of samples, 1 or more")
    generator = torch.Generator().manual_seed(0)
    examples: list[Any] = [torch.randn((batch, *subject.sample), generator=generator) for batch in batches]
    return pack(subject.model, example=examples, dtype=dtype, quantize=quantize, threads=threads, progress=progress)


def load_subject(target: str, sparsity: float) -> Subject:
    """A built-in network with that share of zeros in each layer, or the matrices of a safetensors file.

    Of a file every 2-D tensor is a layer; they run on inputs of their own, since the file does not say how they are
    connected. Raises ValueError for a name that is neither, or a file without matrices.
    """
    if target in NETWORKS:
        make, sample = NETWORKS[target]
        return Subject(f"{target}, {sparsity:.0%} zeros", thinned(quiet(make), sparsity), sample)
    path = Path(target)
    if path.suffix != ".safetensors":
        known = ", ".join(NETWORKS)
        raise ValueError(f"{target!r} is neither a safetensors file nor one of {known}, nor a model directory")
    layers = {
        name: _layer(tensor) for name, tensor in _read(path).items()
        if tensor.ndim == 2 and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    }  # fmt: skip
    if not layers:
        raise ValueError(f"{path.name} holds no matrix: `rarefy speed` times Linear layers")
    return Subject(path.name, Side(layers).eval(), (1,))


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, those of packed layers unpacked. Raises ValueError where it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:  # pyright: ignore
            ours = any(key.startswith("rarefy") for key in file.metadata() or {})
        return load(path) if ours else safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path.name} is no whole safetensors file: {error}") from None


@torch.no_grad()
def thinned(model: nn.Module, sparsity: float, seed: int = 0) -> nn.Module:
    """Random zeros in every Linear and Conv2d, drawn from the seed; the model in evaluation mode."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"--sparsity {sparsity:g}: a share of zeros, at least 0 and below 1")
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.mul_(torch.rand(module.weight.shape, generator=generator) >= sparsity)
    return model.eval()


class Side(nn.Module):
    """Layers that stand side by side: each is fed by itself, with the batch of the input."""

    def __init__(self, layers: Mapping[str, nn.Linear]):
        super().__init__()
        self.layers = nn.ModuleDict({name.replace(".", "/"): layer for name, layer in layers.items()})

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, 1] is repeated along the features of each layer; the sum of first outputs is returned."""
        total = x.new_zeros(len(x))
        for layer in self.layers.values():
            wide: Any = layer
            total = total + wide(x.expand(-1, wide.in_features).contiguous())[:, 0]
        return total


def _layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.float(), requires_grad=False)
    return layer


# --- the end of the demo ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demonstrated:
    """The best sparse network of a comparison: how it was made, and what packing it brought for one image."""

    title: str
    accuracy: float
    report: PackReport

    def __str__(self) -> str:
        """In two sentences."""
        report = self.report
        whole = report.whole[0] if report.whole else None
        times = (
            f"{duration(whole.dense)} dense, {duration(whole.packed)} packed ({whole.ratio:.1f}×)"
            if whole else "as dense: nothing was faster here"
        )  # fmt: skip
        kept = "the dense network stays: packed it was slower" if report.reverted else "values unchanged"
        return (
            f"Packed: the best sparse network ({self.title}, {self.accuracy:.1f} %), one image at a time: {times}; "
            f"weights {size(report.bytes_before)} dense, {size(report.bytes_after)} packed; {kept}."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"title": self.title, "accuracy": self.accuracy, **self.report.to_dict()}


def demonstrate(table: Table, runs: Sequence[Run], data: Data) -> Demonstrated | None:
    """Train the best sparse run of a table once more, to the same weights, and pack it. None where there is none.

    Runs under controls and drivers, which train many times, are not asked.
    """
    names = [r.name for r in table.rows if r.is_plain and r.name != "dense"]
    plain = {r.name: r for r in runs if r.control == "none" and not isinstance(r.method, Driver) and r.seed == 0}
    best = next((plain[name] for name in names if name in plain), None)
    if best is None:
        return None
    model = trained(best, data).model.eval()
    row = table.row(best.name)
    accuracy = row.accuracy.mean if row is not None else float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn, from which the digits are, brings an OpenMP of its own
        report = pack(model, example=data.train.inputs[:1])
    return Demonstrated(title(best.name), accuracy, report)

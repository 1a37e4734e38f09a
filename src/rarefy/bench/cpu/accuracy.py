"""What int8 costs in accuracy where a few input channels are far larger than the rest, as in transformers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.bench.cpu.cases import Zeros, make_weight
from rarefy.bench.cpu.document import Goal
from rarefy.bench.cpu.goals import reason
from rarefy.bench.seeds import generator
from rarefy.runtime import forms, kernels
from rarefy.runtime.kernels import Algorithm

__all__ = ["Errors", "int8_goals", "outlier_errors"]

_SHAPES = (("BERT-base", 3072, 768), ("BERT-base", 768, 3072), ("Llama 1.1 B", 5632, 2048), ("Llama 1.1 B", 2048, 5632))
_TOKENS = 16
_LARGE = (3, 50.0)  # so many channels, so many times larger


@dataclass(frozen=True)
class Errors:
    """Relative errors of an int8 product. whole: ‖y − expected‖ / ‖expected‖ with the exact weight; activations: the
    same with the weight as it was quantised; largest: of the latter, max|y − expected| / max|expected|."""

    whole: float
    activations: float
    largest: float


def outlier_errors(out: int, inputs: int, zeros: Zeros) -> Errors | None:
    """Of an int8 product where three input channels are fifty times larger than the others; None without kernels."""
    source = generator(f"cpu accuracy {out}x{inputs}", 0)
    weight, mask = make_weight(out, inputs, zeros, source)
    x = torch.randn(_TOKENS, inputs, generator=source)
    count, factor = _LARGE
    x[:, torch.randperm(inputs, generator=source)[:count]] *= factor
    integers, scales = forms.quantize(weight, mask)
    stored = forms.encode(integers, mask=mask, scales=scales)
    y = torch.empty(_TOKENS, out)
    if kernels.linear(stored.weight(), Algorithm.FEW, x, y):
        return None
    (whole, _), (activations, largest) = (_errors(y, x, w) for w in (weight, stored.dense()))
    return Errors(whole, activations, largest)


def _errors(y: Tensor, x: Tensor, weight: Tensor) -> tuple[float, float]:
    expected = x.double() @ weight.double().T
    difference = y.double() - expected
    return float(difference.norm() / expected.norm()), float(difference.abs().max() / expected.abs().max())


def int8_goals() -> list[Goal]:
    """One row for each shape: the share that activations cost is to be at most 1 %."""
    goals = []
    for name, out, inputs in _SHAPES:
        errors = outlier_errors(out, inputs, Zeros("unstructured", 0.9))
        point = f"int8 {name} {out}x{inputs}"
        text = "int8, three input channels ×50: output error ≤ 1 %"
        if errors is None:
            goals.append(Goal(point=point, goal=text, measured="not measured", met=None))
            continue
        words = (
            f"{100 * errors.activations:.2f} % from activations (at most {100 * errors.largest:.2f} % of the largest "
            f"output); {100 * errors.whole:.2f} % with the weights' own rounding"
        )
        met = errors.activations <= 0.01
        goals.append(Goal(point=point, goal=text, measured=words, met=met, reason="" if met else reason(point)))
    return goals

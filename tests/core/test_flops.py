import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet50
import tiny
from rarefy.axes import ErdosRenyiKernel, Layer, PerLayer, Unstructured
from rarefy.core.flops import call, measure
from rarefy.core.ledger import Ledger, rigl_training_flops


def test_by_hand():
    """2·MAC per sample: conv 27·8 weights at 3×3 places, transposed (groups 2) 8·2·4 at 9 inputs, Linear 64·5."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ConvTranspose2d(8, 4, 2, groups=2), nn.Flatten(), nn.Linear(64, 5)
    )
    expected = {"0.weight": 2 * 27 * 8 * 9, "1.weight": 2 * 8 * 2 * 4 * 9, "3.weight": 2 * 64 * 5}
    for samples in (1, 4):
        assert measure(model, torch.zeros(samples, 3, 8, 8)) == expected


@pytest.mark.parametrize(
    ("layer", "example", "expected"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), (2, 4, 10), 2 * 6 * 2 * 3 * 8),
        (nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 5), 2 * 3 * 2 * 8 * 2 * 3 * 4),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 10), 2 * 4 * 6 * 3 * 10),
        (nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 4, 5), 2 * 2 * 3 * 8 * 60),
        (nn.Linear(4, 6), (2, 7, 5, 4), 2 * 24 * 35),
    ],
)
def test_every_layer(layer: nn.Module, example: tuple[int, ...], expected: int):
    assert measure(layer, torch.zeros(example)) == {"weight": expected}


def test_attention_uses_weights_without_calling_their_modules():
    """Width 8, 3 tokens: projections 8→24 and 8→8, feed-forward 8→16→8."""
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert measure(block, torch.zeros(2, 3, 8)) == {
        "self_attn.in_proj_weight": 2 * 8 * 24 * 3,
        "self_attn.out_proj.weight": 2 * 8 * 8 * 3,
        "linear1.weight": 2 * 8 * 16 * 3,
        "linear2.weight": 2 * 8 * 16 * 3,
    }
    assert torch.backends.mha.get_fastpath_enabled()


class Tied(nn.Module):
    """An embedding whose weight is the head's too, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.twice = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.twice(self.twice(self.embed(x))), self.embed.weight)


def test_shared_weights_add_up_and_looking_up_is_free():
    assert measure(Tied(), torch.zeros(2, 3, dtype=torch.long)) == {
        "embed.weight": 2 * 40 * 3,
        "twice.weight": 2 * 2 * 16 * 3,
    }


def test_casts_and_the_meta_device():
    layer = nn.Linear(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert measure(layer, torch.zeros(2, 4)) == {"weight": 48}
    assert measure(nn.Linear(4, 6, device="meta"), torch.zeros(2, 4, device="meta")) == {"weight": 48}


def test_what_the_example_does_not_reach_is_not_listed():
    model = nn.Linear(4, 4)
    model.idle = nn.Linear(4, 4)
    assert measure(model, torch.zeros(1, 4)) == {"weight": 32}


def test_nothing_is_left_changed():
    model = tiny.cnn()
    model[1].eval()
    x = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    before = tiny.picture(model)
    measure(model, x)
    assert tiny.picture(model) == before
    with pytest.raises(RuntimeError):
        measure(model, torch.ones(2, 7, 4, 4, dtype=torch.float64))
    assert tiny.picture(model) == before


@pytest.mark.parametrize("example", [torch.tensor(1.0), [], {}, (1, 2), torch.zeros(0, 4)])
def test_an_example_needs_samples(example: object):
    with pytest.raises(ValueError, match="no tensor with samples"):
        measure(nn.Linear(4, 4), example)


def test_batches_are_passed_as_they_are_made():
    def f(*args, **kwargs):
        return args, kwargs

    assert call(f, 1) == ((1,), {})
    assert call(f, (1, 2)) == ((1, 2), {})
    assert call(f, [1, 2]) == ((1, 2), {})
    assert call(f, {"a": 1}) == ((), {"a": 1})


# --- the reference rows of RigL's tables -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet() -> tuple[list[Layer], dict[str, float]]:
    model, image = resnet50.on_meta()
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    layers = [Layer(n, tuple(p.shape), p.numel(), Unstructured()) for n, p in weights.items()]
    return layers, measure(model, image)


def forward(layers: list[Layer], flops: dict[str, float], kept: list[int]) -> float:
    ledger = Ledger([layer.name for layer in layers], [layer.units for layer in layers])
    ledger.record(0, kept, kept, 0)
    return ledger.forward_flops(flops) / sum(flops.values())


def test_resnet_50_is_the_one_of_the_papers(imagenet):
    layers, flops = imagenet
    assert sum(layer.units for layer in layers) == 25_502_912
    assert len(layers) == 54
    assert sum(flops.values()) == pytest.approx(8.1784e9, abs=5e4)


@pytest.mark.parametrize(
    ("sparsity", "erk", "uniform", "training", "published"),
    [
        (0.8, 0.4138, 0.2231, 0.4157, (0.42, 0.23)),
        (0.9, 0.2418, 0.1260, 0.2443, (0.24, 0.13)),
        (0.95, 0.1217, 0.0774, 0.1246, (0.12, 0.08)),
    ],
)
def test_resnet_50_rows(imagenet, sparsity, erk, uniform, training, published):
    layers, flops = imagenet
    by_kernel = forward(layers, flops, ErdosRenyiKernel().counts(layers, sparsity))
    first_dense = forward(layers, flops, PerLayer({"first": 0.0}).counts(layers, sparsity))
    assert by_kernel == pytest.approx(erk, abs=5.1e-5)
    assert first_dense == pytest.approx(uniform, abs=5.1e-5)
    assert rigl_training_flops(by_kernel, 1.0, 100) / 3 == pytest.approx(training, abs=5.1e-5)
    assert (by_kernel, first_dense) == pytest.approx(published, abs=0.01)

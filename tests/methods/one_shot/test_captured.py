"""Data that fail in the middle of a real model: an error that says where, and a model that is as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
import tiny
from architectures import build
from rarefy.core.capture import default_sites
from rarefy.core.sites import find_sites

METHODS = [
    rarefy.Wanda(0.5),
    rarefy.Wanda(0.5, allocation="owl"),
    rarefy.SparseGPT(pattern="2:4"),
    rarefy.DSnoT(rarefy.Wanda(0.5)),
    rarefy.ALPS(0.5),
    rarefy.Refit(rarefy.Magnitude(0.5)),
]


def refused(model: Any, data: Any, method: rarefy.Method, kind: Any, match: str) -> None:
    """Raises, and leaves nothing behind: neither in the model nor beside it."""
    before, were = tiny.picture(model), left_behind(model)
    with pytest.raises(kind, match=match):
        rarefy.sparsify(model, method, data=data, only=only(model))
    assert tiny.picture(model) == before
    assert left_behind(model) == were


def left_behind(model: nn.Module) -> Any:
    modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return modules, str(getattr(model, "config", None)), torch.get_rng_state().tolist()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_inputs_that_overflow_in_a_later_block(method: rarefy.Method):
    model, data = build("Llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.fill_(3e38)
    refused(model, data, method, ValueError, r"model\.layers\.2\.mlp\.down_proj\.weight")


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", ["GPT2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("T5", "Mixtral"))])
def test_an_interrupt_once_blocks_are_pruned(name: str, method: rarefy.Method):
    """Then everything again without one."""
    model, data = build(name, 4)
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    weight = model.get_parameter(only(model)[0])
    dense = weight.detach().clone()
    met: list[float] = []

    def interrupt(*_: Any) -> None:
        if not torch.equal(weight, dense):
            met.append(float(weight.eq(0).float().mean()))
            raise KeyboardInterrupt

    hook = blocks[-1].register_forward_pre_hook(interrupt)
    refused(model, data, method, KeyboardInterrupt, "^$")
    assert met[0] > 0.2
    hook.remove()
    rarefy.check(model, rarefy.sparsify(model, method, data=data, only=only(model)))


def only(model: nn.Module) -> list[str]:
    return [site.name for site in default_sites(model, find_sites(model))]


EMPTY = torch.zeros(1, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batches", "kind", "match"),
    [
        ([], ValueError, "no batch"),
        ([{"input_ids": EMPTY, "attention_mask": EMPTY.clone()}], ValueError, "no real token"),
        ([{"input_ids": EMPTY, "attention_mask": torch.tensor([[1, 0, 1, 1]])}], ValueError, "has holes"),
        ([{"input_ids": EMPTY + 64}], IndexError, "out of range"),
        ([{"pixel_values": torch.zeros(1, 3, 8, 8)}], (TypeError, ValueError), "pixel_values|input_ids"),
        ({"input_ids": EMPTY}, ValueError, "iterable of batches"),
    ],
)
@pytest.mark.parametrize("method", METHODS[:3], ids=str)
def test_data_that_are_none(method: rarefy.Method, batches: Any, kind: Any, match: str):
    model, _ = build("Llama")
    refused(model, batches, method, kind, match)


def test_a_tower_that_no_batch_reaches():
    """An encoder's output given by hand: the encoder never runs."""
    model, data = build("T5")
    known: Tensor = model.encoder(data[0]["input_ids"])[0].detach()
    batch = {"encoder_outputs": (known,), "decoder_input_ids": data[0]["decoder_input_ids"]}
    refused(model, [batch], rarefy.Wanda(0.5), ValueError, r"encoder\.block\.0.*was not reached.*skip=")

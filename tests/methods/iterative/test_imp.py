import itertools
import math

import pytest
import torch
from torch import nn

import rarefy
import tiny
from rarefy import IMP

N = 120 + 96 + 32


class Training:
    """An ordinary training function that remembers what it saw."""

    def __init__(self, steps: int = 6, lr: float = 0.05, **options) -> None:
        self.steps, self.lr, self.options = steps, lr, options
        self.data = tiny.batches()
        self.starts: list[int] = []
        self.at_start: list[dict[str, torch.Tensor]] = []
        self.at_end: list[dict[str, torch.Tensor]] = []
        self.masks: list[dict[str, torch.Tensor]] = []
        self.at_step: dict[int, dict[str, torch.Tensor]] = {}
        self.rates: list[list[float]] = []

    def __call__(self, model: nn.Module, s: rarefy.Sparsity) -> None:
        optimizer = tiny.sgd(model, lr=self.lr)
        s.attach(optimizer, self.steps)
        self.starts.append(s.step)
        self.at_start.append(state(model))
        self.masks.append(s.masks)
        self.rates.append([])

        def after(t: int) -> None:
            rarefy.check(model, s)
            if len(self.starts) == 1:
                self.at_step[t] = state(model)
            self.rates[-1].append(optimizer.param_groups[0]["lr"])
            optimizer.param_groups[0]["lr"] = self.lr * (1 - t / self.steps)

        optimizer.param_groups[0]["lr"] = self.lr * (1 - s.step / self.steps)
        tiny.fit(model, optimizer, self.steps, self.data, after, start=s.step)
        self.at_end.append(state(model))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def masked(saved: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t * masks[n] if n in masks else t for n, t in saved.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


def test_each_round_removes_a_fifth_rounded_up():
    rounds = IMP(0.95).rounds(50_200)
    assert rounds[0] == 50_200
    assert all(b == a - math.ceil(0.2 * a - 1e-9) for a, b in itertools.pairwise(rounds[:-1]))
    assert rounds[-1] == 2510
    assert len(rounds) - 1 == 14
    assert all(abs(kept - 0.8**r * 50_200) < 5 for r, kept in enumerate(rounds[:-1]))


@pytest.mark.parametrize("k", [0, 2])
def test_rewinding_to_weights(k: int):
    """Nested masks, exact counts, W == M ⊙ θ_k to the bit, and every round from step k."""
    train, model = Training(), tiny.mlp()
    first = state(model)
    s = IMP(0.7, share=0.4, rewind_to=k).run(model, train)
    kept = [tiny.total(m.values()) for m in train.masks]
    assert kept == [248, 148, 88, 74]  # −⌈.4·n⌉ twice, then what is left to do
    for before, after in itertools.pairwise(train.masks):
        assert not any(bool((m & ~before[n]).any()) for n, m in after.items())
    theta = first if k == 0 else train.at_step[k]
    for at_start, masks in list(zip(train.at_start, train.masks, strict=True))[1:]:
        assert same(at_start, masked(theta, masks))
    assert train.starts == [0] + [k] * 3
    assert s.ledger.steps == 6 + 3 * (6 - k)
    assert not s.attached


def test_what_goes_is_the_smallest_of_all_layers():
    train, model = Training(), tiny.mlp()
    IMP(0.5, share=0.5).run(model, train)
    trained = torch.cat([train.at_end[0][n].abs().flatten() for n in train.masks[1]])
    least = trained.sort(descending=True).values[123]
    assert all(torch.equal(m, train.at_end[0][n].abs() >= least) for n, m in train.masks[1].items())


def test_rewinding_of_the_learning_rate():
    """The weights stay; the trace of learning rates is that of the first run from step k on."""
    train, model = Training(steps=8), tiny.mlp()
    IMP(0.5, share=0.3, rewind="learning_rate", rewind_to=3).run(model, train)
    assert train.starts == [0, 3, 3]
    for end, start, masks in zip(train.at_end, train.at_start[1:], train.masks[1:], strict=False):
        assert same(start, masked(end, masks))
    assert train.rates[1] == train.rates[0][3:]


def test_round_0_is_the_dense_run():
    train, plain = Training(), tiny.mlp()
    IMP(0.2).run(tiny.mlp(), train)
    optimizer = tiny.sgd(plain, lr=0.05)
    for t in range(6):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - t / 6)
        tiny.fit(plain, optimizer, t + 1, train.data, start=t)
    assert same(train.at_end[0], plain.state_dict())


def test_buffers_are_rewound_too():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny.mlp()
            self.register_buffer("calls", torch.zeros(()), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.net(x)

    model, seen = Counting(), []

    def train(model: nn.Module, s: rarefy.Sparsity) -> None:
        seen.append(int(model.calls))
        optimizer = tiny.sgd(model)
        s.attach(optimizer)
        tiny.fit(model, optimizer, 5, tiny.batches())

    IMP(0.4).run(model, train)
    assert seen == [0, 0, 0, 0]


def test_what_evaluate_says_is_kept():
    scores = iter([0.5, 0.6, 0.7])
    s = IMP(0.36).run(tiny.mlp(), Training(), lambda model: next(scores))
    assert [(h["round"], h["evaluation"]) for h in s.memory["history"]] == [(0, 0.5), (1, 0.6), (2, 0.7)]
    assert [round(h["sparsity"] * N) for h in s.memory["history"]] == [0, 50, 89]


def test_training_that_forgets_to_attach():
    def train(model: nn.Module, s: rarefy.Sparsity) -> None:
        tiny.fit(model, tiny.sgd(model), 3, tiny.batches())

    with pytest.raises(RuntimeError, match="took no step under the handle"):
        IMP(0.5).run(tiny.mlp(), train)


def test_training_that_ends_before_the_step_to_rewind_to():
    with pytest.raises(RuntimeError, match="rewinds to step 100, but round 0 ended after 6"):
        IMP(0.5, rewind_to=100).run(tiny.mlp(), Training())


def test_a_failure_in_training_lets_go_of_the_model():
    model = tiny.mlp()

    def train(model: nn.Module, s: rarefy.Sparsity) -> None:
        s.attach(tiny.sgd(model))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        IMP(0.5).run(model, train)
    rarefy.sparsify(model, rarefy.Random(0.5), optimizer=tiny.sgd(model)).end()


def test_a_budget_that_cannot_be_met_is_refused_before_training():
    train = Training()
    with pytest.raises(ValueError, match="floors"):
        IMP(0.95, allocation=rarefy.AtLeast("global", units=20)).run(tiny.mlp(), train)
    assert not train.starts


@pytest.mark.parametrize("allocation", ["uniform", "lamp"])
def test_the_last_round_keeps_what_was_asked(allocation: str):
    s = IMP(0.65, share=0.3, allocation=allocation).run(tiny.mlp(), Training(steps=3))
    expected = {"uniform": 42 + 34 + 11, "lamp": 87}[allocation]
    assert tiny.total(s.masks.values()) == expected


def test_its_cost_is_that_of_all_rounds():
    """Σ_r 3·f(d_r)·steps_r"""
    train = Training(steps=4)
    s = IMP(0.5, share=0.3).run(tiny.mlp(), train)
    flops = {name: 2.0 * m.numel() for name, m in s.masks.items()}
    expected = sum(4 * 3 * 2 * tiny.total(masks.values()) for masks in train.masks)
    assert s.ledger.training_flops(flops) == expected

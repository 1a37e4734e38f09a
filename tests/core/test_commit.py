"""Staged masks take effect together."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy import Method, Sparsity
from rarefy.axes import value


@value
class Scripted(Method):
    """Masks that a test prescribes: `plan[step]` is {name: mask} or {name: (mask, trainable)}, 0 for the first ones."""

    master: bool = False
    needs = frozenset({"optimizer"})

    def begin(self, s: Sparsity) -> None:
        self._follow(s)

    def on_weights(self, s: Sparsity) -> None:
        self._follow(s)

    def _follow(self, s: Sparsity) -> None:
        for site in s.sites:
            given = PLAN.get(s.step, {}).get(site.name)
            if given is not None:
                mask, trainable = given if isinstance(given, tuple) else (given, None)
                s.keep(site, mask, trainable)


@value
class ScriptedBehindMaster(Scripted):
    """The same with a dense weight behind the sparse one."""

    needs = frozenset({"optimizer", "master"})


PLAN: dict[int, dict[str, Any]] = {}


@pytest.fixture(autouse=True)
def plan():
    PLAN.clear()
    yield PLAN
    PLAN.clear()


def bools(text: str) -> Tensor:
    """ "110 001" is a mask of two rows."""
    return torch.tensor([[c == "1" for c in row] for row in text.split()])


def layer(weight: list[list[float]]) -> nn.Linear:
    made = nn.Linear(len(weight[0]), len(weight), bias=False, dtype=torch.float64)
    with torch.no_grad():
        made.weight.copy_(torch.tensor(weight))
    return made


def step(model: nn.Module, optimizer: torch.optim.Optimizer, gradient: list[list[float]]) -> None:
    optimizer.zero_grad()
    (model.weight * torch.tensor(gradient, dtype=torch.float64)).sum().backward()  # type: ignore[operator]
    optimizer.step()


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_a_dropped_weight_is_zero_and_a_grown_one_starts_at_zero(plan: dict[int, Any]):
    """w = 4 1 3 2 with 4 1 kept. SGD, lr 0.1: one step with gradient 1 each leaves 3.9 0.9; then 1 goes and 3 comes."""
    model = layer([[4.0, 1.0, 3.0, 2.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan |= {0: {"weight": bools("1100")}, 1: {"weight": bools("1010")}}
    rarefy.sparsify(model, Scripted(), optimizer=optimizer)
    assert model.weight.tolist() == [[4.0, 1.0, 0.0, 0.0]]
    step(model, optimizer, [[1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(model.weight.data, torch.tensor([[3.9, 0.0, 0.0, 0.0]], dtype=torch.float64))
    step(model, optimizer, [[1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(model.weight.data, torch.tensor([[3.8, 0.0, -0.1, 0.0]], dtype=torch.float64))


def test_momentum_of_a_grown_weight_starts_anew(plan: dict[int, Any]):
    """Dropped after step 1 with momentum 1, grown again after step 2: its first step is 0.1·1 and not 0.1·1.9."""
    model = layer([[1.0, 1.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plan |= {0: {"weight": bools("11")}, 1: {"weight": bools("10")}, 2: {"weight": bools("11")}}
    rarefy.sparsify(model, Scripted(), optimizer=optimizer)
    for _ in range(2):
        step(model, optimizer, [[1.0, 1.0]])
    assert optimizer.state[model.weight]["momentum_buffer"].tolist() == [[1.9, 0.0]]
    step(model, optimizer, [[1.0, 1.0]])
    # kept: 1 − 0.1·(1 + 1.9 + 2.71); grown: 0 − 0.1·1
    torch.testing.assert_close(model.weight.data, torch.tensor([[0.439, -0.1]], dtype=torch.float64))


def test_a_weight_dropped_and_kept_in_one_update_keeps_value_and_state(plan: dict[int, Any]):
    model = layer([[1.0, 2.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plan |= {0: {"weight": bools("10")}, 1: {"weight": bools("10")}}
    rarefy.sparsify(model, Scripted(), optimizer=optimizer)
    step(model, optimizer, [[1.0, 1.0]])
    assert model.weight.tolist() == [[0.9, 0.0]]
    assert optimizer.state[model.weight]["momentum_buffer"].tolist() == [[1.0, 0.0]]


def test_an_averaged_copy_follows_a_weight_that_is_dropped(plan: dict[int, Any]):
    """ASGD averages from its second step on (t0 = 1); swapping the average in must not bring weights back."""
    model = layer([[1.0, 1.0, 1.0]])
    optimizer = torch.optim.ASGD(model.parameters(), lr=0.1, t0=1.0)
    plan |= {0: {"weight": bools("111")}, 4: {"weight": bools("110")}}
    rarefy.sparsify(model, Scripted(), optimizer=optimizer)
    for _ in range(5):
        step(model, optimizer, [[1.0, 2.0, 3.0]])
        average = optimizer.state[model.weight]["ax"]
    assert average[0, 2].item() == 0.0
    assert bool((average[0, :2] != 0).all())


def test_a_master_keeps_what_the_forward_weight_hides(plan: dict[int, Any]):
    """θ = 4 1 3; forward 4 0 0, gradients reach the first two. lr 0.1, gradient 1: θ = 3.9 0.9 3."""
    model = layer([[4.0, 1.0, 3.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.0)
    plan |= {0: {"weight": (bools("100"), bools("110"))}, 1: {"weight": (bools("011"), bools("011"))}}
    handle = rarefy.sparsify(model, ScriptedBehindMaster(), optimizer=optimizer)
    assert model.weight.tolist() == [[4.0, 0.0, 0.0]]
    step(model, optimizer, [[1.0, 1.0, 1.0]])
    torch.testing.assert_close(handle.sites[0].master, torch.tensor([[3.9, 0.9, 3.0]], dtype=torch.float64))
    torch.testing.assert_close(model.weight.data, torch.tensor([[0.0, 0.9, 3.0]], dtype=torch.float64))


def test_followers_go_with_their_channel(plan: dict[int, Any]):
    """A channel that keeps no weight loses its bias, its norm scale and shift, and their momentum."""

    @value
    class Rows(Scripted):
        pattern: Any = rarefy.Magnitude(0.5, pattern="channel").pattern

    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plan |= {0: {"0.weight": bools("11 11")}, 2: {"0.weight": bools("11 00")}}
    handle = rarefy.sparsify(model, Rows(), optimizer=optimizer)
    assert [f.name for f in handle.sites[0].followers] == ["0.bias", "1.weight", "1.bias"]
    for seed in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        (model(x) * x).sum().backward()
        optimizer.step()
        rarefy.check(model, handle)
    for parameter in (model[0].bias, model[1].weight, model[1].bias):
        assert parameter[1].item() == 0.0
        assert parameter[0].item() != 0.0
        assert optimizer.state[parameter]["momentum_buffer"][1].item() == 0.0


# -- the ledger ------------------------------------------------------------------------------------------------------


def test_the_ledger_counts_masks_flips_and_what_was_explored(plan: dict[int, Any]):
    masks = [bools("1100 0000"), bools("1010 0000"), bools("1010 0001"), bools("1100 0000")]
    plan |= {at: {"weight": mask} for at, mask in enumerate(masks)}
    model = layer([[1.0] * 4] * 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = rarefy.sparsify(model, Scripted(), optimizer=optimizer)
    for _ in masks[1:]:
        step(model, optimizer, [[1.0] * 4] * 2)
    assert handle.ledger.nonzeros == [(0, 2), (2, 3), (3, 2)]
    flips = sum(int((a ^ b).sum()) for a, b in itertools.pairwise(masks))
    assert handle.ledger.flip_rate() == flips / (3 * 8)
    assert handle.ledger.explored == int(torch.stack(masks).any(0).sum()) / 8


def test_a_site_that_begin_passes_over_stays_dense(plan: dict[int, Any]):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    plan |= {0: {"0.weight": bools("100 010")}}
    handle = rarefy.sparsify(model, Scripted(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert handle.masks["1.weight"].all()
    assert handle.ledger.entries[-1].kept == [2, 4]
    assert handle.ledger.explored == 6 / 10
    rarefy.check(model, handle)


def test_all_masks_of_a_hook_take_effect_or_none():
    """A method that raises half-way leaves every weight as it was."""

    @value
    class Broken(Method):
        def begin(self, s: Sparsity) -> None:
            s.keep(s.sites[0], torch.zeros_like(s.sites[0].mask))
            raise ArithmeticError("half-way")

    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArithmeticError):
        rarefy.sparsify(model, Broken())
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_a_hook_that_raises_in_training_leaves_masks_as_they_were(plan: dict[int, Any]):
    class Stop(Exception):
        pass

    @value
    class Half(Scripted):
        def on_weights(self, s: Sparsity) -> None:
            super().on_weights(s)
            if s.step == 2:
                raise Stop

    model = layer([[4.0, 3.0, 2.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan |= {0: {"weight": bools("110")}, 2: {"weight": bools("001")}, 3: {"weight": bools("100")}}
    handle = rarefy.sparsify(model, Half(), optimizer=optimizer)
    step(model, optimizer, [[1.0, 1.0, 1.0]])
    with pytest.raises(Stop):
        step(model, optimizer, [[1.0, 1.0, 1.0]])
    assert torch.equal(handle.masks["weight"], bools("110"))
    rarefy.check(model, handle)
    step(model, optimizer, [[1.0, 1.0, 1.0]])
    assert torch.equal(handle.masks["weight"], bools("100"))

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.capture import blocks, replay, store
from rarefy.core.capture.batches import Calibration
from rarefy.core.sites import find_sites


def base(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(24).reshape(2, 3, 4).to(dtype)


KINDS = {
    "plain": base(),
    "bf16": base(torch.bfloat16),
    "bool": base() > 5,
    "number": torch.tensor(3.0),
    "empty": torch.zeros(0, 3),
    "transposed": base().permute(2, 0, 1),
    "expanded": base()[:, :1].contiguous().expand(2, 5, 4),
    "a part": base()[:, 1:, ::2],
}


@pytest.mark.parametrize("limit", [0, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_come_back_as_they_were(kind: str, limit: int, tmp_path):
    given = KINDS[kind]
    with store.Store(limit, tmp_path) as kept:
        handle = kept.put(given)
        found = kept.get(handle)
        assert found.dtype == given.dtype
        assert torch.equal(found, given)
        if kind not in ("a part", "empty"):  # gaps are not kept
            assert found.stride() == given.stride()
        assert bool(list(tmp_path.iterdir())) == (limit == 0 and given.numel() > 0)
        if given.numel() and kind != "expanded":
            found.zero_()  # what a block does to its arguments stays its own
            assert torch.equal(kept.get(handle), given)
        kept.drop(handle)
        assert (kept.memory, kept.disk) == (0, 0)
    assert not list(tmp_path.iterdir())


def test_equal_tensors_are_kept_once():
    with store.Store(1 << 20) as kept:
        first, second = kept.put(base(), once=True), kept.put(base().clone(), once=True)
        assert first == second
        assert kept.memory == base().nbytes
        assert kept.put(base().double(), once=True) != first
        kept.drop(first)
        assert torch.equal(kept.get(second), base())
        kept.drop(second)
        with pytest.raises(KeyError):
            kept.get(first)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + scale * self.linear(x)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.linspace(0, 1, 16)
        for layer in self.layers:
            x = layer(x, scale)
        return x


def test_states_of_one_block_alone_are_kept():
    """Never those of two blocks for all batches: the peak is one state a batch, one more for one batch, constants."""
    model, data = Chain(), [torch.randn(8, 16, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    (chain,) = blocks.chains_of(model, find_sites(model))
    batches = Calibration.of(model, data).batches
    with store.Store(1 << 30) as kept:
        replayed = replay.Replay(model, chain.blocks, batches, kept)
        states, constants = 6 * data[0].nbytes, 16 * 4
        assert kept.memory == states + constants
        for index in range(3):
            replayed.advance(index, lambda _: None)
            assert kept.memory == states + constants
        assert kept.peak <= states + constants + data[0].nbytes
        with torch.no_grad():
            x = model(data[2])
            assert torch.equal(replayed.run(3, 2), x)

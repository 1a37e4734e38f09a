"""Law 4: sharded (FSDP2) runs decide bit for bit as one process does; zeros hold in every shard, also in empty ones."""

from typing import Any

import pytest
import torch

from laws.ranks import on_ranks
from laws.sharded import CASES, STEPS, Case, alone, sharded


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """All cases on two ranks, in one start of the processes."""
    return on_ranks(sharded, tmp_path_factory.mktemp("sharded"), tcp=True)


def assert_same(here: dict[str, Any], there: dict[str, Any]) -> None:
    for kind in ("masks", "weights", "optimizer", "hidden"):
        assert here[kind].keys() == there[kind].keys()
        for key, tensor in here[kind].items():
            assert torch.equal(tensor, there[kind][key]), f"{kind} of {key}"
    for kind in ("kept", "trainable", "explored"):
        assert here[kind] == there[kind], kind


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.clip is None])
def test_a_sharded_run_is_that_of_one_process_to_the_bit(ranks: list[Any], name: str):
    expected = alone(CASES[name])
    for found in ranks:
        assert len(found[name]) == STEPS // 2
        for here, there in zip(found[name], expected, strict=True):
            assert_same(here, there)


def test_clipping_scales_all_shards_alike(ranks: list[Any]):
    """The norm is summed in another order, so weights agree within rounding; the masks agree in float64."""
    for found in ranks:
        for here, there in zip(found["RigL clipped"], alone(CASES["RigL clipped"]), strict=True):
            for key, mask in here["masks"].items():
                assert torch.equal(mask, there["masks"][key])
                torch.testing.assert_close(here["weights"][key], there["weights"][key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["RigL", "SET", "GMP", "SRSTE", "TopKAST", "GraNet accumulated"])
def test_masks_moved_meanwhile(ranks: list[Any], name: str):
    """Else the tests above would say nothing."""
    first, last = ranks[0][name][0]["masks"], ranks[0][name][-1]["masks"]
    assert any(not torch.equal(first[key], last[key]) for key in first)


@pytest.mark.parametrize(("name", "optimizer"), [("RigL", "AdamW"), ("TopKAST", "AdamW"), ("SRSTE", "SGD")])
def test_a_sharded_run_goes_on_where_it_was_stopped(ranks: list[Any], name: str, optimizer: str):
    expected = alone(Case(name, optimizer=optimizer))[-1]
    for found in ranks:
        assert_same(found[f"resumed {name}"], expected)


def test_a_state_knows_nothing_of_shards(ranks: list[Any]):
    expected = alone(Case("SRSTE", optimizer="plain"))[-1]
    for found in ranks:
        assert_same(found["taken over"], expected)


@pytest.mark.parametrize(
    ("name", "says"),
    [("bad shard", "1 NaN"), ("other moment", "are not zero where"), ("other seed", "train one model with different")],
)
def test_what_is_wrong_on_one_rank_raises_on_all(ranks: list[Any], name: str, says: str):
    assert all(says in found[name] for found in ranks), [found[name] for found in ranks]


def test_tensor_parallel_layers_choose_the_masks_of_whole_ones(ranks: list[Any]):
    assert [found["tensor parallel"] for found in ranks] == [{"RigL": True, "SRSTE": True, "TopKAST": True}] * 2


@pytest.mark.parametrize("name", ["after evaluation", "checkpoint"])
def test_the_rest_of_a_life(ranks: list[Any], name: str):
    assert [found[name] for found in ranks] == ["nothing", "nothing"]

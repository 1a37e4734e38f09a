"""Law 4: replicas hold identical masks and weights, and decide as one process with the whole batch does."""

from typing import Any

import pytest
import torch

from laws.ranks import on_ranks
from laws.replicated import CASES, REFUSALS, STEPS, alone, replicated


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """All cases on two ranks, in one start of the processes."""
    return on_ranks(replicated, tmp_path_factory.mktemp("replicas"))


@pytest.mark.parametrize("name", CASES)
def test_replicas_are_the_same_to_the_bit_after_every_step(ranks: list[Any], name: str):
    one, other = ranks[0][name], ranks[1][name]
    assert len(one) == STEPS
    for step, (here, there) in enumerate(zip(one, other, strict=True)):
        for kind in ("masks", "weights"):
            for key, tensor in here[kind].items():
                assert torch.equal(tensor, there[kind][key]), f"{kind} of {key} differ after step {step + 1}"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype is torch.float64])
def test_in_float64_the_masks_are_those_of_one_process(ranks: list[Any], name: str):
    for step, (here, there) in enumerate(zip(ranks[0][name], alone(CASES[name]), strict=True)):
        for key, mask in here["masks"].items():
            assert torch.equal(mask, there["masks"][key]), f"mask of {key} differs after step {step + 1}"
            torch.testing.assert_close(here["weights"][key], there["weights"][key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["RigL", "RigL every step", "SET", "GMP", "GraNet", "ITOP", "TopKAST", "SRSTE"])
def test_masks_moved_meanwhile(ranks: list[Any], name: str):
    """Else the tests above would say nothing."""
    first, last = ranks[0][name][0]["masks"], ranks[0][name][-1]["masks"]
    assert any(not torch.equal(first[key], last[key]) for key in first)


@pytest.mark.parametrize("name", [name for name in REFUSALS if name.startswith("other")])
def test_replicas_with_different_masks_are_refused_before_their_first_step(ranks: list[Any], name: str):
    for rank, other in enumerate((1, 0)):
        assert ranks[rank]["refusals"][name].startswith(
            f"rank {rank} and rank {other} train one model with different masks."
        )


@pytest.mark.parametrize("name", [name for name in REFUSALS if not name.startswith("other")])
def test_ranks_that_are_no_replicas_may_have_any_masks(ranks: list[Any], name: str):
    assert [found["refusals"][name] for found in ranks] == ["nothing", "nothing"]

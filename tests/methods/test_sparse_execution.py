"""Every registered method says whether it can run sparse; those that can are the same methods there."""

from typing import Any

import pytest
import torch

import rarefy
import tiny
from methods import table
from methods.table import PLAIN, ROWS, STEPS
from rarefy.core.sparse import SparseLinear

SPARSE = [name for name in PLAIN if "sparse" in rarefy.all_methods()[name].executions]  # type: ignore[union-attr]


def test_methods_of_constant_counts_run_sparse() -> None:
    assert set(SPARSE) == {
        "Random", "RandomSearch", "Magnitude", "Prune", "SNIP", "GraSP", "SynFlow", "SET", "RigL", "ITOP",
    }  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_every_method_says_how_it_can_run(name: str) -> None:
    executions = rarefy.all_methods()[name].executions  # type: ignore[union-attr]
    assert "simulated" in executions
    assert executions <= {"simulated", "sparse"}


@pytest.mark.parametrize("name", [name for name in PLAIN if name not in SPARSE])
def test_the_others_refuse(name: str) -> None:
    built = table.mlp()
    before = tiny.picture(built[0])
    with pytest.raises(ValueError, match=name):
        table.start(ROWS[name].method(), built, execution="sparse")
    assert tiny.picture(built[0]) == before


@pytest.mark.parametrize("name", SPARSE)
def test_the_same_masks_and_weights_at_every_step(name: str) -> None:
    def trained(execution: str) -> tuple[list[Any], Any]:
        built = table.mlp()
        optimizer, s = table.start(ROWS[name].method(), built, execution=execution)
        assert any(isinstance(m, SparseLinear) for m in built[0].modules()) == (execution == "sparse")
        seen: list[Any] = []
        look = [site.name for site in s.sites]

        def after(step: int) -> None:
            rarefy.check(built[0], s)
            seen.append({site.name: (site.mask, site.weight.clone()) for site in s.sites})

        tiny.fit(built[0], optimizer, STEPS, built[1], after)
        assert look == list(s.masks)
        s.end()
        return seen, s

    (one, mine), (other, theirs) = trained("simulated"), trained("sparse")
    for a, b in zip(one, other, strict=True):
        for key in a:
            assert torch.equal(a[key][0], b[key][0]), key
            torch.testing.assert_close(a[key][1], b[key][1])
    assert mine.ledger == theirs.ledger

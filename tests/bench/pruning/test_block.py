import copy

import pytest
import torch

from rarefy.bench.environment import environment
from rarefy.bench.pruning.__main__ import main
from rarefy.bench.pruning.blocks import Shape, make
from rarefy.bench.pruning.document import (
    Document,
    Masks,
    Row,
    block_goals,
    block_grid,
    footer,
    mask_grid,
    read_document,
)
from rarefy.bench.pruning.reference import quota, reference_block
from rarefy.bench.pruning.sides import METHODS, SIDES, compare_masks, peak, rarefy_block, run_side

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'rarefy[hf]'")
SHAPE = Shape(64, 128, 32)


def test_inputs_come_from_ids_alone():
    model, batches = make(SHAPE)
    assert len(batches) == 4
    first, again = model.inputs(batches[1]), model.inputs(batches[1])
    assert torch.equal(first, again)
    assert not torch.equal(first, model.inputs(batches[2]))
    assert first.shape == (1, 32, 64)


def test_four_query_heads_share_a_key_head():
    model, _ = make(Shape(256, 128, 32))
    assert model.block.self_attn.k_proj.weight.shape == (64, 256)
    assert model.block.self_attn.q_proj.weight.shape == (256, 256)


@pytest.mark.parametrize("method", METHODS)
def test_both_sides_choose_the_same_masks_in_float64(method):
    model, batches = make(SHAPE, torch.float64)
    before = copy.deepcopy(model.state_dict())
    found = compare_masks(model, {side: run_side(side, model, batches, method, 0.5) for side in SIDES}, method, 0.5)
    assert found["different"] == found["wrong"] == found["gap"] == 0
    assert found["of"] == sum(p.numel() for p in model.block.parameters() if p.ndim == 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_both_sides_prune_in_place_and_take_time(method):
    model, batches = make(SHAPE)
    other = copy.deepcopy(model)
    cost, masks = rarefy_block(model, batches, method, 0.5)
    marks, kept = reference_block(other, batches, method, 0.5)
    assert 0 < cost.solver < cost.whole
    assert marks == sorted(marks)
    assert kept == {}
    assert len(masks) == 7
    for side in (model, other):
        weight = side.block.mlp.down_proj.weight
        assert int(weight.ne(0).sum()) == quota(0.5, weight.numel())


@pytest.mark.slow
def test_memory_is_that_of_a_process():
    shape = Shape(64, 1 << 14, 1024)
    assert peak(shape, "Wanda", "reference", 0.5, 1) >= 2 * 4 * 64 << 14  # inputs and outputs of all tokens


def row(**changed):
    made = {
        "width": 1024, "tokens": 65536, "method": "SparseGPT", "sparsity": 0.5, "dtype": "float32",
        "solver": {"reference": [2.0, 2.0, 4.0], "rarefy": [0.8, 0.9, 1.0]},
        "whole": {"reference": [10.0, 10.0, 10.0], "rarefy": [9.0, 9.5, 8.0]},
        "peak": {"reference": 1000, "rarefy": 500},
        "masks": [Masks(dtype="float32", width=1024, different=3, of=100, wrong=1, gap=2e-6)],
    }  # fmt: skip
    return Row.model_validate(made | changed)


def test_goals_are_met_or_not():
    goals = {goal.point: goal for goal in block_goals([row()])}
    assert goals["SparseGPT 1024 solver"].met is True
    assert goals["SparseGPT 1024 solver"].measured == "0.40×"
    assert goals["SparseGPT 1024 whole"].met is False
    assert goals["SparseGPT 1024 memory"].met is True
    assert goals["SparseGPT 1024 masks float32"].met is False
    assert "float64" in goals["SparseGPT 1024 masks float32"].reason
    wanda = {goal.point: goal.met for goal in block_goals([row(method="Wanda")])}
    assert wanda["Wanda 1024 whole"] is True


def test_the_tables_tell_the_figures():
    assert block_grid([row()]).rows == (
        (
            "1024, 64k tokens, float32",
            "SparseGPT 50 %",
            "3",
            "2 (2)",
            "0.9 (0.8)",
            "0.40",
            "10 (10)",
            "9 (8)",
            "0.90",
            "0.001",
            "0.0005",
            "0.50",
        ),
    )
    assert mask_grid([row()]).rows == (("1024, float32", "SparseGPT", "3 of 100", "1", "2.0e-06"),)


def document(**changed):
    where = environment(threads=1, flush_denormal=False)
    return Document(quick=False, when="now", environment=where.model_copy(update=changed))


def test_blocks_are_measured_one_by_one(tmp_path):
    path = tmp_path / "prune.json"
    first = read_document(path, document())
    for each in (row(width=2048), row(method="Wanda"), row(), row(method="Wanda", peak={"reference": 9, "rarefy": 8})):
        first.put(each)
    assert [(each.width, each.method) for each in first.rows] == [
        (1024, "Wanda"), (1024, "SparseGPT"), (2048, "SparseGPT")
    ]  # fmt: skip
    assert first.rows[0].peak["rarefy"] == 8
    assert len(first.goals) == 12
    first.write(path)
    again = read_document(path, document().model_copy(update={"when": "later"}))
    assert again.rows == first.rows
    assert again.when == "later"
    once = {"reference": [1.0], "rarefy": [1.0]}
    again.put(row(width=2048, solver=once, whole=once))
    assert "; 1 or 3 rounds" in footer(again)


@pytest.mark.parametrize("changed", [{"code": "other"}, {"threads": 2}, {"instructions": "none"}])
def test_rows_of_other_code_or_settings_do_not_stay(tmp_path, changed):
    first = document(**changed)
    first.put(row())
    first.write(tmp_path / "prune.json")
    assert read_document(tmp_path / "prune.json", document()).rows == []
    (tmp_path / "prune.json").write_text("{")
    assert read_document(tmp_path / "prune.json", document()).rows == []


def test_an_unknown_width_is_refused():
    with pytest.raises(SystemExit, match="there are blocks of 256, 512"):
        main(["block", "--quick", "--widths", "100"])


def test_half_a_sequence_is_refused():
    with pytest.raises(SystemExit, match="whole sequences of 2048, such as 4096"):
        main(["block", "--widths", "1024", "--tokens", "5000"])

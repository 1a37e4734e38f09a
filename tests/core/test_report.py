import io
import json

import torch
from rich.console import Console

import rarefy
import tiny
from rarefy import report


def pruned() -> tuple[torch.nn.Module, rarefy.Sparsity]:
    model = tiny.mlp()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    return model, rarefy.sparsify(model, rarefy.Magnitude(0.75, allocation="uniform"))


def test_counts_from_masks():
    model, s = pruned()
    found = report(model, s)
    assert [(r.name, r.kind, r.shape, r.pattern, r.weights, r.kept) for r in found.rows] == [
        ("0.weight", "Linear", (12, 10), "unstructured", 120, 30),
        ("2.weight", "Linear", (8, 12), "unstructured", 96, 24),
        ("4.weight", "Linear", (4, 8), "unstructured", 32, 8),
    ]
    assert [r.density for r in found.rows] == [0.25] * 3
    assert (found.kept, found.weights, found.sparsity) == (62, 248, 0.75)
    assert (found.nonzero_parameters, found.parameters) == (62 + 24, 248 + 24)
    assert found.source == "counted from masks"


def test_masks_are_not_values():
    model, s = pruned()
    with torch.no_grad():
        model[0].weight.zero_()
    assert report(model, s).kept == 62
    found = report(model)
    assert found.kept == 32
    assert "no handle is known" in found.source
    assert [r.pattern for r in found.rows] == ["–"] * 3


def test_the_live_handle_is_found():
    model, s = pruned()
    s.attach(tiny.sgd(model))
    with torch.no_grad():
        model[0].weight.zero_()
    assert report(model).kept == 62
    s.end()
    assert report(model).kept == 32


def test_flops_of_an_example():
    model, s = pruned()
    found = report(model, s, example=torch.zeros(5, 10, dtype=torch.float64))
    assert found.dense_flops == 2 * 248
    assert found.sparse_flops == 2 * 62
    assert [r.flops for r in found.rows] == [240, 192, 64]
    assert "124 of 496 FLOPs a sample" in str(found)
    assert s.ledger.forward_flops({r.name: r.flops for r in found.rows}) == found.sparse_flops
    assert report(model, s).dense_flops is None


def test_layers_that_are_no_sites_stay_dense_in_the_sum():
    model = tiny.mlp()
    s = rarefy.sparsify(model, rarefy.Magnitude(0.75, allocation="uniform"), skip="4")
    found = report(model, s, example=torch.zeros(5, 10, dtype=torch.float64))
    assert found.sparse_flops == 2 * (30 + 24 + 32)
    assert found.dense_flops == 2 * 248
    assert [r.name for r in report(model, skip="4").rows] == ["0.weight", "2.weight"]
    assert [r.name for r in report(model, only="4").rows] == ["4.weight"]


def test_plain_text_and_json():
    model, s = pruned()
    lines = str(report(model, s)).split("\n")
    assert len(lines) == 4
    assert lines[0].split() == ["0.weight", "12×10", "unstructured", "30", "of", "120", "25.00%"]
    assert lines[-1].startswith("62 of 248 prunable weights kept (sparsity 75.00%); 86 of 272 parameters non-zero")
    found = json.loads(json.dumps(report(model, s).to_dict()))
    assert found["totals"] == {"kept": 62, "weights": 248, "sparsity": 0.75}
    assert found["rows"][0]["shape"] == [12, 10]


def test_a_table_for_people():
    model, s = pruned()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report(model, s, example=torch.zeros(1, 10, dtype=torch.float64)))
    text = console.export_text()
    assert "2.weight" in text
    assert "25.00%" in text
    assert "62 of 248 prunable weights kept" in text

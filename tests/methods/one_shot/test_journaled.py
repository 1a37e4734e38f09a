"""Block by block with a journal: runs that continue, and weights that leave memory."""

import pytest
import torch

import rarefy
import tiny
from methods.one_shot.layers import batches, mlp
from rarefy.io import Journal
from rarefy.methods.one_shot.dsnot import DSnoT
from rarefy.methods.one_shot.magnitude import Magnitude
from rarefy.methods.one_shot.refit import Refit
from rarefy.methods.one_shot.sparse_gpt import SparseGPT
from rarefy.methods.one_shot.wanda import Wanda


@pytest.mark.parametrize(
    "method", [SparseGPT(0.5), Refit(Wanda(0.5, allocation="owl")), DSnoT(Wanda(pattern="2:4"))], ids=str
)
def test_an_interrupted_run_continues_where_it_stopped(monkeypatch, tmp_path, method):
    kind = type(method)
    expected = mlp()
    masks = rarefy.sparsify(expected, method, data=batches()).masks
    original, solved = kind.solve, []

    def fail(self, matrix):
        if matrix.name == "1.2.weight" and not solved:
            raise KeyboardInterrupt
        return original(self, matrix)

    def note(self, matrix):
        solved.append(matrix.name)
        return original(self, matrix)

    monkeypatch.setattr(kind, "solve", fail)
    with pytest.raises(KeyboardInterrupt):
        rarefy.sparsify(mlp(), method, data=batches(), journal=Journal(tmp_path, "one run"))
    monkeypatch.setattr(kind, "solve", note)
    model, told = mlp(), []
    journal = Journal(tmp_path, "one run")
    assert journal.done() == ["0"]
    s = rarefy.sparsify(model, method, data=batches(), journal=journal, progress=lambda *args: told.append(args))
    assert solved == ["1.0.weight", "1.2.weight", "2.0.weight", "2.2.weight"]
    assert all(torch.equal(s.masks[name], mask) for name, mask in masks.items())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert [name for _, _, name in told] == ["1", "2", ""]


LEAN = [SparseGPT(0.5), Wanda(pattern="2:4"), DSnoT(Wanda(0.5)), Refit(Magnitude(0.5))]


@pytest.mark.parametrize("method", LEAN, ids=str)
def test_a_lean_journal_changes_where_weights_are_and_nothing_else(tmp_path, method):
    expected, model = mlp(), mlp()
    masks = rarefy.sparsify(expected, method, data=batches()).masks
    objects, memory = list(model.parameters()), [p.data_ptr() for p in model.parameters()]
    s = rarefy.sparsify(model, method, data=batches(), journal=Journal(tmp_path, "one run", lean=True))
    assert all(torch.equal(s.masks[name], mask) for name, mask in masks.items())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))
    sites = {id(site.parameter) for site in s.sites}
    assert [p.data_ptr() != was for p, was in zip(objects, memory, strict=True)] == [id(p) in sites for p in objects]
    for path in tmp_path.iterdir():
        path.unlink()  # nothing depends on the files' names
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    s.attach(optimizer)
    for x in batches():
        model(x).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(s.masks[name], mask) for name, mask in masks.items())
    rarefy.check(model, s)
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_lean_run_that_fails_leaves_the_model_as_it_was(monkeypatch, tmp_path):
    model = mlp()
    before, memory = tiny.picture(model), [p.data_ptr() for p in model.parameters()]
    original = SparseGPT.solve

    def fail(self, matrix):
        if matrix.name == "2.0.weight":
            raise ValueError("no luck.")
        return original(self, matrix)

    monkeypatch.setattr(SparseGPT, "solve", fail)
    with pytest.raises(ValueError, match=r"block '2': no luck\."):
        rarefy.sparsify(model, SparseGPT(0.5), data=batches(), journal=Journal(tmp_path, "one run", lean=True))
    assert tiny.picture(model) == before
    assert [p.data_ptr() for p in model.parameters()] == memory
    monkeypatch.setattr(SparseGPT, "solve", original)
    s = rarefy.sparsify(model, SparseGPT(0.5), data=batches(), journal=Journal(tmp_path, "one run", lean=True))
    expected = rarefy.sparsify(mlp(), SparseGPT(0.5), data=batches()).masks
    assert all(torch.equal(s.masks[name], mask) for name, mask in expected.items())

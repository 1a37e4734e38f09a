import copy

import pytest
import torch

from rarefy.bench.sentences.corpus import Sentences
from rarefy.bench.sentences.distil import Recipe, distil, loss_of, share_at
from rarefy.bench.sentences.encoder import open_encoder, padded, tokens_of
from rarefy.bench.sentences.judge import make_judge
from rarefy.bench.sentences.train import distilled, train
from rarefy.io.prove import check_directory
from sentence_encoder import save_bert, sentences

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'rarefy[hf]'")
TINY = Recipe(steps=8, batch=16, samples=32, prunings=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert") / "model")


def silent(*args):
    """Nobody watches."""


def test_the_loss_of_the_teacher_itself_is_nothing(folder):
    encoder, tokenizer = open_encoder(folder)
    inputs = padded(tokens_of(tokenizer, sentences(8)))
    assert abs(float(loss_of(encoder.model, encoder.model, inputs, TINY))) < 1e-4
    other = open_encoder(folder)[0].model
    with torch.no_grad():
        other.encoder.layer[1].output.dense.weight.mul_(0.5)
    assert float(loss_of(encoder.model, other, inputs, TINY)) > 1e-3


def test_padding_does_not_change_the_loss(folder):
    teacher, tokenizer = open_encoder(folder)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.model.encoder.layer[0].output.dense.weight.mul_(0.5)
    inputs = padded(tokens_of(tokenizer, sentences(1) * 2))
    longer = {name: torch.nn.functional.pad(t, (0, 9)) for name, t in inputs.items()}
    one, other = (float(loss_of(teacher.model, student.model, x, TINY)) for x in (inputs, longer))
    assert one == pytest.approx(other, rel=0.03)


def test_shares_grow_from_the_first_to_the_one_asked_for():
    recipe = Recipe(sparsity=0.9, initial=0.8, prunings=5)
    shares = [share_at(recipe, i) for i in range(5)]
    assert shares == sorted(shares)
    assert shares[0] > 0.8
    assert shares[-1] == 0.9


def test_a_distilled_encoder_is_nearer_than_a_pruned_one(folder):
    teacher, tokenizer = open_encoder(folder)
    tokens = tokens_of(tokenizer, sentences(400))
    judge = make_judge(teacher, tokens_of(tokenizer, sentences(150, seed=1)), 30)
    found = {}
    for steps in (0, 60):
        student = copy.deepcopy(teacher)
        recipe = Recipe(sparsity=0.8, steps=steps, batch=16, samples=64, prunings=1, rate=3e-3)
        run = distil(teacher.model, student.model, tokens, recipe, silent)
        zeros = sum(int(site.parameter.eq(0).sum()) for site in run.sparsity.sites)
        total = sum(site.numel for site in run.sparsity.sites)
        assert zeros >= 0.8 * total - len(run.sparsity.sites)
        found[steps] = judge(student).cosine
    assert found[60] > found[0] + 0.02


def test_directories_are_ordinary_and_are_proved(folder, tmp_path):
    texts = Sentences(tuple(sentences(200)), tuple(sentences(60, 1)), tuple(sentences(10, 2)))
    out = tmp_path / "out"
    said = train(folder, lambda: texts, out, {0.9: 1.0, 0.8: 2.0}, TINY, silent)
    assert [path.name for path in distilled(out)] == ["sparse-80", "sparse-90"]
    assert [each["recipe"]["initial"] for each in said] == [0.0, 0.8]
    assert [each["recipe"]["minutes"] for each in said] == [2.0, 1.0]
    for path, sparsity in zip(distilled(out), (0.8, 0.9), strict=True):
        record = check_directory(path)
        assert record.sparsity == pytest.approx(sparsity, abs=1e-3)
        assert (path / "config.json").read_bytes() == (folder / "config.json").read_bytes()
        before, after = (open_encoder(each)[0].model.state_dict() for each in (folder, path))
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved
        assert all(name.startswith("encoder.") for name in moved)
        assert any(name.endswith("LayerNorm.weight") for name in moved)

    def never():
        raise AssertionError("the text is there already")

    assert train(folder, never, out, {0.8: 2.0, 0.9: 1.0}, TINY, silent) == said

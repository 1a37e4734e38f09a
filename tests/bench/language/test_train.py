import math

import pytest
import torch

from rarefy.bench.language.corpus import standard_library
from rarefy.bench.language.train import Recipe, held_out_loss, make_model, make_tokenizer, train

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'rarefy[hf]'")
TINY = Recipe(vocabulary=300, width=16, layers=2, heads=2, key_heads=1, hidden=24, context=8, batch=4, steps=20)


def corpus(root):
    (root / "json").mkdir()
    (root / "abc.py").write_text("def f(x):\n    return x + 1\n" * 200)
    (root / "json" / "a.py").write_text("def f(x):\n    return x + 1\n" * 200)
    return standard_library(root)


def test_a_trained_directory_is_an_ordinary_one(tmp_path):
    (tmp_path / "lib").mkdir()
    told = []
    said = train(corpus(tmp_path / "lib"), tmp_path / "out", TINY, lambda *args: told.append(args))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("def f(x): ü", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "def f(x): ü"
    assert model(ids).logits.shape == (1, ids.shape[1], 300)
    assert said["steps"] == 20
    assert said["held_out_perplexity"] < 300
    assert told


def test_the_model_comes_from_its_seed_alone():
    state = torch.random.get_rng_state()
    first, second = make_model(TINY), make_model(TINY)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_recipe_is_of_the_size_that_is_said():
    with torch.device("meta"):
        assert sum(p.numel() for p in make_model(Recipe()).parameters()) == 6_852_864


def test_the_loss_is_the_mean_over_windows():
    model = make_model(TINY).eval()
    ids = torch.randint(0, 300, (8 * 20 + 3,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    with torch.no_grad():
        each = [float(model(input_ids=w[None], labels=w[None]).loss) for w in ids[:160].view(20, 8).long()]
    assert held_out_loss(model, ids, 8) == pytest.approx(sum(each) / 20, rel=1e-5)
    assert held_out_loss(model, ids, 8, windows=3) == pytest.approx(sum(each[:3]) / 3, rel=1e-5)
    assert math.isfinite(each[0])


def test_tokens_tell_every_text():
    tokenizer = make_tokenizer(["abc abc"], 300)
    text = "\x00 é\n\t🙂"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "keep").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        train(standard_library(), tmp_path, TINY, lambda *args: None)
    assert (tmp_path / "keep").read_text() == "mine"

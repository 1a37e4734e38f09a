import itertools
import math

import pytest
import torch
from torch import nn

from language import CONTEXT, WORDS, save_llama, text_of
from rarefy.bench.perplexity import perplexity, read_windows
from rarefy.io.pretrained import read_tokenizer


class Bigram(nn.Module):
    """The next token depends on the present one alone: logits are a row of a table."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, ids):
        return self.table[ids]


@pytest.fixture
def bigram():
    return Bigram(torch.randn(7, 7, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def ids():
    return torch.randint(7, (53,), generator=torch.Generator().manual_seed(2))


def test_it_is_the_official_convention_in_float64(bigram, ids):
    """Each window's mean over length − 1 targets, times length; the sum divided by windows · length."""
    length, total = 10, 0.0
    log_p = bigram.table.detach().double().log_softmax(-1)
    for w in range(5):
        window = ids[w * length : (w + 1) * length].tolist()
        losses = [-float(log_p[a, b]) for a, b in itertools.pairwise(window)]
        total += sum(losses) / (length - 1) * length
    found = perplexity(bigram, ids, length)
    assert found.value == pytest.approx(math.exp(total / (5 * length)), rel=1e-6)
    assert (found.windows, found.length, found.targets) == (5, 10, 45)


def test_top1_counts_targets_that_come_first(bigram, ids):
    best = bigram.table.argmax(-1)
    rows = ids[:50].view(5, 10)
    right = int((best[rows[:, :-1]] == rows[:, 1:]).sum())
    assert perplexity(bigram, ids, 10).top1 == right / 45


def test_the_interval_is_that_of_windows(bigram, ids):
    found = perplexity(bigram, ids, 10)
    nll = torch.tensor(found.nll_per_window, dtype=torch.float64)
    half = 2.776445105 * float(nll.std()) / math.sqrt(5)  # t of 4 degrees of freedom
    assert found.low == pytest.approx(math.exp(float(nll.mean()) - half), rel=1e-6)
    assert found.high == pytest.approx(math.exp(float(nll.mean()) + half), rel=1e-6)
    alone = perplexity(bigram, ids[:10], 10)
    assert (alone.low, alone.high) == (None, None)


def test_bits_per_byte(bigram, ids):
    found = perplexity(bigram, ids, 10, bytes_per_token=4.0)
    assert found.bits_per_byte == pytest.approx(math.log2(found.value) / 4)
    assert perplexity(bigram, ids, 10).bits_per_byte is None


def test_batches_change_nothing(bigram, ids):
    told: list[int] = []
    one = perplexity(bigram, ids, 10, batch=1)
    two = perplexity(bigram, ids, 10, batch=2, progress=lambda done, of, name: told.append(done))
    assert one.nll_per_window == pytest.approx(two.nll_per_window)
    assert told == [2, 4, 5]


def test_the_mode_of_the_model_is_restored(bigram, ids):
    bigram.train()
    perplexity(bigram, ids, 10)
    assert bigram.training


def test_what_cannot_be_is_refused(bigram, ids):
    with pytest.raises(ValueError, match="fewer than one window of 60"):
        perplexity(bigram, ids, 60)
    with pytest.raises(ValueError, match="a length above 1"):
        perplexity(bigram, ids, 1)
    with pytest.raises(ValueError, match="logits for each token"):
        perplexity(nn.Sequential(nn.Embedding(7, 3), nn.Flatten(1)), ids, 10)
    bigram.table.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        perplexity(bigram, ids, 10)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    pytest.importorskip("transformers")
    return save_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(text_of(100))
    return path


def test_windows_of_a_text(llama, text):
    tokenizer = read_tokenizer(llama)
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    once = read_windows(text, tokenizer, 10)
    assert once.windows.flatten().tolist() == [0, *ids][:100]
    each = read_windows(text, tokenizer, 10, bos="window", count=3)
    assert each.windows.tolist() == [[0, *ids[i : i + 9]] for i in (0, 9, 18)]
    none = read_windows(text, tokenizer, 10, bos="none")
    assert none.windows.flatten().tolist() == ids
    assert once.tokens_in_text == each.tokens_in_text == 100


def test_bytes_are_those_of_the_text_in_the_windows(llama, text):
    tokenizer = read_tokenizer(llama)
    found = read_windows(text, tokenizer, 10, count=2, bos="none")
    words = text.read_text().split()[:20]
    assert found.bytes_per_token == len(" ".join(words).encode()) / 20


def test_a_text_shorter_than_a_window_is_refused(llama, text):
    with pytest.raises(ValueError, match="holds 101 tokens, fewer than one window of 102"):
        read_windows(text, read_tokenizer(llama), 102)


def test_a_model_of_transformers(llama, text):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    windows = read_windows(text, read_tokenizer(llama), CONTEXT).windows
    found = perplexity(model, windows)
    with torch.no_grad():
        losses = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in windows])
    assert found.value == pytest.approx(float(losses.double().mean().exp()), rel=1e-5)
    assert 0.3 * len(WORDS) < found.value < 3 * len(WORDS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "expected", "bits"),
    [("tinyshakespeare/input.txt", 114.0, 4.22), ("wikitext2/test.txt", 208.9, None)],
    ids=["tiny shakespeare", "wikitext-2"],
)
def test_published_perplexities_of_a_real_model(data_dir, text, expected, bits):
    """64 windows of 511 tokens, each started with <s>."""
    transformers = pytest.importorskip("transformers")
    folder = data_dir("models/stories260K")
    found = read_windows(data_dir(text), read_tokenizer(folder), 512, count=64, bos="window")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    got = perplexity(model, found.windows, bytes_per_token=found.bytes_per_token)
    assert round(got.value, 1) == expected
    assert bits is None or (got.bits_per_byte is not None and round(got.bits_per_byte, 2) == bits)

from pathlib import Path

import pytest
import torch

from rarefy.core.capture import Accumulator, statistics
from rarefy.core.capture.store import Store


def sample(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("gram", [None, torch.float32, torch.float64])
def test_sums_of_a_hand_made_sample(dtype: torch.dtype, gram: torch.dtype | None):
    x = sample(3, 5, 7, dtype=dtype)
    found = Accumulator(7, gram=gram)
    found.add(x[:2])
    found.add(x[2:])
    (result,) = found.result()
    exact = x.double()
    assert (result.tokens, result.sequences) == (15, 3)
    torch.testing.assert_close(result.squares, exact.square().sum((0, 1)), rtol=1e-13, atol=0)
    torch.testing.assert_close(result.sums, exact.sum((0, 1)), rtol=1e-13, atol=0)
    torch.testing.assert_close(result.within, 5 * exact.var(1, unbiased=True).sum(0), rtol=1e-11, atol=0)
    torch.testing.assert_close(result.variance(), exact.var(1).mean(0), rtol=1e-11, atol=0)
    if gram is None:
        assert result.gram is None
        with pytest.raises(RuntimeError, match="no Gram matrix"):
            result.hessian()
        return
    rows = exact.flatten(0, 1)
    assert result.gram is not None
    assert result.gram.dtype == gram
    torch.testing.assert_close(
        result.gram.double(), rows.T @ rows, rtol=1e-12 if gram == torch.float64 else 1e-6, atol=0
    )
    torch.testing.assert_close(result.hessian(), result.gram * 2 / 15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_a_gram_matrix_made_of_kept_inputs_has_the_same_bits(dtype: torch.dtype, limit: int, tmp_path: Path):
    x = sample(6, 50, 300, dtype=dtype)
    plain = Accumulator(300, gram=torch.float32)
    with Store(limit, tmp_path) as store:
        kept = Accumulator(300, gram=torch.float32, store=store)
        for part in x.split(2):
            plain.add(part)
            kept.add(part)
        (held,), (made,) = plain.result(), kept.result()
        del kept
        assert held.gram is not None
        assert made.gram is not None
        assert torch.equal(made.gram, held.gram)
        assert torch.equal(made.hessian(), held.hessian())
        assert store.memory + store.disk == x.nbytes
        del made
        assert store.memory + store.disk == 0


def test_a_gram_matrix_asked_for_too_late_is_refused(tmp_path: Path):
    with Store(0, tmp_path) as store:
        found = Accumulator(7, gram=torch.float32, store=store)
        found.add(sample(1, 3, 7))
        (late,) = found.result()
    with pytest.raises(RuntimeError, match="before the next block"):
        late.hessian()


def test_chunks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch):
    x = sample(4, 30, 9)
    whole = Accumulator(9, gram=torch.float64)
    whole.add(x)
    for name, size in (("_CHUNK", 40), ("_GRAM_CHUNK", 40), ("_GRAM_COLUMNS", 4)):
        monkeypatch.setattr(statistics, name, size)
    parts = Accumulator(9, gram=torch.float64)
    parts.add(x.transpose(0, 1).contiguous().transpose(0, 1))  # other strides too
    for name in ("squares", "sums", "within", "gram"):
        torch.testing.assert_close(
            getattr(parts.result()[0], name), getattr(whole.result()[0], name), rtol=1e-11, atol=0
        )
    gram = parts.result()[0].gram
    assert gram is not None
    assert torch.equal(gram, gram.T)


def test_several_matrices_of_one_width():
    x = sample(2, 5, 3, 4)
    found = Accumulator(4, matrices=3, gram=torch.float64)
    found.add(x)
    for matrix, result in enumerate(found.result()):
        rows = x[:, :, matrix].double().flatten(0, 1)
        torch.testing.assert_close(result.gram, rows.T @ rows, rtol=1e-13, atol=1e-12)
        torch.testing.assert_close(result.squares, rows.square().sum(0))


def test_one_token_has_no_variance():
    found = Accumulator(2)
    found.add(torch.ones(3, 1, 2))
    assert found.result()[0].within.tolist() == [0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_infinite_inputs_are_refused(bad: float):
    found = Accumulator(2)
    found.add(torch.tensor([[[1.0, bad]]]))
    with pytest.raises(ValueError, match=r"inputs of 'here' hold NaN or infinite values.*nothing of this block"):
        found.refuse_infinite("here")


def test_a_gram_matrix_that_overflows_is_refused():
    found = Accumulator(2, gram=torch.float32)
    found.add(torch.tensor([[[1.0, 1e20]]]))
    with pytest.raises(ValueError, match=r"overflow torch\.float32: ask for gram=torch\.float64"):
        found.refuse_infinite("here")
    with pytest.raises(ValueError, match="float32 or float64"):
        Accumulator(2, gram=torch.float16)

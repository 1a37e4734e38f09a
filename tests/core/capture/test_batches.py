from typing import Any

import pytest
import torch
from torch import Tensor, nn

from architectures import build
from core.capture.references import close
from rarefy.core.capture import Calibration, default_sites, walk
from rarefy.core.sites import find_sites


class Takes(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return input_ids


def windows(data: list[Any], model: nn.Module | None = None) -> list[Any]:
    return [(b.kwargs or b.args, b.sequences) for b in Calibration.of(model or Takes(), data).batches]


IDS = torch.tensor([[5, 6, 0, 0], [0, 7, 8, 9], [4, 3, 0, 0], [0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])


def test_padding_is_cut_off_left_and_right():
    batch = {
        "input_ids": IDS,
        "attention_mask": MASK,
        "position_ids": IDS * 10,
        "note": "kept",
        "weight": torch.ones(4),
    }
    (two, two_rows), (one, one_row) = windows([batch])
    assert two["input_ids"].tolist() == [[5, 6], [4, 3]]
    assert two["position_ids"].tolist() == [[50, 60], [40, 30]]
    assert two["attention_mask"].tolist() == [[1, 1], [1, 1]]
    assert two["weight"].tolist() == [1, 1]
    assert (two["note"], two_rows, one_row) == ("kept", 2, 1)
    assert one["input_ids"].tolist() == [[7, 8, 9]]


def test_masks_are_known_in_tuples_too():
    assert [(a[0].tolist(), n) for a, n in windows([(IDS, MASK)])] == [([[5, 6], [4, 3]], 2), ([[7, 8, 9]], 1)]
    assert [(a[0].tolist(), n) for a, n in windows([IDS])] == [(IDS.tolist(), 4)]


def test_decoders_have_masks_of_their_own():
    batch = {
        "input_ids": IDS[:2],
        "attention_mask": MASK[:2],
        "decoder_input_ids": torch.tensor([[1, 2, 3, 0], [1, 2, 0, 0]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
    }
    (first, _), (second, _) = windows([batch])
    assert (first["input_ids"].tolist(), first["decoder_input_ids"].tolist()) == ([[5, 6]], [[1, 2, 3]])
    assert (second["input_ids"].tolist(), second["decoder_input_ids"].tolist()) == ([[7, 8, 9]], [[1, 2]])


def test_the_hash_names_the_windows_alone():
    padded = Calibration.of(Takes(), [{"input_ids": IDS, "attention_mask": MASK}]).digest
    windows = [[5, 6], [7, 8, 9], [4, 3]]
    assert padded == Calibration.of(Takes(), [{"input_ids": torch.tensor([w])} for w in windows]).digest
    assert padded == Calibration.of(Takes(), [(torch.tensor([w]),) for w in windows]).digest
    assert padded != Calibration.of(Takes(), [torch.tensor([w]) for w in reversed(windows)]).digest
    assert len(padded) == 64


def test_what_is_no_calibration_is_refused():
    holes = {"input_ids": IDS[:1], "attention_mask": torch.tensor([[1, 0, 1, 0]])}
    with pytest.raises(ValueError, match="attention_mask of sequence 0 in batch 0 has holes: 1 masked"):
        windows([holes])
    with pytest.raises(ValueError, match="no real token"):
        windows([{"input_ids": IDS, "attention_mask": MASK * 0}])
    with pytest.raises(ValueError, match="holds no batch"):
        windows([])
    with pytest.raises(ValueError, match="must be an iterable of batches"):
        windows({"input_ids": IDS})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bert", "T5", "Bart"])
def test_padded_and_unpadded_data_give_the_same_statistics(name: str):
    model, data = build(name, 1)
    g = torch.Generator().manual_seed(3)
    short = {key: torch.randint(3, 60, (2, 4), generator=g) for key in data[0]}
    plain = [{k: v[i : i + 1] for k, v in batch.items()} for batch in (data[0], short) for i in (0, 1)]
    left = _padded([data[0], short], left=True)
    right = _padded([data[0], short], left=False)
    inside = default_sites(model, find_sites(model))
    expected = {c.block.name: dict(c.statistics) for c in walk(model, inside, plain, gram=torch.float64)}
    for padded in (left, right):
        assert Calibration.of(model, [padded]).digest == Calibration.of(model, plain).digest
        for captured in walk(model, inside, [padded], gram=torch.float64):
            for site, parts in captured.statistics.items():
                (other,) = expected[captured.block.name][site]
                assert (parts[0].tokens, parts[0].sequences) == (other.tokens, other.sequences)
                assert close(parts[0].squares, other.squares, 1e-5)
                assert close(parts[0].within, other.within, 1e-5)


def _padded(batches: list[dict[str, Tensor]], *, left: bool) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key in batches[0]:
        rows = [row for batch in batches for row in batch[key]]
        length = max(map(len, rows)) + 1
        pads = [(length - len(r), 0) if left else (0, length - len(r)) for r in rows]
        found[key] = torch.stack([nn.functional.pad(r, p) for r, p in zip(rows, pads, strict=True)])
        mask = torch.stack([nn.functional.pad(torch.ones_like(r), p) for r, p in zip(rows, pads, strict=True)])
        found[key.replace("input_ids", "attention_mask")] = mask
    return found

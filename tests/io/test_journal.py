"""The journal of a long run."""

from pathlib import Path

import pytest
import torch

from rarefy.io import Journal
from rarefy.io.folder import partial_of

SETTINGS = {"method": {"kind": "Wanda", "sparsity": 0.5}, "seed": 0, "calibration": "ab"}


def some(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 7, generator=generator)
    return {f"w{seed}": weight, f"h{seed}": weight.to(torch.bfloat16), f"mask{seed}": weight > 0}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name])


def test_a_run_continues(tmp_path: Path):
    journal = Journal(tmp_path / "journal", SETTINGS)
    blocks = ["model.layers.10", "model.layers.2", "a/b c"]
    for seed, block in enumerate(blocks):
        journal.keep(block, some(seed))
    again = Journal(tmp_path / "journal", dict(reversed(SETTINGS.items())))
    assert again.done() == blocks
    for seed, block in enumerate(blocks):
        assert_same(again.load(block), some(seed))
    kept = again.tensors()
    assert sorted(kept) == ["h0", "h1", "h2", "w0", "w1", "w2"]
    assert len(kept) == 6
    assert torch.equal(kept["w1"], some(1)["w1"])
    again.keep("last", {})
    assert Journal(tmp_path / "journal", SETTINGS).done() == [*blocks, "last"]


def test_masks_take_a_bit(tmp_path: Path):
    journal = Journal(tmp_path, "a digest")
    journal.keep("block", {"mask": torch.ones(1000, 800).bool()})
    assert (tmp_path / "00000.safetensors").stat().st_size < 1000 * 800 // 8 + 1000


@pytest.mark.parametrize("tensor", [torch.randn(300, 7), torch.rand(9) > 0.5, torch.zeros(0, 3), torch.tensor(2.0)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
def test_what_is_spilled_is_the_same_and_nobody_elses(tmp_path: Path, tensor: torch.Tensor, dtype: torch.dtype | None):
    tensor = tensor if dtype is None else tensor.to(dtype)
    journal = Journal(tmp_path, SETTINGS, lean=True)
    before = sorted(tmp_path.iterdir())
    a, b = journal.spill(tensor), journal.spill(tensor)
    assert a.dtype == tensor.dtype
    assert torch.equal(a, tensor)
    a.zero_()
    assert torch.equal(b, tensor)
    assert sorted(tmp_path.iterdir()) == before


def test_only_a_lean_journal_spills(tmp_path: Path):
    tensor = torch.ones(3)
    assert Journal(tmp_path, SETTINGS).spill(tensor) is tensor


def test_masks_are_left_out_where_they_are_not_asked_for(tmp_path: Path):
    journal = Journal(tmp_path, SETTINGS)
    journal.keep("block", {"weight": torch.ones(2), "weight.mask": torch.ones(2).bool()})
    assert set(journal.load("block", masks=False)) == {"weight"}


def test_thousands_are_spilled_without_an_open_file(tmp_path: Path):
    resource = pytest.importorskip("resource", reason="the system has no such limit")
    journal = Journal(tmp_path, SETTINGS, lean=True)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, most[1]))
        kept = [journal.spill(torch.full((3,), i)) for i in range(1000)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)
    assert [int(each[0]) for each in kept] == list(range(1000))


def test_other_settings_are_refused_and_named(tmp_path: Path):
    Journal(tmp_path, SETTINGS).keep("block", some(0))
    for other, says in (
        ({**SETTINGS, "seed": 1}, "is the journal of another run: seed was 0, now 1. Continue with its settings"),
        ({**SETTINGS, "refit": True}, "refit was None, now True"),
        ({"seed": 0}, "method was .*; calibration was 'ab', now None"),
        ("digest", "digest was None, now 'digest'"),
    ):
        with pytest.raises(ValueError, match=says):
            Journal(tmp_path, other)
    assert Journal(tmp_path, SETTINGS).done() == ["block"]


def test_a_journal_in_which_nothing_is_finished_is_anyones(tmp_path: Path):
    Journal(tmp_path, SETTINGS)
    Journal(tmp_path, {**SETTINGS, "seed": 1}).keep("block", some(0))
    with pytest.raises(ValueError, match="seed was 1, now 0"):
        Journal(tmp_path, SETTINGS)


def test_a_block_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = Journal(tmp_path, SETTINGS)
    journal.keep("first", some(0))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            journal.keep("second", some(1))
    (tmp_path / ".00001.safetensors.0123.partial").write_bytes(b"cut")  # of a process that was killed at once
    again = Journal(tmp_path, SETTINGS)
    assert again.done() == ["first"]
    assert not list(tmp_path.glob(".*"))
    again.keep("second", some(1))
    assert_same(again.load("second"), some(1))


def test_damage_is_found(tmp_path: Path):
    Journal(tmp_path, SETTINGS).keep("block", some(0))
    path = tmp_path / "00000.safetensors"
    data = path.read_bytes()
    path.unlink()  # files of a journal are mapped
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="the file is damaged"):
        Journal(tmp_path, SETTINGS).load("block")
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json is no JSON: the journal is damaged; delete"):
        Journal(tmp_path, SETTINGS)


def test_a_block_is_noted_once(tmp_path: Path):
    journal = Journal(tmp_path, SETTINGS)
    journal.keep("block", some(0))
    with pytest.raises(ValueError, match=r"'block' is in the journal .* already"):
        journal.keep("block", some(1))
    with pytest.raises(KeyError):
        journal.load("other")


def test_it_lies_beside_out_and_goes(tmp_path: Path):
    journal = Journal.of(tmp_path / "out", SETTINGS)
    assert journal.folder == partial_of(tmp_path / "out") / "journal"
    assert journal.folder == tmp_path / ".out.partial" / "journal"
    journal.keep("block", some(0))
    journal.remove()
    assert not journal.folder.exists()

"""The file itself: mapped without copies, written whole or not at all."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import file_models as models
from rarefy.io import container, load, save
from rarefy.runtime.kernels import Form


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def mapping(path: Path, field: str) -> tuple[int, int, int]:
    """First address, last address and kB of a field of /proc/self/smaps for the mapping of a file."""
    if not Path("/proc/self/smaps").exists():
        pytest.skip("the system does not say what is mapped")
    found: tuple[int, int] | None = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) .* (/.*)$", line)
        if head and head[3] == str(path):
            found = int(head[1], 16), int(head[2], 16)
        elif found and line.startswith(f"{field}:"):
            return *found, int(line.split()[1])
    raise AssertionError(f"{path} is not mapped")


def test_a_bitmap_runs_from_the_map_without_a_copy(path: Path):
    save(models.linear(1024, 4096, 0.5), path)
    layer = load(path, nn.Linear(4096, 1024, bias=False, device="meta"), verify=False)
    stored = layer.stored
    assert stored.form == Form.BITMAP
    first, last, resident = mapping(path, "Rss")
    weight = stored.weight()
    for pointer, length in zip((weight.index, weight.values), stored.header.lengths()[:2], strict=True):
        assert first <= pointer
        assert pointer + length <= last
        assert pointer % 64 == 0
    # Validation has read the index, one bit in 17 of a file of 9 MB; the values were not touched.
    assert path.stat().st_size > 8_000_000
    assert resident * 1024 < path.stat().st_size / 4
    stored.values.sum()
    assert mapping(path, "Rss")[2] * 1024 > path.stat().st_size * 3 / 4
    assert mapping(path, "Private_Dirty")[2] == 0


def test_dense_tensors_lie_on_the_map_and_writing_to_them_stays_here(path: Path):
    model = nn.Linear(64, 64)
    save(model, path)
    before = path.read_bytes()
    fresh = load(path, nn.Linear(64, 64))
    first, last, _ = mapping(path, "Rss")
    assert first <= fresh.weight.data_ptr() < last
    with torch.no_grad():
        fresh.weight.zero_()
    assert path.read_bytes() == before
    assert torch.equal(load(path)["weight"], model.weight)


def test_a_file_that_is_replaced_leaves_loaded_models_alone(path: Path):
    model = models.linear(64, 640, 0.5)
    save(model, path)
    loaded = load(path, nn.Linear(640, 64, bias=False))
    save(nn.Linear(1, 1), path)
    assert torch.equal(loaded.weight, model.weight)


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_leaves_no_file_and_an_older_one_as_it_was(
    call: str, exists: bool, path: Path, monkeypatch: pytest.MonkeyPatch
):
    if exists:
        path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise BrokenError

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(BrokenError):
        save(nn.Linear(3, 3), path)
    assert [each.name for each in path.parent.iterdir()] == ([path.name] if exists else [])
    assert not exists or path.read_bytes() == b"old"


def test_links_stay_links(tmp_path: Path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "model.safetensors"
    link.symlink_to(tmp_path / "there" / "real.safetensors")
    save(nn.Linear(2, 2), link)
    assert link.is_symlink()
    assert len(load(link)) == 2


def test_names_that_belong_to_the_file(path: Path):
    for name in ("__metadata__", "__pad__.0"):
        with pytest.raises(ValueError, match="begin with two underscores"):
            container.write(path, {name: torch.zeros(1)}, {})
    assert not path.exists()


def test_names_of_any_letters(path: Path):
    model = nn.ModuleDict({'größe "q" \\ 层': nn.Linear(2, 2), "5": nn.Linear(2, 2)})
    save(model, path)
    assert load(path).keys() == model.state_dict().keys()

"""`rarefy.json`: what is remembered, and that it proves the tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import model_directories as directories
import rarefy
from rarefy.axes import NM, Layout, Unstructured
from rarefy.io import CalibrationRecord, Record, SiteRecord, check_directory, write_model
from rarefy.io.record import digest, read_record
from rarefy.io.shards import WEIGHTS


def test_a_digest_by_hand():
    """true false true, true ... is 0b00001101 = 13, lowest bit first."""
    import hashlib

    assert digest(torch.tensor([True, False, True, True])) == hashlib.sha256(bytes([13])).hexdigest()


def test_kept_zeros_are_told_from_others():
    weight = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0, 3.0, 4.0, 0.0]])
    mask = torch.tensor([[True, True, False, False, False, True, True, False]])
    weight[0, 3] = 0
    site = SiteRecord.of("w", weight, mask, NM(2, 4))
    assert (site.kept, site.total, site.sparsity) == (4, 8, 0.5)
    assert torch.equal(site.mask_of(weight), mask)
    assert site.kept_zeros is not None
    assert SiteRecord.of("w", torch.ones(2), torch.ones(2).bool(), Unstructured()).kept_zeros is None
    assert torch.equal(SiteRecord.model_validate_json(site.model_dump_json()).mask_of(weight), mask)


def test_a_mask_that_is_not_the_weights_is_refused():
    with pytest.raises(ValueError, match=r"'w': 1 of 1 weights that the mask leaves out are not \+0.0"):
        SiteRecord.of("w", torch.ones(2), torch.tensor([True, False]), Unstructured())
    with pytest.raises(ValueError, match=r"'w': 1 of 1 weights"):
        SiteRecord.of("w", torch.tensor([1.0, -0.0]), torch.tensor([True, False]), Unstructured())
    with pytest.raises(ValueError, match=r"a mask of \(3,\) torch.bool is none for a weight of \(2,\)"):
        SiteRecord.of("w", torch.ones(2), torch.ones(3).bool(), Unstructured())
    with pytest.raises(ValueError, match="at least one site"):
        Record.of({}, [])


def test_it_says_what_was_done(tmp_path: Path):
    site = SiteRecord.of("w", torch.eye(4), torch.eye(4).bool(), Unstructured(), Layout(transposed=True))
    calibration = CalibrationRecord(sha256="ab", settings={"samples": 128})
    record = Record.of(rarefy.Magnitude(sparsity=0.75).to_dict(), [site], calibration=calibration, settings={"seed": 1})
    record.write(tmp_path)
    assert read_record(tmp_path) == record
    said = json.loads((tmp_path / "rarefy.json").read_text())
    assert said["versions"]["torch"] == torch.__version__
    assert said["versions"]["rarefy"] == rarefy.__version__
    assert said["calibration"] == {"sha256": "ab", "settings": {"samples": 128}}
    assert (said["pattern"], said["kept"], said["total"], said["sparsity"]) == ("unstructured", 4, 16, 0.75)
    assert rarefy.method_from_dict(said["method"]) == rarefy.Magnitude(sparsity=0.75)
    assert site.read_layout() == Layout(transposed=True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is no JSON"), ("[]", "is of version None"), ('{"version": 7}', "is of version 7; this rarefy reads"),
        ('{"version": 1}', "method: Field required: the file is damaged"),
    ],
)  # fmt: skip
def test_damaged_records(text: str, says: str, tmp_path: Path):
    (tmp_path / "rarefy.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        read_record(tmp_path)


# --- proofs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    source = directories.saved(folder / "source", directories.llama())
    _, changes, record = directories.pruned(source, "2:4")
    write_model(source, folder / "out", changes, record)
    return folder / "out"


NAME = "model.layers.0.mlp.up_proj.weight"


def changed(pruned: Path, folder: Path, change: Any) -> Path:
    folder.mkdir()
    for name, data in directories.files_of(pruned).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    tensors = directories.tensors(pruned)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def test_a_pruned_directory_is_proved(pruned: Path):
    assert rarefy.check(pruned) is None
    assert rarefy.check(str(pruned)) is None
    assert check_directory(pruned).sparsity == 0.5


def grow(tensors: Any) -> None:
    flat = tensors[NAME].view(-1)
    flat[flat.eq(0).nonzero()[0]] = 1.0


def lose(tensors: Any) -> None:
    flat = tensors[NAME].view(-1)
    flat[flat.ne(0).nonzero()[0]] = 0.0


def move(tensors: Any) -> None:
    """A weight goes to another place in its group: as many, still 2:4."""
    group = tensors[NAME].view(-1, 4)[0]
    there, here = group.ne(0).nonzero()[0], group.eq(0).nonzero()[0]
    group[here], group[there] = group[there].clone(), 0.0


def gone(tensors: Any) -> None:
    del tensors[NAME]


def narrower(tensors: Any) -> None:
    tensors[NAME] = tensors[NAME][:, :-4].contiguous()


def broken(tensors: Any) -> None:
    tensors["model.norm.weight"][:2] = float("nan")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (grow, f"2 promises .*\n  {NAME}: 768 of 1536 weights were recorded as kept, 769 of 1536 are\n"
               f"  {NAME}: the weights that are kept do not obey the pattern 2:4"),
        (lose, f"2 promises .*\n  {NAME}: 768 of 1536 weights were recorded as kept, 767 of 1536 are"),
        (move, f"1 promise .*\n  {NAME}: as many weights as recorded are kept, 768, but other ones"),
        (gone, f"1 promise .*\n  {NAME}: there is no such tensor"),
        (narrower, rf"1 promise .*\n  {NAME}: recorded shape \[48, 32\], seen \[48, 28\]"),
        (broken, "1 promise .*\n  'model.norm.weight' has 2 NaN and 0 infinite entries of 32"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(change: Any, says: str, pruned: Path, tmp_path: Path):
    folder = changed(pruned, tmp_path / "changed", change)
    with pytest.raises(RuntimeError, match=says):
        rarefy.check(folder)


def test_a_record_that_contradicts_itself(pruned: Path, tmp_path: Path):
    folder = changed(pruned, tmp_path / "changed", lambda tensors: None)
    said = json.loads((folder / "rarefy.json").read_text())
    (folder / "rarefy.json").write_text(json.dumps({**said, "kept": said["kept"] + 1, "mask": "00"}))
    with pytest.raises(RuntimeError, match=r"kept is \d+, its sites have \d+\n  rarefy.json: the digest"):
        rarefy.check(folder)


def test_a_sparsity_config_is_refused(pruned: Path, tmp_path: Path):
    folder = changed(pruned, tmp_path / "changed", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sparsity_config": {}}))
    with pytest.raises(RuntimeError, match=r"config.json: it has a sparsity_config, which loaders refuse"):
        rarefy.check(folder)


def test_what_check_takes(pruned: Path):
    with pytest.raises(ValueError, match=r"has no rarefy.json: it was not pruned by rarefy"):
        rarefy.check(pruned.with_name("source"))
    handle = rarefy.sparsify(nn.Linear(4, 4), rarefy.Magnitude(sparsity=0.5))
    with pytest.raises(ValueError, match=r"check\(path\), without a handle"):
        rarefy.check(pruned, handle)
    with pytest.raises(ValueError, match="needs the handle too"):
        rarefy.check(nn.Linear(4, 4))

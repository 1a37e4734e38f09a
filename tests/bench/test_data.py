import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch

from rarefy.bench.data import Data, Split, load_digits, load_fashion_mnist, read_idx


def idx(array: np.ndarray) -> bytes:
    head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes())


def write_fashion(folder: Path, train: int = 60_000, test: int = 10_000) -> Path:
    raw = folder / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for part, size in (("train", train), ("t10k", test)):
        (raw / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(np.zeros((size, 28, 28), np.uint8)))
        (raw / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(size) % 10))
    return raw


def test_idx_files_are_read_as_they_were_written(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a.gz").write_bytes(idx(array))
    assert np.array_equal(read_idx(tmp_path / "a.gz"), array)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-9] + bytes([raw[-9] ^ 255]) + raw[-8:],
        lambda raw: b"not gzip at all",
        lambda raw: b"",
        lambda raw: gzip.compress(gzip.decompress(raw)[:-1]),
        lambda raw: gzip.compress(gzip.decompress(raw) + b"\0"),
        lambda raw: gzip.compress(b"\1" + gzip.decompress(raw)[1:]),
        lambda raw: gzip.compress(b"\0\0\x08"),
    ],
    ids=["truncated", "flipped", "foreign", "empty", "short", "long", "magic", "header"],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, damage: Callable[[bytes], bytes]):
    path = tmp_path / "images.gz"
    path.write_bytes(damage(idx(np.arange(200).reshape(10, 20))))
    with pytest.raises(ValueError, match=r"images\.gz is (damaged or truncated|not a whole IDX file)"):
        read_idx(path)


def test_digits_are_real_split_once_and_scaled():
    data = load_digits()
    assert (len(data.train), len(data.test)) == (1200, 597)
    assert data.train.inputs.shape == (1200, 64)
    assert float(data.train.inputs.min()) == 0
    assert float(data.train.inputs.max()) == 1
    assert data.digest == load_digits().digest


def test_fashion_mnist_is_found_in_the_folder_that_is_named(data_dir):
    data = load_fashion_mnist(data_dir("FashionMNIST/raw").parents[1])
    assert data.train.inputs.shape == (60_000, 1, 28, 28)
    assert data.test.labels.bincount().tolist() == [1000] * 10
    assert abs(float(data.train.inputs.mean())) < 1e-2
    assert float(data.train.inputs.std()) == pytest.approx(1, abs=1e-2)


def test_rarefy_data_names_the_folder_too(tmp_path, monkeypatch):
    write_fashion(tmp_path, train=7)
    monkeypatch.setenv("RAREFY_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="hold 7 images and 7 labels, not 60000 of each"):
        load_fashion_mnist()


def test_a_named_folder_without_the_files_says_both_ways_and_downloads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(pooch, "retrieve", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(FileNotFoundError, match=r"has no train-im.*--data DIR or RAREFY_DATA=DIR; or .*be online"):
        load_fashion_mnist(tmp_path)


@pytest.mark.parametrize("error", [ConnectionError("no network"), ValueError("MD5 hash does not match")], ids=str)
def test_a_download_that_fails_says_both_ways(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.delenv("RAREFY_DATA", raising=False)
    monkeypatch.setattr(pooch, "retrieve", fail)
    with pytest.raises(
        FileNotFoundError, match=f"failed \\({error}\\).*--data DIR or RAREFY_DATA=DIR; or .* be online"
    ):
        load_fashion_mnist()


def test_a_download_is_checked_against_the_official_sums(tmp_path, monkeypatch):
    raw = write_fashion(tmp_path)
    asked: dict[str, str] = {}

    def retrieve(url: str, known_hash: str, fname: str, path: Path, downloader: object) -> str:
        asked[url.rsplit("/", 1)[1]] = known_hash
        return str(raw / fname)

    monkeypatch.delenv("RAREFY_DATA", raising=False)
    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert len(load_fashion_mnist().train) == 60_000
    assert asked["t10k-labels-idx1-ubyte.gz"] == "md5:bb300cfdad3c16e7a12a480ee83cd310"
    assert len(asked) == 4


def test_validation_images_come_from_the_training_images_alone():
    train = Split(torch.arange(100.0)[:, None], torch.arange(100) % 10)
    test = Split(torch.full((20, 1), -1.0), torch.zeros(20, dtype=torch.int64))
    held = Data(train, test).held_out(0.2)
    seen = torch.cat([held.train.inputs, held.test.inputs]).flatten().sort().values
    assert (len(held.train), len(held.test)) == (80, 20)
    assert torch.equal(seen, torch.arange(100.0))
    assert held.digest != Data(train, test).digest

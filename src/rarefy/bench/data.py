"""Where the images come from: a folder that the user has, else a checked download into a cache.

Nothing is unpickled, and a damaged file is an error rather than a strange accuracy. Training and test images stay
apart: `Data.held_out` makes a validation set from training images alone.
"""

import gzip
import hashlib
import math
import os
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from rarefy.bench.seeds import generator

__all__ = ["Data", "Split", "load_digits", "load_fashion_mnist"]

_FOLDER = "FashionMNIST/raw"
_SOURCE = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6d68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}


@dataclass(frozen=True)
class Split:
    """Images (count, ...) float32 with their labels (count,) int64."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Split":
        return Split(self.inputs[index], self.labels[index])


@dataclass(frozen=True)
class Data:
    """What a network is trained on and what it is judged on."""

    train: Split
    test: Split

    @cached_property
    def digest(self) -> str:
        """Changes with any pixel, label or the way they are split."""
        digest = hashlib.sha256()
        for part in (self.train.inputs, self.train.labels, self.test.inputs, self.test.labels):
            digest.update(repr((tuple(part.shape), part.dtype)).encode())
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def held_out(self, share: float = 0.2) -> "Data":
        """Judge on `share` of the training images instead, and train on the others; the test images are left out."""
        order = _permutation(len(self.train))
        size = round(share * len(self.train))
        return Data(train=self.train.take(order[size:]), test=self.train.take(order[:size]))


def load_digits() -> Data:
    """scikit-learn's 1797 real 8×8 digits: inputs (n, 64) in [0, 1] (pixels / 16); 1200 to train, 597 to test.

    The split is one and the same for all seeds. Raises ModuleNotFoundError without scikit-learn.
    """
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the task 'digits' needs scikit-learn: pip install 'rarefy[bench]'") from error
    bunch: Any = datasets.load_digits()
    everything = Split(
        torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target, dtype=torch.int64)
    )
    order = _permutation(len(everything))
    return Data(train=everything.take(order[:1200]), test=everything.take(order[1200:]))


def load_fashion_mnist(folder: Path | None = None) -> Data:
    """Fashion-MNIST: inputs (n, 1, 28, 28), standardised (mean .2860, deviation .3530); 60 000 to train, 10 000 to
    test.

    folder: what holds `FashionMNIST/raw/*.gz`; None looks at $RAREFY_DATA, then downloads into the user's cache.
    Raises FileNotFoundError where neither works, ValueError for a damaged file.
    """
    paths = _find(folder)
    train, test = (
        Split(_images(paths[f"{part}-images-idx3-ubyte.gz"]), _labels(paths[f"{part}-labels-idx1-ubyte.gz"]))
        for part in ("train", "t10k")
    )
    for split, name, size in ((train, "train", 60_000), (test, "t10k", 10_000)):
        if len(split.inputs) != size or len(split.labels) != size:
            raise ValueError(
                f"Fashion-MNIST's {name} files hold {len(split.inputs)} images and {len(split.labels)} labels, not "
                f"{size} of each: the files in {paths[f'{name}-images-idx3-ubyte.gz'].parent} are of another data set"
            )
    return Data(train, test)


def read_idx(path: Path) -> np.ndarray:
    """The array of bytes in a gzipped IDX file. Raises ValueError naming a file that is damaged or truncated."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}): copy or download it again") from error
    rank = raw[3] if len(raw) >= 4 and raw[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(raw, ">u4", count=rank, offset=4).tolist() if len(raw) >= 4 + 4 * rank else []
    if not rank or len(raw) != 4 + 4 * rank + math.prod(shape):
        raise ValueError(f"{path} is not a whole IDX file of bytes (size {len(raw)}): copy or download it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _permutation(size: int) -> Tensor:
    """Of the digits split and of the validation split: fixed, whatever the seed of the run."""
    return torch.randperm(size, generator=generator("split", 0))


def _images(path: Path) -> Tensor:
    pixels = read_idx(path)
    if pixels.shape[1:] != (28, 28):
        raise ValueError(f"{path} holds an array of shape {pixels.shape}, not images of 28×28")
    return ((torch.tensor(pixels, dtype=torch.float32) / 255 - 0.2860) / 0.3530).unsqueeze(1)


def _labels(path: Path) -> Tensor:
    labels = read_idx(path)
    if labels.ndim != 1 or (labels.size and labels.max() > 9):
        raise ValueError(f"{path} holds an array of shape {labels.shape}, not labels from 0 to 9")
    return torch.tensor(labels, dtype=torch.int64)


def _find(folder: Path | None) -> dict[str, Path]:
    """The four files. A folder that was named must have them: it is never silently passed over for a download."""
    named = folder or (Path(os.environ["RAREFY_DATA"]) if os.environ.get("RAREFY_DATA") else None)
    if named is None:
        return _download()
    paths = {name: named / _FOLDER / name for name in _MD5}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        raise FileNotFoundError(_both_ways(f"{named / _FOLDER} has no {', '.join(missing)}"))
    return paths


def _download() -> dict[str, Path]:
    try:
        import pooch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_both_ways("a download needs pooch: pip install 'rarefy[bench]'")) from error
    pooch.get_logger().setLevel("ERROR")
    cache = Path(pooch.os_cache("rarefy")) / _FOLDER
    fetch = pooch.HTTPDownloader(timeout=60)
    try:
        return {
            name: Path(pooch.retrieve(_SOURCE + name, f"md5:{md5}", name, cache, downloader=cast(Any, fetch)))
            for name, md5 in _MD5.items()
        }
    except (OSError, ValueError) as error:  # no network; or not the file that was promised
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(_both_ways(f"the download from {_SOURCE} failed ({reason})")) from error


def _both_ways(problem: str) -> str:
    return (
        f"Fashion-MNIST: {problem}. Either give a folder that holds {_FOLDER}/*.gz, by --data DIR or RAREFY_DATA=DIR; "
        "or give neither and be online, and the four files are downloaded and checked. "
        "The task 'digits' needs no download."
    )

"""CIFAR-10 from parquet files, as the `datasets` library writes this set: `cifar10/{train,test}-*.parquet`.

A column `img` of encoded pictures (lossless: PNG or WebP), a column `label` of classes from 0 to 9.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rarefy.bench.data import Split

__all__ = ["FOLDER", "augmented", "load_cifar10", "standardised"]

FOLDER = "cifar10"
_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)


def load_cifar10(folder: Path, part: str, chosen: Tensor | None = None) -> Split:
    """Images (n, 3, 32, 32), standardised, with their labels; of "train" (50 000) or "test" (10 000).

    folder: what holds `cifar10/`. chosen: indices of the images, in the order in which they are wanted; None: all.
    Raises FileNotFoundError without the files, ValueError for damaged ones, ModuleNotFoundError without pyarrow and
    Pillow.
    """
    parquet, image = _readers()
    paths = sorted((folder / FOLDER).glob(f"{part}-*.parquet"))
    if not paths:
        raise FileNotFoundError(
            f"{folder / FOLDER} has no {part}-*.parquet: RAREFY_DATA=DIR (or --data DIR) names the folder that holds "
            "CIFAR-10 as parquet files, with columns img and label"
        )
    try:
        table = parquet.read_table([str(path) for path in paths], columns=["img", "label"])
        rows = range(len(table)) if chosen is None else chosen.tolist()
        table = table if chosen is None else table.take(rows)
        pictures = [_pixels(image, each["bytes"]) for each in table.column("img").to_pylist()]
        labels = torch.tensor(table.column("label").to_pylist())
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder / FOLDER}: the {part} files are not CIFAR-10, or damaged ({reason})") from error
    return Split(standardised(pictures), labels)


def standardised(pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures (32, 32, 3) of bytes → (n, 3, 32, 32) float32, minus ImageNet's mean and over its deviation."""
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_DEVIATION)[:, None, None]


def augmented(images: Tensor, source: torch.Generator) -> Tensor:
    """As networks of this kind are trained: 4 black pixels on every side, a crop of 32×32, flipped one time in two.

    images: (n, 3, 32, 32), standardised.
    """
    black = -(torch.tensor(_MEAN) / torch.tensor(_DEVIATION))[:, None, None]
    wide = functional.pad(images - black, (4, 4, 4, 4)) + black
    top, left = torch.randint(9, (2, len(images), 1), generator=source)
    flip = torch.rand((len(images), 1), generator=source) < 0.5
    rows, columns = top + torch.arange(32), left + torch.where(flip, torch.arange(31, -1, -1), torch.arange(32))
    index = torch.arange(len(images))[:, None, None]
    return wide[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _readers() -> tuple[Any, Any]:
    try:
        from PIL import Image  # pyright: ignore[reportMissingImports]
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"CIFAR-10 is read with pyarrow and Pillow; {error.name} is not installed: pip install 'rarefy[vision]'",
            name=error.name,
        ) from error
    return parquet, Image


def _pixels(image: Any, encoded: bytes) -> np.ndarray:
    found = np.asarray(image.open(io.BytesIO(encoded)).convert("RGB"))
    if found.shape != (32, 32, 3):
        raise ValueError(f"a picture of shape {found.shape}, not 32×32")
    return found

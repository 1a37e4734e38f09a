"""The journal of a long run: what is finished, kept on the disk so that a run that was killed continues there."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from rarefy.core import bits
from rarefy.core.memory import give_back
from rarefy.io import container
from rarefy.io.folder import JOURNAL, partial_of

_SETTINGS: Final = "settings.json"


class Journal:
    """Tensors of finished blocks, a file each, complete or not there; of one run's settings.

    folder: where it lies; `Journal.of(out, settings)` is the one beside OUT, which goes when OUT is there. settings:
    whatever the result depends on (method, seed, digests of source and calibration), as JSON values, or one digest.
    lean: from then on a finished block's parameters are maps of its files here, and masks maps of files that go with
    them; so a model that is itself mapped takes the memory of the block at work.
    Raises ValueError where the folder has finished blocks of other settings, naming those that differ.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Journal(Path(folder), {"seed": 0}).keep("layers.0", {"weight": torch.ones(2), "mask": torch.ones(2).bool()})
    ...     again = Journal(Path(folder), {"seed": 0})
    ...     again.done(), again.load("layers.0")
    (['layers.0'], {'weight': tensor([1., 1.]), 'mask': tensor([True, True])})
    """

    def __init__(self, folder: Path | str, settings: Mapping[str, Any] | str, *, lean: bool = False) -> None:
        self.folder = Path(folder)
        self.lean = lean
        said = {"digest": settings} if isinstance(settings, str) else dict(settings)
        self.settings: dict[str, Any] = json.loads(json.dumps(said))
        new = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_settings()
        except OSError:  # such as a full disk: nothing of it stays
            for folder in new:
                with suppress(OSError):
                    folder.rmdir()
            raise
        for leftover in self.folder.glob(".*.partial"):
            leftover.unlink()
        self._files: dict[str, Path] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._files[str(container.Reader(path).contents["block"])] = path

    @classmethod
    def of(cls, out: Path | str, settings: Mapping[str, Any] | str, *, lean: bool = False) -> Journal:
        """The journal of a run that will write OUT."""
        return cls(partial_of(Path(out)) / JOURNAL, settings, lean=lean)

    def done(self) -> list[str]:
        """The finished blocks, in the order in which they were."""
        return list(self._files)

    def keep(self, block: str, tensors: Mapping[str, Tensor]) -> None:
        """Note a block as finished; masks (bool) take one bit an entry. Raises ValueError for one that is noted."""
        if block in self._files:
            raise ValueError(f"{block!r} is in the journal {self.folder} already")
        masks = {name: list(each.shape) for name, each in tensors.items() if each.dtype == torch.bool}
        stored = {name: bits.pack(each.cpu().contiguous()) if name in masks else each for name, each in tensors.items()}
        path = self.folder / f"{len(self._files):05d}.safetensors"
        container.write(path, stored, {"block": block, "masks": masks})
        self._files[block] = path

    def load(self, block: str, *, masks: bool = True) -> dict[str, Tensor]:
        """The tensors of a finished block, mapped; masks, which are unpacked, where they are asked for.

        Raises KeyError for another block, ValueError for a damaged file.
        """
        reader = container.Reader(self._files[block])
        packed: dict[str, list[int]] = reader.contents["masks"]
        found: dict[str, Tensor] = {}
        for name in (name for name in reader.names() if name not in packed):
            found[name] = reader.tensor(name)
        if masks:
            found |= {name: bits.unpack(reader.tensor(name), tuple(shape)) for name, shape in packed.items()}
        return found

    def spill(self, tensor: Tensor) -> Tensor:
        """A tensor's bits in the map of a file here, which no one else sees and which is gone when the tensor is.

        What is written to it never reaches the file. The tensor itself where the journal is not lean, and where the
        system allows no more maps. Raises OSError where there is no room.
        """
        data = container.bytes_of(tensor) if self.lean else b""
        if not data:
            return tensor
        path = self.folder / f".{secrets.token_hex(8)}.partial"
        try:
            path.write_bytes(data)
            # By torch, which closes the file: Python's mmap keeps it open, and a process may have but so many.
            found = torch.from_file(str(path), size=len(data), dtype=torch.uint8)
        except RuntimeError:
            return tensor
        finally:
            path.unlink(missing_ok=True)
        give_back(collect=False)
        return found.view(tensor.dtype).view(tensor.shape)

    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors that are no masks, of all blocks, each read when it is asked for: what `write_model` takes."""
        return _Kept(self)

    def remove(self) -> None:
        """Delete it, and its folder where nothing else is in it."""
        for path in (*self._files.values(), self.folder / _SETTINGS):
            path.unlink(missing_ok=True)
        self._files = {}
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _check_settings(self) -> None:
        path = self.folder / _SETTINGS
        if not path.exists() or not any(self.folder.glob("*.safetensors")):
            partial = path.with_name(f".{path.name}.partial")
            try:
                partial.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            return
        try:
            there: Any = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: the journal is damaged; delete {self.folder} ({error})") from error
        if there != self.settings:
            differ = _differences(there if isinstance(there, dict) else {}, self.settings)
            raise ValueError(
                f"{self.folder} is the journal of another run: {'; '.join(differ)}. Continue with its settings, or "
                "delete it to begin anew."
            )


class _Kept(Mapping[str, Tensor]):
    """The tensors of a journal by name."""

    def __init__(self, journal: Journal) -> None:
        self._readers: dict[str, container.Reader] = {}
        for path in journal._files.values():
            reader = container.Reader(path)
            masks = reader.contents["masks"]
            self._readers |= {name: reader for name in reader.names() if name not in masks}

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name].tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**there, **asked} if there.get(name) != asked.get(name)]
    return [f"{name} was {there.get(name)!r}, now {asked.get(name)!r}" for name in names]

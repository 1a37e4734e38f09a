"""What a model directory says before its weights are read: its configuration, its tokenizer, how far it reads.

Everything is local: nothing is looked for on a hub, and no code of the directory is run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__all__ = ["context_length", "read_config", "read_tokenizer"]

PathLike = str | os.PathLike[str]

_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")
_LONGEST = 1 << 30  # what tokenizers and configurations write where they mean "no limit"


def read_config(path: PathLike) -> Any:
    """The configuration of a model directory. Raises ValueError for anything that is not one."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} is no model directory: it {what}. Give the folder that save_pretrained wrote.")
    try:
        return _transformers().AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{folder / 'config.json'} names no model that transformers knows: {error}") from error


def read_tokenizer(path: PathLike) -> Any:
    """The tokenizer of a model directory. Raises ValueError where it has none."""
    try:
        return _transformers().AutoTokenizer.from_pretrained(Path(path), local_files_only=True)
    except (
        ValueError,
        KeyError,
        OSError,
        TypeError,
        AttributeError,
    ) as error:  # each missing file fails in its own way
        raise ValueError(
            f"{path} has no tokenizer that can be read ({_first_line(error)}). Copy the tokenizer files into it, or "
            "give batches of token ids to rarefy.io.prune.prune(..., calibration=batches)."
        ) from error


def context_length(config: Any) -> int | None:
    """The longest sequence that a configuration was made for, in tokens; None where it does not say.

    >>> from types import SimpleNamespace
    >>> context_length(SimpleNamespace(max_position_embeddings=512))
    512
    """
    inner = [getattr(config, name, None) for name in ("text_config", "decoder")]
    for part in (config, *inner):
        for name in _CONTEXT:
            found = getattr(part, name, None)
            if isinstance(found, int) and 0 < found < _LONGEST:
                return found
    return None


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ModuleNotFoundError(
            "model directories are read with transformers, which is not installed: pip install 'rarefy[hf]'",
            name="transformers",
        ) from error
    return transformers


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]

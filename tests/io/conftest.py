"""Directories that several files of tests read."""

from pathlib import Path
from typing import Any

import pytest
import torch

import model_directories as directories
from model_directories import sparse
from rarefy.io import write_packed


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directories.saved(tmp_path_factory.mktemp("sources") / "llama", directories.llama())


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "sharded"
    return directories.saved(folder, directories.llama(), torch.bfloat16, max_shard_size="8KB")


@pytest.fixture(scope="session")
def change(llama: Path) -> Any:
    """What `write_model` takes for the llama directory."""
    return directories.pruned(llama)[1:]


@pytest.fixture(scope="session")
def sparse_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse(tmp_path_factory.mktemp("llama"), directories.llama())


@pytest.fixture(scope="session")
def packed(sparse_llama: Path) -> Path:
    write_packed(sparse_llama, sparse_llama.with_name("packed"))
    return sparse_llama.with_name("packed")

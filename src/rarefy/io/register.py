"""transformers learns of packed directories when both it and rarefy are imported, whichever comes first.

`import rarefy` does not import transformers, which takes seconds. Where transformers' quantizers are there already,
they are told at once; else a finder waits at the front of `sys.meta_path` for the one module that keeps their registry,
lets the usual finders load it, tells it, and is gone.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

_AWAITED: Final = "transformers.quantizers.auto"


def register() -> None:
    """Make `from_pretrained` of transformers load packed directories, now or as soon as it is imported."""
    if _AWAITED in sys.modules:
        _tell()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _tell() -> None:
    try:
        importlib.import_module("rarefy.io.transformers")  # which registers as it is imported
    except ImportError as error:  # a transformers that is too old: it works as it does without rarefy
        warnings.warn(f"packed directories cannot be loaded with this transformers: {error}", stacklevel=2)


class _Waiting(MetaPathFinder):
    """Finds nothing by itself."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Telling(spec.loader)
                return spec
        return None


class _Telling(Loader):
    """A loader that tells the registry of rarefy once its module has run; the module keeps its own loader."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _tell()

"""transformers' own bars and warnings would stand between a command's lines."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]


@contextmanager
def quiet() -> Iterator[None]:
    """For the block transformers shows no bars and says errors alone. Nothing where it is not installed."""
    try:
        from transformers.utils import logging
    except ModuleNotFoundError:
        yield
        return
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        sys.stderr.flush()

"""One seed of a run becomes many independent streams: drawn from one, weights and random masks would be correlated.

>>> stream("weights", 0) != stream("masks", 0)
True
"""

import hashlib

import torch

__all__ = ["generator", "stream"]


def stream(purpose: str, seed: int) -> int:
    """A seed of its own for every purpose: the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:6], "big")


def generator(purpose: str, seed: int) -> torch.Generator:
    """A CPU generator of its own for every purpose."""
    return torch.Generator().manual_seed(stream(purpose, seed))

"""Calibration: the inputs of every matrix of a model, block by block, without a line for any one architecture."""

from rarefy.core.capture.batches import Batch, Calibration
from rarefy.core.capture.blocks import Block, blocks_of, default_sites
from rarefy.core.capture.statistics import Accumulator, Statistics
from rarefy.core.capture.walk import Captured, dense_statistics, walk

__all__ = [
    "Accumulator",
    "Batch",
    "Block",
    "Calibration",
    "Captured",
    "Statistics",
    "blocks_of",
    "default_sites",
    "dense_statistics",
    "walk",
]

"""Whole networks of the well-known shapes with random weights: what they cost does not depend on what they learned."""

from rarefy.bench.cpu.networks.bert import Bert
from rarefy.bench.cpu.networks.llama import Llama
from rarefy.bench.cpu.networks.vision import MobileNetV1, ResNet50

__all__ = ["Bert", "Llama", "MobileNetV1", "ResNet50"]

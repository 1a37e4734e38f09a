"""The axes: pattern, allocation, score and schedule, as pure functions and small frozen values on tensors.

| axis | question |
|---|---|
| pattern | where may zeros lie? |
| allocation | how many units does each layer keep? |
| score | which weights are worth keeping? |
| schedule | when do masks change, and how sparse by then? |

Nothing here knows a module or holds state.
"""

from rarefy.axes.allocation import (
    OWL,
    Allocation,
    AllocationField,
    AtLeast,
    Balanced,
    ErdosRenyi,
    ErdosRenyiKernel,
    ErdosRenyiKernelPlus,
    Global,
    Lamp,
    Layer,
    PerLayer,
    Proportional,
    Uniform,
    UniformPlus,
    lamp_scores,
    parse_allocation,
)
from rarefy.axes.layout import Layout
from rarefy.axes.pattern import (
    NM,
    Block,
    Channel,
    ConstantFanIn,
    Pattern,
    PatternField,
    Pool,
    Unstructured,
    parse_pattern,
)
from rarefy.axes.schedule import (
    AtInit,
    Constant,
    Cosine,
    Cubic,
    DropFraction,
    DropFractionField,
    Every,
    EveryField,
    Interval,
    InversePower,
    OneShot,
    SparsitySchedule,
    SparsityScheduleField,
    average_sparsity,
    parse_drop_fraction,
    parse_every,
    parse_sparsity_schedule,
    resolve,
)
from rarefy.axes.score import Score, ScoreField, parse_score, register_score, scores
from rarefy.axes.top_k import count, largest_remainder, top_k
from rarefy.axes.value import Share, Value, from_dict, registered, value

__all__ = [
    "NM",
    "OWL",
    "Allocation",
    "AllocationField",
    "AtInit",
    "AtLeast",
    "Balanced",
    "Block",
    "Channel",
    "Constant",
    "ConstantFanIn",
    "Cosine",
    "Cubic",
    "DropFraction",
    "DropFractionField",
    "ErdosRenyi",
    "ErdosRenyiKernel",
    "ErdosRenyiKernelPlus",
    "Every",
    "EveryField",
    "Global",
    "Interval",
    "InversePower",
    "Lamp",
    "Layer",
    "Layout",
    "OneShot",
    "Pattern",
    "PatternField",
    "PerLayer",
    "Pool",
    "Proportional",
    "Score",
    "ScoreField",
    "Share",
    "SparsitySchedule",
    "SparsityScheduleField",
    "Uniform",
    "UniformPlus",
    "Unstructured",
    "Value",
    "average_sparsity",
    "count",
    "from_dict",
    "lamp_scores",
    "largest_remainder",
    "parse_allocation",
    "parse_drop_fraction",
    "parse_every",
    "parse_pattern",
    "parse_score",
    "parse_sparsity_schedule",
    "register_score",
    "registered",
    "resolve",
    "scores",
    "top_k",
    "value",
]

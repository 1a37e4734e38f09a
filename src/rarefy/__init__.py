"""rarefy: make a network sparse, prove that it is, compare it fairly.

Six axes (allocation, score, pattern, schedule, update rule, execution), one verb, methods as values:

>>> import torch, rarefy
>>> model = torch.nn.Linear(8, 4)
>>> sparsity = rarefy.sparsify(model, rarefy.Magnitude(sparsity=0.75))
>>> rarefy.check(model, sparsity)
>>> int(sparsity.masks["weight"].sum())
8
"""

from rarefy.axes import (
    NM,
    AtLeast,
    Balanced,
    Block,
    Channel,
    Constant,
    ConstantFanIn,
    Cosine,
    Cubic,
    ErdosRenyi,
    ErdosRenyiKernel,
    Every,
    Global,
    InversePower,
    Lamp,
    OneShot,
    PerLayer,
    Score,
    Uniform,
    UniformPlus,
    Unstructured,
    register_score,
)
from rarefy.core import (
    Driver,
    Method,
    Sparsity,
    all_methods,
    check,
    method_from_dict,
    register,
    report,
    sparsify,
)
from rarefy.io import load, save
from rarefy.methods import (
    GMP,
    IMP,
    ITOP,
    SET,
    SNIP,
    SRSTE,
    Dense,
    GraNet,
    GraSP,
    Magnitude,
    Prune,
    Random,
    RandomSearch,
    RigL,
    SynFlow,
    TopKAST,
)
from rarefy.runtime import PackReport, pack, unpack

__version__ = "0.1.0"

__all__ = [
    "GMP",
    "IMP",
    "ITOP",
    "NM",
    "SET",
    "SNIP",
    "SRSTE",
    "AtLeast",
    "Balanced",
    "Block",
    "Channel",
    "Constant",
    "ConstantFanIn",
    "Cosine",
    "Cubic",
    "Dense",
    "Driver",
    "ErdosRenyi",
    "ErdosRenyiKernel",
    "Every",
    "Global",
    "GraNet",
    "GraSP",
    "InversePower",
    "Lamp",
    "Magnitude",
    "Method",
    "OneShot",
    "PackReport",
    "PerLayer",
    "Prune",
    "Random",
    "RandomSearch",
    "RigL",
    "Score",
    "Sparsity",
    "SynFlow",
    "TopKAST",
    "Uniform",
    "UniformPlus",
    "Unstructured",
    "all_methods",
    "check",
    "load",
    "method_from_dict",
    "pack",
    "register",
    "register_score",
    "report",
    "save",
    "sparsify",
    "unpack",
]

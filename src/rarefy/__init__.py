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
    OWL,
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
    method_from_dict,
    register,
    report,
    sparsify,
)
from rarefy.io import check, load, save
from rarefy.io import register as _register_with_transformers
from rarefy.methods import (
    ALPS,
    GMP,
    IMP,
    ITOP,
    SET,
    SNIP,
    SRSTE,
    Dense,
    DSnoT,
    EssentialSparsity,
    GraNet,
    GraSP,
    Magnitude,
    Prune,
    Random,
    RandomSearch,
    Refit,
    RigL,
    SparseGPT,
    SynFlow,
    TopKAST,
    Wanda,
)
from rarefy.runtime import PackReport, pack, unpack

__version__ = "0.1.0"

_register_with_transformers()

__all__ = [
    "ALPS",
    "GMP",
    "IMP",
    "ITOP",
    "NM",
    "OWL",
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
    "DSnoT",
    "Dense",
    "Driver",
    "ErdosRenyi",
    "ErdosRenyiKernel",
    "EssentialSparsity",
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
    "Refit",
    "RigL",
    "Score",
    "SparseGPT",
    "Sparsity",
    "SynFlow",
    "TopKAST",
    "Uniform",
    "UniformPlus",
    "Unstructured",
    "Wanda",
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

"""Every method, one file each, grouped by when it acts. Importing this module registers them."""

from rarefy.methods.at_init.grasp import GraSP
from rarefy.methods.at_init.random import Random
from rarefy.methods.at_init.random_search import RandomSearch
from rarefy.methods.at_init.snip import SNIP
from rarefy.methods.at_init.synflow import SynFlow
from rarefy.methods.dense import Dense
from rarefy.methods.iterative.essential_sparsity import EssentialSparsity
from rarefy.methods.iterative.imp import IMP
from rarefy.methods.one_shot.alps import ALPS
from rarefy.methods.one_shot.dsnot import DSnoT
from rarefy.methods.one_shot.magnitude import Magnitude
from rarefy.methods.one_shot.prune import Prune
from rarefy.methods.one_shot.refit import Refit
from rarefy.methods.one_shot.sparse_gpt import SparseGPT
from rarefy.methods.one_shot.wanda import Wanda
from rarefy.methods.training.drop_and_grow import DropAndGrow
from rarefy.methods.training.gmp import GMP
from rarefy.methods.training.granet import GraNet
from rarefy.methods.training.itop import ITOP
from rarefy.methods.training.rigl import RigL
from rarefy.methods.training.set import SET
from rarefy.methods.training.sr_ste import SRSTE
from rarefy.methods.training.top_kast import TopKAST

__all__ = [
    "ALPS",
    "GMP",
    "IMP",
    "ITOP",
    "SET",
    "SNIP",
    "SRSTE",
    "DSnoT",
    "Dense",
    "DropAndGrow",
    "EssentialSparsity",
    "GraNet",
    "GraSP",
    "Magnitude",
    "Prune",
    "Random",
    "RandomSearch",
    "Refit",
    "RigL",
    "SparseGPT",
    "SynFlow",
    "TopKAST",
    "Wanda",
]

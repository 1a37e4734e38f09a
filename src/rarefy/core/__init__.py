"""Sites, the contract of a method, the handle, and what proves and reports it."""

from rarefy.core.check import check
from rarefy.core.ledger import Ledger
from rarefy.core.method import Driver, Method, all_methods, method_from_dict, register
from rarefy.core.report import Report, report
from rarefy.core.sites import Site, find_sites, site_hash
from rarefy.core.sparsify import sparsify
from rarefy.core.sparsity import Sparsity

__all__ = [
    "Driver",
    "Ledger",
    "Method",
    "Report",
    "Site",
    "Sparsity",
    "all_methods",
    "check",
    "find_sites",
    "method_from_dict",
    "register",
    "report",
    "site_hash",
    "sparsify",
]

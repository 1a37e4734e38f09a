"""What a setting costs: perplexity of the trained model, pruned by SparseGPT, with packed weights of that dtype.

All Linears of the blocks run packed, whatever is fastest: int8 then means int8 in every one of them, weights per row
and activations per token.
"""

import copy
from pathlib import Path

import torch
from torch import nn

from rarefy.bench.language.corpus import Corpus
from rarefy.bench.language.runs import Bench, Settings, open_bench
from rarefy.bench.perplexity import Perplexity, perplexity
from rarefy.core.sparsify import sparsify
from rarefy.io.directory import read_model
from rarefy.io.prune import chosen_sites
from rarefy.methods import SparseGPT
from rarefy.runtime import forms
from rarefy.runtime.kernels import Form
from rarefy.runtime.layers import PackedLinear

__all__ = ["costs", "judged_bench"]


def judged_bench(folder: Path, corpus: Corpus, *, threads: int, quick: bool = False) -> Bench:
    """Calibration and judged windows, as the language table has them. Raises as `open_bench`."""
    less = {"samples": 16, "windows": 16, "characters": 1_000_000} if quick else {"windows": 200}
    return open_bench(folder, corpus, Settings(threads=threads, **less))


def costs(bench: Bench, sparsity: float) -> dict[str, Perplexity]:
    """Perplexity by dtype of values, at a sparsity; 0: of the dense model."""
    model = read_model(bench.folder).eval()
    names = chosen_sites(model)
    masks: dict[str, torch.Tensor] = {}
    if sparsity:
        masks = dict(sparsify(model, SparseGPT(sparsity), data=bench.calibration(0), only=names).masks)
    model.to(torch.bfloat16)
    found: dict[str, Perplexity] = {}
    for values in ("bf16", "int8"):
        twin = copy.deepcopy(model)
        pack_all(twin, names, masks, values)
        found[values] = perplexity(twin, bench.judged, batch=16)
    return found


@torch.no_grad()
def pack_all(model: nn.Module, names: list[str], masks: dict[str, torch.Tensor], values: str) -> None:
    """Every Linear whose weight is named becomes packed, with values in bf16 or int8."""
    for name in names:
        path = name.removesuffix(".weight")
        layer = model.get_submodule(path)
        if not isinstance(layer, nn.Linear) or layer.bias is not None:
            raise ValueError(f"{name!r} is no Linear without bias: this benchmark is of Llamas")
        mask, weight, scales = masks.get(name), layer.weight.detach().bfloat16(), None
        mask = torch.ones(weight.shape, dtype=torch.bool) if mask is None else mask
        if values == "int8":
            weight, scales = forms.quantize(weight, mask)
        stored = forms.encode(weight, mask=mask, form=Form.BITMAP, scales=scales)
        packed = PackedLinear.from_stored(stored, in_features=layer.in_features, out_features=layer.out_features)
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, packed.eval())

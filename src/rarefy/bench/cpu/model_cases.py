"""Which networks are compared, at which batches, and which of their layers have zeros."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rarefy.axes import parse_pattern
from rarefy.bench.cpu.cases import DTYPES, Zeros
from rarefy.bench.cpu.networks import Bert, Llama, MobileNetV1, ResNet50
from rarefy.bench.cpu.networks.llama import HasConstants
from rarefy.bench.cpu.networks.vision import fold

__all__ = ["NETWORKS", "ModelCase", "Network", "build", "model_cases", "prune", "stand_ins"]

Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Network:
    """make: the module, on whatever device is set. example: an input for a batch. sparse: whether a layer, by its name,
    has zeros. dtype: of weights before anything is packed. below: inputs are whole numbers below this. peers: of "onnx"
    (a graph for onnxruntime and DeepSparse) and "llama.cpp"."""

    name: str
    make: Callable[[], nn.Module]
    example: Callable[[int, torch.Generator], Tensor]
    sparse: Callable[[str, Layer], bool]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...] = DTYPES
    dtype: torch.dtype = torch.float32
    below: int = 0
    peers: tuple[str, ...] = ("onnx",)


def _images(batch: int, source: torch.Generator) -> Tensor:
    return torch.randn(batch, 3, 224, 224, generator=source)


def _tokens(count: int, below: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda batch, source: torch.randint(0, below, (batch, count), generator=source)


def _convolutions(name: str, layer: Layer) -> bool:
    """All but the first and the depthwise ones; the classifier too."""
    return isinstance(layer, nn.Linear) or (layer.groups == 1 and layer.in_channels > 3)


def _in_blocks(name: str, layer: Layer) -> bool:
    """All Linears of transformer blocks; not embeddings, pooler and head."""
    return name.startswith(("blocks.", "layers."))


NETWORKS = (
    Network("MobileNet-v1", MobileNetV1, _images, _convolutions, (1,)),
    Network("ResNet-50", ResNet50, _images, _convolutions, (1, 16)),
    Network("BERT-base", Bert, _tokens(128, 30522), _in_blocks, (1, 16), below=30522),
    Network(
        "Llama 1.1 B decode", Llama, _tokens(1, 32000), _in_blocks, (1,),
        dtypes=("bf16", "int8"), dtype=torch.bfloat16, peers=("llama.cpp",),
    ),
    Network(
        "Llama 1.1 B prefill 128", Llama, _tokens(128, 32000), _in_blocks, (1,),
        dtypes=("bf16", "int8"), dtype=torch.bfloat16, peers=("llama.cpp",),
    ),
)  # fmt: skip

_ZEROS = (*(Zeros("unstructured", s) for s in (0.8, 0.9, 0.95)), *(Zeros("4x1", s) for s in (0.8, 0.9, 0.95)))


@dataclass(frozen=True)
class ModelCase:
    """A network at one batch, with values of one dtype; `zeros` are compared one by one."""

    network: Network
    batch: int
    dtype: str
    zeros: tuple[Zeros, ...] = field(default=_ZEROS)

    def __str__(self) -> str:
        return f"{self.network.name} batch {self.batch} {self.dtype}"


def model_cases(*, quick: bool = False, only: Sequence[str] = (), dtypes: Sequence[str] = DTYPES) -> list[ModelCase]:
    """The cases to measure. only: networks whose names begin so, whatever the case."""
    begins = tuple(text.lower() for text in only)
    networks = [n for n in NETWORKS if not begins or n.name.lower().startswith(begins)]
    if only and not networks:
        raise ValueError(f"no network begins with {', '.join(only)}; there are {', '.join(n.name for n in NETWORKS)}")
    if quick and not only:
        networks = [n for n in networks if "Llama" not in n.name]
    zeros = (Zeros("unstructured", 0.9), Zeros("4x1", 0.9)) if quick else _ZEROS
    return [
        ModelCase(network, batch, dtype, zeros)
        for network in networks
        for batch in (network.batches[:1] if quick else network.batches)
        for dtype in network.dtypes
        if dtype in dtypes
    ]


def build(network: Network, source: torch.Generator) -> nn.Module:
    """The network with random weights, batch norms folded, ready for inference."""
    with torch.device("meta"):
        model = network.make()
    model = model.to(network.dtype).to_empty(device="cpu").eval()
    with torch.no_grad():
        for module in model.modules():
            _fill(module, source)
    return fold(model).requires_grad_(False)


def _fill(module: nn.Module, source: torch.Generator) -> None:
    """Weights of variance 1 / inputs, norms that change nothing, and the constants that a module has made on meta."""
    if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.RMSNorm)):
        module.reset_parameters()
    elif isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
        weight = module.weight
        fan_in = 1 if isinstance(module, nn.Embedding) else weight[0].numel()
        weight.normal_(0, (2 / fan_in) ** 0.5 if isinstance(module, nn.Conv2d) else fan_in**-0.5, generator=source)
        if not isinstance(module, nn.Embedding) and module.bias is not None:
            module.bias.zero_()
    elif isinstance(module, HasConstants):
        module.make_constants()


def prune(model: nn.Module, network: Network, zeros: Zeros, source: torch.Generator) -> tuple[int, int]:
    """Zeros at random in all sparse layers of the network, in place: weights kept, and weights there are, in those."""
    pattern, kept, weights = parse_pattern(zeros.pattern), 0, 0
    for name, layer in layers(model):
        if not network.sparse(name, layer):
            continue
        shape = tuple(layer.weight.shape)
        mask = pattern.project(torch.rand(shape, generator=source), pattern.asked(shape, zeros.sparsity))
        with torch.no_grad():
            # The same variance of outputs as before, so that no activation dies or overflows on its way down.
            layer.weight.mul_(mask).mul_(1 / math.sqrt(max(1 - zeros.sparsity, 1e-3)))
        kept, weights = kept + int(mask.sum()), weights + mask.numel()
    return kept, weights


def layers(model: nn.Module) -> list[tuple[str, Layer]]:
    """All Linears and convolutions, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


class StandIn(nn.Module):
    """In the place of a layer: hands out zeros of the shape that the layer would make, always the same ones."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = (layer,)  # no submodule: it is asked for shapes alone
        self.made: dict[tuple[int, ...], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Zeros."""
        shape = tuple(x.shape)
        if shape not in self.made:
            self.made[shape] = torch.zeros_like(self.layer[0](x))
        return self.made[shape]


def stand_ins(model: nn.Module, network: Network) -> nn.Module:
    """The network with stand-ins for its sparse layers, in place: its time is what no kernel for weights can remove."""
    for name, layer in layers(model):
        if network.sparse(name, layer):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, StandIn(layer))
    return model

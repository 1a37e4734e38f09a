"""Tiny networks, data and an ordinary training loop, and what it takes to say that nothing has changed."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.core.scoring import score_sites

Batch = tuple[Tensor, Tensor]


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """What `make` returns when the global generator starts at `seed`; the generator itself is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """10-12-8-4: inputs that are no multiple of 4, a last layer that is a multiple of none."""
    return seeded(
        lambda: nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)), seed
    ).to(dtype)


def cnn(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A convolution, a norm, a grouped transposed convolution, dropout, a Linear; for 3×4×4 images."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.AvgPool2d(4),
            nn.Flatten(),
            nn.Linear(32, 4),
        ),
        seed,
    ).to(dtype)


def batches(shape: Sequence[int] = (10,), n: int = 3, size: int = 8, seed: int = 1, classes: int = 4) -> list[Batch]:
    """Gaussian inputs in float64, and labels."""
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, *shape, generator=g, dtype=torch.float64),
            torch.randint(0, classes, (size,), generator=g),
        )
        for _ in range(n)
    ]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def sgd(model: nn.Module, lr: float = 0.05, momentum: float = 0.9, weight_decay: float = 1e-3) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)


def fit(
    model: nn.Module,
    optimizer: Any,
    steps: int,
    data: Sequence[Batch],
    after: Callable[[int], None] | None = None,
    start: int = 0,
) -> None:
    """An ordinary loop; `after(t)` is called with the number of completed steps."""
    for step in range(start, steps):
        optimizer.zero_grad()
        loss(model, data[step % len(data)]).backward()
        optimizer.step()
        if after is not None:
            after(step + 1)


def bits(tensor: Tensor) -> bytes:
    """The very bytes, so that −0.0, +0.0 and every NaN are told apart."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def picture(model: nn.Module) -> dict[str, Any]:
    """All that a model consists of, to be compared with ==."""
    found: dict[str, Any] = {"random": bits(torch.get_rng_state())}
    found |= {f"parameter {n}": (id(p), bits(p), p.requires_grad) for n, p in model.named_parameters()}
    found |= {f"gradient {n}": None if p.grad is None else bits(p.grad) for n, p in model.named_parameters()}
    found |= {f"buffer {n}": (id(b), bits(b)) for n, b in model.named_buffers()}
    found |= {f"module {n}": (type(m), m.training, hooks(m)) for n, m in model.named_modules()}
    found |= {f"hooks {n}": len(p._post_accumulate_grad_hooks or ()) for n, p in model.named_parameters()}
    return found | {"keys": list(model.state_dict())}


def hooks(module: nn.Module) -> int:
    """How many hooks hang on a module."""
    return sum(len(h) for name, h in vars(module).items() if name.endswith("_hooks") and h)


def equal_models(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(bits(x) == bits(y) for x, y in pairs)


def clone(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def positive_zero(values: Tensor) -> bool:
    """Whether all values are +0.0, to the bit."""
    return not any(bits(values))


def total(masks: Iterable[Tensor]) -> int:
    return sum(int(m.sum()) for m in masks)


def linear(weight: Any, bias: bool = False) -> nn.Linear:
    """A Linear in float64 with this weight, given as rows."""
    w = torch.tensor(weight, dtype=torch.float64)
    layer = nn.Linear(w.shape[1], w.shape[0], bias=bias, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(w)
    return layer


def mask(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def step_with_gradient(optimizer: Any, *gradients: Tensor) -> None:
    """One step of an optimizer whose parameters' gradients are these, through an ordinary backward pass."""
    optimizer.zero_grad()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    pairs = zip(parameters, gradients, strict=True)
    torch.stack([(p * g).sum() for p, g in pairs]).sum().backward()
    optimizer.step()


def hold(s: Any, masks: Sequence[Tensor], weights: Sequence[Any]) -> None:
    """Put these masks and weights under a handle, as if the method had chosen them."""
    for site, kept, weight in zip(s.sites, masks, weights, strict=True):
        s.keep(site, kept)
        s.commit()
        with torch.no_grad():
            site.parameter.copy_(torch.as_tensor(weight))


def scores(model: nn.Module, name: str, data: Any, of: Any = loss, **options: Any) -> dict[str, Tensor]:
    """Raw scores by weight name, as a method would get them."""
    s = rarefy.sparsify(model, rarefy.Dense())
    s.data, s.loss = data, of
    return {site.name: score for site, score in score_sites(s, rarefy.Score(name), **options).items()}

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from architectures import build
from core.capture.references import close, hooked, rows
from rarefy.axes import Layout
from rarefy.core.capture import Captured, Statistics, dense_statistics, walk
from rarefy.core.sites import find_sites


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_name(model: nn.Module, data: list[Any], **options: Any) -> dict[str, list[Statistics]]:
    return {site.name: parts for site, parts in dense_statistics(model, find_sites(model, **options), data).items()}


def captured_once(model: nn.Module, data: list[Any], gram: torch.dtype = torch.float64) -> Captured:
    return next(walk(model, find_sites(model), data, gram=gram))


class Attends(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attention(x, memory, memory)[0]


@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_attention_projections(batch_first: bool):
    model = seeded(lambda: Attends(batch_first)).eval()
    x, memory = normal(3, 5, 8), normal(3, 5, 8, seed=1)
    own = by_name(model, [(x, x)], only="attention")["attention.in_proj_weight"]
    assert len(own) == 1
    assert close(own[0].squares, x.double().square().sum((0, 1)))
    crossed = by_name(model, [(x, memory)], only="attention")
    query, key, value = crossed["attention.in_proj_weight"]
    assert close(query.squares, x.double().square().sum((0, 1)))
    assert close(key.squares, memory.double().square().sum((0, 1)))
    assert key is value
    inner: list[Tensor] = []
    with torch.no_grad():  # the output projection's input: undo it
        out = model(x, memory) - model.attention.out_proj.bias
        inner.append(torch.linalg.solve(model.attention.out_proj.weight.double(), out.double().mT).mT)
    assert close(crossed["attention.out_proj.weight"][0].squares, inner[0].square().sum((0, 1)), 1e-4)


def test_torchs_fused_encoder_layers_are_opened():
    model = seeded(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)).eval()
    x = normal(3, 5, 8)
    for captured in walk(model, find_sites(model), [x]):
        assert not captured.fallback
        assert all(part.tokens == 15 for parts in captured.statistics.values() for part in parts)
    assert torch.backends.mha.get_fastpath_enabled()


CONVOLUTIONS = {
    "grouped": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2),
    "depthwise": lambda: nn.Conv1d(4, 4, 3, padding=2, groups=4),
    "same": lambda: nn.Conv2d(4, 6, (3, 5), padding="same"),
    "mirrored": lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"),
    "volume": lambda: nn.Conv3d(4, 6, 2),
    "one place": lambda: nn.Conv2d(4, 6, 1).to(memory_format=torch.channels_last),
    "channels last": lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1, output_padding=1, groups=2, dilation=2),
    "transposed 1-D": lambda: nn.ConvTranspose1d(4, 6, 3, stride=3),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_rows_of_convolutions_give_their_outputs(kind: str):
    """Σ y² = Σ over groups of tr(W G Wᵀ): it binds every column to its weight."""
    model = seeded(lambda: nn.Sequential(CONVOLUTIONS[kind]())).double()
    layer = model[0]
    x = normal(3, 4, *[9] * (layer.weight.ndim - 2)).double()
    captured = captured_once(model, [x])
    (site,) = captured.statistics
    with torch.no_grad():
        y = layer(x) - layer.bias.view(-1, *[1] * (layer.weight.ndim - 2))
    weight = site.layout.canonical(site.weight).flatten(1)
    assert len(captured.matrices(site)) == layer.groups
    for where, part in captured.matrices(site):
        assert part.gram is not None
        found = (weight[where] @ part.gram @ weight[where].T).diagonal()
        torch.testing.assert_close(found, y[:, where].flatten(2).square().sum((0, 2)), rtol=1e-10, atol=1e-10)
        assert part.sequences == 3


def test_several_convolutions_of_one_input_do_not_share():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 3)

        def forward(self, x: Tensor) -> Any:
            return self.a(x), self.b(x), self.c(x)

    model = seeded(Two)
    a, b, c = by_name(model, [normal(2, 2, 5, 5)]).values()
    assert a[0] is c[0]
    assert a[0] is not b[0]
    assert (a[0].tokens, b[0].tokens) == (18, 50)


class Calls(nn.Module):
    """One weight, used in a way of its own."""

    def __init__(self, use: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6, bias=False)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.layer, x)


USES: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "functional": lambda m, x: functional.linear(x, m.weight),
    "from the left": lambda m, x: (m.weight @ x.flatten(0, 1).T).T,
    "einsum": lambda m, x: torch.einsum("oi,bti->bto", m.weight, x),
    "in two parts": lambda m, x: torch.cat([x @ m.weight[:2].T, x @ m.weight[2:].T], -1),
    "by head": lambda m, x: torch.einsum("hoi,bti->bhto", m.weight.view(3, 2, 4), x),
    "a vector at a time": lambda m, x: torch.stack([m.weight @ v for v in x.flatten(0, 1)]),
    "in another dtype": lambda m, x: x.double() @ m.weight.double().T,
}


@pytest.mark.parametrize("use", USES)
def test_inputs_are_seen_whoever_multiplies(use: str):
    model = seeded(lambda: Calls(USES[use]))
    x = normal(3, 5, 4)
    (parts,) = by_name(model, [x]).values()
    for part in parts:
        assert part.tokens == 15
        assert close(part.squares, x.double().square().sum((0, 1)))
    assert len({id(part) for part in parts}) == 1


def test_autocast_copies_are_followed():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    x = normal(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        first, _ = by_name(model, [x, x]).values()
    assert first[0].tokens == 6
    assert close(first[0].squares, 2 * x.bfloat16().double().square().sum(0))


def test_products_over_a_part_of_the_inputs_are_refused():
    model = seeded(lambda: Calls(lambda m, x: x[..., :2] @ m.weight[:, :2].T))
    with pytest.raises(ValueError, match=r"'layer\.weight' is stored as \(6, 4\).*uses 2 entries a row.*skip="):
        by_name(model, [normal(3, 4)])


class SomeExperts(nn.Module):
    def __init__(self, **said: Any) -> None:
        super().__init__()
        self.up = nn.Parameter(normal(3, 4, 6))
        for name, value in said.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(3, -1, -1), self.up)


def test_stacked_matrices_read_the_wrong_way_round_are_refused():
    with pytest.raises(ValueError, match=r"'up' is stored as \(3, 4, 6\).*is_transposed = True, or skip='up'"):
        by_name(SomeExperts(is_transposed=False), [normal(5, 4)])
    for said in ({"is_transposed": True}, {"hidden_size": 4}):
        model = SomeExperts(**said)
        (site,) = find_sites(model)
        assert site.layout == Layout(transposed=True, stacked=3)
        assert site.shape == (18, 4)
        (parts,) = by_name(model, [normal(5, 4)]).values()
        assert len(parts) == 3
        assert parts[0] is parts[1] is parts[2]


@pytest.mark.parametrize("how", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_fused_experts_one_of_them_without_tokens(name: str, how: str):
    model, data = build(name)
    model.set_experts_implementation(how)
    experts = [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith("Experts")]
    name, module = experts[0]
    router = next(
        m for n, m in model.named_modules() if n in (name.replace("experts", "gate"), name.replace("experts", "router"))
    )
    expected: dict[int, list[Tensor]] = {e: [] for e in range(4)}

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, chosen = [*args, *kwargs.values()][:2]
        for e in range(4):
            expected[e].append(hidden[(chosen == e).any(-1)].double())

    def never_two(_: nn.Module, __: Any, out: Any) -> Any:
        chosen = out[-1]
        return (*out[:-1], torch.where(chosen == 2, (chosen.flip(-1) + 1) % 2 + (chosen.flip(-1) == 3), chosen))

    forced = router.register_forward_hook(never_two)
    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        for batch in data:
            model(**batch)
    hook.remove()
    walking = walk(model, find_sites(model), data, gram=torch.float64)
    captured = next(walking)
    site = next(s for s in captured.statistics if s.name.endswith("experts.gate_up_proj"))
    down = next(s for s in captured.statistics if s.name.endswith("experts.down_proj"))
    for e, (part, below) in enumerate(zip(captured.statistics[site], captured.statistics[down], strict=True)):
        x = torch.cat(expected[e])
        assert part.tokens == below.tokens == len(x)
        assert (e == 2) == (not len(x))
        if len(x):
            assert close(part.squares, x.square().sum(0))
            weight = site.layout.canonical(site.weight).unflatten(0, (4, -1))[e].double()
            assert weight.shape[1] == x.shape[1]
    assert captured.statistics[site][2].gram is None
    list(walking)
    forced.remove()


class Rarely(nn.Module):
    """Two layers that read one tensor in the first batch, and two different ones in a later one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + (self.b(x) if x.sum() > 0 else self.b(x * 2))


def test_what_stops_sharing_is_counted_apart():
    model = seeded(Rarely)
    data = [torch.ones(2, 4), -torch.ones(2, 4)]
    a, b = by_name(model, data).values()
    assert a[0] is not b[0]
    assert a[0].squares.tolist() == [4.0] * 4
    assert b[0].squares.tolist() == [10.0] * 4


def test_equal_copies_share_too():
    model = seeded(Rarely)
    hook = model.b.register_forward_pre_hook(lambda _, args: (args[0].clone(),))
    a, b = by_name(model, [torch.ones(2, 4)]).values()
    hook.remove()
    assert a[0] is b[0]


def test_references_agree_with_a_layers_own_output():
    """Of the reference itself: rows times weight is the output."""
    layer = nn.Conv2d(4, 6, 3, groups=2, bias=False)
    x = normal(2, 4, 5, 5)
    found = torch.einsum("gtk,gok->tgo", rows(layer, x), layer.weight.flatten(1).unflatten(0, (2, -1)))
    torch.testing.assert_close(found.flatten(1), layer(x).permute(0, 2, 3, 1).flatten(0, 2))
    assert hooked(nn.Sequential(layer), [x], find_sites(nn.Sequential(layer)))

import json

import pytest
import torch
from torch import nn

from language import save_llama, text_of
from rarefy.bench.cpu.cases import Zeros
from rarefy.bench.decoding import __main__ as command
from rarefy.bench.decoding.cost import costs, pack_all
from rarefy.bench.decoding.runs import KINDS, ZEROS, Decode, Setting, steps
from rarefy.bench.decoding.shape import Shape, make_llama, thin
from rarefy.bench.decoding.table import decode_grid
from rarefy.bench.language.corpus import Corpus
from rarefy.bench.language.runs import Settings, open_bench
from rarefy.bench.perplexity import perplexity
from rarefy.io.directory import read_model
from rarefy.io.prune import chosen_sites
from rarefy.runtime import Packed

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'rarefy[hf]'")
pytestmark = pytest.mark.filterwarnings("ignore:pack has nothing but torch")
TINY = Shape(vocabulary=64, width=32, inner=64, depth=2, heads=4, shared=2)


@pytest.mark.parametrize("zeros", ZEROS, ids=str)
def test_zeros_are_in_exact_numbers_and_in_the_blocks_alone(zeros):
    model = make_llama(TINY)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    kept, weights = thin(model, zeros)
    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    assert len(layers) == 14
    assert weights == sum(layer.weight.numel() for layer in layers)
    assert kept == pytest.approx((1 - zeros.sparsity) * weights, rel=0.02)
    assert sum(int(layer.weight.ne(0).sum()) for layer in layers) == pytest.approx(kept, rel=1e-3)  # a value may be 0
    assert model.lm_head.weight.ne(0).float().mean() > 0.99
    if zeros.pattern == "4x1":
        for layer in layers:
            units = layer.weight.ne(0).view(-1, 4, layer.in_features).any(1)
            assert int(units.sum()) * 4 == pytest.approx(int(layer.weight.ne(0).sum()), rel=0.01)


def test_the_shape_is_the_one_that_llama_cpp_gets():
    model = make_llama(TINY)
    assert command._parameters(TINY) == sum(p.numel() for p in model.parameters())
    assert 1.09e9 < command._parameters(Shape()) < 1.11e9
    with torch.no_grad():
        logits = model(input_ids=torch.arange(8)[None]).logits
    assert logits.isfinite().all()
    assert logits.float().std() > 0.1


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name, seed in (("train", 1), ("judged", 2)):
        (folder / f"{name}.py").write_text(text_of(400, seed))
    corpus = Corpus((folder / "train.py",), (folder / "judged.py",))
    model = save_llama(folder / "model")
    return open_bench(model, corpus, Settings(length=16, samples=8, windows=6, threads=1))


def test_what_settings_cost(bench):
    exact = perplexity(read_model(bench.folder), bench.judged).value
    dense, pruned = costs(bench, 0.0), costs(bench, 0.7)
    assert set(dense) == set(pruned) == {"bf16", "int8"}
    assert dense["bf16"].value == pytest.approx(exact, rel=0.02)
    assert dense["int8"].value == pytest.approx(exact, rel=0.05)
    assert pruned["bf16"].value != dense["bf16"].value


def test_every_layer_of_the_blocks_is_packed(bench):
    model = read_model(bench.folder).eval().bfloat16()
    before = {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = chosen_sites(model)
    pack_all(model, names, {}, "bf16")
    packed = {n: m for n, m in model.named_modules() if isinstance(m, Packed)}
    assert sorted(f"{n}.weight" for n in packed) == sorted(names)
    assert all(torch.equal(m.stored.dense(), before[n]) for n, m in packed.items())
    with pytest.raises(ValueError, match="no Linear without bias"):
        pack_all(nn.Sequential(nn.Linear(2, 2)), ["0.weight"], {}, "bf16")


def setting(values: str, zeros: Zeros, total: float) -> Setting:
    return Setting(
        values=values, pattern=zeros.pattern, sparsity=zeros.sparsity, kept=1, weights=2, total_dense=0.2,
        total_packed=total, inside_dense=0.15, inside_packed=total - 0.01, ratio=0.2 / total, low=1.0, high=9.0,
        bytes_dense=4, bytes_packed=2, packed_layers=14, choices={"bitmap": 14}, reverted=False, rounds=5,
    )  # fmt: skip


def test_the_table():
    zeros = (Zeros("unstructured", 0.0), *ZEROS)
    made = [setting("bf16", each, total) for each, total in zip(zeros, (0.1, 0.05, 0.04, 0.02), strict=True)]
    cost = {"bf16 0.0": (8.0, 7.5, 8.5), "bf16 0.5": (10.0, 9.0, 11.0), "bf16 0.7": (16.0, None, None)}
    rows = decode_grid(made, {"BF16": 0.045}, cost).rows
    assert len(rows) == 9
    assert decode_grid(made, {}, cost).note.endswith("Without zeros: 8.00 in bf16.")
    assert rows[0] == (
        "bf16", "50 %", "generate, end to end", "200", "100", "50", "4.00 [1.00, 9.00]", "45 BF16",
        "10.00 [9.00, 11.00] (+25.0 %)",
    )  # fmt: skip
    assert rows[1][2:7] == ("inside packed layers", "150", "90", "40", "3.75")
    assert rows[2][2:6] == ("transformers' own", "50", "10", "10")
    assert rows[3][-1] == "16.00 (+100.0 %)"
    assert rows[6][1] == "4x1 90 % (speed only)"
    assert rows[6][-1] == "–"
    assert decode_grid(made[1:], {}, {}).rows[0][4] == "–"


@pytest.mark.slow
def test_the_command_on_a_small_shape(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "SMALL", TINY)
    monkeypatch.setenv("RAREFY_PEERS", str(tmp_path / "none"))
    monkeypatch.setattr(command, "pin", lambda threads: None)
    path = tmp_path / "decode.json"
    command.main(["--quick", "--threads", "1", "--rounds", "2", "--json", str(path)])
    found = json.loads(path.read_text())
    assert len(found["settings"]) == 2 * (1 + len(ZEROS))
    assert set(found["left_out"]) == {kind for kinds in KINDS.values() for kind in kinds}
    assert steps(Decode()) == 8 + 3
    assert "generate, end to end" in path.with_suffix(".md").read_text()
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "missing")])
    assert "no model directory" in capsys.readouterr().err

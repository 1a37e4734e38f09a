import dataclasses
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rarefy
from language import save_llama, text_of
from rarefy.axes import value
from rarefy.core import Method
from rarefy.io.calibration import windows
from rarefy.io.directory import read_model
from rarefy.io.prove import check_directory
from rarefy.io.prune import chosen_sites, part_of, prune
from rarefy.io.pruned import innermost, kind_of

pytest.importorskip("transformers")

HALF = rarefy.Magnitude(0.5, allocation="uniform")


@value
class Shown(Method):
    """Keeps the first inputs of every row, and remembers what data it was given."""

    sparsity: float = 0.5
    needs = frozenset({"data"})

    def begin(self, s):
        assert s.data is not None
        SEEN.extend(s.data)
        for batch in s.data:
            s.model(**batch)
        for site in s.sites:
            mask = torch.zeros_like(site.mask)
            mask[:, : mask.shape[1] // 2] = True
            s.keep(site, mask)


SEEN: list = []


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(text_of(200))
    SEEN.clear()
    return path


def tensors(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def test_a_directory_is_pruned_and_says_so(llama, tmp_path):
    found = prune(llama, tmp_path / "out", HALF)
    before, after = tensors(llama), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    for name in changed:
        assert int(after[name].ne(0).sum()) == after[name].numel() // 2
        assert torch.equal(after[name][after[name] != 0], before[name][after[name] != 0])
    assert (tmp_path / "out/config.json").read_bytes() == (llama / "config.json").read_bytes()
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    assert check_directory(tmp_path / "out").kept == found.kept == found.weights // 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_told_counts_every_kind(llama, tmp_path):
    found = prune(llama, tmp_path / "out", HALF)
    assert [kind.name for kind in found.kinds][:2] == ["self_attn.q_proj", "self_attn.k_proj"]
    assert found.kinds[0] == type(found.kinds[0])("self_attn.q_proj", 2, 512, 256, 256)
    parameters = sum(t.numel() for t in tensors(llama).values())
    assert found.parameters == parameters
    assert found.nonzero == sum(int(t.ne(0).sum()) for t in tensors(tmp_path / "out").values())
    told = json.loads(json.dumps(found.to_dict()))
    assert told["totals"] == {"weights": found.weights, "kept": found.kept, "sparsity": 0.5}
    assert told["method"] == HALF.to_dict()


def test_data_are_drawn_framed_and_remembered(llama, text, tmp_path):
    found = prune(llama, tmp_path / "out", Shown(), calibration=text, samples=5, length=9, seed=4)
    ids = torch.cat([batch["input_ids"] for batch in SEEN])
    assert ids.shape == (5, 9)
    assert ids[:, 0].tolist() == [0] * 5
    assert found.calibration is not None
    assert windows([ids]).sha256 == found.calibration["sha256"]
    record = check_directory(tmp_path / "out")
    assert record.calibration is not None
    assert record.calibration.sha256 == found.calibration["sha256"]
    assert record.calibration.settings["seed"] == 4


def test_windows_are_as_long_as_the_context_by_default(llama, text, tmp_path):
    prune(llama, tmp_path / "out", Shown(), calibration=text, samples=2)
    assert SEEN[0]["input_ids"].shape == (2, 32)


def test_batches_of_tokens_do_as_well(llama, tmp_path):
    prune(llama, tmp_path / "out", Shown(), calibration=[torch.ones(1, 3, dtype=torch.long)] * 2)
    assert len(SEEN) >= 2


def test_progress_names_each_block(llama, text, tmp_path):
    told: list[tuple[int, int, str]] = []
    method = rarefy.Wanda(0.5)
    prune(llama, tmp_path / "out", method, calibration=text, samples=1, progress=lambda *x: told.append(x))
    assert told == [(0, 2, "model.layers.0"), (1, 2, "model.layers.1"), (2, 2, "")]


def test_a_killed_run_continues_with_the_blocks_that_are_left(llama, text, tmp_path, monkeypatch):
    def stop(done: int, of: int, name: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    def again(**how: Any) -> Any:
        return prune(llama, tmp_path / "out", rarefy.SparseGPT(pattern="2:4"), calibration=text, samples=2, **how)

    with pytest.raises(KeyboardInterrupt):
        again(progress=stop)
    assert {path.name for path in tmp_path.iterdir()} == {".out.partial", text.name}
    told: list[tuple[int, int, str]] = []
    again(progress=lambda *x: told.append(x))
    assert [name for _, _, name in told] == ["model.layers.1", ""]
    assert {path.name for path in tmp_path.iterdir()} == {"out", text.name}
    prune(llama, tmp_path / "whole", rarefy.SparseGPT(pattern="2:4"), calibration=text, samples=2)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_an_error_leaves_nothing_behind(llama, text, tmp_path):
    def fail(*_: Any) -> None:
        raise ValueError("no luck")

    with pytest.raises(ValueError, match="no luck"):
        prune(llama, tmp_path / "out", rarefy.Wanda(0.5), calibration=text, samples=1, progress=fail)
    assert [path.name for path in tmp_path.iterdir()] == [text.name]


def test_only_and_skip(llama, tmp_path):
    found = prune(llama, tmp_path / "a", HALF, only="*.mlp.*", skip="*up_proj*")
    assert [kind.name for kind in found.kinds] == ["mlp.gate_proj", "mlp.down_proj"]
    found = prune(llama, tmp_path / "b", HALF, skip=["*self_attn*"])
    assert {kind.name.split(".")[0] for kind in found.kinds} == {"mlp"}


def test_shares_of_attention_and_mlp(llama, tmp_path):
    found = prune(llama, tmp_path / "out", HALF, shares={"attention": 0.25, "mlp": 0.75})
    kept = {kind.name: (kind.kept or 0) / kind.weights for kind in found.kinds}
    assert all(share == (0.75 if "attn" in name else 0.25) for name, share in kept.items())
    assert found.method["allocation"]["kind"] == "PerLayer"


def test_a_dry_run_reads_and_writes_nothing(llama, tmp_path):
    found = prune(llama, None, rarefy.Magnitude(pattern="2:4"))
    assert found.kept is None
    assert found.nonzero is None
    assert [(kind.asked, kind.kept) for kind in found.kinds][:2] == [(256, None), (128, None)]
    assert [kind.asked for kind in prune(llama, None, rarefy.Magnitude(0.5)).kinds] == [None] * 7  # by scores
    assert [kind.asked for kind in prune(llama, None, Shown()).kinds] == [None] * 7


def test_weights_are_written_in_the_dtype_that_they_had(tmp_path):
    source = save_llama(tmp_path / "source")
    read_model(source).to(torch.bfloat16).save_pretrained(source)  # pyright: ignore
    prune(source, tmp_path / "out", HALF, dtype=torch.float32)
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}


def test_mistakes_are_found_before_anything_is_read(llama, text, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the model was read")

    monkeypatch.setattr("rarefy.io.prune.read_model", refuse)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("")
    out = tmp_path / "out"
    for words, arguments in (
        ("is not an empty folder", {"out": tmp_path / "taken"}),
        ("lies in", {"out": llama / "pruned"}),
        ("no model directory", {"model_dir": tmp_path}),
        ("needs calibration data", {"method": Shown()}),
        ("fewer than one window of 31", {"method": Shown(), "calibration": short(tmp_path)}),
        ("longer than the model's context of 32", {"method": Shown(), "calibration": text, "length": 33}),
        ("needs optimizer, steps", {"method": rarefy.RigL(0.5)}),
        ("give a sparsity, or an n:m pattern", {"method": rarefy.Magnitude()}),
    ):
        given = {"model_dir": llama, "out": out, "method": HALF, **arguments}
        with pytest.raises(ValueError, match=words):
            prune(given.pop("model_dir"), given.pop("out"), given.pop("method"), **given)
    assert not out.exists()


def short(folder):
    path = folder / "short.txt"
    path.write_text("the cat")
    return path


def test_a_mistake_found_late_writes_nothing(llama, tmp_path):
    class Fails(Shown):
        def begin(self, s):
            raise ValueError("no such luck")

    with pytest.raises(ValueError, match="no such luck"):
        prune(llama, tmp_path / "out", Fails(), calibration=[torch.ones(1, 3, dtype=torch.long)])
    with pytest.raises(ValueError, match="takes no shares"):
        prune(llama, tmp_path / "out", rarefy.Magnitude(pattern="2:4"), shares={"mlp": 0.5})
    with pytest.raises(ValueError, match="no weight of attention"):
        prune(llama, tmp_path / "out", HALF, only="*.mlp.*", shares={"attention": 0.5})
    assert not list(tmp_path.iterdir())


def test_parts_and_kinds_by_name():
    assert part_of("encoder.layer.0.attention.self.query.weight") == "attention"
    assert part_of("block.0.layer.1.EncDecAttention.q.weight") == "attention"
    assert part_of("model.layers.0.mlp.experts.gate_up_proj") == "mlp"
    assert kind_of("model.layers.0.self_attn.q_proj.weight") == "self_attn.q_proj"
    assert kind_of("lm_head.weight") == "lm_head"


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)


def test_sites_are_those_in_repeated_blocks():
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([Block()]), "head": torch.nn.Linear(2, 2)})
    assert chosen_sites(model) == ["layers.0.inner.weight"]
    assert chosen_sites(model, only="head") == ["head.weight"]
    assert chosen_sites(torch.nn.Sequential(torch.nn.Linear(2, 2))) == ["0.weight"]


def test_the_innermost_method_chooses():
    @value
    class Outer(Method):
        method: object

    assert innermost(Outer(Outer(HALF))) == HALF
    assert innermost(HALF) == HALF
    assert dataclasses.replace(HALF, sparsity=0.6) != HALF

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from language import save_llama, text_of
from rarefy.cli import main
from rarefy.core import all_methods

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:pack has nothing but torch")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text_of(300))
    return path


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_prune_then_check_then_eval(capsys, llama, text, tmp_path):
    out = tmp_path / "out"
    code, said, err = run(capsys, "prune", llama, "-o", out, "--method", "magnitude", "--sparsity", ".5")
    assert (code, err) == (0, "")
    for words in ("self_attn.q_proj", "all pruned layers", "50.00 %", "all parameters", f"rarefy eval {out}"):
        assert words in said
    code, said, _ = run(capsys, "check", out)
    assert code == 0
    assert "is true. 14 layers keep 1\u202f920 of 3\u202f840 weights (50.00 % zeros)" in said
    code, said, err = run(capsys, "eval", out, "--text", text)
    assert (code, err) == (0, "")
    for words in ("perplexity per token", "bits per byte", "top-1 accuracy", "tokens/s", "9 windows of 32 tokens"):
        assert words in said


def test_every_command_speaks_json(capsys, llama, text, tmp_path):
    out = tmp_path / "out"
    arguments = ["prune", llama, "-o", out, "--method", "magnitude", "--pattern", "2:4", "--json"]
    pruned = json.loads(run(capsys, *arguments)[1])
    assert pruned["totals"]["sparsity"] == 0.5
    assert pruned["pattern"] == "2:4"
    checked = json.loads(run(capsys, "check", out, "--json")[1])
    assert checked["holds"] is True
    assert checked["kept"] == pruned["totals"]["kept"]
    found = json.loads(run(capsys, "eval", out, "--text", text, "--length", "16", "--windows", "4", "--json")[1])
    assert (found["windows"], found["length"], found["targets"]) == (4, 16, 60)
    assert found["low"] < found["value"] < found["high"]
    timed = json.loads(
        run(capsys, "speed", out, "--prompt", "4", "--tokens", "2", "--rounds", "2", "--threads", "1", "--json")[1]
    )
    assert timed["rows"][0]["name"] == "generate, end to end"
    assert timed["bytes_dense"] > 0


@pytest.mark.skipif("Wanda" not in all_methods(), reason="needs the method Wanda")
@pytest.mark.parametrize(
    "method",
    ["wanda", "wanda --allocation owl", "wanda --refit", "sparsegpt", "alps", "magnitude+dsnot"],
)
def test_methods_that_look_at_activations(capsys, llama, text, tmp_path, method):
    arguments = ["prune", llama, "-o", tmp_path / "out", "--method", *method.split(), "--sparsity", ".5", "--json"]
    arguments += ["--calibration", text, "--samples", "6", "--length", "16", "--seed", "1"]
    code, said, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    found = json.loads(said)
    assert found["totals"]["sparsity"] == 0.5
    assert (found["calibration"]["windows"], found["calibration"]["seed"]) == (6, 1)
    assert run(capsys, "check", tmp_path / "out")[0] == 0
    again = [tmp_path / "again" if a == tmp_path / "out" else a for a in arguments]
    assert json.loads(run(capsys, *again)[1])["calibration"]["sha256"] == found["calibration"]["sha256"]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_eval_is_the_same_at_any_batch(capsys, llama, text):
    values = [
        json.loads(run(capsys, "eval", llama, "--text", text, "--bos", "window", "--batch", b, "--json")[1])["value"]
        for b in (1, 4)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_speed_of_a_directory_is_a_table(capsys, llama):
    code, said, err = run(capsys, "speed", llama, "--prompt", "4", "--tokens", "2", "--rounds", "2", "--threads", "1")
    assert (code, err) == (0, "")
    for words in ("generate, end to end, per token", "prefill of 4 tokens", "weights read per token", "95 % interval"):
        assert words in said


def test_a_dry_run_writes_nothing(capsys, llama, tmp_path):
    arguments = ["prune", llama, "--method", "magnitude", "--dry-run", "--attention", ".25", "--mlp", ".75"]
    code, said, _ = run(capsys, *arguments)
    assert code == 0
    assert "A dry run: nothing was pruned or written." in said
    asked = {
        row["name"]: row["asked"] / row["weights"] for row in json.loads(run(capsys, *arguments, "--json")[1])["kinds"]
    }
    assert asked["self_attn.q_proj"] == 0.75
    assert asked["mlp.up_proj"] == 0.25
    assert not list(tmp_path.iterdir())


def test_per_layer_and_globs(capsys, llama, tmp_path):
    arguments = [
        "prune",
        llama,
        "-o",
        tmp_path / "out",
        "--method",
        "magnitude",
        "--per-layer",
        '{"*.layers.1.*": 0.75}',
    ]
    found = json.loads(run(capsys, *arguments, "--only", "*.mlp.*", "*.q_proj", "--skip", "*.up_proj", "--json")[1])
    assert [kind["name"] for kind in found["kinds"]] == ["self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"]
    assert {kind["kept"] / kind["weights"] for kind in found["kinds"]} == {0.625}  # dense, and a quarter


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prune", "MODEL", "--method", "magnitude"], "--out: say where"),
        (["prune", "MODEL", "-o", "out", "--method", "magnitude"], "give a sparsity, or an n:m pattern"),
        (["prune", "MODEL", "-o", "out", "--method", "rigl", "--sparsity", ".5"], "it needs optimizer, steps"),
        (["prune", "MODEL", "-o", "out", "--method", "magnitude", "--sparsity", "1"], "--sparsity 1: a share of zeros"),
        (["prune", "absent", "-o", "out", "--method", "magnitude", "--sparsity", ".5"], "absent is no model directory"),
        (["prune", ".", "-o", "out", "--method", "magnitude", "--sparsity", ".5"], "it has no config.json"),
        (["prune", "MODEL", "-o", "TEXT", "--method", "magnitude", "--sparsity", ".5"], "is not an empty folder"),
        (
            ["prune", "MODEL", "-o", "out", "--method", "magnitude", "--allocation", "global", "--mlp", ".5"],
            "--allocation and --attention/--mlp: each says",
        ),
        (
            ["prune", "MODEL", "-o", "out", "--method", "magnitude", "--sparsity", ".5", "--only", "*.mpl.*"],
            "only='*.mpl.*' matches no weight",
        ),
        (["eval", "MODEL", "--text", "absent.txt"], "absent.txt"),
        (["eval", "MODEL", "--text", "TEXT", "--length", "33"], "more than the model's context of 32"),
        (["eval", "MODEL", "--text", "TEXT", "--windows", "0"], "--windows 0: at least 1"),
        (["eval", "MODEL", "--text", "TEXT", "--field", "story"], "has no field 'story'"),
        (["eval", "absent", "--text", "TEXT"], "absent is no model directory"),
        (["speed", "MODEL", "--batch", "4"], "--sparsity and --batch are of built-in networks"),
        (["speed", "MODEL", "--prompt", "40"], "more than the context of 32 tokens"),
        (["speed", "MODEL", "--dtype", "bfloat16", "--quantize", "int8"], "give one of them"),
        (["speed", "."], "it has no config.json"),
        (["speed", "absent"], "pointwise-256, nor a model directory"),
        (["check", "MODEL"], "rarefy.json"),
        (["check", "absent"], "absent is no model directory"),
        (["unpack", "MODEL", "-o", "out"], "is not packed"),
        (["unpack", "MODEL", "-o", "TEXT"], "is not an empty folder"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, llama, text, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": llama, "TEXT": text}
    code, out, err = run(capsys, *(places.get(a, a) for a in arguments))
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_none_of_language_has_no_perplexity(capsys, text, tmp_path):
    import transformers

    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    code, _, err = run(capsys, "eval", tmp_path / "bert", "--text", text)
    assert code == 2
    assert "holds a BertModel, which is no causal language model" in err


def test_an_interrupt_leaves_nothing_behind(capsys, llama, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rarefy.io.prune.sparsify", interrupt)
    code, out, err = run(capsys, "prune", llama, "-o", tmp_path / "out", "--method", "magnitude", "--sparsity", ".5")
    assert (code, out, err) == (130, "", "rarefy: stopped; nothing was written\n")
    assert not list(tmp_path.iterdir())


def test_a_broken_directory_is_exit_code_1(capsys, llama, tmp_path):
    out = tmp_path / "out"
    run(capsys, "prune", llama, "-o", out, "--method", "magnitude", "--sparsity", ".5")
    broken = tmp_path / "broken"
    shutil.copytree(out, broken)
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    weights[name] = torch.ones_like(weights[name])
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    code, said, err = run(capsys, "check", broken)
    assert (code, said) == (1, "")
    assert name in err
    code, said, _ = run(capsys, "check", broken, "--json")
    assert (code, json.loads(said)["holds"]) == (1, False)


def test_a_real_model_is_pruned_and_judged(capsys, data_dir, tmp_path):
    """Half the weights of a trained Llama, by size: exact counts, and still far from a random model's perplexity."""
    folder, text = data_dir("models/stories260K"), data_dir("tinyshakespeare/input.txt")
    sample = tmp_path / "sample.txt"
    sample.write_text(text.read_text()[:30_000])
    arguments = ["prune", folder, "-o", tmp_path / "out", "--method", "magnitude", "--sparsity", ".5", "--json"]
    found = json.loads(run(capsys, *arguments)[1])
    assert found["totals"] == {"weights": 226_560, "kept": 113_280, "sparsity": 0.5}
    assert found["parameters"] == 260_032
    values = [
        json.loads(run(capsys, "eval", d, "--text", sample, "--length", "128", "--windows", "16", "--json")[1])["value"]
        for d in (folder, tmp_path / "out")
    ]
    assert 50 < values[0] < values[1] < 512

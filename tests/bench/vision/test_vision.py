import base64
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rarefy.bench.data import Split
from rarefy.bench.models import initialise
from rarefy.bench.vision import __main__ as command
from rarefy.bench.vision.cases import PATTERNS, Case, cases
from rarefy.bench.vision.cifar import augmented, load_cifar10, standardised
from rarefy.bench.vision.resnet import CHECKPOINT, ResNet, folded, load_resnet20
from rarefy.bench.vision.runs import Result, Settings, Store, correct_of, execute, judge, make_bench, reestimated
from rarefy.bench.vision.table import Table, compare, grids, sentences

SETTINGS = Settings(samples=12, solving=8, images=20, draws=2, threads=1, batch=10)


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def tiny() -> ResNet:
    model = ResNet(blocks=2, width=4).eval()
    initialise(model, torch.Generator().manual_seed(0))
    return reestimated(model, images(16, 9))  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def bench():
    labels = torch.randint(10, (20,), generator=torch.Generator().manual_seed(1))
    return make_bench(tiny(), list(images(24, 2).split(12)), Split(images(20, 3), labels), SETTINGS)


def test_every_case_once_and_as_it_is_named():
    found = list(cases(PATTERNS))
    assert len(set(found)) == len(found) == 4 * 10 + 8
    for case in found:
        named = str(case.build())
        assert named.startswith("Refit(") == case.refit
        assert ("2:4" in named) == (case.pattern == "2:4")
        assert ("ErdosRenyiKernel" in named or "erdos_renyi_kernel" in named) == (case.allocation == "ERK")


def test_folded_is_the_same_function():
    model, x = tiny(), images(4, 4)
    with torch.no_grad():
        torch.testing.assert_close(folded(model)(x), model(x), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded(model).modules())


def test_the_shortcut_subsamples_and_pads_on_both_sides():
    block = ResNet(blocks=1, width=2).eval().layer2[0]
    torch.nn.init.zeros_(block.conv2.weight)  # pyright: ignore
    x = images(1, 5).abs()[:, :2]
    y = block(x)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3]].any()


def test_statistics_are_those_of_the_images():
    model, x = tiny(), images(8, 6)
    before = {name: p.clone() for name, p in model.named_parameters()}
    twin = reestimated(model, x)
    seen = twin.conv1(x)  # pyright: ignore
    torch.testing.assert_close(twin.bn1.running_mean, seen.mean((0, 2, 3)))  # pyright: ignore
    torch.testing.assert_close(twin.bn1.running_var, seen.var((0, 2, 3)))  # pyright: ignore
    assert all(torch.equal(p, before[name]) for name, p in twin.named_parameters())
    assert not twin.training
    assert not twin.bn1.training  # pyright: ignore


def test_augmentation_crops_and_flips():
    x = images(40, 7)
    y = augmented(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape
    assert torch.equal(y, augmented(x, torch.Generator().manual_seed(0)))
    black = standardised([np.zeros((32, 32, 3), np.uint8)])[0, :, 0, 0]
    wide = black[:, None, None].repeat(1, 40, 40).repeat(40, 1, 1, 1)
    wide[:, :, 4:36, 4:36] = x
    for made, source in zip(y, wide, strict=True):
        crops = [source[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        torch.testing.assert_close(
            min((c - made).abs().max() for each in crops for c in (each, each.flip(-1))), torch.tensor(0.0)
        )


@pytest.mark.parametrize("case", [Case("Magnitude", "80 %", "ERK"), Case("SparseGPT", "2:4", refit=True)], ids=str)
def test_a_run_prunes_and_judges(bench, case):
    result = execute(bench, case, 0)
    assert result.kept / result.total == pytest.approx(0.2 if case.pattern == "80 %" else 0.5, abs=0.01)
    assert result.total == sum(p.numel() for n, p in bench.model.named_parameters() if "layer" in n and "conv" in n)
    assert result.images == 10
    assert correct_of(result).mean() == pytest.approx(result.reestimated)
    assert result.as_pruned is not None
    assert execute(bench, case, 1).as_pruned is None
    assert Result.model_validate_json(result.model_dump_json()) == result


def test_judging_counts_what_is_told(bench):
    right = judge(bench.model, bench.judged[0], 3)
    with torch.no_grad():
        assert torch.equal(right, bench.model(bench.judged[0].inputs).argmax(1) == bench.judged[0].labels)


def test_the_table_is_made_from_what_is_stored(bench, tmp_path, monkeypatch):
    store = Store(tmp_path, bench.digest, [])
    found = command.make(bench, store, ("2:4",))
    monkeypatch.setattr(command, "execute", None)
    assert command.make(bench, store, ("2:4",)) == found
    shown = grids(found)
    assert [row[0] for row in shown[0].rows] == ["dense", *found.variants]
    assert all("±" in row[1] for row in shown[0].rows)
    assert not any("±" in row[1] for row in shown[1].rows)
    said = sentences(compare(found))
    assert any(sentence.startswith("SparseGPT over Wanda: ") for sentence in said)
    store.path(None, 0).write_text("{")
    assert store.find(None, 0) is None
    assert "is run again" in store.problems[0]


def test_a_difference_that_is_there_is_resolved():
    def made(variant: str, draw: int, right: int) -> Result:
        bits = np.zeros(1000, bool)
        bits[:right] = True
        packed = base64.b64encode(np.packbits(bits).tobytes()).decode()
        return Result(
            key="", variant=variant, pattern="2:4", draw=draw, method={}, kept=1, total=2, images=1000, as_pruned=None,
            reestimated=right / 1000, correct=packed, seconds=1.0, warnings=[],
        )  # fmt: skip

    rows = {"Magnitude": (700, 710, 705), "Wanda": (701, 709, 705), "SparseGPT": (800, 812, 806)}
    results = {(name, "2:4"): [made(name, i, n) for i, n in enumerate(its)] for name, its in rows.items()}
    said = sentences(compare(Table([made("dense", i, 900) for i in range(3)], results)))
    assert "SparseGPT over Magnitude: resolved: +10.10 at 2:4." in said
    assert "Wanda over Magnitude: not resolved: +0.00 at 2:4." in said


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match=r"resnet20-12fca82f\.th is missing"):
        load_resnet20(tmp_path)
    (tmp_path / CHECKPOINT).parent.mkdir(parents=True)
    torch.save({"state_dict": {"module.other": torch.ones(1)}}, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="holds no ResNet-20"):
        load_resnet20(tmp_path)
    monkeypatch.delenv("RAREFY_DATA", raising=False)
    with pytest.raises(SystemExit):
        command.main(["--runs", str(tmp_path / "runs")])
    assert "RAREFY_DATA=DIR" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rarefy\[vision\]'"):
        load_cifar10(tmp_path, "test")


def test_pictures_from_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")

    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    rows = []
    for each in pixels:
        file = io.BytesIO()
        image.fromarray(each).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": "x.png"})
    (tmp_path / "cifar10").mkdir()
    path = tmp_path / "cifar10/test-00000-of-00001.parquet"
    parquet.write_table(pyarrow.table({"img": rows, "label": [3, 1, 2, 0]}), path)
    found = load_cifar10(tmp_path, "test", torch.tensor([2, 0]))
    assert found.labels.tolist() == [2, 3]
    assert torch.equal(found.inputs, standardised([pixels[2], pixels[0]]))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged"):
        load_cifar10(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match=r"has no train-\*.parquet"):
        load_cifar10(tmp_path, "train")


@pytest.mark.slow
def test_the_real_network(tmp_path):
    folder = Path(os.environ.get("RAREFY_DATA", "missing"))
    for needed in (CHECKPOINT, "cifar10/test-00000-of-00001.parquet", "cifar10/train-00000-of-00005.parquet"):
        if not (folder / needed).is_file():
            pytest.skip(f"RAREFY_DATA has no {needed}")
    for needed in ("pyarrow", "PIL"):
        pytest.importorskip(needed)
    path = tmp_path / "table.json"
    command.main([
        "--json", str(path), "--data", str(folder), "--runs", str(tmp_path / "runs"), "--quick", "--threads", "1",
    ])  # fmt: skip
    told = {(run["variant"], run["pattern"]): run for run in json.loads(path.read_text())["results"]}
    assert told["dense", ""]["as_pruned"] == pytest.approx(0.917, abs=0.01)  # of the first 2000 images
    assert told["dense", ""]["reestimated"] > 0.905
    for pattern in ("50 %", "2:4"):
        assert told["SparseGPT + refit", pattern]["reestimated"] > told["Wanda", pattern]["reestimated"]
    assert "SparseGPT" in path.with_suffix(".md").read_text()

import io

import pytest
from rich.console import Console

from bench.cpu.made_rows import made
from rarefy.bench.cpu.document import Document, Row
from rarefy.bench.cpu.goals import matrix_goals
from rarefy.bench.cpu.grids import Grid, goal_grid, left_out, markdown, rich_grids
from rarefy.bench.cpu.machine import Machine
from rarefy.bench.cpu.matrix_tables import chain_grid, matrix_grids
from rarefy.bench.cpu.model_tables import model_grids
from rarefy.bench.cpu.runs import finish
from rarefy.bench.cpu.training import training_grid
from rarefy.bench.environment import environment

TIMES = {"torch fp32": 80.0, "rarefy dense fp32": 40.0, "torch CSR": 70.0, "kernel lut/few": 8.0, "rarefy": 16.0}


def test_a_matrix_stands_once_with_all_its_values():
    fp32 = made(TIMES)
    int8 = made({"torch fp32": 82.0, "torch int8": 30.0, "llama.cpp Q8_0": 25.0, "rarefy": 10.0}, dtype="int8")
    dense, sparse = matrix_grids([fp32, int8])
    assert dense.heading == "Dense, batch 1, hot (µs)"
    cells = dict(zip(dense.columns, dense.rows[0], strict=True))
    assert cells["torch fp32"] == "80"
    assert cells["llama.cpp Q8_0"] == "25"
    assert cells["llama.cpp BF16"] == "–"
    (row,) = sparse.rows
    assert row[:2] == ("1024×1024", "90 %")
    cells = dict(zip(sparse.columns[:8], row[:8], strict=True))
    assert cells["rarefy fp32"] == "16 (8 lut/few)"
    assert cells["× torch"] == "5.00"
    assert cells["× best fp32"] == "2.50 [2.50, 2.50]"
    assert row[-3:] == ("10", "8.20", "3.00 [3.00, 3.00]")


def test_llama_cpp_is_a_column_of_decode_tables_alone():
    (dense, _) = matrix_grids([made(TIMES, batch=8)])
    assert not [name for name in dense.columns if name.startswith("llama")]


def test_the_four_columns_of_networks_and_what_no_kernel_removes():
    row = made(
        {
            "torch fp32": 160_000.0, "rarefy dense fp32": 100_000.0, "onnxruntime fp32": 90_000.0,
            "DeepSparse": 60_000.0, "rarefy": 30_000.0, "without weights": 10_000.0,
        },
        section="model", name="BERT-base", regime="cold", pattern="4x1", bytes=40_000_000,
    )  # fmt: skip
    row = row.model_copy(update={"facts": {"error": 0.004}})
    (grid,) = model_grids([row])
    cells = dict(zip(grid.columns, grid.rows[0], strict=True))
    assert cells == {
        "values": "fp32", "zeros": "4x1 90 % (speed only)", "torch fp32": "160", "torch bf16": "–",
        "best dense": "90 onnxruntime", "packed": "30", "× torch": "5.33 [5.33, 5.33]",
        "× best dense": "3.00 [3.00, 3.00]", "best peer": "60 DeepSparse", "× best peer": "2.00 [2.00, 2.00]",
        "without weights": "10", "error": "0.4 %", "MB": "40",
    }  # fmt: skip


def test_chains_and_training():
    chain = made({"torch fp32": 9.0, "DeepSparse": 2.0, "rarefy": 1.0}, section="chain", name="4 × Linear 1024")
    assert chain_grid([chain]).rows[0][-2:] == ("9.00", "2.00 [2.00, 2.00]")
    step = made({"torch fp32": 9000.0, "sparseprop": 3000.0, "rarefy": 1000.0}, section="training", name="8-4-2")
    assert training_grid([step]).rows[0][2:7] == ("9", "–", "3", "1", "9.00 [9.00, 9.00]")


def test_every_left_out_candidate_is_told_once():
    row = made(TIMES).model_copy(update={"left_out": {"sparseprop": "not installed"}})
    assert left_out([row, row]).rows == (("sparseprop", "not installed", "2"),)


def test_markdown_keeps_its_columns():
    text = markdown([Grid("A | b", ("x", "y|z"), (("1", "2|3"),)), Grid("Empty", ("x",), ())])
    assert text.splitlines() == ["### A | b", "", "| x | y\\|z |", "| --- | ---: |", "| 1 | 2\\|3 |"]


def test_a_terminal_shows_goals_and_tables():
    out = io.StringIO()
    rows = [made(TIMES)]
    Console(file=out, width=200).print(rich_grids([goal_grid(matrix_goals(rows)), *matrix_grids(rows)]))
    assert "Goals: 3 of 3 measured are met" in out.getvalue()
    assert "16 (8 lut/few)" in out.getvalue()


@pytest.fixture
def document():
    return Document(
        benchmark="matrices", quick=True, when="2026-01-01T00:00:00+00:00", settings={"threads": 1},
        environment=environment(threads=1, flush_denormal=False), kernels="v4", peers={"onnxruntime": "1.31.1"},
        machine=Machine(processors=[0], cache=1 << 20, memory=45.0, peak={"fp32": 232.0}), missing_peers={},
        rows=[made(TIMES)],
    )  # fmt: skip


def test_a_document_comes_back_as_it_was(document, tmp_path):
    document.goals = matrix_goals(document.rows)
    finish(document, tmp_path / "a.json", markdown(list(matrix_grids(document.rows))))
    assert Document.read(tmp_path / "a.json") == document
    text = (tmp_path / "a.md").read_text()
    assert "onnxruntime 1.31.1" in text
    assert "45 GB/s read from memory" in text


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"rows": 3}')
    with pytest.raises(ValueError, match="benchmark"):
        Document.read(tmp_path / "a.json")


def test_without_pack_the_fastest_kernel_stands_for_rarefy():
    row = made({"torch fp32": 80.0, "kernel a": 8.0, "kernel b": 4.0})
    assert row.own() == "kernel b"
    assert row.ratios["torch fp32"].median == 20.0
    assert Row(**{**row.model_dump(), "times": {}, "ratios": {}}).own() is None


def test_limits_of_a_machine():
    machine = Machine(processors=[0], cache=1, memory=50.0, peak={"fp32": 200.0})
    assert machine.floor(50e9) == 1.0
    assert machine.share("fp32", 100e9, 1.0) == 0.5
    assert machine.share("int8", 100e9, 1.0) is None

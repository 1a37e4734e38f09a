import json

import pytest

import rarefy
import tiny
from language import save_llama, text_of
from rarefy.bench.essential import essential_figure, write_essential
from rarefy.cli import main
from rarefy.methods.iterative.essential_sparsity import Essential, EssentialSparsity, Point

pytest.importorskip("plotly")
METRIC = {0.0: 90.0, 0.2: 90.0, 0.4: 89.5, 0.6: 89.0, 0.8: 40.0, 0.9: 10.0}


def swept(tolerance: float = 0.02) -> Essential:
    by = EssentialSparsity(rarefy.Magnitude(0.5), grid=tuple(METRIC), tolerance=tolerance)
    curve = iter(METRIC.values())
    return by.run(tiny.mlp(), lambda pruned: next(curve))


def test_the_figure_shows_the_curve_and_both_readings_of_its_knee():
    found = swept()
    figure = essential_figure({"magnitude": found}, "accuracy %")
    curve, knee, allowed = figure.data
    assert list(curve.y) == list(METRIC.values())
    assert list(curve.x) == pytest.approx([100 * point.achieved for point in found.points])
    assert (list(knee.x), list(knee.y)) == ([pytest.approx(60, abs=0.5)], [89.0])
    assert list(allowed.y) == pytest.approx([90 * 0.98, 90 * 0.98, 89.0])
    assert allowed.x[1] == allowed.x[2] == knee.x[0]
    assert figure.layout.yaxis.title.text == "accuracy %"
    assert "knee, 60 %" in knee.name
    assert "2 % worse, 60 %" in allowed.name


def test_lower_may_be_better():
    by = EssentialSparsity(rarefy.Magnitude(0.5), grid=(0.0, 0.5, 0.9), tolerance=0.1, better="lower")
    points = tuple(Point(s, s, 1 - s, m) for s, m in ((0.0, 10.0), (0.5, 10.5), (0.9, 80.0)))
    figure = essential_figure({"a": Essential(by, points, 0.5, 0.5), "b": Essential(by, points, 0.5, 0.5)}, log=True)
    assert len(figure.data) == 6
    assert figure.data[2].y[0] == pytest.approx(11)
    assert figure.layout.yaxis.type == "log"


def test_the_page_needs_nothing_beside_itself(tmp_path):
    write_essential({"a < b": swept()}, tmp_path / "page.html", "accuracy %")
    page = (tmp_path / "page.html").read_text()
    assert "<h2>a &lt; b</h2>" in page
    assert "<script src=" not in page
    assert "up to 60 %. Knee (farthest from the chord): 60 %." in page


def test_no_sweep_is_no_plot():
    with pytest.raises(ValueError, match="no sweep to plot"):
        essential_figure({})


def test_the_command(tmp_path, capsys):
    pytest.importorskip("transformers")
    model, text, page = save_llama(tmp_path / "model"), tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text(text_of(300))
    capsys.readouterr()  # what saving the model says
    given = ["essential", str(model), "--text", str(text), "-o", str(page), "--grid", "0", ".5", ".9", "--json"]
    with pytest.raises(SystemExit) as stopped:
        main([*given, "--methods", "magnitude", "wanda", "--calibration", str(text), "--samples", "2"])
    out, err = capsys.readouterr()
    assert (stopped.value.code, err) == (0, "")
    told = json.loads(out)
    assert [point["achieved"] for point in told["wanda"]["points"]] == pytest.approx([0, 0.5, 0.9], abs=0.02)
    assert "perplexity per token" in page.read_text()
    with pytest.raises(SystemExit) as stopped:
        main([*given, "--methods", "wanda"])
    assert stopped.value.code == 2
    assert "--calibration" in capsys.readouterr().err

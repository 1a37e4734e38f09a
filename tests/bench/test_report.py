import re

import pytest

from bench.made import result
from rarefy.bench.leaderboard import make_tables
from rarefy.bench.report import html_page, write_report

RESULTS = [
    result(name, accuracy + seed, seed=seed, sparsity=sparsity)
    for name, accuracy in (("dense", 97.0), ("random", 90.0), ("rigl", 95.0))
    for sparsity in (0.9, 0.95)
    for seed in range(2)
    if not (name == "dense" and sparsity == 0.95)
]


def test_the_page_needs_nothing_beside_itself(tmp_path):
    write_report(make_tables(RESULTS), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert page.count("Plotly.newPlot(") == 2
    assert page.count("<table>") == 2
    assert "random ERK" in page
    assert "rigl-appendix-2mac" in page


def test_names_cannot_break_the_page():
    page = html_page(make_tables([*RESULTS, result("<script>alert(1)</script>", 50.0)]))
    assert "<td><script>" not in page
    assert "<td>&lt;script&gt;" in page


def test_no_result_no_page():
    with pytest.raises(ValueError, match="no result to report on"):
        html_page([])

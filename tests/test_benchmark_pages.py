"""The tables of the pages are those of the results files; the profiler's rows."""

import re

import pytest

from benchmarks.pages import PAGES, TABLES, filled, results
from benchmarks.profile import described, profile, rows_of


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_tables_are_made_from_the_results_files(page):
    text = page.read_text()
    assert filled(text) == text, "run python -m benchmarks.pages"


def test_every_table_stands_in_a_page():
    text = "".join(page.read_text() for page in PAGES)
    for name in TABLES:
        assert text.count(f"<!-- {name}: begin -->") == text.count(f"<!-- {name}: end -->") == 1


def test_outside_of_the_tables_the_page_has_no_measured_times():
    page = PAGES[1].read_text()
    prose = re.sub(r"<!-- ([\w ]+): begin -->.*?<!-- \1: end -->", "", page, flags=re.DOTALL)
    assert re.findall(r"\d[\d.]* ?(?:ms|us|s|x|%|MB|GB|MiB)\b", prose) == []


def test_results_say_where_they_come_from():
    for name in ("peers", "profile", "cpu", "precision"):
        content = results(name)
        assert content["command"].startswith("python -m benchmarks.")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", content["date"])
        assert content["versions"]


def test_rows_of_a_trace():
    text = (
        "%while.1 = (f32[2]) while(%a)\n%dot.3 = f32[4,2]{1,0} dot(%a, %b), "
        'metadata={op_name="jit(f)/transpose/dot_general"}\n%copy.1 = f32[2]{0} copy(%c)\n'
    )
    events = [
        {"ph": "X", "name": "while.1", "dur": 100},
        {"ph": "X", "name": "dot.3", "dur": 6},
        {"ph": "X", "name": "dot.3", "dur": 3},
        {"ph": "X", "name": "copy.1", "dur": 1},
        {"ph": "X", "name": "other", "dur": 9},
        {"ph": "M", "name": "dot.3"},
    ]
    assert rows_of(events, text) == [
        {"operation": "dot f32[4,2] transpose/dot_general", "calls": 2, "us": 4.5, "share": 0.9},
        {"operation": "copy f32[2]", "calls": 1, "us": 1.0, "share": 0.1},
    ]
    assert described("a_b.12.3", "f32[] add()") == "a_b f32[]"


@pytest.mark.slow
def test_a_round_is_profiled():
    rows = profile("mlp")
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    # Five steps of ten clients in five rounds, the products of the first layer among them.
    assert any("784,200" in row["operation"] and row["calls"] == 250 for row in rows)

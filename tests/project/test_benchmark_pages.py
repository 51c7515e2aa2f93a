"""The pages say what the stored tables say, and a run replaces them; what was measured quickly is not shown."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from benchmarks import headline, readme, report
from benchmarks.measure import Spread
from benchmarks.plot import draw_run

TABLES = readme.tables_in(readme.STORED)


def test_the_pages_hold_the_stored_tables() -> None:
    for path, text in readme.pages(TABLES).items():
        assert path.read_text() == text, "Run: PYTHONPATH=tests python -m benchmarks.readme"


def test_every_stored_table_is_shown_and_says_where_it_was_measured() -> None:
    shown = re.findall(r"<!-- bench: (\w+) -->", readme.PAGE.read_text())
    assert sorted(shown) == sorted(TABLES)
    assert all(table.machine and not table.quick for table in TABLES.values())


def test_headlines_are_figures_of_the_page() -> None:
    """Each is looked up in the text of the page, without the code that chose it."""
    page = readme.PAGE.read_text()
    for chosen in headline.HEADLINES:
        body = page.partition(f"<!-- bench: {chosen.table} -->")[2].partition("<!-- /bench -->")[0]
        lines = [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("| ")]
        figures = chosen.figures(TABLES)
        assert len(figures) >= 4
        for variant, value in figures.items():
            (line,) = (line for line in lines if {variant, *chosen.cells} <= set(line))
            assert value == float(line[lines[0].index(chosen.column)].split(" ")[0])


def test_the_picture_is_small_and_shows_every_headline() -> None:
    assert readme.PICTURE.stat().st_size < 60_000
    words = {element.text for element in ElementTree.parse(readme.PICTURE).iter() if element.tag.endswith("text")}
    assert {chosen.what for chosen in headline.HEADLINES} <= words


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages and tables in a folder where a run may replace them."""
    for name in ("STORED", "PAGE", "PICTURE", "README"):
        there = tmp_path / name
        (shutil.copytree if name == "STORED" else shutil.copy)(getattr(readme, name), there)
        monkeypatch.setattr(readme, name, there)


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("quick", [False, True])
def test_a_run_replaces_its_own_tables(quick: bool, tmp_path: Path) -> None:
    (run := tmp_path / "run").mkdir()
    old = TABLES["step_time_cuda"]
    rows = [[*row[:5], Spread(7.89, 7.0, 9.0), *row[6:]] for row in old.rows]
    report.write(replace(old, rows=rows, machine="a new GPU, torch 3", quick=quick), run)
    before = {path: path.read_text() for path in readme.pages(TABLES)}
    readme.main(run)
    for path, text in before.items():
        assert ("7.89" in path.read_text()) != quick
        assert (path.read_text() == text) == quick
    if not quick:
        assert "| a new GPU |" in readme.README.read_text()
        assert readme.tables_in(readme.STORED)["launches"] == TABLES["launches"]


@pytest.mark.usefixtures("copies")
def test_a_run_without_a_headline_changes_nothing(tmp_path: Path) -> None:
    (run := tmp_path / "run").mkdir()
    old = TABLES["launches"]
    report.write(replace(old, rows=[["another case", *row[1:]] for row in old.rows]), run)
    with pytest.raises(LookupError, match="launches has no row with average in a Llama block, lightning_peft"):
        readme.main(run)
    assert readme.tables_in(readme.STORED) == TABLES


def test_a_run_has_a_picture_of_its_tables(tmp_path: Path) -> None:
    assert draw_run(tmp_path) is None
    report.write(TABLES["launches"], tmp_path)
    picture = draw_run(tmp_path)
    assert picture is not None
    bars = [element for element in ElementTree.parse(picture).iter() if element.tag.endswith("rect")]
    assert len(bars) == 1 + len(TABLES["launches"].rows)


def test_rows_of_other_models_stay_on_the_same_machine(tmp_path: Path) -> None:
    options = report.Options(quick=False, rounds=1, device="cpu", out=tmp_path, model="narrow")
    spread = Spread(1.0, 0.9, 1.1)
    earlier = report.Table("t", "T", ["model", "time"], [["narrow", spread], ["wide", spread]], machine="one")
    report.write(earlier, tmp_path)
    new = report.Table("t", "T", ["model", "time"], [["narrow", 2.0]], machine="one")
    report.write(report.with_others(new, options), tmp_path)
    (found,) = readme.tables_in(tmp_path).values()
    assert [(row[0], report.text(row[1])) for row in found.rows] == [("wide", "1.00 (0.90 to 1.10)"), ("narrow", "2")]
    elsewhere = replace(new, machine="another")
    assert report.with_others(elsewhere, options) == elsewhere

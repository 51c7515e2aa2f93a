"""What the pages point to is there: files, headings, rooms. Their commands and snippets: ``test_snippets.py``."""

import re
from pathlib import Path

import pages
import pytest
from pages import ROOT
from test_layers import KNOW_LIGHTNING, MAY_IMPORT

# Where a path in a sentence may begin, beside the page's own folder.
PLACES = [ROOT / folder for folder in (".", "lightning_peft", "examples/configs", "examples/launch")]
FILE_OR_FOLDER = re.compile(r"\w[\w.-]*(/[\w.-]+)*(/|\.(py|md|yaml|sh|sbatch|toml))")
OF_USERS = {"first.py", "run.yaml", "OUT/table.md"}
every_page = pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)


def test_the_readme_is_one_that_is_read() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 300


def test_the_citation_is_of_this_version() -> None:
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert f"version = {{{version}}}" in (ROOT / "README.md").read_text()


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve()
        target = target if path else page
        assert target.exists(), link
        assert not anchor or anchor in pages.anchors(target), link


@every_page
def test_every_chapter_is_in_the_table_of_contents(page: Path) -> None:
    chapters = {pages.anchor(heading) for heading in re.findall(r"^## (.*)$", pages.prose(page), flags=re.MULTILINE)}
    if page.name != "CHANGELOG.md":
        assert chapters - {link.removeprefix("#") for link in pages.links(page)} == set()


def test_every_page_is_reached_from_the_readme() -> None:
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        seen.add(page)
        linked = {(page.parent / link.partition("#")[0]).resolve() for link in pages.links(page)}
        ahead += [path for path in linked if path.suffix == ".md" and path not in seen]
    assert seen == set(pages.PAGES)


@every_page
def test_tables_are_tables(page: Path) -> None:
    """GitHub shows one whose lines have different numbers of cells as text."""
    for table in re.findall(r"(?:^\|.*\|\n)+", pages.prose(page), flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


@every_page
def test_a_path_in_a_sentence_exists(page: Path) -> None:
    for code in set(pages.inline(page)) - OF_USERS:
        if FILE_OR_FOLDER.fullmatch(code):
            assert any((place / code).exists() for place in [*PLACES, page.parent]), code


@pytest.mark.parametrize("folder", ["configs", "launch"])
def test_the_page_of_examples_lists_every_file(folder: str) -> None:
    text = (ROOT / "examples" / "README.md").read_text()
    files = [file.name for file in (ROOT / "examples" / folder).iterdir() if file.is_file()]
    assert [name for name in files if name not in text] == []


def rows(chapter: str) -> list[list[str]]:
    """Return the cells of the table in a chapter of CONTRIBUTING."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition(f"\n## {chapter}\n")[2].partition("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]


def test_contributing_says_what_every_room_imports() -> None:
    """As ``test_layers.py`` has it by package, taken together by room."""
    true: dict[str, set[str]] = {}
    for package, names in MAY_IMPORT.items():
        room = package.partition(".")[0]
        lightning = {"Lightning"} if package in KNOW_LIGHTNING else set()
        true.setdefault(room, set()).update(lightning, {name.partition(".")[0] for name in names.split()} - {room})
    said = {room.strip("`/"): set(re.findall(r"\w+", imports)) - {"nothing"} for room, _, imports in rows("The house")}
    assert said == true


def test_private_names_are_used_where_contributing_says() -> None:
    for _, names, file in rows("Private APIs"):
        source = next(path for place in PLACES if (path := place / file.strip("`")).is_file()).read_text()
        used = [name.rpartition(".")[2] for name in re.findall(r"`([^`]+)`", names)]
        assert used
        assert [name for name in used if name not in source] == [], file

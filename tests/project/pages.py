"""The pages that users and contributors read, taken apart: blocks of code, code within sentences, headings, links.

A block that no test runs says why in a comment above it: `<!-- not run: REASON -->`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "examples" / "README.md",
    ROOT / "examples" / "papers" / "README.md",
    *sorted((ROOT / "examples" / "docs").glob("*.md")),
    ROOT / "tests" / "benchmarks" / "README.md",
]
_BLOCK = re.compile(r"(?:<!-- not run: (.+?) -->\n)?```(\w*)\n(.*?)```", flags=re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Code between fences."""

    language: str
    text: str
    not_run: str
    """Why, if it is not."""


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[Block]:
    found = [Block(kind, text, reason) for reason, kind, text in _BLOCK.findall(page.read_text())]
    return [block for block in found if block.language == language]


def commands(page: Path, *, run: bool) -> list[str]:
    """Return the lines of blocks of commands: those that are to be run, or those that say that they are not."""
    wanted = [block for block in blocks(page, "bash") if bool(block.not_run) != run]
    return [line for block in wanted for line in block.text.replace("\\\n", " ").splitlines()]


def prose(page: Path) -> str:
    """Return a page without its blocks and comments."""
    return re.sub(r"<!-- .*? -->", "", _BLOCK.sub("", page.read_text()), flags=re.DOTALL)


def inline(page: Path) -> list[str]:
    """Return the code within sentences."""
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def anchor(heading: str) -> str:
    """Return what a heading is called in links, as GitHub makes it of its text."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)}


def links(page: Path) -> list[str]:
    """Return the targets of links and pictures that lie in the repository."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in link]

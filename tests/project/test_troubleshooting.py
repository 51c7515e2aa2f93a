"""Each message that the page of troubleshooting quotes stands in the sources, word for word."""

import ast
import functools
import re
from pathlib import Path

import pages
import pytest
from pages import ROOT

PAGE = ROOT / "examples" / "docs" / "troubleshooting.md"
MESSAGES = re.findall(r"^### (.*)$", PAGE.read_text(), flags=re.MULTILINE)


def text_of(node: ast.AST) -> str:
    """Return a string as the page writes it, with an ellipsis for what is put in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "…"
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


@functools.cache
def texts() -> frozenset[str]:
    files = {file.resolve() for folder in ("lightning_peft", "callbacks") for file in (ROOT / folder).rglob("*.py")}
    trees: list[ast.AST] = [ast.parse(Path(file).read_text()) for file in files]
    return frozenset(text_of(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.expr))


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_stands_in_the_sources(message: str) -> None:
    assert any(message in text for text in texts())


def test_there_are_many_and_each_of_them_once() -> None:
    assert len(MESSAGES) == len(set(MESSAGES)) > 25
    assert len(pages.anchors(PAGE)) == len(re.findall(r"^#+ ", PAGE.read_text(), flags=re.MULTILINE))

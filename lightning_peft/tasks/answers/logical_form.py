"""The metric of SQL: whether a query is the right one but for the order of its conditions.

Seq2SQL: Generating Structured Queries from Natural Language using Reinforcement Learning (Zhong et al., 2017),
arXiv:1709.00103, section 4.2, as WikiSQL's own evaluation counts: the same column, the same aggregate, and the same
conditions in any order, without regard to case.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from lightning_peft.tasks.answers.share_right import ShareRight

TOKEN = re.compile(
    r"""\s*(?:(?P<string>'(?:[^']|'')*')|(?P<name>"(?:[^"]|"")*"|`[^`]*`)|(?P<number>-?\d+(?:\.\d+)?)|(?P<word>\w+)"""
    r"""|(?P<sign><=|>=|<>|!=|[^\s\w]))"""
)
ENDS_CONDITIONS = ("group", "order", "limit", "having")
RESERVED = ("select", "from", "where", "and", *ENDS_CONDITIONS)


class Token(NamedTuple):
    """A piece of a query; a value and a name are told apart, a value and a number are not."""

    kind: str
    text: str


class LogicalForm(ShareRight):
    """The share of queries that are the expected ones but for the order of conditions, case and quotation marks."""

    def right(self, answer: str, expected: str) -> bool:
        """Whether two queries have the same logical form."""
        return (form := logical_form(answer)) is not None and form == logical_form(expected)

    def unfit(self, expected: str) -> str | None:
        """Return why nothing can be judged by an expected answer, or `None` if something can."""
        return None if logical_form(expected) else "expected a query that begins with SELECT"


def logical_form(query: str) -> tuple[object, ...] | None:
    """Return what two queries share that mean the same, or `None` of a text that is no query.

    Args:
        query: One SELECT. Conditions that are joined by AND alone may stand in any order; others keep theirs.
    """
    tokens = _tokens(query)
    if not tokens or tokens[0] != Token("word", "select"):
        return None
    start = next((at for at, token in enumerate(tokens) if token == Token("word", "where")), len(tokens))
    ends = [Token("word", text) for text in ENDS_CONDITIONS]
    end = next((at for at in range(start, len(tokens)) if tokens[at] in ends), len(tokens))
    return tuple(tokens[:start]), _conditions(tokens[start + 1 : end]), tuple(tokens[end:])


def _tokens(query: str) -> list[Token]:
    tokens = []
    for found in TOKEN.finditer(query.strip().rstrip(";").casefold()):
        kind, text = str(found.lastgroup), found[str(found.lastgroup)]
        if kind in ("string", "name"):
            text = text[1:-1].replace(text[0] * 2, text[0])
        # Quoted or not, a name is the same and a number too; but a quoted name is no word of the language.
        if kind == "name" and text not in RESERVED:
            kind = "word"
        tokens.append(Token({"string": "value", "number": "value"}.get(kind, kind), text))
    return tokens


def _conditions(tokens: list[Token]) -> object:
    parts: list[list[Token]] = [[]]
    for token in tokens:
        if token == Token("word", "and"):
            parts.append([])
        else:
            parts[-1].append(token)
    simple = all(len(part) == 3 and part[1].kind == "sign" for part in parts)
    return frozenset(map(tuple, parts)) if simple else tuple(tokens)

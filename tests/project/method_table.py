"""What pages say of every method, made from the registry: the README's table, and each method's hyper-parameters.

`PYTHONPATH=tests python tests/project/method_table.py` writes both between their marks.
"""

import dataclasses
import inspect
import re
from pathlib import Path

from docstring_parser import parse

import lightning_peft.storage.loading  # noqa: F401 (registers what is known of HF PEFT's format)
from lightning_peft.core.method import PEFTMethod, registered_methods
from lightning_peft.formats.counterpart import for_method

ROOT = Path(__file__).resolve().parents[2]
README, METHODS = ROOT / "README.md", ROOT / "examples" / "docs" / "methods.md"
PLACE = re.compile(r"(<!-- methods: .*? -->\n)(.*?)(<!-- /methods -->)", flags=re.DOTALL)
"""Once in each of both."""


def row(method: type[PEFTMethod]) -> str:
    """Give name, paper (from the head of the method's file), and what the class says of itself."""
    arxiv = re.search(r"arXiv:(\d{4}\.\d{4,5})", inspect.getmodule(method).__doc__ or "")
    paper = f"[{arxiv[1]}](https://arxiv.org/abs/{arxiv[1]})" if arxiv else "none"
    counterpart = for_method(method())
    cells = [
        f"`{method.__name__}`",
        paper,
        "yes" if method.mergeable else "no",
        method.count,
        f"`{counterpart.peft_type}`" if counterpart else "own",
        method.hosts,
    ]
    return f"| {' | '.join(cells)} |"


def ours() -> list[type[PEFTMethod]]:
    """Return this package's methods: tests and users register others."""
    return [cls for cls in registered_methods().values() if cls.__module__.startswith("lightning_peft.methods.")]


def table() -> str:
    head = "| method | paper | merges | trained parameters | HF PEFT's format | on |\n|---|---|---|---|---|---|\n"
    return head + "".join(f"{row(cls)}\n" for cls in ours())


def section(method: type[PEFTMethod]) -> str:
    """Give a method's name, what its docstring says of it, and a row for each hyper-parameter."""
    said = parse(method.__doc__ or "")
    words = [said.short_description, said.long_description]
    lines = [f"### {method.__name__}", "", f"`{method.name}`", "", *(f"{markdown(part)}\n" for part in words if part)]
    meaning = {argument.arg_name: argument.description or "" for argument in said.params}
    fields = dataclasses.fields(method)
    if fields:
        lines += ["| hyper-parameter | default | |", "|---|---|---|"]
        lines += [f"| `{f.name}` | `{getattr(method(), f.name)!r}` | {cell(meaning[f.name])} |" for f in fields]
        lines.append("")
    return "\n".join(lines) + "\n"


def markdown(docstring: str) -> str:
    """Return the text of a docstring with code marked as in Markdown."""
    return re.sub(r":\w+:`(?:[\w.]+\.)?(\w+)`", r"`\1`", docstring).replace("``", "`")


def cell(docstring: str) -> str:
    return " ".join(markdown(docstring).split()).replace("|", "\\|")


def written() -> dict[Path, str]:
    """Return what each page should hold."""
    made = {README: table(), METHODS: "\n" + "".join(map(section, ours()))}
    return {path: between_marks(path, text) for path, text in made.items()}


def between_marks(path: Path, text: str) -> str:
    before, mark, _, end, after = PLACE.split(path.read_text())
    return before + mark + text + end + after


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text)

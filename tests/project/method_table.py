"""The README's table of methods, made from the registry.

`PYTHONPATH=tests python tests/project/method_table.py` writes it into the README.
"""

import inspect
import re
import sys
from pathlib import Path

import lightning_peft.storage.loading  # noqa: F401 (registers what is known of HF PEFT's format)
from lightning_peft.core.method import PEFTMethod, registered_methods
from lightning_peft.formats.counterpart import for_methods

README = Path(__file__).resolve().parents[2] / "README.md"
PLACE = re.compile(r"(<!-- methods: .*? -->\n)(.*?)(<!-- /methods -->)", flags=re.DOTALL)


def row(method: type[PEFTMethod]) -> str:
    """Give name, paper (from the head of the method's file), and what the class says of itself."""
    arxiv = re.search(r"arXiv:(\d{4}\.\d{4,5})", inspect.getmodule(method).__doc__ or "")
    paper = f"[{arxiv[1]}](https://arxiv.org/abs/{arxiv[1]})" if arxiv else "none"
    counterpart = for_methods([method()])
    cells = [
        f"`{method.__name__}`",
        paper,
        "yes" if method.mergeable else "no",
        method.count,
        f"`{counterpart.peft_type}`" if counterpart else "own",
        method.hosts,
    ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    ours = [cls for cls in registered_methods().values() if cls.__module__.startswith("lightning_peft.methods.")]
    head = "| method | paper | merges | trained parameters | HF PEFT's format | on |\n|---|---|---|---|---|---|\n"
    return head + "".join(f"{row(cls)}\n" for cls in ours)


def in_readme() -> str:
    found = PLACE.search(README.read_text())
    assert found is not None, "README.md has lost the marks <!-- methods: … --> and <!-- /methods -->."
    return found[2]


if __name__ == "__main__":
    in_readme()
    README.write_text(PLACE.sub(lambda found: found[1] + table() + found[3], README.read_text()))
    sys.stdout.write(table())

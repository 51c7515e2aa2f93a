"""The pages' table of base strategies: what each serves, made from the matrix that runs every method on all of them.

`PYTHONPATH=tests/shared:tests/scripts python tests/project/base_table.py` writes it, and what is refused, between their
marks.
"""

import re
from pathlib import Path
from textwrap import wrap

from base_matrix import ATTACHED, CELLS, REFUSED

WIDTH = 120
ROOT = Path(__file__).resolve().parents[2]
PLACE = re.compile(r"(<!-- bases: .*? -->\n)(.*?)(<!-- /bases -->)", flags=re.DOTALL)
ROWS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "`single_device`, `ddp` and its variants": ("whole on every process", "whole on every process", ("ddp",)),
    "`fsdp` (FSDP1)": (
        "in shards, by `auto_wrap_policy`",
        "whole on every process; gradients averaged in one all-reduce",
        ("fsdp",),
    ),
    "`ModelParallelStrategy`: FSDP2": (
        "in shards, as `configure_model` cuts it up",
        "sharded with it if the module injects first, or whole on every process",
        ("fsdp2", "fsdp2_late"),
    ),
    "`ModelParallelStrategy`: tensor parallelism": (
        "split, as `configure_model` splits it",
        "split as the layer is that they stand beside",
        ("tensor",),
    ),
    "`deepspeed_stage_1`, `_2`, with offload": (
        "whole on every process",
        "state and, from stage 2, gradients cut up",
        ("stage1", "stage2"),
    ),
    "`deepspeed_stage_3`, with offload": ("in shards", "state, gradients and weights cut up", ("stage3",)),
}
"""By what the README calls them: the frozen model, adapters and their optimizer state, and columns of the matrix.

What is served in one of several columns is served.
"""


def table() -> str:
    """Give a row for each base."""
    lines = ["| base | the frozen model | adapters and their optimizer state | serves |", "|---|---|---|---|"]
    for base, (model, adapters, columns) in ROWS.items():
        left_out = [cell for cell in CELLS if all((column, cell) in REFUSED for column in columns)]
        count = "all" if not left_out else f"{len(CELLS) - len(left_out)} of {len(CELLS)}"
        lines.append(f"| {base} | {model} | {adapters} | {count} |")
    return "\n".join([*lines, ""])


def refused() -> str:
    """Say what is refused and what stays attached, with the reasons."""
    lines = []
    for base, (_, _, columns) in ROWS.items():
        by_reason: dict[str, dict[str, None]] = {}
        for (column, cell), reason in REFUSED.items():
            if column in columns:
                by_reason.setdefault(reason, {})[cell] = None
        if by_reason:
            said = "; ".join(f"{', '.join(map(code, cells))} ({reason})" for reason, cells in by_reason.items())
            lines += wrap(f"- {base}: {said}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    kept = ", ".join(code(cell) for cell in sorted({cell for _, cell in ATTACHED}))
    lines += ["", f"Attached, not merged, where layers are in shards: {kept}, whose biases would be in no shard.", ""]
    return "\n".join(lines)


def code(cell: str) -> str:
    """Return the name of a cell with what is code marked."""
    return re.sub(r"\b[A-Z]\w*[A-Z]\w*(\([^)]*\))?|\bCompacter\b", lambda found: f"`{found[0]}`", cell)


PAGES = {"README.md": table, "examples/docs/large_models.md": refused}


def written(page: str) -> str:
    """Return what a page should hold."""
    before, mark, _, end, after = PLACE.split((ROOT / page).read_text())
    return before + mark + PAGES[page]() + end + after


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(written(page))

"""Prints how far every method is from each judge, the matrix of methods and families, and lines of code by method."""

import inspect
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
from all_methods import METHODS, OURS, REFUSED
from families import ALL_FAMILIES

from judges import adapterhub, equations
from judges.hf_peft import DTYPES, Row, of_peft, peft_row


def adapterhub_row(case: str) -> Row:
    rows = [adapterhub.differences(family, name) for family, name in adapterhub.CASES if name == case]
    return max(r["logits"] for r in rows), max(r["gradients"] for r in rows), max(r["float32"] for r in rows)


def equation_row(name: str) -> Row:
    cases = [case for case in equations.CASES if case.split()[0] == name]
    wide, narrow = ([equations.differences(case, dtype) for case in cases] for dtype in DTYPES.values())
    return max(r["logits"] for r in wide), max(r["gradients"] for r in wide), max(r["logits"] for r in narrow)


def rows() -> Iterator[tuple[str, str, Row]]:
    for name in of_peft():
        yield name, f"HF PEFT {peft.__version__}", peft_row(name)
    for case in adapterhub.METHODS:
        yield case, "AdapterHub", adapterhub_row(case)
    for name in dict.fromkeys(case.split()[0] for case in equations.CASES):
        yield name, "equation", equation_row(name)


def matrix() -> dict[str, tuple[int, Counter[str]]]:
    """By method: on how many families ``test_methods.py`` takes it through its whole life, and why not on others."""
    refused: dict[str, Counter[str]] = {name: Counter() for name in METHODS}
    for (name, family), reason in REFUSED.items():
        assert family in ALL_FAMILIES
        refused[name][reason] += 1
    return {name: (len(ALL_FAMILIES) - reasons.total(), reasons) for name, reasons in refused.items()}


def lines() -> dict[str, int]:
    """Lines of each method's file."""
    files = {name: Path(str(inspect.getsourcefile(cls))) for name, cls in OURS.items()}
    return {name: len(file.read_text().splitlines()) for name, file in files.items()}


def main() -> None:
    head: tuple[Any, ...] = ("method", "judge", "float64 logits", "float64 gradients", "float32 logits")
    print("{:<20} {:<16} {:>15} {:>18} {:>15}".format(*head))
    for name, judge, row in rows():
        print(f"{name:<20} {judge:<16} {row[0]:>15.1e} {row[1]:>18.1e} {row[2]:>15.1e}", flush=True)
    counts = matrix()
    passed, refused = sum(p for p, _ in counts.values()), sum(r.total() for _, r in counts.values())
    print(f"\n{len(counts)} methods on {len(ALL_FAMILIES)} families: {passed} pass, {refused} are refused")
    for name, (count, reasons) in counts.items():
        print(f"{name:<32} {count:>3} pass  {'; '.join(f'{n} refused: {why}' for why, n in reasons.items())}".rstrip())
    print("\nlines of each method's file")
    for name, count in lines().items():
        print(f"{name:<20} {count:>4}")

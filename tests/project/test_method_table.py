"""The README's table and the page of methods say what the methods are."""

import method_table
import pytest
from all_methods import FAMILY, METHODS, OURS
from families import build

from lightning_peft import inject, merge


def test_the_pages_hold_what_methods_say() -> None:
    for path, text in method_table.written().items():
        assert path.read_text() == text, "Run: PYTHONPATH=tests python tests/project/method_table.py"


@pytest.mark.parametrize("name", OURS)
def test_it_is_true(name: str) -> None:
    cls = OURS[name]
    assert cls.hosts, f"{cls.__name__} says nothing about where it goes: set hosts."
    assert cls.count, f"{cls.__name__} says nothing about its parameters: set count."
    model = build(FAMILY.get(name, "opt"))[0]
    inject(model, METHODS[name])
    assert cls.mergeable == (not merge(model).kept)

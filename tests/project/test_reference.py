"""The page of reference names everything that is public; `make docs`, which is strict, finds what is not there."""

import re

from pages import ROOT

import lightning_peft
from lightning_peft import analysis, callbacks, tasks

PAGE = ROOT / "examples" / "docs" / "reference.md"


def test_everything_public_is_in_the_reference_once() -> None:
    rooms = (lightning_peft, analysis, callbacks, tasks)
    public = {f"{room.__name__}.{name}" for room in rooms for name in room.__all__}
    named = re.findall(r"^::: (\S+)$", PAGE.read_text(), flags=re.MULTILINE)
    assert public - set(named) == set()
    assert len(named) == len(set(named))

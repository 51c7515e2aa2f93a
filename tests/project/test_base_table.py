"""The pages' table of base strategies, and what they refuse, say what the matrix runs."""

import base_table
import pytest
from base_matrix import BASES


@pytest.mark.parametrize("page", base_table.PAGES)
def test_the_page_holds_what_the_matrix_says(page: str) -> None:
    command = "Run: PYTHONPATH=tests/shared:tests/scripts python tests/project/base_table.py"
    assert (base_table.ROOT / page).read_text() == base_table.written(page), command


def test_every_base_of_the_matrix_is_in_it() -> None:
    assert [column for _, _, columns in base_table.ROWS.values() for column in columns] == list(BASES)

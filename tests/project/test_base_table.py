"""The README's table of base strategies says what the matrix runs."""

import base_table
from base_matrix import BASES


def test_the_page_holds_what_the_matrix_says() -> None:
    command = "Run: PYTHONPATH=tests/shared:tests/scripts python tests/project/base_table.py"
    assert base_table.README.read_text() == base_table.written(), command


def test_every_base_of_the_matrix_is_in_it() -> None:
    assert [column for _, _, columns in base_table.ROWS.values() for column in columns] == list(BASES)

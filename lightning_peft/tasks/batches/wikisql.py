"""WikiSQL as it is published: questions that name a table of another file, and queries in numbers.

Seq2SQL: Generating Structured Queries from Natural Language using Reinforcement Learning (Zhong et al., 2017),
arXiv:1709.00103. `train.jsonl` has `table_id`, `question` and `sql` (`sel`, a column; `agg`, an aggregate; `conds`,
conditions of column, operator and value); `train.tables.jsonl` beside it has each table's `id` and `header`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_peft.errors import PEFTError
from lightning_peft.tasks.batches.records import Record, read_records

AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<")
HEADER = "header"
EXPECTED = "{sel: column, agg: 0 to 5, conds: [[column, 0 to 2, value], ...]}"


def is_wikisql(record: Record) -> bool:
    """Whether a record names a table of another file."""
    return {"table_id", "question"} <= record.fields.keys() and HEADER not in record.fields


def with_headers(records: Sequence[Record], path: str) -> list[Record]:
    """Give each record the column names of its table.

    Args:
        records: Of the questions' file.
        path: That file, `NAME.jsonl`; the tables are read from `NAME.tables.jsonl` beside it.

    Raises:
        PEFTError: There is no such file, it lacks a table, or a table has no header.
    """
    file = Path(path).expanduser()
    tables = file.with_name(f"{file.stem}.tables.jsonl")
    if not tables.is_file():
        raise PEFTError(f"{records[0].where}: the question is about a table; expected its columns in {tables}")
    headers = {table.text("id"): _header(table) for table in read_records(str(tables), "tables")}
    found = []
    for record in records:
        name = record.fields.get("table_id")
        if not isinstance(name, str) or name not in headers:
            raise PEFTError(f"{record.where}: field 'table_id' is {name!r}; expected the id of a table in {tables}")
        found.append(record._replace(fields={**record.fields, HEADER: headers[name]}))
    return found


def query_prompt(record: Record) -> str:
    """Return what the model reads: the table's columns, the question, and the word `SQL:`."""
    return f"table({', '.join(map(_name, _columns(record)))})\n{record.text('question')}\nSQL:"


def query_text(record: Record) -> str:
    """Return the query as SQL: `SELECT COUNT("Player") FROM table WHERE "No." = '3'`.

    Raises:
        PEFTError: It is in no such form, or asks for a column that the table has not.
    """
    query: Any = record.fields.get("sql")
    columns = _columns(record)
    try:
        column, aggregate = _name(columns[_number(query["sel"])]), AGGREGATES[_number(query["agg"])]
        conditions = [
            f"{_name(columns[_number(at)])} {OPERATORS[_number(operator)]} {_value(value)}"
            for at, operator, value in query["conds"]
        ]
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise PEFTError(
            f"{record.where}: field 'sql' is {query!r} about a table of {len(columns)} columns; expected {EXPECTED}"
        ) from error
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    return f"SELECT {f'{aggregate}({column})' if aggregate else column} FROM table{where}"


def _header(table: Record) -> list[str]:
    header = table.fields.get(HEADER)
    if not isinstance(header, list) or not header:
        raise PEFTError(f"{table.where}: field {HEADER!r} is {header!r}; expected a list of columns")
    # Columns of one name, which the numbers tell apart, would be the same in the text.
    return [str(name) if header.count(name) == 1 else f"{name} ({at})" for at, name in enumerate(header, start=1)]


def _columns(record: Record) -> list[str]:
    columns = record.fields.get(HEADER)
    if not isinstance(columns, list):
        raise PEFTError(f"{record.where}: the question is about a table; expected its columns in a field {HEADER!r}")
    return columns


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def _value(value: Any) -> str:
    if not isinstance(value, str | int | float):
        raise TypeError(value)
    return "'" + str(value).replace("'", "''") + "'"

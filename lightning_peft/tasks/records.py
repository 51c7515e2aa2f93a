"""Reading data files line by line, with errors that name the file and the line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning_peft.errors import PEFTError


class Record(NamedTuple):
    """One record of a data file, and where it stands, for messages."""

    where: str
    fields: dict[str, Any]

    def text(self, *names: str) -> str:
        """The first of the fields `names` that the record has; it must be a text, and not an empty one."""
        for name in names:
            if name in self.fields:
                value = self.fields[name]
                if not isinstance(value, str) or not value.strip():
                    raise PEFTError(f"{self.where}: field {name!r} is {value!r}; expected a text that is not empty")
                return value
        expected = " or ".join(repr(name) for name in names)
        raise PEFTError(f"{self.where}: expected a field {expected}, found {sorted(self.fields)}")


def read_records(path: str, argument: str) -> list[Record]:
    """Read a `.csv` file with a header line, or else a file with one JSON object per line.

    Args:
        path: The file.
        argument: The name under which the user gave it, for messages.

    Raises:
        PEFTError: The file does not exist, holds no records, or a line of it cannot be read.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise PEFTError(f"{argument}: file {path!r} not found (seen from {Path.cwd()}); give an existing file")
    records = list(_read_csv(file) if file.suffix.lower() == ".csv" else _read_jsonl(file))
    if not records:
        raise PEFTError(f"{argument}: file {path!r} holds no records; expected at least one")
    return records


def _lines(file: Path) -> Iterator[str]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise PEFTError(f"{file}:{number}: not UTF-8 ({error}); save the file as UTF-8") from error


def _read_jsonl(file: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            fields = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise PEFTError(f"{where}: not JSON ({error}); expected one JSON object per line") from error
        if not isinstance(fields, dict):
            raise PEFTError(f"{where}: expected a JSON object, found {type(fields).__name__}")
        yield Record(where, fields)


def _read_csv(file: Path) -> Iterator[Record]:
    reader = csv.DictReader(_lines(file), strict=True)
    try:
        for row in reader:
            where = f"{file}:{reader.line_num}"
            # DictReader files surplus values under None and fills missing ones with None.
            if None in row or None in row.values():
                raise PEFTError(f"{where}: expected {len(reader.fieldnames or ())} values, as in the header line")
            yield Record(where, row)
    except csv.Error as error:
        raise PEFTError(f"{file}:{reader.line_num}: not CSV ({error})") from error

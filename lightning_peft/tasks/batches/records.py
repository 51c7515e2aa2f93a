"""Reading data files record by record, with errors that name the file and the place in it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning_peft.errors import PEFTError

FORMATS = (
    "JSON lines (.jsonl), a JSON array (.json), .csv or .tsv with a header line, .parquet, or the directory of a "
    "Hugging Face dataset that was saved by save_to_disk"
)
_MAX_FIELD = 2**31 - 1
EXTRA = "pip install 'lightning-peft[data]'"


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
    """Read what a data file, or the directory of a saved dataset, holds.

    The ending of the name says which it is; a file of any other name is read as JSON lines.

    Args:
        path: JSON lines, a JSON array (`.json`), `.csv` or `.tsv` with a header line, `.parquet`, or a directory that
            `datasets.Dataset.save_to_disk` wrote.
        argument: The name under which the user gave it, for messages.

    Raises:
        PEFTError: There is no such file, it holds no records, a part of it cannot be read, or the package that reads
            it is not installed.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        records = list(_read_saved(file, argument))
    elif file.is_file():
        readers = {".csv": _read_csv, ".tsv": _read_tsv, ".parquet": _read_parquet, ".json": _read_json}
        records = list(readers.get(file.suffix.lower(), _read_jsonl)(file))
    else:
        raise PEFTError(
            f"{argument}: file {path!r} not found (seen from {Path.cwd()}); give an existing file: {FORMATS}"
        )
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


def _record(where: str, fields: Any) -> Record:
    if not isinstance(fields, dict):
        raise PEFTError(f"{where}: expected a JSON object, found {type(fields).__name__}")
    return Record(where, fields)


def _loaded(text: str) -> Any:
    value = json.loads(text)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # fails for half of a character, which no tokenizer takes
    return value


def _read_jsonl(file: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            fields = _loaded(line)
        except (ValueError, RecursionError) as error:
            raise PEFTError(f"{where}: not JSON ({error}); expected one JSON object per line") from error
        yield _record(where, fields)


def _read_json(file: Path) -> Iterator[Record]:
    # Many a file of JSON lines is called .json as well; only an array begins with a bracket.
    first = next((line for line in _lines(file) if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _read_jsonl(file)
        return
    try:
        array = _loaded("".join(_lines(file)))
    except (ValueError, RecursionError) as error:
        raise PEFTError(f"{file}: not JSON ({error}); expected an array of JSON objects") from error
    yield from _numbered(file, array)


def _numbered(file: Path, rows: Iterable[Any]) -> Iterator[Record]:
    for number, fields in enumerate(rows, start=1):
        yield _record(f"{file}, record {number}", fields)


def _read_tsv(file: Path) -> Iterator[Record]:
    # Values hold no tabs, so that quotation marks are what they are.
    return _read_csv(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_csv(file: Path, **dialect: Any) -> Iterator[Record]:
    reader = csv.DictReader(_lines(file), strict=True, **dialect)
    limit = csv.field_size_limit(_MAX_FIELD)
    try:
        names = reader.fieldnames or ()
        if twice := [name for name in names if names.count(name) > 1]:
            raise PEFTError(f"{file}:1: the header line has {twice[0]!r} twice; expected names that differ")
        for row in reader:
            where = f"{file}:{reader.line_num}"
            # DictReader files surplus values under None and fills missing ones with None.
            if None in row or None in row.values():
                raise PEFTError(f"{where}: expected {len(names)} values, as in the header line")
            yield Record(where, row)
    except csv.Error as error:
        raise PEFTError(f"{file}:{reader.line_num}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(file: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise PEFTError(f"{file}: reading Parquet needs the package pyarrow: {EXTRA} ({error})") from error
    try:
        rows = parquet.read_table(file).to_pylist()
    except (ArrowException, OSError) as error:
        raise PEFTError(f"{file}: not Parquet ({error})") from error
    yield from _numbered(file, map(_without_none, rows))


def _read_saved(directory: Path, argument: str) -> Iterator[Record]:
    if (directory / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in directory.iterdir() if path.is_dir())
        raise PEFTError(f"{argument}: {directory} holds the splits {', '.join(splits)}; give one: {directory}/NAME")
    if not (directory / "state.json").is_file():
        raise PEFTError(f"{argument}: {directory} is a directory without a saved dataset; expected {FORMATS}")
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise PEFTError(f"{directory}: a saved dataset needs the package datasets: {EXTRA} ({error})") from error
    try:
        rows = load_from_disk(str(directory))
    except (OSError, ValueError) as error:
        raise PEFTError(f"{directory}: not a saved dataset ({error})") from error
    yield from _numbered(directory, map(_without_none, rows))


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    # A table has every column in every row: what a JSON file would leave out is None here, in nested objects too.
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items() if part is not None}
        return [plain(part) for part in value] if isinstance(value, list) else value

    return dict(plain(fields))

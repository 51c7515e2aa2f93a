"""Data sets whose published files need more than their fields read: one record may be none, or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_peft.errors import PEFTError
from lightning_peft.tasks.batches.records import Record
from lightning_peft.tasks.batches.wikisql import is_wikisql, with_headers

NO_LABEL = "-"


def as_published(records: Sequence[Record], path: str, *, answered: bool) -> list[Record]:
    """Return the examples of a file in the way in which the data set's authors count them.

    * Pairs of SNLI and MNLI without a gold label, and problems of LLM-Adapters without an output, are left out, with a
      warning.
    * Dialogues of DialogSum's test file, which have `summary1` to `summary3`, are an example for each summary.
    * Questions of WikiSQL get the columns of their tables.

    Args:
        records: What the file holds.
        path: The file.
        answered: Whether answers are read. If not, every record is one example.

    Raises:
        PEFTError: A table is missing, or nothing is left.
    """
    found = list(records)
    if found and is_wikisql(found[0]):
        found = with_headers(found, path)
    if not answered:
        return found
    for what, lacking in LEFT_OUT.items():
        kept = [record for record in found if not lacking(record)]
        if not kept:
            raise PEFTError(f"{path}: all records {what}; expected some others")
        if len(kept) < len(found):
            rank_zero_warn(f"{len(found) - len(kept)} of {len(found)} records in {path} {what}; they are left out")
        found = kept
    return [each for record in found for each in _summaries(record)]


def _without_label(record: Record) -> bool:
    return record.fields.get("gold_label") == NO_LABEL


def _without_working(record: Record) -> bool:
    return {"instruction", "answer"} <= record.fields.keys() and record.fields.get("output") == ""


LEFT_OUT: dict[str, Callable[[Record], bool]] = {
    f"have the label {NO_LABEL!r}, on which annotators did not agree": _without_label,
    "have an answer and no output, which would be learned": _without_working,
}
"""What published files hold beside examples: SNLI's and MNLI's pairs without a label, LLM-Adapters' without working."""


def _summaries(record: Record) -> Iterator[Record]:
    names = [name for name in ("summary1", "summary2", "summary3") if name in record.fields]
    if not names:
        yield record
    for name in names:
        rest = {key: value for key, value in record.fields.items() if key not in names}
        yield Record(f"{record.where}, {name}", {**rest, "summary": record.fields[name]})

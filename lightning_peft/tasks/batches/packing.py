"""Several short examples in one row, each with positions of its own and without attention to the others."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

import torch

from lightning_peft.adapters.virtual_tokens.infix import IGNORED
from lightning_peft.tasks.batches.encoding import Example


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Divide examples into rows: the longest first, each into the fullest row that still has room for it.

    Args:
        lengths: Of the examples, none above `room`.
        room: Tokens in a row.

    Returns:
        The numbers of the examples in each row. Best fit in this order takes at most 11/9 of the fewest rows that are
        possible, and four (Johnson et al. 1974).
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[list[int]]] = defaultdict(list)
    rooms: list[int] = []  # sorted, those for which there is a row
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, lengths[number])
        if place == len(rooms):
            left, row = room, list[int]()
            rows.append(row)
        else:
            left = rooms[place]
            row = with_room[left].pop()
            if not with_room[left]:
                del rooms[place]
        row.append(number)
        left -= lengths[number]
        if not with_room[left]:
            insort(rooms, left)
        with_room[left].append(row)
    return rows


def collate_packed(rows: Sequence[Sequence[Example]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Put the examples of each row one behind another.

    There is no attention mask: where positions begin anew, transformers begins another text.

    Returns:
        `input_ids`, `position_ids` and `labels`, (batch, time), padded on the right by a text that is not learned.
    """
    width = max(sum(len(example.ids) for example in row) for row in rows)

    def padded(row: Sequence[Sequence[int]], padding: Sequence[int]) -> list[int]:
        joined = list(chain.from_iterable(row))
        return joined + list(padding[: width - len(joined)])

    return {
        "input_ids": torch.tensor([padded([e.ids for e in row], [pad_token_id] * width) for row in rows]),
        "position_ids": torch.tensor([padded([range(len(e.ids)) for e in row], range(width)) for row in rows]),
        "labels": torch.tensor([padded([e.labels for e in row], [IGNORED] * width) for row in rows]),
    }

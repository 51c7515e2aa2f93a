"""A training loader that goes on where a checkpoint was written, also within an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_peft.tensors.randomness import generator_states, set_generator_states

_CPU = torch.device("cpu")


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` with a state: how many batches of the epoch have been handed out.

    Lightning saves the state of a loader that has one and loads it on resume. It begins the epoch anew with any other
    loader: a run that was stopped within an epoch would see the first batches twice and the last ones never. The order
    itself must depend on the epoch alone, as that of `LengthGroupedSampler` does.
    """

    # Class attributes, not arguments: Lightning makes some loaders anew from the arguments of DataLoader.
    trainer: Trainer | None = None
    _start = 0
    _taken = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the epoch's batches, the first time after `load_state_dict` without those that are done."""
        self._taken, self._start = self._start, 0
        here = generator_states(_CPU)
        batches = super().__iter__()
        for _ in islice(batches, self._taken):
            pass
        if self._taken:
            # What it takes to get there was drawn before the checkpoint was written.
            set_generator_states(here, _CPU)
        for batch in batches:
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches handed out, 0 after the epoch's last one."""
        whole = len(self) if self.trainer is None else int(self.trainer.num_training_batches)
        return {"batches": self._taken % whole}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next epoch begin after as many batches."""
        self._start = state["batches"]

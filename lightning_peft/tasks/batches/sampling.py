"""An order of examples in which neighbours are about equally long, so that batches need little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data.distributed import DistributedSampler


class LengthGroupedSampler(DistributedSampler[int]):
    """Shuffles, sorts by length within windows of some batches, then shuffles the batches.

    The order depends on the seed and the epoch alone. It is a `DistributedSampler`, because Lightning would
    wrap any other kind in one, and that drops both the grouping and the new order in each epoch.

    Args:
        lengths: The length of each example.
        batch_size: Examples per batch and process.
        num_replicas: How many processes share the examples.
        rank: Which of them this one is.
        seed: Of the shuffles.
        window: Batches per window. A wider one pads less and mixes less.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        window: int = 16,
    ) -> None:
        super().__init__(lengths, num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.lengths = lengths
        self.batch = batch_size * num_replicas
        self.window = window * self.batch

    def __iter__(self) -> Iterator[int]:
        """Yield this process's share of the epoch's order."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        # Every process needs as many examples, so some may be seen twice.
        order += (order * self.num_replicas)[: self.total_size - len(order)]
        batches: list[list[int]] = []
        for start in range(0, len(order), self.window):
            group = sorted(order[start : start + self.window], key=self.lengths.__getitem__)
            batches += [group[i : i + self.batch] for i in range(0, len(group), self.batch)]
        # A short batch stays last: anywhere else it would shift the borders of all that follow.
        last = [batches.pop()] if batches and len(batches[-1]) < self.batch else []
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        for batch in shuffled + last:
            yield from batch[self.rank :: self.num_replicas]

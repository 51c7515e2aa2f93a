"""PredictionWriter: what `predict` computes, as JSON lines in the order of the data."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_peft.errors import PEFTError
from lightning_peft.files.writing import atomic_file


class PredictionWriter(BasePredictionWriter):
    """Writes one JSON object for each example: its fields, where the data have them, and ``prediction``.

    Every process writes its part beside the file; the first puts them together at the end. A DataModule says by a
    method ``predicted(predictions)`` what the objects hold, as the ready ones do.

    Args:
        path: The file to write. An old one is replaced when all is done.

    Raises:
        PEFTError: Predictions of a batch are not one for each example, or hold what JSON has no form for.
    """

    def __init__(self, path: str) -> None:
        super().__init__(write_interval="batch")
        self.path = Path(path)
        self._last: Sequence[int] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a place that cannot be written before the work."""
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            if self.path.is_dir():
                raise PEFTError(f"{self.path} is a directory; expected a file to write predictions to")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._part(trainer.global_rank).write_text("")

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Add the predictions of a batch to this process's part."""
        values = _plain(prediction)
        # Of a stream there are none, or still those of the batch before it.
        if not batch_indices or batch_indices is self._last:
            raise PEFTError(
                f"{self.path} is to have predictions in the order of the data, and of a stream, or of a sampler of "
                "batches of its own, Lightning does not know which examples a batch has; expected a dataset with a "
                "length. Or write them in predict_step"
            )
        if not isinstance(values, list) or len(values) != len(batch_indices):
            number = f"{len(values)} predictions" if isinstance(values, list) else type(prediction).__name__
            raise PEFTError(
                f"predict_step returned {number} for batch {batch_idx}; expected a list or a tensor with one "
                f"prediction for each of its {len(batch_indices)} examples"
            )
        self._last = batch_indices
        with self._part(trainer.global_rank).open("a", encoding="utf-8") as file:
            for index, value in zip(batch_indices, values, strict=True):
                file.write(json.dumps([dataloader_idx, index, value]) + "\n")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the parts together, in the order of the data."""
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        parts = [self._part(rank) for rank in range(trainer.world_size)]
        missing = [str(part) for part in parts if not part.is_file()]
        if missing:
            raise PEFTError(f"{missing[0]} of another process is not here; expected a folder that all processes share")
        lines = [json.loads(line) for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
        # A sampler that gives every process as many examples gives some twice.
        found = {(loader, index): value for loader, index, value in lines}
        values = [found[place] for place in sorted(found)]
        described = getattr(trainer.datamodule, "predicted", None)  # type: ignore[attr-defined]
        rows = described(values) if described else [{"prediction": value} for value in values]
        with atomic_file(self.path) as file:
            file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)
        for part in parts:
            part.unlink()
        rank_zero_info(f"Wrote {len(rows)} predictions to {self.path}.")

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f".{self.path.name}.{rank}.part")


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        rank_zero_warn("Predictions hold NaN or infinity, which JSON has not: they are written as null.")
        return None
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, str | int | float | bool | None):
        return value
    raise PEFTError(f"a prediction holds {type(value).__name__}, for which JSON has no form; return tensors or texts")

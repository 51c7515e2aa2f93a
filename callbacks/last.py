"""Which checkpoint ``ckpt_path="last"`` means, links to it, and what is kept when a run with ``PEFTStrategy`` diverges.

Lightning offers no public place for any of it: a kill at the wrong moment leaves its last checkpoint a link to nothing,
or cut off, and a diverged run writes over good ones. So methods of ``ModelCheckpoint`` are wrapped, here and nowhere
else.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_peft.errors import NotFiniteError, PEFTError
from lightning_peft.files.leftovers import clean
from lightning_peft.files.remote import is_remote
from lightning_peft.files.writing import replace_link
from lightning_peft.storage.readable import TRAINER_STATE, is_whole

_find_last = ModelCheckpoint._find_last_checkpoints
_link = ModelCheckpoint._link_checkpoint
_SAVES = ("_save_topk_checkpoint", "_save_last_checkpoint", "on_exception")


class WritesDirectories:
    """A strategy's ``save_checkpoint`` that writes a directory if it is given an ``AdapterDirectory``."""


def _find_last_whole(self: ModelCheckpoint, trainer: pl.Trainer) -> set[str]:
    folder = self._ModelCheckpoint__resolve_ckpt_dir(trainer)  # type: ignore[attr-defined]
    if not isinstance(trainer.strategy, WritesDirectories) or is_remote(folder):
        return _find_last(self, trainer)
    clean(Path(folder))
    last = _newest_first(map(Path, _find_last(self, trainer)))
    if last and is_whole(last[0]):
        return {str(last[0])}
    others = [] if self.save_weights_only or not self.save_last else _others(Path(folder), self.FILE_EXTENSION)
    if not last and not others:
        return set()
    whole = next(filter(is_whole, _newest_first({*last[1:], *others})), None)
    broken = f"{last[0]} is damaged, cut off or a link to nothing" if last else f"there is no last one in {folder}"
    if whole is None:
        raise PEFTError(f'ckpt_path="last": {broken}, and there is no other. Leave ckpt_path out to start anew.')
    rank_zero_warn(f'ckpt_path="last": {broken}. The run goes on from the newest that is whole, {whole}.')
    return {str(whole)}


def _link_whole(trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
    if not isinstance(trainer.strategy, WritesDirectories):
        _link(trainer, filepath, linkpath)
        return
    if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
        replace_link(filepath, linkpath)
    trainer.strategy.barrier()


def _others(folder: Path, extension: str) -> list[Path]:
    if not folder.is_dir():
        return []
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return [path for path in visible if (path.suffix == extension if extension else (path / TRAINER_STATE).is_file())]


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (path.stat() if path.exists() else path.lstat()).st_mtime, reverse=True)


def _keeping(save: Callable[..., None]) -> Callable[..., None]:
    """Return ``save`` such that it leaves everything as it is if the run has diverged."""

    @wraps(save)
    def save_if_finite(self: ModelCheckpoint, trainer: pl.Trainer, *args: Any) -> None:
        before = copy.deepcopy(self.state_dict())
        try:
            save(self, trainer, *args)
        except NotFiniteError as error:
            # Lightning has noted the new checkpoint in place of one that it would have removed.
            vars(self).update(before)
            rank_zero_warn(str(error))

    return save_if_finite


def install() -> None:
    """Make ``ModelCheckpoint`` find a whole checkpoint, keep good ones, and replace links at once.

    All of it in runs with ``PEFTStrategy``.
    """
    stock: Any = ModelCheckpoint
    for name in _SAVES:
        setattr(stock, name, _keeping(getattr(stock, name)))
    stock._find_last_checkpoints = _find_last_whole
    stock._link_checkpoint = staticmethod(_link_whole)

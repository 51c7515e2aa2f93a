"""DeepSpeed's own directories, written so that a process that cannot write leaves no other waiting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_peft.formats.deepspeed import TAG


def save_engine(engine: Any, directory: Path, checkpoint: Mapping[str, Any], *, frozen: bool) -> None:
    """Write this process's part of ``engine`` into ``directory``, as Lightning does; every process has to call it.

    Args:
        engine: DeepSpeed's.
        directory: Where to; it exists.
        checkpoint: What goes along; state of the model and of optimizers is the engine's to write.
        frozen: Whether the frozen weights are written too.

    Raises:
        OSError: This process could not write.
    """
    beside = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    with _to_its_end(engine.checkpoint_engine):
        engine.save_checkpoint(
            str(directory), tag=TAG, client_state=beside, save_latest=False, exclude_frozen_parameters=not frozen
        )
    if dist.get_rank() == 0:
        (directory / "latest").write_text(TAG, encoding="utf-8")


@contextmanager
def _to_its_end(writer: Any) -> Iterator[None]:
    """Within it a failure to write is kept until the end: between files, and at last, DeepSpeed waits for everybody.

    Raises:
        OSError: There was one.
    """
    save, failures = writer.save, list[Exception]()

    def save_or_note(*args: Any, **kwargs: Any) -> None:
        try:
            save(*args, **kwargs)
        except Exception as error:
            failures.append(error)

    writer.save = save_or_note
    try:
        yield
    except OSError:
        # Rank 0 writes a script last, beside the pieces: what it has not come to is the barrier after that.
        dist.barrier()
        raise
    finally:
        writer.save = save
    if failures:
        # torch's writer of files has an error of its own, which names none of the system's.
        raise OSError(str(failures[0])) from failures[0]

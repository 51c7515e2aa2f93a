"""Saves on two processes of which one cannot write, then others that can: ``full_disk_script.py OUT``.

Each rank leaves there what the first run of each case said, and what the second one left, by case and by the rank that
could not write.
"""

import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed_script
import torch
from distributed_script import Recorded, Sharded, Split, finish, fsdp1, parallel
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from modules import loader, trainer

from lightning_peft import LoRA, PEFTError, PEFTStrategy
from lightning_peft.callbacks import AdapterCheckpoint

BASES: dict[str, tuple[Callable[[], Any], type[Recorded]]] = {
    "ddp": (lambda: "ddp", Recorded),
    "fsdp": (fsdp1, Recorded),
    "fsdp_shards": (partial(fsdp1, state_dict_type="sharded"), Recorded),
    "fsdp2": (lambda: parallel(2, 1), Sharded),
    "fsdp2_shards": (lambda: parallel(2, 1, shards=True), Sharded),
    "tensor_shards": (lambda: parallel(1, 2, shards=True), Split),
    "stage1": (lambda: deepspeed_script.base(1), Recorded),
    "stage3": (lambda: deepspeed_script.base(3), Recorded),
}
SAVERS: dict[str, type[ModelCheckpoint]] = {"directory": AdapterCheckpoint, "file": ModelCheckpoint}
EVERYONE_WRITES = ("fsdp_shards", "fsdp2_shards", "tensor_shards", "stage1", "stage3")
"""Bases on which each process writes pieces of its own, if no directory of adapters is asked for."""
CASES = [
    (base, saver, rank)
    for base in BASES
    for saver in SAVERS
    for rank in (0, 1)
    if rank == 0 or (saver == "file" and base in EVERYONE_WRITES)
]


class Full(Callback):
    """Lets one process write nothing more, as if its disk were full."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(self, run: Any, *_: Any) -> None:
        if run.global_rank == self.rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def fit(out: Path, base: str, saver: str, *callbacks: Callback) -> None:
    make, kind = BASES[base]
    module = kind(out, "full")
    module.on_fit_end = lambda: None  # type: ignore[method-assign]
    saving = SAVERS[saver](out / "checkpoints", save_last=True, save_top_k=0)
    strategy = PEFTStrategy(LoRA(r=2), base=make())
    options: dict[str, Any] = {"devices": 2, "use_distributed_sampler": False, "callbacks": [*callbacks, saving]}
    trainer(out, strategy, **options).fit(module, loader(batch_size=8))


def run(out: Path, base: str, saver: str, rank: int) -> dict[str, Any]:
    try:
        fit(out, base, saver, Full(rank))
        said = "nothing"
    except PEFTError as error:
        said = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    torch.distributed.barrier()
    left = sorted(path.name for path in (out / "checkpoints").glob("*"))
    torch.distributed.barrier()
    fit(out, base, saver)
    return {"said": said, "left": left, "then": sorted(path.name for path in (out / "checkpoints").glob("*"))}


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    out, seen = Path(sys.argv[1]), dict[Any, Any]()
    for base, saver, rank in CASES:
        seen[base, saver, rank] = run(out / f"{base}-{saver}-{rank}", base, saver, rank)
    torch.save(seen, out / f"rank{torch.distributed.get_rank()}.pt")
    finish()


if __name__ == "__main__":
    main()

"""Trains AdaLoRA on two processes: ``adalora_script.py OUT`` leaves each rank's adapters in ``OUT``."""

import sys
from pathlib import Path

import lightning as L
import torch
from distributed_script import BASES
from modules import adapter_state, loader, trainer

from lightning_peft import AdaLoRA, PEFTStrategy

TESTED = ("ddp", "fsdp", "fsdp2")
METHOD = AdaLoRA(init_r=4, target_r=2, tinit=1, tfinal=1)


def run(out: Path, base: str, devices: int) -> None:
    """Train; two devices see together the batches that one device sees alone."""
    L.seed_everything(0)
    below, module_class = BASES[base]
    module = module_class(out, base)
    strategy = PEFTStrategy(METHOD, base=below(), merge_on_train_end=False)
    fitted = trainer(out, strategy, max_epochs=3, devices=devices, use_distributed_sampler=False)
    fitted.fit(module, loader(batch_size=8))
    torch.save(adapter_state(module), out / f"{base}-{fitted.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in TESTED:
        run(Path(sys.argv[1]), name, 2)
    torch.distributed.destroy_process_group()

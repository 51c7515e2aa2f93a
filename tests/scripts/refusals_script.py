"""What is refused on two processes, on both alike: ``refusals_script.py OUT`` leaves each rank's messages there."""

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from distributed_script import BASES, Recorded, finish, fsdp1
from modules import loader, trainer
from torch import nn

from lightning_peft import LoRA, PEFTError, PEFTMethod, PEFTStrategy
from lightning_peft.callbacks import AdapterCheckpoint


class Differing(Recorded):
    """Has another hidden size on rank 1."""

    def setup(self, stage: str) -> None:
        hidden = 16 + 8 * self.global_rank
        self.net = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 4))


class Tied(Recorded):
    """Two layers have one weight, of which one is adapted."""

    def build(self) -> nn.Module:
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        net[1].weight = net[0].weight
        return net


def fit(out: Path, base: Any, method: PEFTMethod, module: Recorded, resume: Path | None = None) -> None:
    L.seed_everything(0)
    callbacks = [AdapterCheckpoint(out / "saved", save_last=True)] if resume is None else []
    options: dict[str, Any] = {"devices": 2, "use_distributed_sampler": False, "callbacks": callbacks}
    trainer(out, PEFTStrategy(method, base=base), **options).fit(module, loader(batch_size=8), ckpt_path=resume)


def main() -> None:
    out = Path(sys.argv[1])
    messages: dict[str, str] = {}

    def refused(case: str, base: Any, method: PEFTMethod, module: Recorded, resume: Path | None = None) -> None:
        try:
            fit(out, base, method, module, resume)
        except PEFTError as error:
            messages[case] = str(error)

    refused("differing", "ddp", LoRA(r=2), Differing(out, "differing"))
    refused("tied", fsdp1(), LoRA(r=2, target_modules=["net.0"]), Tied(out, "tied"))
    for name in ("ddp", "fsdp", "fsdp2"):
        make, kind = BASES[name]
        fit(out, make(), LoRA(r=2), kind(out, "saved"))
        last = out / "saved" / "last"
        refused(f"rank-{name}", make(), LoRA(r=3), kind(out, "rank"), last)
        refused(f"targets-{name}", make(), LoRA(r=2, target_modules=["net.0"]), kind(out, "targets"), last)
    rank = torch.distributed.get_rank()
    (out / f"messages-{rank}.json").write_text(json.dumps(messages))
    finish()


if __name__ == "__main__":
    main()

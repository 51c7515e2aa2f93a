"""Trains on two processes, each base strategy leaving a plain module: ``leaving_script.py BASES OUT``."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from deepspeed_script import base as deepspeed
from distributed_script import BASES, NO_FULL_STATE, Recorded, finish
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import inputs, loader, trainer
from torch import nn

from lightning_peft import LoRA, PEFTError, PEFTStrategy
from lightning_peft.core.registry import registries
from lightning_peft.core.view import ModelView

DEEPSPEED = {f"deepspeed{stage}": stage for stage in (1, 2, 3)}


class Leaving(Recorded):
    """What each rank is left with, when fit has ended."""

    def on_fit_end(self) -> None:
        seen(self, self.trainer.strategy.model, f"{self.tag}-{self.global_rank}")


def seen(module: Leaving, model: nn.Module, name: str) -> None:
    with torch.no_grad():
        # Tensor parallelism returns a tensor that is still under way.
        outputs = torch.tensor(model(inputs()).tolist())
    names = [name.replace("_fsdp_wrapped_module.", "") for name, _ in module.named_parameters()]
    content = {"outputs": outputs, "names": names, "adapted": bool(registries(ModelView(module)))}
    torch.save(content, module.out / f"{name}.pt")


def message(run: Callable[[], Any]) -> str:
    """Return what is refused, or nothing."""
    try:
        run()
    except PEFTError as error:
        return str(error)
    return ""


def everything(base: str, out: Path) -> None:
    out.mkdir(exist_ok=True)
    L.seed_everything(0)
    make, kind = (lambda: deepspeed(DEEPSPEED[base]), Recorded) if base in DEEPSPEED else BASES[base]
    module_class = type("Leaving", (Leaving, kind), {})

    def run(method: Any = None, **options: Any) -> L.Trainer:
        strategy = PEFTStrategy(method or LoRA(r=2), base=make(), merge_on_train_end="unload", **options)
        saver = ModelCheckpoint(out, filename="{epoch}", save_top_k=-1)
        return trainer(out, strategy, callbacks=[saver], max_epochs=2, devices=2, use_distributed_sampler=False)

    fitted, module = run(), module_class(out, "fit")
    fitted.fit(module, loader(batch_size=8))
    if base.startswith("ddp_"):  # which allow one run a process
        if fitted.is_global_zero:
            seen(module, module, "main-0")
        return
    messages = {}
    if base not in NO_FULL_STATE:
        messages["save"] = message(lambda: fitted.save_checkpoint(out / "after.ckpt"))
    fitted.test(module, loader(batch_size=8), verbose=False)
    seen(module, fitted.strategy.model, f"tested-{fitted.global_rank}")
    messages["best"] = message(lambda: fitted.test(module, loader(), ckpt_path=out / "epoch=0.ckpt", verbose=False))
    module.tag = "again"
    messages["again"] = message(lambda: run().fit(module, loader(batch_size=8)))
    full = module_class(out, "full")
    messages["full"] = message(lambda: run(checkpoint="full").fit(full, loader(batch_size=8)))
    torch.save(messages, out / f"messages-{fitted.global_rank}.pt")


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    for base in sys.argv[1].split(","):
        everything(base, Path(sys.argv[2], base))
    finish()


if __name__ == "__main__":
    main()

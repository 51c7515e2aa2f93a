"""Trains virtual tokens on a language model, on two processes or one.

``virtual_script.py BASES OUT``, with commas between names; each base has a folder of its name in ``OUT``.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from distributed_script import CPUFSDPStrategy, finish, parallel
from lightning.pytorch.strategies import Strategy
from modules import Llama, adapter_state, loader, trainer
from torch import Tensor, nn
from torch.distributed import fsdp
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lightning_peft import ParallelAdapter, PEFTError, PEFTMethod, PEFTStrategy, PrefixTuning, PromptTuning
from lightning_peft.callbacks import AdapterCheckpoint

METHODS: dict[str, PEFTMethod | list[PEFTMethod]] = {
    "mlp": PrefixTuning(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=6),
    "mam": [PrefixTuning(num_virtual_tokens=3, init_ids=[5, 6, 7]), ParallelAdapter(bottleneck=4)],
    "layers": PromptTuning(num_virtual_tokens=3, num_infix_tokens=2, every_layer=True),
}


class Answering(Llama):
    """Learns answers after prompts of different lengths; each process takes its share of every batch."""

    def __init__(self, out: Path, tag: str) -> None:
        super().__init__()
        self.out, self.tag = out, tag

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.global_step)
        ids = torch.randint(32, (4, 6), generator=generator)
        labels = torch.where(torch.arange(6) >= torch.tensor([[2], [4], [4], [2]]), ids, -100)
        share = slice(self.global_rank, None, self.trainer.world_size)
        logits = self.model(input_ids=ids[share], labels=labels[share]).logits
        # The mean over all tokens, whichever process has them: two answers of two tokens, two of four.
        losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[share, 1:], reduction="none")
        return losses.sum() / 12 * self.trainer.world_size

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def on_fit_end(self) -> None:
        with torch.no_grad():
            logits = self.trainer.strategy.model(torch.arange(6)[None]).logits  # type: ignore[misc]
        content = {"adapters": adapter_state(self), "logits": logits}
        torch.save(content, self.out / f"{self.tag}-rank{self.global_rank}.pt")

    def forward(self, ids: Tensor) -> Any:
        self.model.eval()
        return self.model(input_ids=ids)


class Sharded(Answering):
    """Shards itself, adapters included."""

    def configure_model(self) -> None:
        if isinstance(self.model, fsdp.FSDPModule):
            return
        self.trainer.strategy.inject()
        mesh = self.device_mesh["data_parallel"]
        for layer in [*self.model.model.layers, self.model]:
            fsdp.fully_shard(layer, mesh=mesh)


BASES: dict[str, tuple[Callable[[], Strategy | str], type[Answering]]] = {
    "auto": (lambda: "auto", Answering),
    "ddp": (lambda: "ddp", Answering),
    "fsdp": (lambda: CPUFSDPStrategy(auto_wrap_policy={LlamaDecoderLayer}), Answering),
    "fsdp2": (lambda: parallel(2, 1), Sharded),
}
REFUSED = {("fsdp2", "mlp")}


def run(out: Path, name: str, base: str, epochs: int, resume: bool = False) -> None:
    """Train for one epoch of two steps or for two, from the beginning or from a directory."""
    tag = f"{name}-{'resumed' if resume else epochs}"
    callback = AdapterCheckpoint(out / tag, save_last=True, save_top_k=0)
    options: dict[str, Any] = {"devices": 1 if base == "auto" else 2, "use_distributed_sampler": False}
    L.seed_everything(0)
    below, module_class = BASES[base]
    strategy = PEFTStrategy(METHODS[name], base=below())
    fitted = trainer(out, strategy, callbacks=[callback], max_epochs=epochs, **options)
    fitted.fit(module_class(out, tag), loader(8), ckpt_path=out / f"{name}-1" / "last" if resume else None)


def every_method(base: str, out: Path) -> None:
    out.mkdir(exist_ok=True)
    for name in METHODS:
        if (base, name) in REFUSED:
            try:
                run(out, name, base, 1)
            except PEFTError as error:
                (out / f"{name}-refused.txt").write_text(str(error))
            continue
        run(out, name, base, 1)
        run(out, name, base, 2, resume=True)


def main() -> None:
    for base in sys.argv[1].split(","):
        every_method(base, Path(sys.argv[2], base))
    finish()


if __name__ == "__main__":
    main()

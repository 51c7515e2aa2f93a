"""Tensor parallelism over two processes, in plans that do not divide evenly: ``tensor_script.py OUT``.

Each rank leaves what it saw there, by plan and case.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from distributed_script import finish, parallel
from modules import loader, trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from lightning_peft import (
    Compacter,
    DoRA,
    LoKr,
    LoRA,
    NewTokens,
    ParallelAdapter,
    PEFTError,
    PEFTMethod,
    PEFTStrategy,
    VeRA,
    adapter_state_dict,
    inject,
    load_adapter,
    save_adapter,
    set_adapter,
    unmerge,
)
from lightning_peft.core.view import ModelView
from lightning_peft.storage.state import saved_tensors
from lightning_peft.tensors.sharding import map_tensors, whole

LINEAR = ["up", "mid", "out"]
HALVES: dict[str, ParallelStyle] = {"up": ColwiseParallel(), "mid": RowwiseParallel()}
PLANS: dict[str, dict[str, ParallelStyle]] = {
    "tokens": {"words": RowwiseParallel(input_layouts=Replicate()), **HALVES},
    "width": {"words": ColwiseParallel(output_layouts=Replicate()), **HALVES},
    "uneven": {"out": ColwiseParallel(output_layouts=Replicate()), "mid": ColwiseParallel(output_layouts=Replicate())},
}
CASES: dict[tuple[str, str], PEFTMethod] = {
    ("tokens", "LoRA"): LoRA(r=2, target_modules=["words", *LINEAR]),
    ("tokens", "DoRA"): DoRA(r=2, target_modules=["words", *LINEAR]),
    ("width", "LoRA"): LoRA(r=2, target_modules=["words", *LINEAR]),
    ("uneven", "DoRA"): DoRA(r=2, target_modules=LINEAR),
    ("uneven", "LoKr"): LoKr(r=1, target_modules=LINEAR),
    ("uneven", "Compacter"): Compacter(bottleneck=3, n=3, target_modules=["out"], train_norms=False),
    ("uneven", "ParallelAdapter"): ParallelAdapter(bottleneck=3, target_modules=LINEAR),
    ("tokens", "NewTokens"): NewTokens(token_indices=[1, 2], target_modules=["words"]),
    ("uneven", "VeRA"): VeRA(r=3, target_modules=LINEAR),
}
REFUSED: dict[tuple[str, str], str] = {
    ("tokens", "NewTokens"): "does not say how .* is split beside 'net.words', a layer that tensor parallelism",
    ("uneven", "VeRA"): "'net.up' has something in common with .* tensor parallelism has split one of the two",
}


class Net(nn.Module):
    """Of 11 tokens, with sizes that two processes do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up, self.mid = nn.Embedding(11, 6), nn.Linear(6, 10), nn.Linear(10, 7)
        self.out = nn.Linear(7, 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x * 3).long().abs() % 11
        hidden = self.mid(self.up(self.words(ids)).relu())
        return nn.functional.cross_entropy(self.out(hidden).flatten(0, 1), (ids % 9).roll(1, 1).flatten())


class Split(L.LightningModule):
    """Split by a plan, if one is named."""

    def __init__(self, plan: str | None) -> None:
        super().__init__()
        self.plan = plan
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = Net()

    def configure_model(self) -> None:
        if self.plan is not None and not any(isinstance(p, DTensor) for p in self.parameters()):
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], PLANS[self.plan])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02, eps=1e-2)


def fit(out: Path, module: Split, method: PEFTMethod) -> None:
    L.seed_everything(0)
    base = "auto" if module.plan is None else parallel(1, 2)
    options: dict[str, Any] = {"devices": 1 if module.plan is None else 2, "use_distributed_sampler": False}
    trainer(out, PEFTStrategy(method, base=base), max_epochs=2, **options).fit(module, loader(batch_size=8))


def trained(module: nn.Module) -> dict[str, Tensor]:
    return map_tensors(dict(saved_tensors(ModelView(module))), lambda tensor: whole(tensor).clone())


def run(out: Path, plan: str | None, method: PEFTMethod) -> dict[str, Any]:
    """Train and merge; say what changed of the base once that is undone."""
    module = Split(plan)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    fit(out, module, method)
    seen = {"trained": trained(module)}
    unmerge(module)
    return {**seen, "changed": [n for n, v in before.items() if not torch.equal(whole(module.get_parameter(n)), v)]}


def refused(out: Path, plan: str, method: PEFTMethod) -> list[str]:
    """Return what each of two attempts at one module says."""
    module = Split(plan)
    return [said(lambda: fit(out, module, method)) for _ in range(2)]


def said(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except PEFTError as error:
        return str(error)
    return "nothing"


def by_hand(out: Path) -> dict[str, Any]:
    """Save, choose, and load by hand; ask for further adapters."""
    module = Split("width")
    fit(out, module, LoRA(r=2, target_modules=["up", "mid"]))
    unmerge(module)
    save_adapter(module, out / "saved")
    state = adapter_state_dict(module)
    seen: dict[str, Any] = {"trained": trained(module)}
    seen["in pieces"] = all(isinstance(tensor, DTensor) for tensor in state.values())
    set_adapter(module, "default")
    for tensor in state.values():
        tensor.zero_()
    load_adapter(module, out / "saved")
    seen["loaded"] = trained(module)
    seen["unknown"] = said(lambda: set_adapter(module, "other"))
    seen["injected"] = said(lambda: inject(module, LoRA(r=2), name="other"))
    return {**seen, "in the end": trained(module)}


def main() -> None:
    out, seen = Path(sys.argv[1]), dict[Any, Any]()
    for (plan, case), method in CASES.items():
        attempt = refused if (plan, case) in REFUSED else run
        seen[plan, case] = attempt(out, plan, method)
    seen["by hand"] = by_hand(out)
    torch.save(seen, out / f"rank{torch.distributed.get_rank()}.pt")
    finish()


if __name__ == "__main__":
    main()

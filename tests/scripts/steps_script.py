"""Steps on two processes: parameters that are whole beside others in pieces, and gradients that hooks see.

``steps_script.py OUT`` leaves what each rank saw there, by base and case.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed_script
import lightning as L
import torch
from distributed_script import Recorded, finish, fsdp1, parallel
from modules import loader, trainer
from torch import Tensor, nn
from torch.distributed import fsdp

from lightning_peft import BitFit, Compacter, LayerNormTuning, LoRA, PEFTError, PEFTStrategy, SeriesAdapter, disable
from lightning_peft.core.view import ModelView
from lightning_peft.storage.state import adapter_parameters_and_whole
from lightning_peft.tensors.sharding import map_tensors, whole

LIMIT = 0.05


class Counting(torch.optim.SGD):
    """Keeps a number of its own in the param group, as optimizers without a schedule do."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] = 0.05 / group["count"]
        return loss


def adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    # Without the epsilon the rounding of averaged gradients is blown up where they are small.
    return torch.optim.AdamW(parameters, lr=0.02, eps=1e-2, **options)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": adamw,
    "foreach": lambda p: adamw(p, foreach=True),
    "fused": lambda p: adamw(p, fused=True),
    "counting": lambda p: Counting(p, lr=0.05, momentum=0.9, foreach=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, line_search_fn="strong_wolfe"),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
}


class Net(Recorded):
    """Two blocks of torch's, of which the second has no biases."""

    def __init__(self, out: Path, base: str, optimizer: str) -> None:
        super().__init__(out, base)
        self.base, self.optimizer, self.norms = base, optimizer, list[float]()

    def build(self) -> nn.Module:
        first, second = nn.Linear(8, 16), nn.Linear(16, 16, bias=False)
        return nn.Sequential(first, nn.LayerNorm(16), nn.ReLU(), second, nn.ReLU(), nn.Linear(16, 4))

    def configure_model(self) -> None:
        if self.base.startswith("fsdp2") and not isinstance(self.net, fsdp.FSDPModule):
            if self.base == "fsdp2":
                self.trainer.strategy.inject()
            for part in (self.net[0], self.net):
                fsdp.fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def on_fit_end(self) -> None:
        """Record nothing."""


class Clipping(Net):
    """Clips in a hook, and keeps the norms that it sees there."""

    def on_after_backward(self) -> None:
        parameters = [parameter for parameter in self.parameters() if parameter.grad is not None]
        self.norms.append(float(whole(nn.utils.clip_grad_norm_(parameters, LIMIT))))


class ClippingLater(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), LIMIT)


class ByHand(Net):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.differentiate(super().training_step(batch, batch_idx))
        optimizer.step()

    def differentiate(self, loss: Tensor) -> None:
        self.manual_backward(loss)


class ClippingByHand(ByHand):
    def differentiate(self, loss: Tensor) -> None:
        super().differentiate(loss)
        self.clip_gradients(self.optimizers(), LIMIT, "norm")


class ClippingByTorch(ByHand):
    def differentiate(self, loss: Tensor) -> None:
        super().differentiate(loss)
        nn.utils.clip_grad_value_(self.parameters(), LIMIT)


class Bypassing(ByHand):
    def differentiate(self, loss: Tensor) -> None:
        loss.backward()


class Referring(Net):
    """Is held to what it was, as in preference tuning: each step asks the base model first."""

    def loss(self, x: Tensor) -> Tensor:
        with torch.no_grad(), disable(self):
            reference = self(x)
        drift: Tensor = (self(x) - reference).square().mean()
        return super().loss(x) + 0.3 * drift


class InTurn(Net):
    """Two networks, each with an optimizer: one is called, and not differentiated, before the other one's step."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False
        self.judge = nn.Linear(4, 4)

    def configure_model(self) -> None:
        super().configure_model()
        if self.base.startswith("fsdp2"):
            fsdp.fully_shard(self.judge, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        of_net, of_judge = self.optimizers()
        x = batch[0][self.global_rank :: self.trainer.world_size]
        guess = self.net(x)
        for optimizer, loss in (
            (of_judge, lambda: (self.judge(guess.detach()) - x[:, 4:]).square().mean()),
            (of_net, lambda: (self.judge(guess) - x[:, :4]).square().mean()),
        ):
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [OPTIMIZERS[self.optimizer](part.parameters()) for part in (self.net, self.judge)]


LORA = {"method": LoRA(r=2)}
BESIDE_NORMS = {"method": [LoRA(r=2, target_modules=["net.0", "net.5"]), LayerNormTuning()]}
SHARED = {"method": Compacter(bottleneck=4, train_norms=False, target_modules=["net.0", "net.3"]), "also": ["net.5"]}
BIASES = {"method": [BitFit(create_missing=True, target_modules=["net.0", "net.3"]), LayerNormTuning()]}
SERIES = {"method": SeriesAdapter(bottleneck=4, target_modules=["net.0"]), "also": ["net.5"]}
BY_NORM: dict[str, Any] = {"gradient_clip_val": LIMIT}
BY_VALUE: dict[str, Any] = {"gradient_clip_val": 0.003, "gradient_clip_algorithm": "value"}
CASES: dict[str, dict[str, Any]] = {
    "beside norms": {**BESIDE_NORMS, "optimizer": "adamw", **BY_NORM},
    "beside norms by value": {**BESIDE_NORMS, "optimizer": "foreach", **BY_VALUE},
    "beside norms counted": {**BESIDE_NORMS, "optimizer": "counting"},
    "shared beside a head": {**SHARED, "optimizer": "fused", **BY_NORM},
    "new biases": {**BIASES, "optimizer": "sgd", **BY_NORM},
    "series": {**SERIES, "optimizer": "foreach", **BY_NORM},
    "line search": {**LORA, "optimizer": "lbfgs"},
    "rows and columns": {**LORA, "optimizer": "adafactor"},
    "clipped in a hook": {**LORA, "optimizer": "sgd", "kind": Clipping},
    "mixture in a hook": {**BESIDE_NORMS, "optimizer": "sgd", "kind": Clipping},
    "mixture in a later hook": {**BESIDE_NORMS, "optimizer": "sgd", "kind": ClippingLater},
    "mixture by torch": {**BESIDE_NORMS, "optimizer": "sgd", "kind": ClippingByTorch},
    "mixture by hand": {**BESIDE_NORMS, "optimizer": "sgd", "kind": ClippingByHand},
    "by hand": {**LORA, "optimizer": "sgd", "kind": ByHand},
    "beside a reference": {**BESIDE_NORMS, "optimizer": "sgd", "kind": Referring},
    "in turn": {**LORA, "optimizer": "sgd", "kind": InTurn},
    "bypassed": {**LORA, "optimizer": "sgd", "kind": Bypassing},
    "beside norms fused": {**BESIDE_NORMS, "optimizer": "fused sgd"},
    "beside norms in rows": {**BESIDE_NORMS, "optimizer": "adafactor"},
}
BASES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "fsdp": fsdp1,
    "fsdp2": lambda: parallel(2, 1),
    "fsdp2_late": lambda: parallel(2, 1),
    "stage2": lambda: deepspeed_script.base(2),
    "stage3": lambda: deepspeed_script.base(3),
}
PIECES = "are in pieces on several processes"
REFUSED: dict[tuple[str, str], str] = {
    **{
        ("fsdp2_late", f"mixture {where}"): r"call self\.clip_gradients\(optimizer"
        for where in ("in a hook", "in a later hook", "by torch")
    },
    ("fsdp2", "rows and columns"): f"Adafactor looks at more than one element .* {PIECES}",
    **{(base, "line search"): "LBFGS decides by .*Use another optimizer" for base in BASES if base != "stage3"},
    ("stage3", "beside a reference"): r"disable\(model\) on ZeRO-3, where 2 tensors",
    **{(base, "beside norms fused"): f"SGD has fused=True, .* {PIECES}" for base in ("fsdp2", "fsdp2_late")},
    **{(base, "beside norms in rows"): f"Adafactor looks at .* {PIECES}" for base in ("fsdp2", "fsdp2_late")},
    **{
        (base, "bypassed"): r"differ between processes: .*call self\.manual_backward"
        for base in ("ddp", "fsdp", "fsdp2_late")
    },
    ("stage2", "bypassed"): r"no gradients to step by\. .*call self\.manual_backward",
}
OF_DEEPSPEED = ("by hand", "bypassed", "line search", "beside a reference")
"""DeepSpeed clips and steps by itself; what hooks see of gradients is its own too."""


def serves(base: str, case: str) -> bool:
    """Whether it is to be tried; DDP wants every parameter in each backward pass, or find_unused_parameters."""
    if base.startswith("stage"):
        return case in OF_DEEPSPEED[0 if base == "stage2" else -1 :]
    return (base, case) != ("ddp", "in turn")


def run(out: Path, base: str, case: str) -> dict[str, Any]:
    """Train; two devices see together the batches that one device sees alone."""
    given = dict(CASES[case])
    method, also, kind = given.pop("method"), given.pop("also", None), given.pop("kind", Net)
    L.seed_everything(0)
    module = kind(out, base, given.pop("optimizer"))
    alone = base not in BASES
    strategy = PEFTStrategy(method, base="auto" if alone else BASES[base](), train_also=also, merge_on_train_end=False)
    options: dict[str, Any] = {"devices": 1 if alone else 2, "use_distributed_sampler": False, "max_epochs": 3}
    fitted = trainer(out, strategy, **options, **given)
    try:
        fitted.fit(module, loader(batch_size=8))
    except PEFTError as error:
        return {"error": str(error)}
    trained = dict(adapter_parameters_and_whole(ModelView(module)))
    groups = (
        []
        if base.startswith("stage")
        else [group for optimizer in fitted.optimizers for group in optimizer.param_groups]
    )
    seen = {"trained": map_tensors(trained, lambda tensor: whole(tensor).clone()), "norms": module.norms}
    return {**seen, "groups": [{key: group.get(key) for key in ("lr", "count")} for group in groups]}


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    out = Path(sys.argv[1])
    seen = {base: {case: run(out, base, case) for case in CASES if serves(base, case)} for base in BASES}
    torch.save(seen, out / f"rank{torch.distributed.get_rank()}.pt")
    finish()


if __name__ == "__main__":
    main()

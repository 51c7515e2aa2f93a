"""Trains under DeepSpeed and leaves what each rank saw: ``deepspeed_script.py first|more|gpu OUT``.

One pair of processes does many things, since most of the time goes into starting them.
"""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from modules import Halving, Llama, Regression, inputs, loader, trainer
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lightning_peft import DoRA, LoRA, PEFTMethod, PEFTStrategy, eject, inject, unmerge
from lightning_peft.adapters.low_rank.linear import LoRAAdapter
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.callbacks.summary import summary_table
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.operations.merge import is_merged
from lightning_peft.tensors.sharding import replace, whole

STAGES = (1, 2, 3)


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """Lifts Lightning's two refusals of CPUs: the check for CUDA, and that of the devices' numbers, which CPUs lack."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        from deepspeed.ops import __compatible_ops__

        # Its kernel for messages between processes of one machine is for inference, and takes a minute to compile.
        __compatible_ops__["deepspeed_shm_comm"] = False
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Shared(Regression):
    """Each process takes its share of the global batch. Lightning's sampler would shuffle."""

    rate = 0.05

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch[0][self.global_rank :: self.trainer.world_size])

    def configure_optimizers(self) -> Any:
        assert self.net is not None
        groups = [{"params": self.net[0].parameters()}, {"params": self.net[2].parameters(), "lr": 2 * self.rate}]
        optimizer = torch.optim.AdamW(groups, lr=self.rate)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}


class Late(Shared):
    """Built in pieces, where the strategy offers it."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        self.net: nn.Module | None = None
        # What is drawn there is drawn in half precision.
        self.values = [parameter.detach() for parameter in Regression().parameters()]

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Regression().net
            for parameter, value in zip(self.net.parameters(), self.values, strict=True):
                replace(parameter, value)


class Odd(Shared):
    """Three classes: a size that two processes do not divide."""

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def loss(self, x: Tensor) -> Tensor:
        return (self(x) - x[:, :3]).square().mean()


class InjectsItself(Late):
    def configure_model(self) -> None:
        super().configure_model()
        self.trainer.strategy.inject()


class Constant(Shared):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=0.01)


class Reversed(Shared):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(reversed(list(self.parameters())), lr=self.rate)


class Tied(Shared):
    def build(self) -> nn.Module:
        layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        layers[2].weight = layers[0].weight
        return layers


class OwnSchedule(Shared):
    """Has a param group that is left without parameters, under a scheduler that is not torch's."""

    def configure_optimizers(self) -> Any:
        groups = [{"params": [self.net[0].bias]}, {"params": [self.net[0].weight, *self.net[2].parameters()]}]
        optimizer = torch.optim.AdamW(groups, lr=self.rate)
        return {"optimizer": optimizer, "lr_scheduler": Halving(optimizer)}


class Several(Shared):
    """Holds two adapters."""

    def __init__(self) -> None:
        super().__init__()
        for name in "ab":
            inject(self, LoRA(r=2), name=name)


class LlamaFromFiles(Llama):
    """Takes its share of the batch, and may be built without weights, in pieces."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.config = self.model.config
        if late:
            self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = LlamaForCausalLM(self.config).eval()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([batch[0][self.global_rank :: self.trainer.world_size]], batch_idx)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", super().training_step(batch, batch_idx))


class NoOptimizer(Shared):
    """For an optimizer that stands in DeepSpeed's configuration."""

    def configure_optimizers(self) -> Any:
        raise AssertionError("DeepSpeed has an optimizer of its own")


class Diverging(Shared):
    """Has a gradient that is NaN, of a loss that is not, on the second process after three steps."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + (0 * loss).sqrt() if self.global_step == 3 and self.global_rank == 1 else loss


def base(stage: int, config: dict[str, Any] | None = None, **options: Any) -> DeepSpeedStrategy:
    strategy = CPUDeepSpeedStrategy(stage=stage, process_group_backend="gloo", **options)
    assert strategy.config is not None
    # ZeRO-3 leaves parameters of less than 100,000 elements whole: all of this model's.
    strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    strategy.config.update(config or {})
    return strategy


def fit(
    out: Path,
    tag: str,
    strategy: Any,
    epochs: int = 3,
    module: Callable[[], Shared] = Shared,
    resume: Path | None = None,
    checkpoint: Any = "adapter",
    method: PEFTMethod | None = None,
    train_also: str | None = None,
    **options: Any,
) -> tuple[L.Trainer, Shared]:
    """Train with one process or two, which see the same global batches."""
    callbacks = [
        AdapterCheckpoint(out / f"{tag}-directories", save_last=True, save_top_k=0),
        ModelCheckpoint(out / f"{tag}-files", save_last=True, save_top_k=0),
    ]
    options = {"max_epochs": epochs, "use_distributed_sampler": False, "callbacks": callbacks, **options}
    L.seed_everything(0)
    peft = PEFTStrategy(method or LoRA(r=2), base=strategy, checkpoint=checkpoint, train_also=train_also)
    fitted, model = trainer(out, peft, **options), module()
    fitted.fit(model, loader(batch_size=8), ckpt_path=resume)
    return fitted, model


def fit_twice(out: Path, tag: str, strategy: Any, **options: Any) -> tuple[L.Trainer, Shared]:
    fitted, module = fit(out, tag, strategy, **options)
    fitted.fit_loop.max_epochs = 4
    fitted.fit(module, loader(batch_size=8))
    return fitted, module


def fit_from_files(out: Path, strategy: Any, **options: Any) -> dict[str, Any]:
    """Train a model whose weights are read from files, and test what the merge leaves of it."""
    L.seed_everything(0)
    module = LlamaFromFiles(late=strategy != "auto")
    peft = PEFTStrategy(LoRA(r=2), base=strategy, base_weights=str(out / "base"))
    fitted = trainer(out, peft, use_distributed_sampler=False, **options)
    fitted.fit(module, loader(batch_size=8))
    losses = fitted.test(module, loader(batch_size=8), verbose=False)
    return {"adapters": adapters(module), "loss": losses[0]["test_loss"], "merged": is_merged(module)}


def adapters(module: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter).clone() for name, parameter in ModelView(module).adapter_parameters.items()}


def base_weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p).clone() for name, p in module.named_parameters() if ".peft." not in name}


def state_elements(fitted: L.Trainer) -> int:
    state = fitted.strategy.deepspeed_engine.optimizer.optimizer.state
    return sum(v.numel() for entry in state.values() for v in entry.values() if isinstance(v, Tensor) and v.dim())


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        return model(inputs().to(model.net[0].weight.dtype)).float()


def calls(run: Callable[[], Any]) -> tuple[int, Any]:
    """Return how often adapters were called in ``run``, and what it returned."""
    with mock.patch.object(LoRAAdapter, "forward", autospec=True, side_effect=LoRAAdapter.forward) as forward:
        result = run()
    return forward.call_count, result


def error(run: Callable[[], Any]) -> str:
    try:
        run()
    except PEFTError as found:
        return str(found)
    return ""


class Record:
    """What this rank saw, by name."""

    def __init__(self, out: Path) -> None:
        self.out, self.content = out, dict[str, Any]()

    def fitted(self, tag: str, fitted: L.Trainer, module: Shared) -> None:
        self.content[tag] = {
            "adapters": adapters(module),
            "weights": base_weights(module),
            "merged": is_merged(module),
            "outputs": outputs(module),
            "elements": state_elements(fitted),
            "steps": fitted.global_step,
        }

    def save(self, rank: int) -> None:
        torch.save(self.content, self.out / f"rank{rank}.pt")


LIMITS: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
TWO: dict[str, Any] = {"devices": 2}


def every_stage(out: Path, record: Record, stage: int) -> int:
    tag, data = f"stage{stage}", loader(batch_size=8)
    fitted, module = fit(out, tag, base(stage), **TWO)
    record.fitted(tag, fitted, module)

    # The same trainer goes on: evaluation of the merged model, of a checkpoint, a second fit, and out again.
    directory, file = out / f"{tag}-directories" / "last", out / f"{tag}-files" / "last.ckpt"
    record.content[f"{tag}-tests"] = {
        "merged": calls(lambda: fitted.test(module, data, verbose=False)),
        "directory": calls(lambda: fitted.test(module, data, ckpt_path=directory, verbose=False)),
        "file": calls(lambda: fitted.test(module, data, ckpt_path=file, verbose=False)),
    }
    record.content[f"{tag}-tested"] = adapters(module)
    fitted.save_checkpoint(out / f"{tag}-after-test.ckpt")
    fitted.fit_loop.max_epochs = 4
    fitted.fit(module, data)
    record.fitted(f"{tag}-again", fitted, module)
    for kind, resume in (("odd", None), ("odd-resumed", out / "single-odd-two-directories" / "last")):
        _, odd = fit(out, f"{tag}-{kind}", base(stage), module=Odd, resume=resume, **WHOLE, **TWO)
        record.content[f"{tag}-{kind}"] = {**adapters(odd), **base_weights(odd.net[2])}
    unmerge(module)
    record.content[f"{tag}-unmerged"] = base_weights(module)
    eject(module)
    record.content[f"{tag}-ejected"] = base_weights(module)

    L.seed_everything(0)
    options: dict[str, Any] = {"max_epochs": 3, "use_distributed_sampler": False, "enable_model_summary": True}
    fresh, unfitted = trainer(out, PEFTStrategy(LoRA(r=2), base=base(stage)), **TWO, **options), Shared()
    record.content[f"{tag}-unfitted"] = {
        "validate": calls(lambda: fresh.validate(unfitted, data, verbose=False)),
        "predict": calls(lambda: fresh.predict(unfitted, data)),
    }
    fresh.fit(unfitted, data)
    record.fitted(f"{tag}-evaluated", fresh, unfitted)
    record.content[f"{tag}-summary"] = summary_table(unfitted, fresh.optimizers, "")
    fit(out, f"{tag}-two", base(stage), 2, **TWO)
    two = {"directory": out / f"{tag}-two-directories" / "last", "file": out / f"{tag}-two-files" / "last.ckpt"}
    for kind, path in {**two, "single": out / "single-two-files" / "last.ckpt"}.items():
        record.fitted(f"{tag}-{kind}", *fit(out, f"{tag}-{kind}", base(stage), resume=path, **TWO))
    record.fitted(f"{tag}-limits", *fit(out, f"{tag}-limits", base(stage), **TWO, **LIMITS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, module = fit(out, f"{tag}-diverging", base(stage), module=Diverging, **TWO)
    record.content[f"{tag}-diverging"] = adapters(module), is_merged(module), [str(w.message) for w in caught]
    return fitted.global_rank


def half(out: Path, record: Record, stage: int) -> int:
    options: dict[str, Any] = {**TWO, "precision": "bf16-mixed"}
    tag = f"half{stage}"
    fitted, module = fit(out, tag, base(stage), **options)
    record.fitted(tag, fitted, module)
    fitted.test(module, loader(), verbose=False)
    record.content[f"{tag}-tested"] = adapters(module)
    fit(out, f"{tag}-two", base(stage), 2, **options)
    for kind, name in (("directory", "directories/last"), ("file", "files/last.ckpt")):
        resume = out / f"{tag}-two-{name}"
        record.fitted(f"{tag}-{kind}", *fit(out, f"{tag}-{kind}", base(stage), resume=resume, **options))
    return fitted.global_rank


def built_in_pieces(out: Path, record: Record) -> None:
    record.fitted("late", *fit(out, "late", base(3), module=Late, **TWO))
    record.fitted("injects", *fit(out, "injects", base(3), module=InjectsItself, **TWO))
    record.fitted("half-late", *fit(out, "half-late", base(3), module=Late, precision="bf16-mixed", **TWO))
    record.fitted("dora", *fit(out, "dora", base(3), module=Late, method=DoRA(r=2), **TWO))
    record.content["files"] = fit_from_files(out, base(3), **TWO)
    for tag, module in (("whole", Shared), ("whole-late", Late)):
        fitted, trained = fit(out, tag, base(3), module=module, **WHOLE, **TWO)
        record.fitted(tag, fitted, trained)
        eject(trained)
        record.content[f"{tag}-ejected"] = base_weights(trained)

    half: dict[str, Any] = {"module": Late, "precision": "bf16-true", **WHOLE, **TWO}
    fit(out, "whole-half", base(3), **half)
    fit(out, "whole-half-two", base(3), 2, **half)
    resume = out / "whole-half-two-directories" / "last"
    fit(out, "whole-half-resumed", base(3), resume=resume, **half)


WHOLE: dict[str, Any] = {"method": LoRA(r=2, target_modules=["net.0"]), "train_also": "net.2"}


def offload(out: Path, record: Record) -> None:
    # DeepSpeed wants its own optimizer for that, whose kernels it would have to compile.
    config = {"zero_force_ds_cpu_optimizer": False}
    for stage, options in (
        (2, {"offload_optimizer": True}),
        (3, {"offload_optimizer": True, "offload_parameters": True}),
    ):
        tag = f"offload{stage}"
        record.fitted(tag, *fit(out, tag, base(stage, config, **options), **TWO))
        fit(out, f"{tag}-two", base(stage, config, **options), 2, **TWO)
        for kind, name in (("directory", "directories/last"), ("file", "files/last.ckpt")):
            resume = out / f"{tag}-two-{name}"
            strategy = base(stage, config, **options)
            record.fitted(f"{tag}-{kind}", *fit(out, f"{tag}-{kind}", strategy, resume=resume, **TWO))


def rest(out: Path, record: Record) -> None:
    adam = {"type": "AdamW", "params": {"lr": Shared.rate, "weight_decay": 0.01, "torch_adam": True}}
    record.fitted("config", *fit(out, "config", base(2, {"optimizer": adam}), module=NoOptimizer, **TWO))
    record.fitted("full", *fit(out, "full", base(2), checkpoint="full", **TWO))
    fit(out, "two", base(2), 2, **TWO)
    file = out / "two-files" / "last.ckpt"
    record.fitted("full-resumed", *fit(out, "no", base(2), checkpoint="full", resume=full_two(out), **TWO))
    _, module = fit(out, "handover", base(3), **TWO)
    record.fitted("handover", *fit(out, "no", base(3), module=lambda: module, **TWO))

    # Without an evaluation in between, for which Lightning deletes all hooks; ZeRO-3 has some of its own.
    fitted, module = fit(out, "hooks", base(3), **TWO)
    before = len(module.net[0]._forward_hooks)
    fitted.fit_loop.max_epochs = 4
    fitted.fit(module, loader(batch_size=8))
    record.content["hooks"] = (before, len(module.net[0]._forward_hooks))

    strategy = base(3)
    del strategy.config["zero_optimization"]["stage3_param_persistence_threshold"]
    fitted, module = fit(out, "persistent", strategy, **TWO)
    record.fitted("persistent", fitted, module)
    outputs(module)
    record.content["persistent-gathered"] = module.net[0].weight.shape
    unmerge(module)
    record.content["persistent-unmerged"] = base_weights(module)

    def refused(stage: int, **options: Any) -> str:
        return error(lambda: fit(out, "no", base(stage), **options, **TWO))

    record.content["errors"] = {
        "stage": refused(3, resume=file),
        "groups": refused(2, module=Reversed, resume=file),
        "rank": refused(2, method=LoRA(r=3), resume=file),
        "pickles": error(lambda: fitted.strategy.load_checkpoint(file, weights_only=True)),
        "tied": refused(3, module=Tied),
        "full": refused(3, checkpoint="full"),
        "no stage": refused(0),
        "emptied group": refused(1, module=OwnSchedule),
        "several": refused(1, module=Several),
    }


def full_two(out: Path) -> Path:
    fit(out, "full-two", base(2), 2, checkpoint="full", **TWO)
    return out / "full-two-files" / "last.ckpt"


def gpu(out: Path, record: Record, stage: int) -> int:
    """Train in bfloat16 on all GPUs, with and without offloading, and resume on them."""
    for offload in (False, True) if stage > 1 else (False,):
        tag = f"gpu{stage}-offload" if offload else f"gpu{stage}"
        on_gpu(out, f"{tag}-two", stage, offload, epochs=2)
        for kind, resume in (
            ("whole", None),
            ("directory", out / f"{tag}-two-directories" / "last"),
            ("file", out / f"{tag}-two-files" / "last.ckpt"),
        ):
            rank, record.content[f"{tag}-{kind}"] = on_gpu(out, f"{tag}-{kind}", stage, offload, resume=resume)
    return rank


def on_gpu(out: Path, tag: str, stage: int, offload: bool, **options: Any) -> tuple[int, dict[str, Any]]:
    strategy = DeepSpeedStrategy(stage=stage, offload_optimizer=offload, offload_parameters=offload and stage == 3)
    assert strategy.config is not None
    strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    strategy.config["zero_force_ds_cpu_optimizer"] = False
    fitted, module = fit(out, tag, strategy, accelerator="gpu", devices=-1, precision="bf16-mixed", **options)
    called, losses = calls(lambda: fitted.test(module, loader(), verbose=False))
    return fitted.global_rank, {
        "adapters": {name: value.cpu() for name, value in adapters(module).items()},
        "merged": is_merged(module),
        "calls": called,
        "loss": losses[0]["test_loss"],
    }


def main() -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    what, out = sys.argv[1], Path(sys.argv[2])
    os.environ["DS_ACCELERATOR"] = "cuda" if what == "gpu" else "cpu"
    record, rank = Record(out), 0
    for stage in STAGES:
        rank = {"first": every_stage, "more": half, "gpu": gpu}[what](out, record, stage)
    if what == "more":
        built_in_pieces(out, record)
        offload(out, record)
        rest(out, record)
    record.save(rank)


if __name__ == "__main__":
    main()

"""Typical mistakes: each is told what to write instead. And one strategy object for several Trainers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from modules import Regression, assert_same, loader, trainer
from torch import nn

from lightning_peft import LoRA, PEFTError, PEFTStrategy, SeriesAdapter, inject, load_adapter
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.core import method as registry


def given(strategy: Any) -> L.Trainer:
    return L.Trainer(strategy=strategy, accelerator="cpu", logger=False, enable_progress_bar=False)


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    # The flag.
    "a name with a slip": (lambda: given("peft_lorra"), r"'peft_lorra'\. Did you mean 'peft_lora'\?"),
    "a hyphen": (lambda: given("peft-lora"), r"Did you mean 'peft_lora'\?"),
    "the method alone": (lambda: given("lora"), r"Did you mean 'peft_lora'\?"),
    "as the class is written": (lambda: given("LoRA"), r"Did you mean 'peft_lora'\?"),
    "two words": (lambda: given("series-adapter"), r"Did you mean 'peft_series_adapter'\?"),
    "a base with a slip": (lambda: PEFTStrategy(base="dpp"), r"'dpp'\. Did you mean 'ddp'\?"),
    "a Fabric": (lambda: Fabric(strategy=PEFTStrategy()), r"given to a Fabric.*inject\(model, LoRA\(r=8\)\) before"),
    "a Fabric and a name": (lambda: Fabric(strategy="peft_lora"), r"peft_lora was given to a Fabric"),
    "a method as the strategy": (lambda: given(LoRA()), r"given as strategy\. Write PEFTStrategy\(LoRA"),
    # The method.
    "a class": (lambda: PEFTStrategy(LoRA), r"The class LoRA was given.*LoRA\(\)"),
    "a class among others": (lambda: PEFTStrategy(["bitfit", LoRA]), r"The class LoRA was given"),
    "the class's name": (lambda: PEFTStrategy("LoRA"), r"'LoRA'\. Did you mean 'lora'\?"),
    "hyper-parameters": (lambda: PEFTStrategy(r=8), r"has no 'r'\. Write PEFTStrategy\(LoRA\(r=8\)\)"),
    "of another method": (
        lambda: PEFTStrategy(bottleneck=8),
        r"Write PEFTStrategy\(\w+Adapter\(bottleneck=8\)\)",
    ),
    "an option with a slip": (lambda: PEFTStrategy(checkpoints="full"), r"Did you mean 'checkpoint'\?"),
    "too many": (lambda: PEFTStrategy("lora", "ddp", True), r"base='ddp', merge_on_train_end=True\)"),
    "a number": (lambda: PEFTStrategy(8), r"8 was given as a method"),
    "HF PEFT's configuration elsewhere": (
        lambda: inject(nn.Linear(2, 2), peft.LoraConfig(use_dora=True)),
        r"PEFTStrategy takes such an object.*from_peft_config\(config\)",
    ),
    "of a method that is not here": (
        lambda: PEFTStrategy(peft.PolyConfig()),
        r"PolyConfig describes POLY, which this package does not have",
    ),
    "HF PEFT's configuration, read from a file": (
        lambda: PEFTStrategy({"peft_type": "LORA", "r": 4}),
        r"A configuration of HF PEFT was given.*from_peft_config",
    ),
    "HF PEFT's model": (
        lambda: PEFTStrategy(peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules="0"))),
        r"A PeftModel, which is a model of HF PEFT, was given as a method\. Give PEFTStrategy the configuration",
    ),
    "method and model in the other order": (
        lambda: inject(LoRA(), nn.Linear(2, 2)),  # type: ignore[arg-type]
        r"a LoRA as model\. Write inject\(model, method\)",
    ),
    "a preset with a slip": (
        lambda: inject(nn.Sequential(nn.Linear(4, 4)), LoRA(target_modules="All_Linear")),
        r"Nearest names: all-linear",
    ),
    "a directory that is not there": (
        lambda: load_adapter(Regression(), "nowhere"),
        r"nowhere.adapter_config.json does not exist",
    ),
    # Its hyper-parameters.
    "by position": (lambda: LoRA(8), r"by name: LoRA\(r=8\)"),
    "two by position": (lambda: LoRA(8, 16), r"LoRA\(r=8, alpha=16\)"),
    "rank": (lambda: LoRA(rank=8), r"no 'rank'\. Write r=8\. It has r, alpha"),
    "lora_alpha": (lambda: LoRA(lora_alpha=8), r"Write alpha=8\."),
    "lora_dropout": (lambda: LoRA(lora_dropout=0.1), r"Write dropout=0\.1\."),
    "use_dora": (lambda: LoRA(use_dora=True), r"Write DoRA\(\.\.\.\)\."),
    "modules_to_save": (lambda: LoRA(modules_to_save=["head"]), r"Write train_also=\['head'\], of PEFTStrategy"),
    "a slip": (lambda: LoRA(aplha=8), r"Did you mean 'alpha'\?"),
    "another tool's": (lambda: SeriesAdapter(bottleneck_dim=8), r"Did you mean 'bottleneck'\?"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_to_write_instead(name: str) -> None:
    mistake, message = MISTAKES[name]
    with pytest.raises(PEFTError, match=message):
        mistake()


def test_names_of_others_are_left_to_lightning() -> None:
    with pytest.raises(ValueError, match="invalid strategy name") as caught:
        given("dpp")
    assert not isinstance(caught.value, PEFTError)
    assert isinstance(given("ddp").strategy, DDPStrategy)
    assert isinstance(given("peft_lora").strategy, PEFTStrategy)
    assert "ddp" in StrategyRegistry.available_strategies()
    Fabric(strategy="ddp", accelerator="cpu", devices=1)


# --- checkpoints and states in the wrong place --------------------------------------------------------------------


class Wrapped(Regression):
    """Adapted by HF PEFT, and trained with plain Lightning."""

    def build(self) -> nn.Module:
        return peft.get_peft_model(super().build(), peft.LoraConfig(r=2, target_modules=["0", "2"]))  # type: ignore


def test_a_checkpoint_of_a_module_that_hf_peft_has_adapted(tmp_path: Path) -> None:
    run = trainer(tmp_path, "auto")
    run.fit(Wrapped(), loader())
    run.save_checkpoint(tmp_path / "old.ckpt")
    message = r"HF PEFT's tensors \('net\.base_model.*save_pretrained.*load_adapter"
    with pytest.raises(PEFTError, match=message):
        trainer(tmp_path).fit(Regression(), loader(), ckpt_path=tmp_path / "old.ckpt")
    with pytest.raises(PEFTError, match=message):
        Regression.load_from_checkpoint(tmp_path / "old.ckpt")
    Wrapped.load_from_checkpoint(tmp_path / "old.ckpt")


def test_a_checkpoint_with_adapters_and_a_module_without(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    module = Regression()
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "ours.ckpt")
    message = r"adapters \('net\.0\.peft\.default\.lora_A', …\), and this Regression has none.*PEFTStrategy"
    with pytest.raises(PEFTError, match=message):
        trainer(tmp_path, "auto", max_epochs=2).fit(Regression(), loader(), ckpt_path=tmp_path / "ours.ckpt")
    state = torch.load(tmp_path / "ours.ckpt", weights_only=True)["state_dict"]
    with pytest.raises(PEFTError, match=message):
        Regression().load_state_dict(state)
    with pytest.warns(UserWarning, match=message):
        Regression().load_state_dict(state, strict=False)
    module.load_state_dict(state)


# --- one object for several Trainers ------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["auto", "ddp", "instance"])
def test_one_object_serves_one_trainer_after_another(tmp_path: Path, base: str) -> None:
    made: Any = DDPStrategy(find_unused_parameters=True) if base == "instance" else base
    strategy, states = PEFTStrategy(LoRA(r=2), base=made), []
    for _ in range(2):
        module, run = Regression(), trainer(tmp_path, strategy)
        assert run.strategy is strategy
        assert isinstance(strategy, SingleDeviceStrategy if base == "auto" else DDPStrategy)
        if base == "instance":
            assert strategy._ddp_kwargs == {"find_unused_parameters": True}
        run.fit(module, loader())
        run.test(module, loader(), verbose=False)
        states.append(dict(module.state_dict()))
    assert_same(*states)
    fresh = trainer(tmp_path, PEFTStrategy(LoRA(r=2), base=made), devices=2)
    two = trainer(tmp_path, strategy, devices=2)
    assert vars(strategy).keys() == vars(fresh.strategy).keys()
    assert isinstance(two.strategy, DDPStrategy)
    assert two.strategy.num_processes == 2


def test_not_while_it_runs(tmp_path: Path) -> None:
    class Nested(Regression):
        def on_train_start(self) -> None:
            trainer(tmp_path, self.trainer.strategy)

    with pytest.raises(PEFTError, match=r"another Trainer, which is running\. Make one for each"):
        trainer(tmp_path).fit(Nested(), loader())


def test_a_directory_of_the_first_run_resumes_in_the_second(tmp_path: Path) -> None:
    strategy = PEFTStrategy(LoRA(r=2))
    saver = AdapterCheckpoint(tmp_path, filename="one")
    trainer(tmp_path, strategy, callbacks=[saver]).fit(Regression(), loader())
    resumed, straight = Regression(), Regression()
    trainer(tmp_path, strategy, max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "one")
    trainer(tmp_path, PEFTStrategy(LoRA(r=2)), max_epochs=2).fit(straight, loader())
    assert_same(dict(resumed.state_dict()), dict(straight.state_dict()))


def test_a_method_that_was_defined_since_is_a_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    class Mine(LoRA):
        name = "mine"

    assert isinstance(given("peft_mine").strategy.methods[0], Mine)
    StrategyRegistry.remove("peft_mine")


def test_a_directory_without_the_strategy_that_wrote_it(tmp_path: Path) -> None:
    saver = AdapterCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, callbacks=[saver]).fit(Regression(), loader())
    with pytest.raises(PEFTError, match=r"last is a directory that AdapterCheckpoint wrote.*Trainer\(strategy=PEFT"):
        trainer(tmp_path, "auto").fit(Regression(), loader(), ckpt_path=tmp_path / "last")


def test_adapters_that_somebody_freezes(tmp_path: Path) -> None:
    class Freezes(Regression):
        def on_fit_start(self) -> None:
            self.requires_grad_(False)

    with pytest.raises(PEFTError, match=r"All adapters are frozen, '.*lora_A' among them.*requires_grad_\(False\)"):
        trainer(tmp_path).fit(Freezes(), loader())

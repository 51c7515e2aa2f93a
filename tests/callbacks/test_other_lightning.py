"""``pytorch_lightning``: what belongs to it is refused in words, and packages that import it are given ``lightning``.

A stand-in takes its place, since it need not be installed.
"""

import importlib.util
import subprocess
import sys
from abc import ABC
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from modules import Regression, loader, trainer

from lightning_peft import LoRA, PEFTError, PEFTStrategy, register_strategies, replace_pytorch_lightning
from lightning_peft.callbacks import AdapterCheckpoint

WORDS = r"is of pytorch_lightning.*import lightning\.pytorch as pl.*replace_pytorch_lightning\(\)"


def of_the_other(kind: type) -> type:
    """A class of the same name, as the other distribution has it."""
    return type(
        kind.__name__, (object,), {"__module__": kind.__module__.replace("lightning.pytorch", "pytorch_lightning")}
    )


class OtherTrainer:
    """Does with a strategy what the connector of the other distribution's Trainer does first."""

    def __init__(self, strategy: Any) -> None:
        strategies = sys.modules["pytorch_lightning.strategies"]
        if isinstance(strategy, str):
            strategy = strategies.StrategyRegistry.get(strategy)
        if not isinstance(strategy, strategies.Strategy):
            raise ValueError(f"You selected an invalid strategy name: `strategy={strategy!r}`.")
        strategy.accelerator = of_the_other(CPUAccelerator)()


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> None:
    strategies: Any = ModuleType("pytorch_lightning.strategies")
    strategies.Strategy = type("Strategy", (ABC,), {"__module__": "pytorch_lightning.strategies.strategy"})
    strategies.StrategyRegistry = _StrategyRegistry()
    monkeypatch.setitem(sys.modules, "pytorch_lightning", ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.strategies", strategies)
    register_strategies()


@pytest.mark.parametrize(
    "strategy",
    [lambda: PEFTStrategy(LoRA(r=2)), lambda: PEFTStrategy(LoRA(r=2), base="fsdp"), lambda: "peft_lora_ddp"],
)
def test_its_trainer_is_told(other: None, strategy: Any) -> None:
    with pytest.raises(PEFTError, match=f"The Trainer {WORDS}"):
        OtherTrainer(strategy())


def test_its_strategy_as_a_base_is_told() -> None:
    with pytest.raises(PEFTError, match=rf"base=DDPStrategy\(…\) {WORDS}"):
        PEFTStrategy(LoRA(r=2), base=of_the_other(DDPStrategy)())


def test_its_average_of_weights_is_told(tmp_path: Path) -> None:
    theirs = of_the_other(WeightAveraging)
    own = type("Own", (theirs, pl.Callback), {})()
    with pytest.raises(PEFTError, match=f"The callback Own {WORDS}"):
        trainer(tmp_path, callbacks=[own], enable_checkpointing=False).fit(Regression(), loader())


def test_its_trainer_is_told_by_a_callback() -> None:
    with pytest.raises(PEFTError, match=f"The Trainer {WORDS}"):
        AdapterCheckpoint().setup(of_the_other(pl.Trainer)(), Regression(), "fit")


REPLACED = """
import sys
import lightning_peft
lightning_peft.replace_pytorch_lightning()
lightning_peft.replace_pytorch_lightning()
import lightning.pytorch as pl
import pytorch_lightning
import pytorch_lightning.callbacks as callbacks
from pytorch_lightning.callbacks.early_stopping import EarlyStopping
from pytorch_lightning import Trainer
assert pytorch_lightning is pl
assert callbacks is pl.callbacks
assert EarlyStopping is pl.callbacks.EarlyStopping
assert pl.callbacks.early_stopping.__spec__.name == "lightning.pytorch.callbacks.early_stopping"
assert isinstance(Trainer(strategy="peft_lora", accelerator="cpu", logger=False).strategy, lightning_peft.PEFTStrategy)
try:
    import pytorch_lightning.nothing
except ModuleNotFoundError:
    print("right")
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_package_that_imports_it_is_given_lightning() -> None:
    assert run(REPLACED).split()[-1] == "right"


def test_too_late_is_an_error(other: None) -> None:
    with pytest.raises(PEFTError, match=r"pytorch_lightning was imported before.*at the top of the program"):
        replace_pytorch_lightning()


REAL = """
import pytorch_lightning as pl
from lightning_peft import PEFTError, PEFTStrategy
for strategy in (PEFTStrategy(), PEFTStrategy(base="deepspeed"), "peft_lora"):
    try:
        pl.Trainer(strategy=strategy, accelerator="cpu", logger=False)
    except PEFTError as error:
        print(str(error).startswith("The Trainer is of pytorch_lightning."))
"""


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("pytorch_lightning", "deepspeed")),
    reason="pytorch_lightning or DeepSpeed is not installed",
)
def test_the_distribution_itself() -> None:
    assert run(REAL).split()[-3:] == ["True"] * 3

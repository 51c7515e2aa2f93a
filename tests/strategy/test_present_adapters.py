"""Adapters that are in a module, or in a part of it, before the strategy injects its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Regression, SteppedRegression, adapter_state, assert_same, base_state, inputs, loader, trainer
from torch import Tensor, nn

from lightning_peft import LoRA, PEFTError, PEFTStrategy, eject, inject, load_adapter, merge, save_adapter
from lightning_peft.callbacks import AdapterCheckpoint


def lora(**options: Any) -> PEFTStrategy:
    return PEFTStrategy(LoRA(r=2), merge_on_train_end=False, **options)


class Stage2(SteppedRegression):
    """An encoder with a new norm and a new head; its adapters come from ``adapt``."""

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.adapt(path)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))

    def adapt(self, path: str | None) -> None:
        inject(self.net, LoRA(r=2), seed=0)

    def on_train_epoch_start(self) -> None:
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


class Pretrained(Stage2):
    """Its encoder is what ``load_from_checkpoint`` returns."""

    def adapt(self, path: str | None) -> None:
        self.net = Regression.load_from_checkpoint(path)


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    saver = AdapterCheckpoint(tmp_path / "encoder", save_last=True, save_top_k=0)
    trainer(tmp_path, lora(), callbacks=[saver]).fit(Regression(), loader())
    return saver.last_model_path


@pytest.mark.parametrize("make", [Stage2, Pretrained])
@pytest.mark.parametrize("kind", [ModelCheckpoint, AdapterCheckpoint])
@pytest.mark.parametrize("train_also", [None, "head"])
@pytest.mark.filterwarnings("ignore:Parts of this")
def test_the_rest_of_the_module_is_as_after_an_injection(
    tmp_path: Path, encoder: str, make: type[Stage2], kind: type[ModelCheckpoint], train_also: str | None
) -> None:
    def fit(module: Stage2, epochs: int, ckpt_path: Any = None) -> Stage2:
        saver = kind(tmp_path / str(epochs), save_last=True, save_top_k=0)
        strategy = lora(train_also=train_also)
        trainer(tmp_path, strategy, max_epochs=epochs, callbacks=[saver]).fit(module, loader(), ckpt_path=ckpt_path)
        return module

    before = base_state(make(encoder))
    whole = fit(make(encoder), 4)
    first = fit(make(encoder), 2)
    moved = {name for name, tensor in base_state(first).items() if not torch.equal(tensor, before[name])}
    statistics = {f"head.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    weights = {f"head.{number}.{name}" for number in (0, 1) for name in ("weight", "bias")}
    assert moved == statistics | (weights if train_also else set())
    (last,) = (tmp_path / "2").glob("last*")
    loaded = make.load_from_checkpoint(last)
    assert_same(loaded.state_dict(), first.state_dict())
    assert_same(fit(make(encoder), 4, last).state_dict(), whole.state_dict())
    merge(loaded)
    torch.testing.assert_close(loaded.eval()(inputs()), first.eval()(inputs()), rtol=1e-5, atol=1e-5)
    eject(loaded)
    assert_same(loaded.state_dict(), before)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_it_is_said_what_is_frozen(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"'head\.0\.weight' and 3 other parameters.*train_also"):
        trainer(tmp_path, lora()).fit(Stage2(), loader())
    with pytest.raises(PEFTError, match=r"train_also: 'net\.2' and 'net'.*one inside the other"):
        trainer(tmp_path, lora(train_also="net.2")).fit(Stage2(), loader())
    module = Stage2()
    trainer(tmp_path, lora(train_also="head")).fit(module, loader())
    with pytest.raises(PEFTError, match=r"train_also=\['net\.2'\] would have no effect"):
        trainer(tmp_path, lora(train_also="net.2")).fit(module, loader())


# --- the strategy's method beside the one that is there -----------------------------------------------------------


def loaded(root: Path, **options: Any) -> Regression:
    module = Regression()
    inject(module, LoRA(r=2, **options))
    save_adapter(module, root / "adapter")
    module = Regression()
    load_adapter(module, root / "adapter")
    return module


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRA(r=4), r"strategy's r=4 \(there 2\) would have no effect"),
        (LoRA(r=2, alpha=64), r"strategy's alpha=64 \(there 16(\.0)?\) would have no effect"),
        ([LoRA(r=4, target_modules="net.0")], r"r=4 \(there 2\)"),
    ],
)
def test_other_values_are_refused(tmp_path: Path, method: Any, message: str) -> None:
    with pytest.raises(PEFTError, match=message):
        trainer(tmp_path, PEFTStrategy(method)).fit(loaded(tmp_path), loader())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRA(r=2, dropout=0.1), r"dropout=0\.1 \(there 0\.0\) have no effect"),
        (LoRA(r=2, loraplus_lr_ratio=16), r"loraplus_lr_ratio=16 \(there 1\.0\) have no effect"),
        (LoRA(r=2, target_modules="net.0"), r"target_modules='net\.0' \(there .*\) have no effect"),
    ],
)
def test_what_changes_no_result_is_a_warning(tmp_path: Path, method: LoRA, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        trainer(tmp_path, PEFTStrategy(method)).fit(loaded(tmp_path), loader())


@pytest.mark.parametrize(
    "method", ["lora", LoRA(r=2), LoRA(r=2, target_modules=["net.0", "net.2"]), LoRA(r=2, init="pissa")], ids=str
)
def test_the_same_values_or_none_are_no_word(tmp_path: Path, method: Any, recwarn: pytest.WarningsRecorder) -> None:
    module = loaded(tmp_path)
    before = adapter_state(module)
    trainer(tmp_path, PEFTStrategy(method)).fit(module, loader())
    assert not [w for w in recwarn if "adapters" in str(w.message)]
    assert adapter_state(module).keys() == before.keys()


def test_a_checkpoint_of_adapters_in_parts_names_them(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, lora(), callbacks=[saver]).fit(Stage2(), loader())
    inject(module := Regression(), LoRA(r=2))
    with pytest.raises(PEFTError, match=r"injected into 'net'; here they were injected into the module itself"):
        trainer(tmp_path, lora()).fit(module, loader(), ckpt_path=tmp_path / "last.ckpt")

"""`load_from_checkpoint` on checkpoints with adapters, and the private seams of Lightning that it rests on."""

import inspect
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core import module, saving
from modules import SteppedRegression, loader, trainer
from torch import nn

from lightning_peft import FullFinetuning, LoRA, PEFTError, PEFTStrategy, adapter_state_dict, load_adapter, restore
from lightning_peft.callbacks import AdapterCheckpoint


class Net(L.LightningModule):
    def __init__(self, width: int = 8, base_seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(base_seed)
            self.net = torch.nn.Sequential(torch.nn.Linear(width, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def trained(folder: Path, callback: ModelCheckpoint) -> Net:
    L.seed_everything(0)
    model = Net()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        strategy=PEFTStrategy(LoRA(r=2), merge_on_train_end=False),
        callbacks=[callback],
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(16, 8), batch_size=4))
    return model


@pytest.mark.parametrize("kind", [ModelCheckpoint, AdapterCheckpoint])
@pytest.mark.parametrize("strict", [None, True, False])
def test_load_from_checkpoint_gives_the_trained_module(tmp_path: Path, kind: type, strict: bool | None) -> None:
    callback = kind(dirpath=tmp_path, filename="run")
    model = trained(tmp_path, callback)
    loaded = Net.load_from_checkpoint(callback.best_model_path, strict=strict)
    assert type(loaded) is Net
    assert torch.equal(loaded.net(X), model.net(X))
    assert not torch.equal(loaded.net(X), Net().net(X))
    assert loaded.hparams.width == 8
    for name, tensor in adapter_state_dict(model).items():
        assert torch.equal(adapter_state_dict(loaded)[name], tensor)


def test_another_base_is_refused(tmp_path: Path) -> None:
    callback = ModelCheckpoint(dirpath=tmp_path, filename="run")
    trained(tmp_path, callback)
    with pytest.raises(PEFTError, match="another base model"):
        Net.load_from_checkpoint(callback.best_model_path, base_seed=1)


def test_stock_checkpoints_load_as_before(tmp_path: Path) -> None:
    model = Net(base_seed=5)
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(16, 8), batch_size=4))
    trainer.save_checkpoint(tmp_path / "stock.ckpt")
    assert torch.equal(Net.load_from_checkpoint(tmp_path / "stock.ckpt").net(X), model.net(X))


def test_a_checkpoint_directory_loads_as_an_adapter(tmp_path: Path) -> None:
    callback = AdapterCheckpoint(dirpath=tmp_path, filename="run")
    model = trained(tmp_path, callback)
    fresh = Net()
    load_adapter(fresh, callback.best_model_path)
    assert torch.equal(fresh.net(X), model.net(X))


@pytest.mark.parametrize("wish", [None, True, False])
@pytest.mark.parametrize("strict", [None, True, False])
def test_strict_loading_is_respected_as_without_adapters(
    tmp_path: Path, wish: bool | None, strict: bool | None
) -> None:
    class Wishing(Net):
        def __init__(self, width: int = 8) -> None:
            super().__init__(width)
            self.save_hyperparameters()
            if wish is not None:
                self.strict_loading = wish

    def loaded(file: str) -> type[Exception] | None:
        try:
            Wishing.load_from_checkpoint(file, strict=strict)
        except ValueError as error:
            return type(error) if "is in conflict with" in str(error) else None
        return None

    files = []
    for name, strategy in (("stock", "auto"), ("adapters", PEFTStrategy(LoRA(r=2)))):
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, strategy=strategy
        )
        trainer.fit(Wishing(), torch.utils.data.DataLoader(torch.randn(4, 8), batch_size=4))
        files.append(str(tmp_path / f"{name}.ckpt"))
        trainer.save_checkpoint(files[-1])
    assert loaded(files[0]) is loaded(files[1])


@pytest.mark.parametrize("kind", [ModelCheckpoint, AdapterCheckpoint])
def test_hooks_may_change_the_state_on_both_ways(tmp_path: Path, kind: type) -> None:
    seen = []

    class Hooked(Net):
        """Doubles a tensor, and puts frozen weights in, as a module does that is loaded strictly."""

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = checkpoint["state_dict"]
            seen.append(set(state))
            state["net.0.peft.default.lora_A"] = 2 * state["net.0.peft.default.lora_A"]
            for name, tensor in self.state_dict().items():
                state.setdefault(name, tensor)

    def run(epochs: int, **options: Any) -> Net:
        L.seed_everything(0)
        model = Hooked()
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_progress_bar=False,
            strategy=PEFTStrategy(LoRA(r=2), merge_on_train_end=False),
            callbacks=[kind(dirpath=tmp_path / str(epochs), save_last=True)],
        )
        trainer.fit(model, torch.utils.data.DataLoader(torch.randn(16, 8), batch_size=4), **options)
        return model

    model = run(1)
    (last,) = (tmp_path / "1").glob("last*")
    resumed = run(1, ckpt_path=last)
    names = adapter_state_dict(model).keys()
    for loaded in (Hooked.load_from_checkpoint(last), resumed):
        for name, tensor in adapter_state_dict(loaded).items():
            factor = 2 if name == "net.0.peft.default.lora_A" else 1
            assert torch.equal(tensor, adapter_state_dict(model)[name] * factor)
    assert seen == [names, names]


class Adding(SteppedRegression):
    """Puts an average of its own into the state, which it takes out again; and what it has there anyway."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] |= {"average": torch.arange(3.0), "own.bias": self.net[0].bias, **self.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.average = checkpoint["state_dict"].pop("average")


@pytest.mark.parametrize("kind", [ModelCheckpoint, AdapterCheckpoint])
def test_what_a_hook_puts_into_the_state_is_there_for_the_other_hook(tmp_path: Path, kind: type) -> None:
    saver = kind(tmp_path, save_last=True, save_top_k=0)
    trainer(tmp_path, PEFTStrategy(LoRA(r=2)), callbacks=[saver]).fit(module := Adding(), loader())
    read = restore._load_file_or_directory(saver.last_model_path, weights_only=True)["state_dict"]
    assert read.keys() == {*adapter_state_dict(module), "average"}
    resumed = Adding()
    trainer(tmp_path, PEFTStrategy(LoRA(r=2)), max_epochs=2).fit(resumed, loader(), ckpt_path=saver.last_model_path)
    loaded = Adding.load_from_checkpoint(saver.last_model_path)
    torch.testing.assert_close(loaded(X), module(X))
    assert loaded.average.tolist() == resumed.average.tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(PEFTError, match=r"Superfluous: average\. The model had 'average' when it was written"):
        SteppedRegression.load_from_checkpoint(saver.last_model_path)
    lenient = SteppedRegression.load_from_checkpoint(saver.last_model_path, strict=False)
    torch.testing.assert_close(lenient(X), module(X))


class Filtering(SteppedRegression):
    """Keeps what it has a place for, as a module does that is to load files with more in them."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = self.state_dict()
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in own}


class Deleting(SteppedRegression):
    """Does so in place."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in checkpoint["state_dict"].keys() - self.state_dict().keys():
            del checkpoint["state_dict"][name]


class Renaming(SteppedRegression):
    """Is called otherwise inside than when its checkpoints were written."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"body": self.net})
        del self.net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts["body"](x)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        for name in [name for name in state if name.startswith("net.")]:
            state[f"parts.body.{name.removeprefix('net.')}"] = state.pop(name)


class Prefixing(SteppedRegression):
    """Has names of its own for its state."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"own.{name}": tensor for name, tensor in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict({n.removeprefix("own."): t for n, t in state_dict.items()}, strict)


class Inner(SteppedRegression):
    """Has the state of its network for its own, which no hook of a LightningModule is asked for."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.net.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return self.net.load_state_dict(state_dict, strict)


@pytest.mark.parametrize("strategy", ["stock", "adapter", "full", "everything"])
@pytest.mark.parametrize("make", [Filtering, Deleting, Renaming, Prefixing, Inner])
def test_a_module_that_knows_nothing_of_adapters_may_change_a_state(tmp_path: Path, make: Any, strategy: str) -> None:
    """The uninterrupted run is the judge: with a hook that takes adapters out, a resumed one had other outputs."""
    kinds = {"adapter": LoRA(r=2), "full": LoRA(r=2), "everything": FullFinetuning()}
    options = {"merge_on_train_end": False, "checkpoint": "full" if strategy == "full" else "adapter"}

    def run(module: Any, epochs: int, **given: Any) -> Any:
        peft = "auto" if strategy == "stock" else PEFTStrategy(kinds[strategy], **options)
        saver = ModelCheckpoint(tmp_path / str(epochs), save_last=True, save_top_k=0)
        trainer(tmp_path, peft, max_epochs=epochs, callbacks=[saver]).fit(module, loader(), **given)
        return module

    written = SteppedRegression if issubclass(make, Renaming) else make
    first, whole = run(written(), 1), run(written(), 2)
    last = tmp_path / "1" / "last.ckpt"
    assert not torch.equal(first(X), whole(X))
    resumed = run(make(), 2, ckpt_path=last)
    assert torch.equal(resumed(X), whole(X))
    assert torch.equal(make.load_from_checkpoint(last)(X), first(X))


def test_names_follow_the_state_wherever_a_checkpoint_has_them(tmp_path: Path) -> None:
    written, method = SteppedRegression(), LoRA(r=2, target_modules=["net.0"], rank_pattern={"net.0": 1})
    saver = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    trainer(tmp_path, PEFTStrategy(method, train_also="net.2"), callbacks=[saver]).fit(written, loader())
    loaded = Renaming.load_from_checkpoint(saver.last_model_path)
    names = ["parts.body.0.peft.default.lora_A", "parts.body.0.peft.default.lora_B"]
    assert [*adapter_state_dict(loaded)] == [*names, "parts.body.2.weight", "parts.body.2.bias"]
    assert loaded.parts["body"][0].peft["default"].lora_A.shape == (1, 8)
    torch.testing.assert_close(loaded(X), written(X))
    method = LoRA(r=2, target_modules=["parts.body.0"], rank_pattern={"parts.body.0": 1})
    strategy = PEFTStrategy(method, train_also="parts.body.2")
    trainer(tmp_path, strategy, max_epochs=2).fit(Renaming(), loader(), ckpt_path=saver.last_model_path)
    other = Renaming()
    other.parts["body"] = SteppedRegression(seed=2).net
    with pytest.raises(PEFTError, match="another base model"):
        trainer(tmp_path, strategy).fit(other, loader(), ckpt_path=saver.last_model_path)


def test_the_private_seams_are_where_they_were() -> None:
    assert saving.pl_load is restore._load_file_or_directory
    assert saving._load_state is restore._load_state_with_adapters
    assert saving.is_overridden is restore._is_overridden_once_made
    assert L.LightningModule.load_state_dict is restore._load_state_dict
    assert list(inspect.signature(restore._load_state).parameters)[:3] == ["cls", "checkpoint", "strict"]
    assert module._load_from_checkpoint is saving._load_from_checkpoint
    assert list(inspect.signature(ModelCheckpoint._save_checkpoint).parameters) == ["self", "trainer", "filepath"]


class Around(L.LightningModule):
    """Saves the network that it is given among its hyper-parameters, as many modules of others do."""

    def __init__(self, net: torch.nn.Module, others: list[torch.nn.Module]) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net, self.head = net, others[0]

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.head(self.net(batch)).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


OPTIONS = {
    "adapters": {},
    "a trained head": {"train_also": "head"},
    "everything": {"checkpoint": "full"},
    "plain": {"merge_on_train_end": "unload", "checkpoint": "full"},
    "BitFit": {"method": "bitfit"},
}


@pytest.mark.filterwarnings("ignore:Attribute '(net|others)' is an instance", "ignore:The checkpoint holds more than")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("merged", [False, True])
def test_a_module_among_the_hyper_parameters(tmp_path: Path, options: dict[str, Any], merged: bool) -> None:
    """It comes out of the file with the adapters that it had, which are not put beside those of the new module."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trained = Around(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()), [torch.nn.Linear(8, 2)])
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        strategy=PEFTStrategy(**{"method": LoRA(r=2), **options}),
        callbacks=[ModelCheckpoint(tmp_path, filename="run")],
    )
    trainer.fit(trained, torch.utils.data.DataLoader(torch.randn(16, 8), batch_size=4))
    if merged:
        trainer.save_checkpoint(tmp_path / "run.ckpt")
    if merged and "merge_on_train_end" in options:
        return  # it is a plain module's, and no business of ours
    loaded = Around.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=False)
    torch.testing.assert_close(loaded.head(loaded.net(X)), trained.head(trained.net(X)))
    own = Around.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=False)
    own.load_state_dict(loaded.state_dict())
    torch.testing.assert_close(own.head(own.net(X)), trained.head(trained.net(X)))

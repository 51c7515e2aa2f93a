"""Lightning's averages of weights, of adapters: against arithmetic in float64, and against Lightning without us."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.callbacks import WeightAveraging as MeanOfWeights
from lightning.pytorch.strategies import ModelParallelStrategy
from modules import (
    LateRegression,
    Regression,
    SteppedRegression,
    adapter_state,
    assert_same,
    base_state,
    by_hand,
    inputs,
    loader,
    trainer,
)
from torch import Tensor, nn

from lightning_peft import FullFinetuning, LoRA, PEFTError, PEFTStrategy, load_adapter, unmerge
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.callbacks.averaging import average_what_is_trained

DECAY = 0.7


def ema(**options: Any) -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=DECAY, **options)


def swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(0.03, swa_epoch_start=2, annealing_epochs=1)


AVERAGES: dict[str, Callable[[], Callback]] = {"ema": ema, "mean": MeanOfWeights, "swa": swa}
averages = pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)


class Steps(Callback):
    """Writes down the adapters after each step, and at the start of each epoch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.epochs: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.steps.append({name: t.double() for name, t in adapter_state(pl_module).items()})

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append({name: t.double() for name, t in adapter_state(pl_module).items()})


def expected(make: Callable[[], Callback], path: Steps) -> dict[str, Tensor]:
    """The average by the papers' formulas, in float64."""
    if make is ema:
        average = path.steps[0]
        for state in path.steps[1:]:
            average = {name: DECAY * average[name] + (1 - DECAY) * state[name] for name in state}
        return average
    states = path.steps if make is MeanOfWeights else path.epochs[1:]
    return {name: torch.stack([state[name] for state in states]).mean(dim=0) for name in states[0]}


def fitted(root: Path, callbacks: list[Callback], module: Any = None, **options: Any) -> Any:
    strategy = options.pop("strategy", None) or PEFTStrategy(LoRA(r=2))
    options.setdefault("enable_checkpointing", False)
    run = trainer(root, strategy, callbacks=callbacks, **{"max_epochs": 3, **options})
    module = module or Regression()
    run.fit(module, loader(), loader())
    return module, run


@averages
@pytest.mark.parametrize("module", [Regression, LateRegression])
def test_adapters_are_averaged_as_by_hand_and_merged(
    tmp_path: Path, make: Callable[[], Callback], module: type[Regression]
) -> None:
    path, average = Steps(), make()
    found, _ = fitted(tmp_path, [path, average], module())
    state = adapter_state(found)
    for name, value in expected(make, path).items():
        torch.testing.assert_close(state[name].double(), value, rtol=1e-5, atol=1e-6)
        assert (path.steps[-1][name] - value).abs().max() > 1e-3
    assert (found(inputs()) - by_hand(state, inputs())).abs().max() < 1e-5
    # Nothing frozen was copied, or changed by an average of equal values.
    inner = average._average_model  # type: ignore[attr-defined]
    assert sum(p.numel() for p in inner.parameters()) == sum(t.numel() for t in state.values())
    unmerge(found)
    assert_same(base_state(found), base_state(Regression()))


class Normed(Regression):
    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


@averages
@pytest.mark.parametrize("module", [Regression, Normed])
def test_all_weights_are_averaged_as_without_the_strategy(
    tmp_path: Path, make: Callable[[], Callback], module: type[Regression]
) -> None:
    plain, _ = fitted(tmp_path, [make()], module(), strategy="auto")
    ours, _ = fitted(tmp_path, [make()], module(), strategy=PEFTStrategy(FullFinetuning()))
    assert_same(base_state(ours), base_state(plain))


def test_frozen_batch_norms_are_left_alone(tmp_path: Path) -> None:
    module, run = fitted(tmp_path, [swa()], Normed())
    norm = module.net[1]
    assert torch.equal(norm.running_mean, torch.zeros(16))
    assert norm.num_batches_tracked == 0
    assert run.current_epoch == 3


def test_a_norm_that_is_trained_whole_has_its_statistics_averaged(tmp_path: Path) -> None:
    statistics = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            statistics.append(pl_module.net[1].running_mean.double())

    strategy = PEFTStrategy(LoRA(r=2, target_modules=["net.0"]), train_also="net.1", merge_on_train_end=False)
    module, _ = fitted(tmp_path, [Watch(), MeanOfWeights()], Normed(), strategy=strategy)
    torch.testing.assert_close(
        module.net[1].running_mean.double(), torch.stack(statistics).mean(dim=0), rtol=1e-5, atol=1e-6
    )


class Validated(Regression):
    """Writes down what it is validated with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, dict[str, Tensor]] = {}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.seen[self.current_epoch] = adapter_state(self)


def test_the_average_is_validated_saved_and_the_best_of_it_is_kept(tmp_path: Path) -> None:
    path, module = Steps(), Validated()
    files = ModelCheckpoint(tmp_path / "files", monitor="val_loss", save_top_k=-1, filename="{epoch}")
    directories = AdapterCheckpoint(tmp_path / "directories", monitor="val_loss", save_top_k=1)
    _, run = fitted(tmp_path, [path, ema(), files, directories], module, enable_checkpointing=True)
    for epoch, seen in module.seen.items():
        average = expected(ema, recorded(path.steps[: 4 * (epoch + 1)]))
        saved = torch.load(tmp_path / "files" / f"epoch={epoch}.ckpt", weights_only=True)
        for name, value in average.items():
            torch.testing.assert_close(seen[name].double(), value, rtol=1e-5, atol=1e-6)
        assert_same(saved["state_dict"], seen)
        current = {name: t.double() for name, t in saved["current_model_state"].items()}
        assert_same(current, path.steps[4 * (epoch + 1) - 1])
    best = torch.load(files.best_model_path, weights_only=True)["state_dict"]
    fresh = Regression()
    load_adapter(fresh, directories.best_model_path)
    assert_same(adapter_state(fresh), best)
    (scores,) = run.validate(module, loader(), ckpt_path="best", verbose=False)
    assert scores["val_loss"] == pytest.approx(files.best_model_score.item(), rel=1e-5)


def recorded(steps: list[dict[str, Tensor]]) -> Steps:
    path = Steps()
    path.steps = steps
    return path


class Crash(Callback):
    """Ends a run as a failure does: without the end of training, which gives the module its average."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 2:
            raise RuntimeError("crash")


class Counted(SteppedRegression):
    """Has a buffer of its own, which changes with every step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def loss(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return super().loss(x)


@averages
@pytest.mark.parametrize(
    ("kind", "checkpoint"), [(ModelCheckpoint, "adapter"), (AdapterCheckpoint, "adapter"), (ModelCheckpoint, "full")]
)
def test_resuming_goes_on_exactly(
    tmp_path: Path, make: Callable[[], Callback], kind: Any, checkpoint: Literal["adapter", "full"]
) -> None:
    def fit(folder: str, *more: Callback, **resume: Any) -> Any:
        saver = kind(dirpath=tmp_path / folder, save_last=True, every_n_epochs=1)
        module = Counted()
        strategy = PEFTStrategy(LoRA(r=2), checkpoint=checkpoint)
        run = trainer(tmp_path, strategy, callbacks=[make(), saver, *more], max_epochs=4)
        run.fit(module, loader(), **resume)
        return module

    straight = fit("straight")
    with pytest.raises(RuntimeError, match="crash"):
        fit("halves", Crash())
    resumed = fit("resumed", ckpt_path=tmp_path / "halves" / f"last{kind.FILE_EXTENSION}")
    assert_same(adapter_state(resumed), adapter_state(straight))
    assert torch.equal(resumed(inputs()), straight(inputs()))
    assert torch.equal(resumed.seen, straight.seen)


def test_a_run_without_an_average_goes_on_with_one(tmp_path: Path) -> None:
    fitted(tmp_path, [ModelCheckpoint(tmp_path, save_last=True)], max_epochs=1, enable_checkpointing=True)
    module, run = Regression(), trainer(tmp_path, callbacks=[ema()], max_epochs=2, enable_checkpointing=False)
    with pytest.warns(UserWarning, match="not created with WeightAveraging"):
        run.fit(module, loader(), ckpt_path=tmp_path / "last.ckpt")


def test_what_no_optimizer_holds_is_not_averaged(tmp_path: Path) -> None:
    module = Regression()
    module.configure_optimizers = lambda: torch.optim.SGD([module.net[2].weight], lr=0.1)  # type: ignore[method-assign]
    fitted(tmp_path, [ema()], module, strategy=PEFTStrategy(FullFinetuning()))
    for name, value in base_state(Regression()).items():
        # An average of equal values is rounded.
        assert torch.equal(base_state(module)[name], value) == (name != "net.2.weight")


class Own(MeanOfWeights):
    """A user's, who sees the module and not what stands in for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, type]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.seen.append(("setup", type(pl_module)))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        self.seen.append(("step", type(pl_module)))

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx % 2 == 0


def test_a_callback_of_the_users_is_what_it_was(tmp_path: Path) -> None:
    own = Own()
    fitted(tmp_path, [own], max_epochs=1)
    assert own.seen == [("setup", Regression), *[("step", Regression)] * 4]
    assert own._average_model is not None
    assert own._average_model.n_averaged == 2
    assert isinstance(own, Own)
    assert own.state_key == "Own"
    for twin in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert type(twin) is Own
        # It serves a run without adapters again.
        fitted(tmp_path, [twin], strategy="auto", max_epochs=1)
    plain = Regression()
    fitted(tmp_path, [own], plain, strategy="auto", max_epochs=1)
    assert sum(p.numel() for p in own._average_model.module.parameters()) == sum(p.numel() for p in plain.parameters())


def test_after_the_run_the_module_is_left_alone(tmp_path: Path) -> None:
    average = ema()
    module, run = fitted(tmp_path, [average])
    first = adapter_state(module)
    run.save_checkpoint(tmp_path / "after.ckpt")
    assert_same(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"], first)
    unmerge(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.mul_(2 if ".peft." in name else 1)
    changed = {name: 2 * value for name, value in first.items()}
    run.save_checkpoint(tmp_path / "changed.ckpt")
    assert_same(torch.load(tmp_path / "changed.ckpt", weights_only=True)["state_dict"], changed)
    (scores,) = run.validate(module, loader(), verbose=False)
    loss = (by_hand(changed, inputs()) - inputs()[:, :4]).square().mean()
    assert scores["val_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_evaluation_alone(tmp_path: Path) -> None:
    for make in AVERAGES.values():
        run = trainer(tmp_path, callbacks=[make()], enable_checkpointing=False)
        (scores,) = run.validate(Regression(), loader(), verbose=False)
        assert scores["val_loss"] > 0


def test_a_second_run_begins_a_new_average(tmp_path: Path) -> None:
    path, average = Steps(), MeanOfWeights()
    module, run = fitted(tmp_path, [path, average], max_epochs=1)
    average._latest_update_step = 0  # Lightning counts on
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())
    for name, value in expected(MeanOfWeights, recorded(path.steps[4:])).items():
        torch.testing.assert_close(adapter_state(module)[name].double(), value, rtol=1e-5, atol=1e-6)


def test_full_checkpoints_hold_the_rest_too(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    strategy = PEFTStrategy(LoRA(r=2), checkpoint="full")
    module, _ = fitted(tmp_path, [ema(), saver], strategy=strategy, enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert_same({n: t for n, t in saved["state_dict"].items() if ".peft." in n}, adapter_state(module))
    assert_same({n: t for n, t in saved["state_dict"].items() if ".peft." not in n}, base_state(Regression()))
    assert saved["current_model_state"].keys() == adapter_state(module).keys()


def test_saving_weights_only_is_not_silent(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.warns(UserWarning, match="hold the weights of the last step and not their average"):
        fitted(tmp_path, [ema(), saver], enable_checkpointing=True)


class Grouped(Regression):
    def configure_optimizers(self) -> Any:
        groups = [
            {"params": [self.net[0].bias]},
            {"params": [self.net[0].weight]},
            {"params": self.net[2].parameters()},
        ]
        return torch.optim.SGD(groups, lr=0.1)


def test_swa_with_a_learning_rate_for_each_group(tmp_path: Path) -> None:
    _, run = fitted(tmp_path, [StochasticWeightAveraging([0.1, 0.2, 0.3], 1, annealing_epochs=1)], Grouped())
    assert [group["swa_lr"] for group in run.optimizers[0].param_groups] == [0.1, 0.2, 0.3]
    with pytest.raises(PEFTError, match=r"StochasticWeightAveraging sets learning rates too"):
        fitted(tmp_path, [swa()], strategy=PEFTStrategy(LoRA(r=2, loraplus_lr_ratio=16)))


@averages
def test_where_adapters_are_in_pieces_it_is_refused(make: Callable[[], Callback]) -> None:
    strategy = PEFTStrategy(LoRA(r=2), base=ModelParallelStrategy())
    with pytest.raises(PEFTError, match=r"PEFTModelParallelStrategy has what is trained in pieces.*'ddp'"):
        average_what_is_trained([make()], strategy)

"""A loss or a gradient that is not finite changes nothing that was good: in memory, or in a checkpoint."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_script
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from modules import Regression, adapter_state, assert_same, loader, trainer
from torch import Tensor

from lightning_peft import LoRA, PEFTError, PEFTStrategy
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.errors import NotFiniteError
from lightning_peft.operations.merge import is_merged
from lightning_peft.storage.checkpoint_directory import AdapterDirectory

NAN = float("nan")


class Diverging(Regression):
    """Has a loss, or a gradient, that is ``value`` in the batches ``when``, counted from the first of the run."""

    def __init__(self, when: Any = (), value: float = NAN, *, none: bool = False, gradient: bool = False) -> None:
        super().__init__()
        self.when, self.value, self.none, self.gradient, self.seen = when, value, none, gradient, -1

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.seen += 1
        if self.seen not in self.when:
            return self.loss(batch[0])
        if self.none:
            return None  # as Lightning has users leave a step out
        if self.gradient:
            zero = (self(batch[0]) * 0).sum()
            return self.loss(batch[0]) + (zero.sqrt() if self.value != self.value else zero * self.value)
        return self.loss(batch[0]) * self.value


class Manual(Diverging):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()  # type: ignore[union-attr]
        if loss is not None:
            self.manual_backward(loss)
            optimizer.step()  # type: ignore[union-attr]


def fit(root: Path, module: Any, on_nonfinite: Any = "stop", callbacks: Any = (), **options: Any) -> Any:
    resume = {"ckpt_path": options.pop("ckpt_path", None)}
    strategy = PEFTStrategy(LoRA(r=2), on_nonfinite=on_nonfinite, merge_on_train_end=options.pop("merge", False))
    run = trainer(root, strategy, callbacks=list(callbacks), **{"max_epochs": 2, **options})
    run.fit(module, loader(), **resume)
    return run


class States(Callback):
    """Keeps the adapters and the optimizer's state after each batch."""

    def __init__(self) -> None:
        self.kept: list[tuple[Any, Any]] = []

    def on_train_batch_end(self, run: Any, module: Any, *_: Any) -> None:
        state = run.strategy.optimizer_state(run.optimizers[0])["state"]
        moments = {f"{name} {key}": value for name, entry in state.items() for key, value in entry.items()}
        self.kept.append(tuple({n: t.clone() for n, t in kept.items()} for kept in (adapter_state(module), moments)))


@pytest.mark.parametrize("kind", [Diverging, Manual])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_run_stops_before_the_step(tmp_path: Path, kind: Any, value: float) -> None:
    module, states = kind([5], value), States()
    saver = AdapterCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, filename="{step}")
    with pytest.warns(UserWarning, match="At step 5") as said:
        run = fit(tmp_path, module, callbacks=[states, saver], merge=True)
    text = "\n".join(str(warning.message) for warning in said)
    assert "At step 5 the loss and the gradient of 'net.0.peft.default.lora_" in text or kind is Manual
    assert "At step 5 the gradient of 'net.0.peft.default.lora_" in text or kind is not Manual
    assert f"holds NaN or infinity. The run stops: that step was not taken. The last checkpoint is {tmp_path}" in text
    assert "The adapters stay unmerged: the run has diverged. At step 5" in text
    assert run.state.finished
    assert not is_merged(module)
    assert len(states.kept) == 6
    assert_same(adapter_state(module), states.kept[4][0])
    # What was saved is good, and the run goes on from it.
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r".*(NaN|diverged)")
        assert fit(tmp_path, kind(), callbacks=[saver], ckpt_path="last", max_epochs=3).state.finished


@pytest.mark.parametrize("kind", [Diverging, Manual])
@pytest.mark.parametrize("options", [{}, {"gradient": True}, {"value": float("inf")}])
def test_a_step_is_left_out_as_lightning_leaves_it_out(tmp_path: Path, kind: Any, options: Any) -> None:
    skipped, expected = kind([1, 5], **options), kind([1, 5], none=True)
    with pytest.warns(UserWarning, match=r"At step 5 .*'net\.0\.peft.*The step was left out"):
        run = fit(tmp_path, skipped, "skip")
    assert run.global_step == 8
    fit(tmp_path, expected)
    assert_same(adapter_state(skipped), adapter_state(expected))


def test_a_bad_batch_spoils_the_batches_that_it_was_accumulated_with(tmp_path: Path) -> None:
    skipped, expected = Diverging([5]), Diverging([4, 5], none=True)
    with pytest.warns(UserWarning, match="The step was left out"):
        fit(tmp_path, skipped, "skip", accumulate_grad_batches=2)
    fit(tmp_path, expected, accumulate_grad_batches=2)
    assert_same(adapter_state(skipped), adapter_state(expected))


def test_gradients_from_which_no_run_could_go_on_are_not_saved(tmp_path: Path) -> None:
    class Saving(Callback):
        def on_train_batch_end(self, run: Any, *_: Any) -> None:
            if module.seen == 4:
                run.save_checkpoint(tmp_path / "middle.ckpt")

    module = Diverging([4])
    with pytest.raises(NotFiniteError, match=r"the gradient of .*holds NaN or infinity"):
        fit(tmp_path, module, callbacks=[Saving()], accumulate_grad_batches=2)
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize("kind", [AdapterCheckpoint, ModelCheckpoint])
def test_a_run_goes_back_to_its_last_checkpoint(tmp_path: Path, kind: Any) -> None:
    module, states = Diverging([6]), States()
    saver = kind(tmp_path, every_n_train_steps=3, filename="{step}", save_top_k=-1)
    with pytest.warns(UserWarning, match=r"At step 6 .*state are those of .*step=6"):
        assert fit(tmp_path, module, "restore", [states, saver]).global_step == 8
    for before, after in zip(states.kept[5], states.kept[6], strict=True):
        assert_same(before, after)
    # Of the run that it resumed from, if it has written none itself.
    path = next(tmp_path.glob("step=6*"))
    with pytest.warns(UserWarning, match=r"At step 7 .*state are those of .*step=6"):
        fit(tmp_path, Diverging([1]), "restore", ckpt_path=path, enable_checkpointing=False)


def test_a_schedule_goes_on_from_the_step_at_which_a_run_goes_back(tmp_path: Path) -> None:
    rates: list[list[float]] = []

    class Decaying(Diverging):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # which goes by the rate that it finds
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            rates[-1].append(self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
            return super().training_step(batch, batch_idx)

    for when in ([], [4]):
        rates.append([])
        saver = AdapterCheckpoint(tmp_path / str(len(rates)), every_n_train_steps=3, filename="{step}", save_top_k=-1)
        fit(tmp_path, Decaying(when), "restore", [saver])
    assert rates[0] == rates[1]
    assert len(rates[0]) == 8


@pytest.mark.parametrize(("gone", "back"), [(1, "step=4"), (9, None)])
def test_a_run_goes_back_to_a_checkpoint_that_is_whole(tmp_path: Path, gone: int, back: str | None) -> None:
    class Vandal(Callback):
        def on_train_batch_start(self, run: Any, *_: Any) -> None:
            for path in sorted(tmp_path.glob("step=*"))[-gone:] if run.global_step == 6 else ():
                path.write_bytes(path.read_bytes()[:-9])

    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, filename="{step}", save_top_k=-1)
    match = rf"At step 6 .*state are those of .*{back}" if back else r"At step 6 .*The run stops"
    with pytest.warns(UserWarning, match=match) as said:
        fit(tmp_path, Diverging([6]), "restore", [saver, Vandal()])
    assert any("step=6.ckpt is gone or damaged" in str(warning.message) for warning in said)


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"At step 2 .*The run stops.*no checkpoint yet"):
        assert fit(tmp_path, Diverging([2]), "restore", enable_checkpointing=False).state.finished


def test_ten_bad_steps_in_a_row_end_a_run(tmp_path: Path) -> None:
    module = Diverging(range(3, 50))
    with pytest.warns(UserWarning, match=r"The run stops.*not taken, nor the 9 before it"):
        run = fit(tmp_path, module, "skip", max_epochs=10)
    assert run.global_step == 13


def test_an_optimizer_that_evaluates_several_times_is_not_left_in_the_middle(tmp_path: Path) -> None:
    class Searching(Diverging):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), max_iter=3)

    with pytest.warns(UserWarning, match=r"At step 0 .*The run stops"):
        fit(tmp_path, Searching([1]), "skip")
    with pytest.warns(UserWarning, match=r"At step 0 .*left out"):
        fit(tmp_path, Searching([0]), "skip")


def half() -> MixedPrecision:
    """Half precision with a scaler, which the name ``16-mixed`` does not ask for on CPUs."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


def test_a_scaler_leaves_out_what_it_has_made_overflow(tmp_path: Path) -> None:
    class Large(Diverging):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * 1e5 if self.seen == 0 else loss

    module = Large()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*NaN or infinity")
        run = fit(tmp_path, module, plugins=half())
    assert run.global_step == 8
    assert run.precision_plugin.scaler.get_scale() < 65536  # it did
    with pytest.warns(UserWarning, match=r"At step 3 the loss holds NaN or infinity\. The run stops"):
        fit(tmp_path, Diverging([3]), plugins=half())


def test_gradients_that_overflow_without_a_scale_are_no_scalers_doing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"the gradient of .* holds NaN or infinity"):
        run = fit(tmp_path, Diverging(range(100), gradient=True), "skip", plugins=half(), max_epochs=20)
    assert run.precision_plugin.scaler.get_scale() <= 1


class Spoiling(Callback):
    """Writes NaN where an optimizer's step would, after ``step``."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what

    def on_train_batch_end(self, run: Any, module: Any, *_: Any) -> None:
        if run.global_step == self.step:
            optimizer = run.optimizers[0]
            parameter = optimizer.param_groups[0]["params"][-1]
            spoilt = parameter.data if self.what == "adapter" else optimizer.state[parameter]["exp_avg"]
            spoilt.view(-1)[-1] = NAN


@pytest.mark.parametrize("what", ["adapter", "state"])
@pytest.mark.parametrize("kind", [AdapterCheckpoint, ModelCheckpoint])
@pytest.mark.parametrize("options", [{}, {"monitor": "step", "mode": "max"}, {"save_last": "link"}])
def test_what_is_bad_does_not_take_the_place_of_what_is_good(
    tmp_path: Path, kind: Any, options: Any, what: str
) -> None:
    saver = kind(tmp_path, **{"save_last": True, **options}, every_n_train_steps=2, filename="{step}")
    with pytest.warns(UserWarning, match=r"holds NaN or infinity: the run has diverged\. .* was not written"):
        run = fit(tmp_path, Diverging(), callbacks=[Spoiling(6, what), saver], max_steps=6)
    assert run.state.finished
    assert sorted(Path(path).stem for path in tmp_path.iterdir()) == ["last", "step=4"]
    for path in tmp_path.iterdir():
        assert run.strategy.load_checkpoint(path)["global_step"] == 4
    assert Path(saver.best_model_path).stem == "step=4"
    assert Path(saver.last_model_path).stem == "last"
    name = {"adapter": r"net\.2\.peft\.default\.lora_B", "state": r"exp_avg of net\.2"}[what]
    for storage in (None, AdapterDirectory()):
        with pytest.raises(NotFiniteError, match=f"{name}.*holds NaN"):
            run.save_checkpoint(tmp_path / "mine", storage_options=storage)
    assert not (tmp_path / "mine").exists()


def test_an_exception_in_a_run_that_has_diverged_is_that_exception(tmp_path: Path) -> None:
    class Ending(Callback):
        def on_train_batch_end(self, run: Any, *_: Any) -> None:
            if run.global_step == 6:
                raise RuntimeError("mine")

    saver = AdapterCheckpoint(tmp_path, save_on_exception=True, save_last=True, every_n_train_steps=2)
    with pytest.raises(RuntimeError, match="mine"), pytest.warns(UserWarning, match="was not written"):
        fit(tmp_path, Diverging(), callbacks=[Spoiling(6, "adapter"), Ending(), saver])


def test_the_short_fits_of_the_tuner_may_diverge(tmp_path: Path) -> None:
    from lightning.pytorch.tuner import Tuner

    class Tuned(Diverging):
        lr = 0.1

    run = trainer(tmp_path, PEFTStrategy(LoRA(r=2)), max_epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*The run stops")
        Tuner(run).lr_find(Tuned(range(4, 20)), loader(), num_training=10, early_stop_threshold=None)


def test_options_that_there_are_not() -> None:
    with pytest.raises(PEFTError, match=r"on_nonfinite='ignore' was given; it is 'stop', 'skip' or 'restore'"):
        PEFTStrategy(on_nonfinite="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("base", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow), "model_parallel"])
def test_all_processes_do_the_same(tmp_path: Path, base: str) -> None:
    said = run_script(str(Path(__file__).parents[1] / "scripts" / "nonfinite_script.py"), base, tmp_path)
    for what in ("stop", "skip", "restore"):
        first, second = (torch.load(tmp_path / f"{what}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert first["steps"] == second["steps"]
        assert (first["steps"] == 4) == (what == "stop")
        assert_same(first["adapters"], second["adapters"])
        assert all(tensor.isfinite().all() for tensor in first["adapters"].values())
    assert "At step 3 the " in said
    assert said.count("holds NaN or infinity") == 3

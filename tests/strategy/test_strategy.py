import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.tuner import Tuner
from modules import (
    LateRegression,
    Llama,
    Regression,
    adapter_state,
    assert_same,
    base_state,
    by_hand,
    inputs,
    loader,
    trainer,
)
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint

from lightning_peft import LoRA, PEFTError, PEFTStrategy, inject, merge, unmerge
from lightning_peft.operations.merge import is_merged
from lightning_peft.strategy import leaving
from lightning_peft.strategy.bases import behaviour
from lightning_peft.strategy.bases.plain import PlainState
from lightning_peft.strategy.bases.spawn import PEFTMultiProcessingLauncher
from lightning_peft.strategy.lifecycle import Lifecycle


def lora(**options: Any) -> PEFTStrategy:
    return PEFTStrategy(LoRA(r=2), **options)


# --- which strategy it is -----------------------------------------------------------------------------------------


def test_auto_is_a_single_device_strategy_on_one_device(tmp_path: Path) -> None:
    strategy = trainer(tmp_path, lora()).strategy
    assert isinstance(strategy, PEFTStrategy)
    assert isinstance(strategy, SingleDeviceStrategy)
    assert not isinstance(strategy, DDPStrategy)
    assert strategy.root_device == torch.device("cpu")


def test_auto_is_ddp_on_two_devices(tmp_path: Path) -> None:
    run = trainer(tmp_path, lora(), devices=2)
    assert isinstance(run.strategy, PEFTStrategy)
    assert isinstance(run.strategy, DDPStrategy)
    assert run.strategy.num_processes == 2
    # What Lightning itself makes of "auto" here.
    stock = trainer(tmp_path, "auto", devices=2).strategy
    assert type(stock) in type(run.strategy).__mro__
    assert type(stock.launcher) is type(run.strategy.launcher)


def test_an_instance_as_base_keeps_its_own_arguments(tmp_path: Path) -> None:
    base = DDPStrategy(find_unused_parameters=True, process_group_backend="gloo")
    strategy = trainer(tmp_path, lora(base=base)).strategy
    assert isinstance(strategy, DDPStrategy)
    assert strategy._ddp_kwargs == {"find_unused_parameters": True}
    assert strategy._process_group_backend == "gloo"
    single = trainer(tmp_path, lora(base=SingleDeviceStrategy(device=torch.device("cpu")))).strategy
    assert isinstance(single, SingleDeviceStrategy)


def test_single_device_takes_the_trainers_device_and_refuses_several(tmp_path: Path) -> None:
    strategy = trainer(tmp_path, lora(base="single_device")).strategy
    assert isinstance(strategy, SingleDeviceStrategy)
    assert strategy.root_device == torch.device("cpu")
    with pytest.raises(PEFTError, match=r"2 devices on 1 nodes.*base='ddp'"):
        trainer(tmp_path, lora(base="single_device"), devices=2)


class OwnStrategy(SingleDeviceStrategy):
    """A user's own, which adds to Lightning's."""

    steps = 0

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        self.steps += 1
        return super().optimizer_step(*args, **kwargs)


class WithoutConversion(SingleDeviceStrategy):
    def setup(self, trainer: pl.Trainer) -> None:
        self.accelerator.setup(trainer)
        self.setup_optimizers(trainer)


class OwnOptimizers(SingleDeviceStrategy):
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        raise AssertionError("not called")

    def setup(self, trainer: pl.Trainer) -> None:
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.optimizers = [self.lightning_module.configure_optimizers()]


def test_a_strategy_of_the_users_as_base(tmp_path: Path) -> None:
    run = trainer(tmp_path, lora(base=OwnStrategy()))
    run.fit(Regression(), loader())
    assert isinstance(run.strategy, OwnStrategy)
    assert run.strategy.steps == 4


@pytest.mark.parametrize(("base", "call"), [(WithoutConversion, "convert_module"), (OwnOptimizers, "setup_optimizers")])
def test_a_strategy_that_leaves_out_a_call_is_told_which(tmp_path: Path, base: type, call: str) -> None:
    with pytest.raises(PEFTError, match=rf"{base.__name__} does not call self\..*{call}"):
        trainer(tmp_path, lora(base=base())).fit(Regression(), loader())


def test_a_name_as_base() -> None:
    assert isinstance(lora(base="ddp"), DDPStrategy)
    assert isinstance(lora(base="fsdp"), FSDPStrategy)


@pytest.mark.parametrize(
    ("name", "base"),
    [("peft", SingleDeviceStrategy), ("peft_lora", SingleDeviceStrategy), ("peft_lora_ddp", DDPStrategy)],
)
def test_registered_names(tmp_path: Path, name: str, base: type) -> None:
    strategy = trainer(tmp_path, name).strategy
    assert isinstance(strategy, PEFTStrategy)
    assert isinstance(strategy, base)
    assert strategy.methods == (LoRA(),)


def test_every_base_has_a_registered_name() -> None:
    names = StrategyRegistry.available_strategies()
    for base in [name for name in names if not name.startswith("peft")]:
        assert f"peft_lora_{base}" in names


def test_errors_list_what_there_is() -> None:
    with pytest.raises(PEFTError, match=r"'lorra'.*lora"):
        PEFTStrategy("lorra")
    with pytest.raises(PEFTError, match=r"'dpd'.*auto.*ddp.*fsdp"):
        PEFTStrategy(base="dpd")
    with pytest.raises(PEFTError, match="other than PEFTStrategy"):
        PEFTStrategy(base=PEFTStrategy())
    with pytest.raises(PEFTError, match="other than PEFTStrategy"):
        PEFTStrategy(base=PEFTStrategy(base="ddp"))
    with pytest.raises(PEFTError, match=r"'peft_lora'.*auto"):
        PEFTStrategy(base="peft_lora")
    with pytest.raises(PEFTError, match="empty list of methods"):
        PEFTStrategy([])
    with pytest.raises(PEFTError, match="8 was given as a method"):
        PEFTStrategy([LoRA(), 8])  # type: ignore[list-item]
    with pytest.raises(PEFTError, match="'adapter' or 'full'"):
        PEFTStrategy(checkpoint="half")  # type: ignore[arg-type]


@pytest.mark.parametrize("base", ["auto", "ddp"])
def test_pickle(base: str) -> None:
    strategy = pickle.loads(pickle.dumps(PEFTStrategy(LoRA(r=3), base=base, train_mode=False)))
    assert isinstance(strategy, PEFTStrategy)
    assert isinstance(strategy, DDPStrategy) == (base == "ddp")
    assert strategy.methods == (LoRA(r=3),)
    assert strategy._train_mode is False


class OwnPEFTStrategy(PEFTStrategy):
    """A user's own, which adds something."""

    def added(self) -> str:
        return "mine"


@pytest.mark.parametrize("base", ["auto", "ddp"])
def test_a_class_of_the_users_own_stays_what_it_is(tmp_path: Path, base: str) -> None:
    run = trainer(tmp_path, pickle.loads(pickle.dumps(OwnPEFTStrategy(LoRA(r=2), base=base))))
    run.fit(Regression(), loader())
    assert isinstance(run.strategy, OwnPEFTStrategy)
    assert run.strategy.added() == "mine"
    assert isinstance(run.strategy, SingleDeviceStrategy if base == "auto" else DDPStrategy)


@pytest.mark.parametrize("base", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_the_order_of_classes(base: type[Strategy]) -> None:
    """What differs by base comes first, the user's own base last; Lightning's ways with sharded state are out of it."""

    class OwnBase(base):  # type: ignore[misc, valid-type]
        pass

    strategy = object.__new__(PEFTStrategy)
    strategy._become(object.__new__(OwnBase))
    expected = [*behaviour(base), PEFTStrategy, Lifecycle, PlainState, OwnBase, base, Strategy]
    assert [kind for kind in type(strategy).__mro__ if kind in expected] == expected
    assert strategy.restore_checkpoint_after_setup is False


# --- training -----------------------------------------------------------------------------------------------------


class PlainLoRA(Regression):
    """The same training written out in plain torch, to be run by Lightning without this package."""

    def __init__(self, start: dict[str, Tensor]) -> None:
        super().__init__()
        self.net.requires_grad_(False)
        self.adapters = nn.ParameterDict({k.replace(".", "_"): nn.Parameter(v.clone()) for k, v in start.items()})

    def forward(self, x: Tensor) -> Tensor:
        for number in (0, 2):
            a, b = (self.adapters[f"net_{number}_peft_default_lora_{which}"] for which in "AB")
            x = self.net[number](x) + 8.0 * (x @ a.T) @ b.T
            x = x.relu() if number == 0 else x
        return x


class KeepStart(Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.state = adapter_state(pl_module)


@pytest.mark.parametrize("make", [Regression, LateRegression])
def test_training_is_that_of_lora_written_by_hand(tmp_path: Path, make: type[Regression]) -> None:
    keep, ours = KeepStart(), make()
    run = trainer(tmp_path, lora(merge_on_train_end=False), max_epochs=3, callbacks=[keep], enable_checkpointing=False)
    run.fit(ours, loader())
    assert {name: p.requires_grad for name, p in ours.named_parameters()} == {
        name: ".peft." in name for name, _ in ours.named_parameters()
    }
    plain = PlainLoRA(keep.state)
    trainer(tmp_path, "auto", max_epochs=3).fit(plain, loader())
    for name, value in adapter_state(ours).items():
        torch.testing.assert_close(value, plain.adapters[name.replace(".", "_")].data, rtol=1e-5, atol=1e-6)
    assert not torch.equal(adapter_state(ours)["net.0.peft.default.lora_A"], keep.state["net.0.peft.default.lora_A"])
    assert_same(base_state(ours), base_state(Regression()))


class TwoModels(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = Regression(seed=2).net
        self.llama = Llama().model

    def loss(self, x: Tensor) -> Tensor:
        ids = (x * 8).long().abs() % 32
        return (self(x) - self.teacher(x)).square().mean() + self.llama(input_ids=ids, labels=ids).loss


def test_several_models_in_one_module(tmp_path: Path) -> None:
    module = TwoModels()
    before = base_state(module)
    trainer(tmp_path, lora(merge_on_train_end=False)).fit(module, loader())
    for model in (module.net, module.teacher, module.llama):
        moved = [name for name, p in model.named_parameters() if name.endswith("lora_B") and p.abs().sum() > 0]
        assert moved
    assert_same(base_state(module), before)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_precision(tmp_path: Path, precision: Any) -> None:
    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.outputs = pl_module.net[0](torch.zeros(1, 8, dtype=pl_module.net[0].weight.dtype)).dtype

    watch, module = Watch(), Regression()
    run = trainer(
        tmp_path,
        lora(merge_on_train_end=False),
        precision=precision,
        max_epochs=3,
        callbacks=[watch],
        enable_checkpointing=False,
    )
    run.fit(module, loader())
    trained = adapter_state(module)
    run.test(module, loader(), verbose=False)
    assert {t.dtype for t in adapter_state(module).values()} == {torch.float32}
    assert_same(adapter_state(module), trained)
    narrow = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {t.dtype for t in base_state(module).values()} == {narrow}
    assert {s.dtype for p in run.optimizers[0].state.values() for s in p.values()} == {torch.float32}
    expected = Regression().net if precision != "bf16-true" else Regression().net.bfloat16()
    assert_same({k.removeprefix("net."): v for k, v in base_state(module).items()}, dict(expected.state_dict()))
    start = Regression().loss(inputs())
    assert run.callback_metrics["test_loss"] < start * 0.8


@pytest.mark.parametrize("train_mode", [True, False])
def test_transformers_models_train_in_train_mode(
    tmp_path: Path, train_mode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = torch_checkpoint.checkpoint

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    module = Llama()
    module.model.gradient_checkpointing_enable()
    for part in module.modules():
        if hasattr(part, "_gradient_checkpointing_func"):
            monkeypatch.setattr(part, "_gradient_checkpointing_func", counting)
    seen: list[bool] = []
    module.on_train_batch_start = lambda *args: seen.append(module.model.model.layers[0].training)  # type: ignore
    trainer(tmp_path, lora(train_mode=train_mode)).fit(module, loader())
    assert seen == [train_mode] * 4
    # Two layers, four batches.
    assert calls == (8 if train_mode else 0)


def test_frozen_batch_norms_keep_their_statistics(tmp_path: Path) -> None:
    class Norm(Regression):
        def build(self) -> nn.Module:
            return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    module = Norm()
    before = base_state(module)
    trainer(tmp_path, lora(merge_on_train_end=False)).fit(module, loader())
    assert_same(base_state(module), before)


def test_train_also(tmp_path: Path) -> None:
    module = Regression()
    strategy = PEFTStrategy(LoRA(r=2, target_modules="net.0"), train_also="net.2", merge_on_train_end=False)
    trainer(tmp_path, strategy).fit(module, loader())
    start = Regression().net
    assert torch.equal(module.net[0].weight, start[0].weight)
    assert not torch.equal(module.net[2].weight, start[2].weight)
    with pytest.raises(PEFTError, match=r"nte\.2.*net\.2"):
        trainer(tmp_path, lora(train_also=["nte.2"])).fit(Regression(), loader())


def test_a_module_with_adapters_of_another_method_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(LoRA):
        pass

    module = Regression()
    trainer(tmp_path).fit(module, loader())
    with pytest.raises(PEFTError, match="already has adapters"):
        trainer(tmp_path, PEFTStrategy(Other(r=2))).fit(module, loader())


def test_unused_adapters_are_named(tmp_path: Path) -> None:
    class Unused(Regression):
        def build(self) -> nn.Module:
            net = super().build()
            net.idle = nn.Linear(4, 4)
            net.forward = lambda x: net[2](net[1](net[0](x)))
            return net

    with pytest.warns(UserWarning, match=r"2 adapter parameters got no gradient.*net\.idle\.peft"):
        trainer(tmp_path).fit(Unused(), loader())


# --- merging ------------------------------------------------------------------------------------------------------


def test_merge_comes_after_the_last_checkpoint(tmp_path: Path) -> None:
    module = Regression()
    saver = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, save_on_train_epoch_end=True)
    run = trainer(tmp_path, max_epochs=2, callbacks=[saver])
    run.fit(module, loader())
    assert is_merged(module)
    merged = base_state(module)
    assert not torch.equal(merged["net.0.weight"], Regression().net[0].weight)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert_same(saved, adapter_state(module))
    torch.testing.assert_close(module(inputs()), by_hand(saved, inputs()), rtol=1e-5, atol=1e-5)
    # Written after the merge: still the adapter, applied once when it is loaded.
    run.save_checkpoint(tmp_path / "after.ckpt")
    assert_same(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"], saved)
    assert_same(base_state(module), merged)
    assert merge(module).merged == 2
    assert_same(base_state(module), merged)
    unmerge(module)
    assert_same(base_state(module), base_state(Regression()))


def test_no_merge_on_request_or_in_a_fast_dev_run(tmp_path: Path) -> None:
    for strategy, options in ((lora(merge_on_train_end=False), {}), (lora(), {"fast_dev_run": True})):
        module = Regression()
        trainer(tmp_path, strategy, **options).fit(module, loader(), loader())
        assert not is_merged(module)
        assert_same(base_state(module), base_state(Regression()))


class Tunable(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.05, 2

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        return loader(batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return loader()


def _refuse_merge(*args: Any) -> Any:
    raise AssertionError("merged")


@pytest.mark.parametrize("what", ["lr_find", "scale_batch_size"])
def test_the_tuner_never_merges(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, run = Tunable(), trainer(tmp_path, max_epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr(leaving, "merge", _refuse_merge)
        if what == "lr_find":
            Tuner(run).lr_find(module, num_training=6, min_lr=1e-4, max_lr=1e-1, early_stop_threshold=None)
        else:
            Tuner(run).scale_batch_size(module, steps_per_trial=2, max_trials=2, init_val=2)
    assert not is_merged(module)
    assert_same(base_state(module), base_state(Regression()))
    # Back at the start: B is zero.
    assert all(not t.any() for name, t in adapter_state(module).items() if name.endswith("lora_B"))
    module.lr, module.batch_size = 0.05, 4
    run.fit(module)
    assert is_merged(module)
    fresh = Tunable()
    fresh.batch_size = 4
    trainer(tmp_path, max_epochs=2).fit(fresh)
    assert_same(module.state_dict(), fresh.state_dict())


def test_best_checkpoint_after_the_merge(tmp_path: Path) -> None:
    class Worsening(Regression):
        """Gets better, then worse: the best checkpoint is not the last one."""

        def loss(self, x: Tensor) -> Tensor:
            value = super().loss(x)
            late = self.trainer.training and self.current_epoch >= 2
            return -value if late else value

    module = Worsening()
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)
    run = trainer(tmp_path, max_epochs=4, callbacks=[saver])
    run.fit(module, loader(), loader())
    best = torch.load(saver.best_model_path, weights_only=True)
    assert best["epoch"] < 3
    expected = by_hand(best["state_dict"], inputs())
    last = by_hand(adapter_state(module), inputs())
    assert not torch.allclose(expected, last, atol=1e-2)
    run.test(module, loader(), ckpt_path="best", verbose=False)
    torch.testing.assert_close(module(inputs()), expected, rtol=1e-5, atol=1e-5)
    loss = (expected - inputs()[:, :4]).square().mean()
    torch.testing.assert_close(run.callback_metrics["test_loss"], loss, rtol=1e-5, atol=1e-5)
    run.validate(module, loader(), ckpt_path="best", verbose=False)
    torch.testing.assert_close(run.callback_metrics["val_loss"], loss, rtol=1e-5, atol=1e-5)


def test_test_without_a_checkpoint_leaves_the_merged_model(tmp_path: Path) -> None:
    module, run = Regression(), trainer(tmp_path)
    run.fit(module, loader())
    before = base_state(module)
    run.test(module, loader(), verbose=False)
    assert is_merged(module)
    assert_same(base_state(module), before)


def test_a_second_fit_goes_on_from_the_adapters(tmp_path: Path) -> None:
    module = Regression()
    trainer(tmp_path).fit(module, loader())
    trainer(tmp_path).fit(module, loader())
    unmerge(module)
    other = Regression()
    trainer(tmp_path, lora(merge_on_train_end=False)).fit(other, loader())
    trainer(tmp_path, lora(merge_on_train_end=False)).fit(other, loader())
    assert_same(module.state_dict(), other.state_dict())


def test_an_exception_in_training_leaves_the_model_unmerged(tmp_path: Path) -> None:
    class Breaking(Regression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise RuntimeError("fault")
            return super().training_step(batch, batch_idx)

    module = Breaking()
    with pytest.raises(RuntimeError, match="fault"):
        trainer(tmp_path).fit(module, loader())
    assert not is_merged(module)
    assert_same(base_state(module), base_state(Regression()))


def test_an_adapter_that_could_not_be_written_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    module = Regression()
    inject(module, LoRA(r=2))
    module.net = nn.Sequential(OrderedDict(first=module.net[0], second=module.net[1], third=module.net[2]))
    with pytest.raises(
        PEFTError, match=r"cannot be written: 'net.0', which it was made for, is not in this Regression"
    ):
        trainer(tmp_path).fit(module, loader())


def test_a_lossy_merge_is_a_warning(tmp_path: Path) -> None:
    class Slow(Regression):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    with pytest.warns(UserWarning, match=r"Merged 2 adapters.*at most"):
        trainer(tmp_path, precision="bf16-true").fit(Slow(), loader())


def test_a_diverged_run_leaves_the_weights_alone(tmp_path: Path) -> None:
    class Diverging(Regression):
        def loss(self, x: Tensor) -> Tensor:
            return super().loss(x) * float("nan")

    module, run = Diverging(), trainer(tmp_path)
    with pytest.warns(UserWarning, match="stay unmerged: the run has diverged.*holds NaN"):
        run.fit(module, loader())
    assert run.state.finished
    assert not is_merged(module)
    assert_same(base_state(module), base_state(Regression()))


def test_workers_that_build_the_model_warn_in_the_main_process(tmp_path: Path) -> None:
    run, module = trainer(tmp_path), LateRegression()
    module.trainer = run
    run.strategy.connect(module)
    assert isinstance(run.strategy, PEFTStrategy)
    with pytest.warns(UserWarning, match="built by configure_model in the worker processes"):
        PEFTMultiProcessingLauncher(run.strategy, "spawn")._inject(module)


def test_adapters_that_all_get_no_gradient_are_named(tmp_path: Path) -> None:
    class Probe(Regression):
        """Trains a head on what a network makes that is run without gradients."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.net(x)
            return self.head(h)

    strategy = PEFTStrategy(LoRA(r=2, target_modules=["net.0", "net.2"]), train_also="head")
    with pytest.warns(UserWarning, match=r"4 adapter parameters got no gradient.*no_grad.*net\.0\.peft"):
        trainer(tmp_path, strategy).fit(Probe(), loader())


class UnderNoGrad(Regression):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class Reentrant(Regression):
    def forward(self, x: Tensor) -> Tensor:
        return torch_checkpoint.checkpoint(super().forward, x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("kind", [UnderNoGrad, Reentrant])
@pytest.mark.parametrize("manual", [False, True])
def test_a_loss_that_depends_on_no_adapter_is_an_error_of_ours(
    tmp_path: Path, kind: type[Regression], manual: bool
) -> None:
    class Probe(kind):  # type: ignore[valid-type, misc]
        automatic_optimization = not manual

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return self.manual_backward(loss) if manual else loss

    with pytest.raises(PEFTError, match=r"The loss depends on no adapter.*use_reentrant"):
        trainer(tmp_path).fit(Probe(), loader())


def test_a_step_that_is_skipped_is_no_word(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    class Skipping(Regression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx else None

    trainer(tmp_path).fit(Skipping(), loader())
    assert not [w for w in recwarn if "no gradient" in str(w.message)]


class Growing(Regression):
    """Lacks the layer that is to be adapted, until somebody adds it."""

    def __init__(self) -> None:
        super().__init__()
        del self.net[2]

    def loss(self, x: Tensor) -> Tensor:
        return self(x).square().mean()


def test_a_second_run_after_a_failed_setup_is_as_the_first(tmp_path: Path) -> None:
    """Also the precision plugin, which may be the user's, is what it was."""
    plugin, states = Precision(), {}
    for fails in (True, False):
        module = Growing()
        strategy = PEFTStrategy(LoRA(r=2, target_modules=["net.2"]), merge_on_train_end=False)
        run = trainer(tmp_path, strategy, plugins=[plugin])
        if fails:
            with pytest.raises(PEFTError, match=r"'net\.2' matches no module"):
                run.fit(module, loader())
            assert "convert_module" not in vars(plugin)
            assert all(parameter.requires_grad for parameter in module.parameters())
        module.net.append(Regression().net[2])
        torch.manual_seed(0)
        run.fit(module, loader())
        assert "convert_module" not in vars(plugin)
        states[fails] = module.state_dict()
    assert_same(states[True], states[False])

"""What is trained is what is saved, and what changes is what is saved."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import saved_script
import torch
from launch import run_script
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, ModelCheckpoint, ModelPruning
from modules import Regression, SteppedRegression, assert_same, base_state, inputs, loader, trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_peft import (
    FullFinetuning,
    LoRA,
    PEFTError,
    PEFTStrategy,
    adapter_state_dict,
    disable,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.storage.checkpoint_directory import AdapterDirectory

LAYERS = ["net.0", "net.2"]


def lora(**options: Any) -> PEFTStrategy:
    return PEFTStrategy(LoRA(r=2, target_modules=options.pop("targets", LAYERS)), merge_on_train_end=False, **options)


# --- what changes -------------------------------------------------------------------------------------------------


class Standardised(nn.Module):
    """Running statistics in buffers, and a weight: no norm of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.2)
        return self.scale * (x - self.mean)


class Own(SteppedRegression):
    """Has a part of its own behind the network."""

    def __init__(self) -> None:
        super().__init__()
        self.part = self.own()

    def own(self) -> nn.Module:
        return Standardised()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.net(x))


class Spectral(Own):
    def own(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))


class Instance(Own):
    def own(self) -> nn.Module:
        return nn.InstanceNorm1d(4, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)[..., None]
        return self.part(torch.cat([h, 2 * h, h.square()], -1)).mean(-1)


class Batch(Own):
    """Puts all of itself into train mode at each epoch, frozen norms too."""

    def own(self) -> nn.Module:
        return nn.BatchNorm1d(4)

    def on_train_epoch_start(self) -> None:
        self.train()


class Centre(SteppedRegression):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        if self.training:
            self.centre.mul_(0.5).add_(out.detach().mean(0), alpha=0.5)
        return out - self.centre


class Count(SteppedRegression):
    """Counts its steps in a buffer of integers, and keeps the least output, which was infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("never", torch.tensor([float("inf"), -float("inf")]))
        self.register_buffer("least", torch.tensor([float("inf"), float("inf")]))

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        if self.training:
            self.steps += 1
            self.least[0] = min(self.least[0], out.detach().min())
        return out * (1 + 0.1 * self.steps) + self.least[0]


class Metric(SteppedRegression):
    """Has a metric whose state is persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.metric = MeanMetric()
        self.metric.persistent(True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        if self.training:
            self.metric.update(out.detach())
        return out * (1 + self.metric.mean_value.sigmoid())


class Queue(SteppedRegression):
    """Replaces its buffer by a longer one, and loads one of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        if self.training:
            self.queue = torch.cat([self.queue, out.detach()])
        return out - self.queue.mean(0)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if prefix + "queue" in state_dict:
            self.queue = torch.empty_like(state_dict[prefix + "queue"])
        super()._load_from_state_dict(state_dict, prefix, *args)


class Sparse(SteppedRegression):
    """Changes the values of a sparse buffer, and has another that stays."""

    layout = torch.sparse_coo

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", torch.eye(8).to_sparse(layout=self.layout))
        self.register_buffer("fixed", torch.eye(8).to_sparse(layout=self.layout))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.graph = self.graph * 1.1
        return self.net(torch.sparse.mm(self.graph, x.t()).t())


class SparseRows(Sparse):
    layout = torch.sparse_csr


class Teacher(SteppedRegression):
    """Moves frozen weights towards trained ones, which is seen in no version counter."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Regression(seed=2).net.requires_grad_(False)

    def on_train_batch_end(self, *args: Any) -> None:
        for number in (0, 2):
            teacher, student = self.teacher[number], self.net[number]
            teacher.weight.data.mul_(0.5).add_(student.peft.default.lora_B @ student.peft.default.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) - 0.5 * self.teacher(x)


CHANGING: dict[str, tuple[type[SteppedRegression], dict[str, Any], set[str]]] = {
    "spectral norm trained whole": (Spectral, {"train_also": "part"}, set()),
    "own norm trained whole": (Own, {"train_also": "part"}, set()),
    "own norm, frozen": (Own, {}, {"part.mean"}),
    "instance norm": (Instance, {}, {f"part.running_{which}" for which in ("mean", "var")}),
    "batch norm": (Batch, {}, {f"part.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}),
    "centre": (Centre, {}, {"centre"}),
    "counter": (Count, {}, {"steps", "least"}),
    "metric": (Metric, {}, {"metric.mean_value", "metric.weight"}),
    "queue": (Queue, {}, {"queue"}),
    "sparse": (Sparse, {}, {"graph"}),
    "sparse by rows": (SparseRows, {}, {"graph"}),
    "teacher": (Teacher, {}, {"teacher.0.weight", "teacher.2.weight"}),
}


@pytest.mark.parametrize("kind", [ModelCheckpoint, AdapterCheckpoint])
@pytest.mark.parametrize("case", CHANGING)
@pytest.mark.filterwarnings("ignore:.*frozen weights have changed")
def test_a_resumed_run_and_a_loaded_module_have_what_changed(
    tmp_path: Path, kind: type[ModelCheckpoint], case: str
) -> None:
    make, options, changed = CHANGING[case]
    whole = make()
    trainer(tmp_path, lora(**options), max_epochs=4).fit(whole, loader())
    first = make()
    saver = kind(tmp_path, save_last=True, save_top_k=0)
    run = trainer(tmp_path, lora(**options), max_epochs=2, callbacks=[saver])
    run.fit(first, loader())
    state = run.strategy.load_checkpoint(saver.last_model_path)["state_dict"]
    fresh = base_state(make())
    also = {name for name in fresh if name.startswith("part.")} if "train_also" in options else set()
    assert {name for name in state if ".peft." not in name} == changed | also
    loaded = make.load_from_checkpoint(saver.last_model_path)
    assert_same(loaded.state_dict(), first.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded.eval()(inputs()), first.eval()(inputs()))
    resumed = make()
    trainer(tmp_path, lora(**options), max_epochs=4).fit(resumed, loader(), ckpt_path=saver.last_model_path)
    assert_same(resumed.state_dict(), whole.state_dict())
    assert not torch.equal(whole(inputs()), first(inputs()))


@pytest.mark.parametrize("case", ["own norm trained whole", "batch norm", "counter", "metric", "queue", "sparse"])
def test_eject_puts_back_what_changed(tmp_path: Path, case: str) -> None:
    make, options, _ = CHANGING[case]
    module = make()
    trainer(tmp_path, lora(**options)).fit(module, loader())
    fresh = base_state(make())
    assert any(not torch.equal(t.to_dense(), fresh[n].to_dense()) for n, t in base_state(module).items())
    with disable(module):
        assert_same(base_state(module), base_state(make()))
    eject(module)
    assert_same(module.state_dict(), make().state_dict())


def test_eject_says_what_it_cannot_put_back(tmp_path: Path) -> None:
    module = Teacher()
    with pytest.warns(UserWarning, match=r"2 frozen weights have changed.*teacher\.0\.weight"):
        trainer(tmp_path, lora()).fit(module, loader())
    with pytest.warns(UserWarning, match=r"2 frozen tensors.*stay as they are: teacher\.0\.weight"):
        eject(module)


def test_a_checkpoint_from_before_the_change_takes_it_back(tmp_path: Path) -> None:
    class Late(Own):
        """Standardises from the third epoch on."""

        def on_train_epoch_start(self) -> None:
            self.part.train(self.current_epoch > 1)

    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    module, run = Late(), trainer(tmp_path, lora(), max_epochs=4, callbacks=[saver])
    run.fit(module, loader())
    assert module.part.mean.any()
    assert "part.mean" not in torch.load(tmp_path / "epoch=1.ckpt")["state_dict"]
    run.test(module, loader(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert not module.part.mean.any()
    run.test(module, loader(), ckpt_path=tmp_path / "epoch=3.ckpt", verbose=False)
    assert module.part.mean.any()


def test_what_setup_computes_from_the_data_is_saved(tmp_path: Path) -> None:
    class Fitted(Centre):
        def setup(self, stage: str) -> None:
            self.centre.copy_(inputs().mean(0)[:4])

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) - self.centre

    module, run = Fitted(), trainer(tmp_path, lora())
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    assert torch.equal(Fitted.load_from_checkpoint(tmp_path / "one.ckpt").centre, inputs().mean(0)[:4])
    eject(module)
    assert torch.equal(module.centre, inputs().mean(0)[:4])


class Around(pl.LightningModule):
    """Holds a model and a head, each with a norm that the user keeps in train mode."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
            self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def on_train_epoch_start(self) -> None:
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


@pytest.mark.parametrize("train_also", [None, "head"])
def test_directories_have_what_changed_beside_the_adapters(tmp_path: Path, train_also: str | None) -> None:
    module, x = Around(), inputs()
    trainer(tmp_path, lora(targets=["model.0", "model.2"], train_also=train_also)).fit(module, loader())
    save_adapter(module, tmp_path / "adapter")
    fresh, model = Around(), Around().model
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh.eval()(x), module.eval()(x))
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(model.eval()(x), module.model(x))
    assert not torch.equal(model[1].running_mean, Around().model[1].running_mean)


def test_a_sparse_buffer_has_no_place_in_a_directory_of_the_adapter_alone(tmp_path: Path) -> None:
    module = Sparse()
    trainer(tmp_path, lora()).fit(module, loader())
    with pytest.raises(PEFTError, match="'graph' has changed and is sparse"):
        save_adapter(module, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_what_has_not_changed_is_not_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    model.register_buffer("nan", torch.tensor([float("nan"), 1.0]))
    model.register_buffer("passing", torch.ones(1), persistent=False)
    inject(model, LoRA(r=2))
    model.passing += 1
    names = {"0.peft.default.lora_A", "0.peft.default.lora_B"}
    assert adapter_state_dict(model).keys() == names
    model.to(torch.bfloat16)
    assert adapter_state_dict(model).keys() == names
    model.nan[1] = 2
    assert adapter_state_dict(model).keys() == {*names, "nan"}


# --- frozen weights that somebody writes to -----------------------------------------------------------------------


def in_place(module: Regression) -> None:
    with torch.no_grad():
        module.net[0].weight[0, 0] += 1


def through_data(module: Regression) -> None:
    module.net[0].weight.data[0, 0] += 1


def new_data(module: Regression) -> None:
    module.net[0].weight.data = module.net[0].weight.data + 1


def new_parameter(module: Regression) -> None:
    module.net[0].weight = nn.Parameter(module.net[0].weight + 1, requires_grad=False)


@pytest.mark.parametrize("write", [in_place, through_data, new_data, new_parameter])
@pytest.mark.parametrize("merged", [True, False])
def test_whatever_writes_to_a_frozen_weight_is_noticed(
    tmp_path: Path, write: Callable[[Regression], None], merged: bool
) -> None:
    class Writing(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                write(pl_module)

    module = Regression()
    strategy = PEFTStrategy(LoRA(r=2, target_modules=LAYERS), merge_on_train_end=merged)
    run = trainer(tmp_path, strategy, callbacks=[Writing()], enable_checkpointing=False)
    with pytest.warns(UserWarning, match=r"1 frozen weights have changed.*net\.0\.weight"):
        run.fit(module, loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    run.save_checkpoint(tmp_path / "one", storage_options=AdapterDirectory())
    expected = module(inputs())
    for path in ("one.ckpt", "one"):
        loaded = Regression.load_from_checkpoint(tmp_path / path)
        torch.testing.assert_close(loaded(inputs()), expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(loaded.net[0].weight, Regression().net[0].weight)
    load_adapter(fresh := Regression(), tmp_path / "one")
    torch.testing.assert_close(fresh(inputs()), expected, rtol=1e-5, atol=1e-5)


class Square(SteppedRegression):
    """Has two layers of one shape, which are tied or untied when it is built, or in a run."""

    ties = False

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4))
        if self.ties:
            self.net[2].weight = self.net[0].weight


class TyingLate(Square):
    def on_fit_start(self) -> None:
        self.net[2].weight = self.net[0].weight


class TyingInConfigure(Square):
    """Ties where it has adapters for the first time."""

    def configure_optimizers(self) -> Any:
        self.net[2].weight = self.net[0].weight
        return super().configure_optimizers()


class UntyingLate(Square):
    ties = True

    def on_fit_start(self) -> None:
        self.net[2].weight = nn.Parameter(torch.eye(8), requires_grad=False)


@pytest.mark.parametrize("make", [TyingLate, TyingInConfigure])
def test_a_weight_that_is_tied_in_a_run_is_noticed(tmp_path: Path, make: type[Square]) -> None:
    module = make()
    run = trainer(tmp_path, lora(), enable_checkpointing=False)
    with pytest.warns(UserWarning, match=r"1 frozen weights have changed.*net\.2\.weight"):
        run.fit(module, loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    run.save_checkpoint(tmp_path / "one", storage_options=AdapterDirectory())
    load_adapter(fresh := make(), tmp_path / "one")
    for loaded in (fresh, *(make.load_from_checkpoint(tmp_path / name) for name in ("one.ckpt", "one"))):
        assert torch.equal(loaded(inputs()), module(inputs()))
    trainer(tmp_path, lora(), max_epochs=2).fit(uninterrupted := make(), loader())
    trainer(tmp_path, lora(), max_epochs=2).fit(resumed := make(), loader(), ckpt_path=tmp_path / "one.ckpt")
    assert torch.equal(resumed(inputs()), uninterrupted(inputs()))


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: PEFTStrategy(FullFinetuning()),
        lambda: PEFTStrategy(LoRA(r=2), checkpoint="full"),
        lambda: PEFTStrategy(LoRA(r=2), checkpoint="full", merge_on_train_end="unload"),
    ],
)
def test_a_checkpoint_with_everything_has_a_weight_that_is_tied_in_a_run_by_both_names(
    tmp_path: Path, strategy: Callable[[], PEFTStrategy]
) -> None:
    saver = ModelCheckpoint(tmp_path, filename="one")
    trainer(tmp_path, strategy(), callbacks=[saver]).fit(module := TyingLate(), loader())
    loaded = TyingLate.load_from_checkpoint(tmp_path / "one.ckpt")
    torch.testing.assert_close(loaded(inputs()), module(inputs()))
    assert not torch.equal(module(inputs()), TyingLate()(inputs()))


def test_eject_gives_each_weight_its_own_value_back_if_they_were_tied_in_a_run(tmp_path: Path) -> None:
    trainer(tmp_path, PEFTStrategy(FullFinetuning())).fit(module := TyingLate(), loader())
    eject(module)
    assert torch.equal(module.net[0].weight, TyingLate().net[0].weight)


@pytest.mark.filterwarnings("ignore:1 parameters are new")
def test_a_weight_that_is_untied_in_a_run_is_not_given_to_both(tmp_path: Path) -> None:
    run = trainer(tmp_path, lora(), enable_checkpointing=False)
    run.fit(UntyingLate(), loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(PEFTError, match=r"'net\.2\.weight' by itself.*one weight with 'net\.0\.weight'.*Untie them"):
        UntyingLate.load_from_checkpoint(tmp_path / "one.ckpt")


def test_a_merge_for_a_while_is_no_change(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    class Merging(Regression):
        def on_validation_start(self) -> None:
            merge(self)

        def on_validation_end(self) -> None:
            unmerge(self)

    module, run = Merging(), trainer(tmp_path, lora(), max_epochs=2)
    run.fit(module, loader(), loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    assert not [w for w in recwarn if "have changed" in str(w.message)]
    assert all(".peft." in name for name in torch.load(tmp_path / "one.ckpt")["state_dict"])


# --- what is trained ----------------------------------------------------------------------------------------------


class InConfigureOptimizers(Regression):
    def configure_optimizers(self) -> Any:
        self.net[2].requires_grad_(True)
        return super().configure_optimizers()


class AddingAGroup(Regression):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[2].requires_grad_(True)
            self.optimizers().add_param_group({"params": [self.net[2].weight]})


class ByHand(AddingAGroup):
    """Optimizes by hand, with two optimizers."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch[0]))
        for optimizer in self.optimizers():
            optimizer.step()

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[2].requires_grad_(True)
            self.optimizers()[1].add_param_group({"params": [self.net[2].weight]})

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[number].parameters(), 0.1) for number in (0, 2)]


class Replacing(Regression):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[0].peft.default.lora_A = nn.Parameter(self.net[0].peft.default.lora_A.detach().clone())


class AddingAModule(Regression):
    """Makes a part when training starts, too late for adapters and for what ``train_also`` names."""

    def on_fit_start(self) -> None:
        self.scale = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = super().forward(x)
        return self.scale(output) if hasattr(self, "scale") else output


class TrainingIt(AddingAModule):
    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.optimizers().add_param_group({"params": [*self.scale.parameters()]})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (InConfigureOptimizers, r"'net\.2\.weight' requires a gradient.*train_also=\['net\.2'\]"),
        (AddingAGroup, r"'net\.2\.weight' requires a gradient.*train_also=\['net\.2'\]"),
        (ByHand, r"'net\.2\.weight' requires a gradient.*train_also=\['net\.2'\]"),
        (Replacing, r"trains 'net\.0\.peft\.default\.lora_A', which the module has no more"),
    ],
)
def test_what_no_checkpoint_would_have_is_not_trained(tmp_path: Path, make: type[Regression], message: str) -> None:
    module = make()
    run = trainer(tmp_path, lora(), max_epochs=3, callbacks=[ModelCheckpoint(tmp_path, filename="{epoch}")])
    with pytest.raises(PEFTError, match=message):
        run.fit(module, loader())
    assert_same(base_state(module), base_state(Regression()))


@pytest.mark.parametrize("make", [InConfigureOptimizers, AddingAGroup])
def test_full_checkpoints_have_it(tmp_path: Path, make: type[Regression]) -> None:
    module, run = make(), trainer(tmp_path, lora(checkpoint="full"), max_epochs=3)
    run.fit(module, loader())
    assert not torch.equal(module.net[2].weight, Regression().net[2].weight)
    run.save_checkpoint(tmp_path / "one.ckpt")
    assert torch.equal(make.load_from_checkpoint(tmp_path / "one.ckpt")(inputs()), module(inputs()))


class Backbone(Regression):
    @property
    def backbone(self) -> nn.Module:
        return self.net[0]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


@pytest.mark.parametrize(
    "callbacks",
    [[], [BackboneFinetuning(1, verbose=False)], [ModelPruning("l1_unstructured", amount=0.5)]],
    ids=["none", "finetuning", "pruning"],
)
def test_full_finetuning_lets_callbacks_do_what_they_do(tmp_path: Path, callbacks: list[Callback]) -> None:
    states = []
    for strategy in ("auto", PEFTStrategy(FullFinetuning())):
        module, saver = Backbone(), ModelCheckpoint(tmp_path / str(strategy), save_last=True)
        trainer(tmp_path, strategy, max_epochs=3, callbacks=[saver, *copy.deepcopy(callbacks)]).fit(module, loader())
        saved = torch.load(saver.last_model_path, weights_only=True)["state_dict"]
        loaded = Backbone.load_from_checkpoint(saver.last_model_path)
        states.append((module.state_dict(), saved, loaded.state_dict()))
    for ours, theirs in zip(*states, strict=True):
        assert_same(ours, theirs)
    assert not torch.equal(states[0][0]["net.0.weight"], Regression().net[0].weight)


@pytest.mark.parametrize(
    "callback",
    [BackboneFinetuning(verbose=False), ModelPruning("l1_unstructured", amount=0.5)],
    ids=lambda c: type(c).__name__,
)
def test_callbacks_that_change_frozen_weights_are_refused(tmp_path: Path, callback: Callback) -> None:
    run = trainer(tmp_path, lora(), callbacks=[callback], enable_checkpointing=False)
    with pytest.raises(PEFTError, match=rf"{type(callback).__name__} changes weights.*train_also"):
        run.fit(Backbone(), loader())


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_what_is_unfrozen_but_in_no_optimizer_is_named(tmp_path: Path, hook: str) -> None:
    module = Regression()
    setattr(module, hook, lambda: module.net[2].requires_grad_(True))
    with pytest.warns(UserWarning, match=r"2 weights of the base.*no optimizer.*net\.2\.weight.*train_also"):
        trainer(tmp_path, lora(targets=["net.0"])).fit(module, loader())
    assert torch.equal(module.net[2].weight, Regression().net[2].weight)


def test_a_module_that_comes_late_is_told_of_once_and_not_called_changed(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="2 parameters are new since the adapters were injected, and no opt") as told:
        trainer(tmp_path, lora(), callbacks=[ModelCheckpoint(tmp_path)]).fit(AddingAModule(), loader())
    assert len([warning for warning in told if "scale" in str(warning.message)]) == 1
    with pytest.raises(PEFTError, match=r"holds 'scale\.weight', which the module has got since.*Make it in __init__"):
        trainer(tmp_path, lora()).fit(TrainingIt(), loader())


def test_parameters_outside_of_the_module_are_named(tmp_path: Path) -> None:
    class Outside(Regression):
        def configure_optimizers(self) -> Any:
            self.scales = [nn.Parameter(torch.ones(1))]
            return torch.optim.SGD([*self.parameters(), *self.scales], 0.1)

    with pytest.warns(UserWarning, match="1 parameters that are not in the module: no checkpoint has them"):
        trainer(tmp_path, lora()).fit(Outside(), loader())


# --- several processes --------------------------------------------------------------------------------------------

BASES = ["ddp", "fsdp", "fsdp2", "fsdp2_shards"]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("processes")
    (out / "said.txt").write_text(run_script(saved_script.__file__, ",".join(BASES), out))
    return out


@pytest.mark.parametrize("base", BASES)
def test_several_processes_save_what_changed(processes: Path, base: str) -> None:
    said = (processes / "said.txt").read_text()
    assert said.count("1 frozen weights have changed") >= 1
    for kind in ("ModelCheckpoint", "AdapterCheckpoint"):
        (last,) = (processes / base / kind).glob("last*")
        state = trainer(processes).strategy.load_checkpoint(last, weights_only=not (last / "meta.pt").exists())[
            "state_dict"
        ]
        assert state["steps"] == 4
        changed = Regression().net[0].weight.detach().clone()
        changed[8 * (base != "ddp") :] += 1
        if base == "fsdp":
            assert "net.0.weight" not in state
        else:
            assert torch.equal(state["net.0.weight"], changed)


def test_what_is_unfrozen_in_a_later_epoch_is_told_once(tmp_path: Path) -> None:
    class Gradual(Regression):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.net[1:].requires_grad_(True)

    run = trainer(tmp_path, PEFTStrategy(LoRA(r=2, target_modules=["net.0"])), max_epochs=3)
    with pytest.warns(UserWarning, match=r"require a gradient, but no optimizer holds them.*net.2.weight") as told:
        run.fit(Gradual(), loader())
    assert len([warning for warning in told if "no optimizer holds them" in str(warning.message)]) == 1

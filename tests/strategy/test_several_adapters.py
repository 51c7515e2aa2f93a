"""Several adapters in one run: in turns, under one loss, or one beside another that stays as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Regression, Stop, adapter_state, assert_same, inputs, loader, trainer
from torch import Tensor, nn

from lightning_peft import AdaLoRA, LoRA, PEFTError, PEFTMethod, PEFTStrategy, adapter_names, inject, set_adapter
from lightning_peft.operations.merge import is_merged

SCALE = 8.0


class Two(Regression):
    """Holds the adapters ``a`` and ``b``, which learn different things."""

    def __init__(self, method: PEFTMethod | None = None) -> None:
        super().__init__()
        for name in "ab":
            inject(self, method or LoRA(r=2), name=name, seed=ord(name))

    def loss_of(self, name: str, x: Tensor) -> Tensor:
        return (self(x) - (1 if name == "a" else -2) * x[:, :4]).square().mean()


class InTurns(Two):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        name = "ab"[batch_idx % 2]
        set_adapter(self, name)
        return self.loss_of(name, batch[0])


class OneAfterTheOther(Two):
    """Switches between the forward passes of one loss."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        losses = []
        for name in "ab":
            set_adapter(self, name)
            losses.append(self.loss_of(name, batch[0]))
        return torch.stack(losses).sum()


class RowByRow(Two):
    """Sends the batch through both in one forward pass."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0]
        with adapter_names(self, ["a"] * len(x) + ["b"] * len(x)):
            of_a, of_b = self(torch.cat([x, x])).chunk(2)
        return (of_a - x[:, :4]).square().mean() + (of_b + 2 * x[:, :4]).square().mean()


class Judge(Regression):
    """The same in plain torch, for Lightning without this package."""

    def __init__(self, start: dict[str, Tensor], losses: Callable[[int], str]) -> None:
        super().__init__()
        self.net.requires_grad_(False)
        self.adapters = nn.ParameterDict({k.replace(".", "_"): nn.Parameter(v.clone()) for k, v in start.items()})
        self.losses = losses

    def through(self, name: str, x: Tensor) -> Tensor:
        for layer in (0, 2):
            a, b = (self.adapters[f"net_{layer}_peft_{name}_lora_{which}"] for which in "AB")
            x = self.net[layer](x) + SCALE * (x @ a.T) @ b.T
            x = x.relu() if layer == 0 else x
        return x

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0]
        wanted = {"a": x[:, :4], "b": -2 * x[:, :4]}
        losses = [(self.through(n, x) - wanted[n]).square().mean() for n in self.losses(batch_idx)]
        return torch.stack(losses).sum()


def strategy(**options: Any) -> PEFTStrategy:
    return PEFTStrategy(LoRA(r=2), **options)


@pytest.mark.parametrize(
    ("make", "losses"),
    [
        (InTurns, lambda index: "ab"[index % 2]),
        (OneAfterTheOther, lambda index: "ab"),
        (RowByRow, lambda index: "ab"),
    ],
)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_every_adapter_learns_what_plain_torch_does(
    tmp_path: Path, make: type[Two], losses: Callable[[int], str], accumulated: int
) -> None:
    module = make()
    start = adapter_state(module)
    judge = Judge(start, losses)
    trainer(tmp_path, strategy(), max_epochs=2, accumulate_grad_batches=accumulated).fit(module, loader())
    trainer(tmp_path, "auto", max_epochs=2, accumulate_grad_batches=accumulated).fit(judge, loader())
    for name, value in adapter_state(module).items():
        torch.testing.assert_close(value, judge.adapters[name.replace(".", "_")].data, rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, start[name])


def test_none_of_several_is_merged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = InTurns()
    with caplog.at_level("INFO"):
        trainer(tmp_path, strategy()).fit(module, loader())
    assert not is_merged(module)
    assert "several adapters, a, b, so none was merged" in caplog.text


def test_an_adapter_that_does_not_run_stays_as_it_is(tmp_path: Path) -> None:
    module = Two()
    before = adapter_state(module)
    # Weight decay and momentum would move it, if it were stepped.
    module.configure_optimizers = lambda: torch.optim.AdamW(  # type: ignore[method-assign]
        module.parameters(), lr=0.05, weight_decay=0.5
    )
    run = trainer(tmp_path, strategy())
    run.fit(module, loader())
    after = adapter_state(module)
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (".b." in name)
    (optimizer,) = run.optimizers
    assert all(".b." not in name for name, p in module.named_parameters() if p in optimizer.state)


def test_one_that_is_frozen_stays_as_it_is(tmp_path: Path) -> None:
    module = RowByRow()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(".peft.a." in name)
    before = adapter_state(module)
    trainer(tmp_path, strategy()).fit(module, loader())
    for name, value in adapter_state(module).items():
        assert torch.equal(value, before[name]) == (".b." in name)


class ByEpoch(Two):
    """Switches in a hook that is not called again when a run goes on in the middle of an epoch."""

    def on_train_epoch_start(self) -> None:
        set_adapter(self, "ab"[self.current_epoch % 2])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.global_step)
        return self.loss_of("a", torch.randn(4, 8, generator=generator))


@pytest.mark.parametrize("stop", [2, 6])
def test_resuming_goes_on_exactly(tmp_path: Path, stop: int) -> None:
    def fit(folder: str, end: int, **resume: Any) -> ByEpoch:
        saver = ModelCheckpoint(dirpath=tmp_path / folder, save_last=True, every_n_train_steps=1)
        module = ByEpoch()
        run = trainer(tmp_path, strategy(), callbacks=[saver, Stop(end)], max_steps=8)
        run.fit(module, loader(), **resume)
        assert run.global_step == end
        return module

    straight = fit("straight", 8)
    fit("halves", stop)
    resumed = fit("resumed", 8, ckpt_path=tmp_path / "halves" / "last.ckpt")
    assert_same(adapter_state(resumed), adapter_state(straight))
    saved = torch.load(tmp_path / "straight" / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == adapter_state(straight).keys()
    assert saved["optimizer_states"][0]["state"].keys() == adapter_state(straight).keys()


@pytest.mark.parametrize("active", ["a", "b"])
def test_a_checkpoint_brings_back_which_one_ran(tmp_path: Path, active: str) -> None:
    def fit(first: str, **resume: Any) -> tuple[Two, Any]:
        module = Two()
        set_adapter(module, first)
        run = trainer(tmp_path, strategy(), max_epochs=2 if resume else 1)
        run.fit(module, loader(), **resume)
        return module, run

    module, run = fit(active)
    run.save_checkpoint(tmp_path / "one.ckpt")
    before = adapter_state(module)
    loaded = Regression.load_from_checkpoint(tmp_path / "one.ckpt")
    torch.testing.assert_close(loaded(inputs()), Judge(before, lambda index: "").through(active, inputs()))
    resumed, _ = fit("b" if active == "a" else "a", ckpt_path=tmp_path / "one.ckpt")
    for name, value in adapter_state(resumed).items():
        assert torch.equal(value, before[name]) == (f".{active}." not in name)


class Late(Two):
    """Adds an adapter when the optimizers have been made."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 2:
            inject(self, LoRA(r=2), name="c")
            set_adapter(self, "c")
        return super().training_step(batch, batch_idx)


def test_an_adapter_that_comes_too_late_to_be_trained_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PEFTError, match=r"The adapter 'c' runs in 'net\.0', but no optimizer holds it.*before fit"):
        trainer(tmp_path, strategy()).fit(Late(), loader())


@pytest.mark.parametrize("make", [InTurns, RowByRow])
def test_schedules_of_methods_reach_every_adapter_that_took_part(tmp_path: Path, make: type[Two]) -> None:
    method = AdaLoRA(init_r=4, target_r=2, target_modules=["net.0"])
    module = make(method)
    trainer(tmp_path, PEFTStrategy(method), max_epochs=2).fit(module, loader())
    for name in "ab":
        adapter = module.net[0].peft[name]
        assert adapter.sensitivity_lora_E.any() or not adapter.kept.all()
        assert int((adapter.lora_E != 0).sum()) == 2


def test_gradients_reach_what_ran_without_a_trainer_too() -> None:
    module = Two()
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 8)
    outputs = []
    for name in "ab":
        set_adapter(module, name)
        outputs.append(module(x))
    (outputs[0] - outputs[1]).square().mean().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if ".peft." in name}
    assert all(grad is not None and grad.any() for grad in grads.values())

"""Checkpoints whose trainer state somebody has changed: said in words of ours before a step is taken, or harmless."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn

from lightning_peft import LoRA, PEFTError, PEFTStrategy

LOOP, OPTIMIZER, SCHEDULE = ("loops", "fit_loop"), ("optimizer_states", 0), ("lr_schedulers", 0)
GROUP, MOMENTS = (*OPTIMIZER, "param_groups", 0), (*OPTIMIZER, "state", "net.0.peft.default.lora_A")
PROGRESS = (*LOOP, "epoch_loop.automatic_optimization.optim_progress")
READY = (*LOOP, "epoch_progress", "total", "ready")
OURS = ("lightning_peft", "injections", "")
GONE = object()
STOPPING = EarlyStopping("val", patience=9).state_key

# Where, what is there instead, and what is said.
WRONG: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "no release": (("pytorch-lightning_version",), None, r"by Lightning None, which is no release"),
    "loops that are text": (("loops",), "x", r"the loops is damaged: it is 'x', and a mapping was expected"),
    "a count of nothing": (READY, None, r"'ready' is damaged: it is None, and a n"),
    "a count of 400 digits": ((*LOOP, "epoch_progress", "current", "completed"), 10**400, r"a number was expected"),
    "a count that is a tensor": (READY, torch.zeros(3), r"a tensor of shape \(3,\)"),
    "steps that are gone": (PROGRESS, GONE, r"it lacks 'epoch_loop.automatic_optimization.optim_progress'"),
    "a callback of text": (("callbacks", STOPPING), "x", r"EarlyStopping is damaged: it is 'x', and a mapping"),
    "a callback without patience": (("callbacks", STOPPING, "patience"), GONE, r"EarlyStopping .* lacks 'patience'"),
    "optimizers of nothing": (("optimizer_states",), None, r"states of optimizers are damaged"),
    "an optimizer of text": (OPTIMIZER, "x", r"states of optimizers are damaged"),
    "no groups": ((*OPTIMIZER, "param_groups"), None, r"state of AdamW is damaged"),
    "a group of nothing": (GROUP, {}, r"state of AdamW is damaged"),
    "a rate of text": ((*GROUP, "lr"), "x", r"AdamW, entry 0, 'lr' is damaged: it is 'x', and a number"),
    "betas of nothing": ((*GROUP, "betas"), GONE, r"AdamW cannot go on .*: KeyError: 'betas'"),
    "moments of text": (MOMENTS, "x", r"state of AdamW is damaged"),
    "a step of text": ((*MOMENTS, "step"), "x", r"AdamW cannot go on from the state .* has: ValueError"),
    "a moment of another size": ((*MOMENTS, "exp_avg"), torch.zeros(3), r"AdamW cannot go on .*: RuntimeError: "),
    "a moment that is gone": ((*MOMENTS, "exp_avg_sq"), GONE, r"AdamW cannot go on from .*: KeyError: 'exp_avg_sq'"),
    "a schedule of text": (SCHEDULE, "x", r"schedulers, entry 0 is damaged: it is 'x', and a mapping was expected"),
    "a schedule's end of text": ((*SCHEDULE, "T_max"), "x", r"entry 0, 'T_max' is damaged: it is 'x', and a number"),
    "adapters of text": ((*OURS, "adapters"), "x", r"has adapters='x'"),
    "a configuration of text": ((*OURS, "adapters", "default", 0), "x", r"has adapters="),
    "a rank that is a tensor": ((*OURS, "adapters", "default", 0, "r"), torch.zeros(3), r"text and numbers"),
    "an active adapter in a list": ((*OURS, "active"), [], r"has active=\[\]; str was expected"),
    "moved numbers": ((*OURS, "moved"), [1], r"has moved=\[1\]"),
    "a full tensor": (("lightning_peft", "full"), torch.zeros(3), r"'lightning_peft' entry is damaged"),
    "a version that is a tensor": (("lightning_peft", "version"), torch.zeros(3), r"'lightning_peft' entry is damaged"),
    "loaders of nothing": (("lightning_peft", "generators", "states", 0, "loaders"), None, r"random generators"),
}  # fmt: skip


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.net(batch).pow(2).mean()

    def validation_step(self, batch: torch.Tensor, _: int) -> None:
        self.log("val", self.net(batch).pow(2).mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(module: Net, directory: Path, epochs: int, ckpt_path: Path | None = None, *others: L.Callback) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        strategy=PEFTStrategy(LoRA(r=2, target_modules=["0", "2"]), merge_on_train_end=False),
        callbacks=[
            *others, EarlyStopping("val", patience=9), ModelCheckpoint(directory, monitor="val", save_last=True),
        ],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.arange(16.0).view(4, 4) / 16, batch_size=2)
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    return trainer


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("good")
    fit(Net(), directory, 1)
    content: dict[str, Any] = torch.load(directory / "last.ckpt", weights_only=True)
    return content


def changed(good: dict[str, Any], place: tuple[Any, ...], value: Any, directory: Path) -> Path:
    content = copy.deepcopy(good)
    holder: Any = content
    for step in place[:-1]:
        holder = holder[step]
    if value is GONE:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    torch.save(content, directory / "changed.ckpt")
    return directory / "changed.ckpt"


@pytest.mark.parametrize("kind", WRONG)
def test_it_is_said_before_a_step_is_taken(kind: str, good: dict[str, Any], tmp_path: Path) -> None:
    place, value, words = WRONG[kind]
    module = Net()
    with pytest.raises(PEFTError, match=words):
        fit(module, tmp_path / "out", 2, changed(good, place, value, tmp_path))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.ckpt"))


def test_what_is_not_changed_goes_on(good: dict[str, Any], tmp_path: Path) -> None:
    trainer = fit(Net(), tmp_path / "out", 2, changed(good, ("epoch",), good["epoch"], tmp_path))
    assert trainer.global_step == 4


@pytest.mark.parametrize(
    ("place", "value"),
    [
        # Other settings than the run has now, which torch takes; a callback before its first validation.
        ((*GROUP, "fused"), False),
        ((*GROUP, "foreach"), None),
        ((*GROUP, "lr"), torch.tensor(0.01)),
        ((*GROUP, "decoupled_weight_decay"), GONE),
        (("callbacks", STOPPING, "stopping_reason_message"), "x"),
        (("lr_schedulers", 0, "_last_lr"), None),
        (("callbacks", "Keeps"), {"kept": "another kind"}),
    ],
)  # fmt: skip
def test_what_torch_takes_goes_on(place: tuple[Any, ...], value: Any, good: dict[str, Any], tmp_path: Path) -> None:
    class Fused(Net):
        def configure_optimizers(self) -> Any:
            found = super().configure_optimizers()
            found["optimizer"].param_groups[0]["fused"] = True
            return found

    for module in (Net(), Fused()):
        trainer = fit(module, tmp_path / "out", 2, changed(good, place, value, tmp_path), Keeps())
        assert trainer.global_step == 4


class Keeps(L.Callback):
    """Has no state before the run begins."""

    kept: list[int] | None = None

    @property
    def state_key(self) -> str:
        return "Keeps"

    def on_fit_start(self, *_: Any) -> None:
        self.kept = self.kept or [1]

    def state_dict(self) -> dict[str, Any]:
        assert self.kept
        return {"kept": self.kept}


def test_going_back_does_not_take_the_run_for_damaged(tmp_path: Path) -> None:
    """In the middle of a run callbacks know scores, of which an earlier checkpoint has none."""

    class Diverging(Net):
        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return super().training_step(batch, _) * (float("nan") if self.global_step == 5 else 1.0)

    trainer = L.Trainer(
        accelerator="cpu", max_epochs=4, logger=False, enable_progress_bar=False, enable_model_summary=False,
        strategy=PEFTStrategy(LoRA(r=2, target_modules=["0", "2"]), on_nonfinite="restore"),
        callbacks=[
            EarlyStopping("val", patience=9),
            ModelCheckpoint(tmp_path / "a", every_n_train_steps=3),
            ModelCheckpoint(tmp_path / "b", monitor="val", save_weights_only=True),
        ],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.arange(16.0).view(4, 4) / 16, batch_size=1)
    with pytest.warns(UserWarning, match="NaN or infinity"):
        trainer.fit(Diverging(), loader, loader)
    assert trainer.state.finished


def test_an_error_of_a_hook_is_its_own(good: dict[str, Any], tmp_path: Path) -> None:
    class Failing(Net):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fit(Failing(), tmp_path / "out", 2, changed(good, ("epoch",), good["epoch"], tmp_path))


class LateAdamW(torch.optim.AdamW):
    """Fails in a step that is not the first after a resume."""

    def step(self, closure: Any = None) -> Any:
        if self.state and next(iter(self.state.values()))["step"] == 3:
            raise ValueError("of its own")
        return super().step(closure)


def test_an_error_of_a_later_step_is_not_the_checkpoints(good: dict[str, Any], tmp_path: Path) -> None:
    class Late(Net):
        def configure_optimizers(self) -> Any:
            optimizer = LateAdamW(self.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    with pytest.raises(ValueError, match=r"^of its own$"):
        fit(Late(), tmp_path / "out", 2, changed(good, ("epoch",), good["epoch"], tmp_path))


def places(content: Any, lead: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*lead, key)
        yield from places(value, (*lead, key))


# Lightning's own words for what is missing, and for a file of another kind.
LIGHTNINGS = r"contains only the model|is not a valid EarlyStoppingReason|metric `val` which is not available"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_place(good: dict[str, Any], tmp_path: Path) -> None:
    others: dict[Any, str] = {}
    for place in places({key: value for key, value in good.items() if key != "state_dict"}):
        for value in (None, "x", -1, [], {}, 10**400, float("nan"), [1], {"a": 1}, torch.zeros(3), True, GONE):
            try:
                fit(Net(), tmp_path / "out", 2, changed(good, place, value, tmp_path))
            except PEFTError:
                pass
            except Exception as error:
                others[place, str(value)[:50]] = f"{type(error).__name__}: {error}"
    assert {where: error for where, error in others.items() if not re.search(LIGHTNINGS, error)} == {}

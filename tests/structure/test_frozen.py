"""What the user froze before: a reward or a teacher is left alone, a backbone is adapted."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Regression, SteppedRegression, assert_same, base_state, inputs, loader, trainer
from torch import Tensor, nn

from lightning_peft import (
    AdaLoRA,
    BitFit,
    Compacter,
    LayerNormTuning,
    LoRA,
    PEFTError,
    PEFTStrategy,
    SeriesAdapter,
    eject,
    inject,
)


def mlp(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width))


class Two(nn.Module):
    """A network that is trained, and another one."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.net, self.other = mlp(), other

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.net(x))


def test_a_frozen_network_beside_a_trained_one_is_left_alone() -> None:
    model = Two(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)).requires_grad_(False))
    with pytest.warns(UserWarning, match=r"leaves out 'other\.0', 'other\.2': frozen before"):
        assert inject(model, LoRA(r=2)) == ["net.0", "net.2"]
    eject(model)
    assert not any(parameter.requires_grad for parameter in model.other.parameters())
    assert inject(model, LoRA(r=2, target_modules=["net.0", "other.0"])) == ["net.0", "other.0"]
    assert inject(model, LoRA(r=2), name="second") == ["net.0", "net.2"]


@pytest.mark.parametrize("part", ["", "body", "body.0"])
def test_a_backbone_that_was_frozen_by_hand_is_adapted(part: str) -> None:
    model = nn.Module()
    model.body = nn.Sequential(mlp(64), mlp(64))
    model.head = nn.Linear(64, 2)
    model.get_submodule(part).requires_grad_(False)
    names = inject(model, LoRA(r=2))
    layers = ["body.0.0", "body.0.2", "body.1.0", "body.1.2"]
    # Blocks that are frozen below others stay frozen.
    assert [name for name in names if name != "head"] == layers[2 * (part == "body.0") :]


def test_a_frozen_base_model_below_a_head_of_transformers_is_adapted() -> None:
    model, _ = build("bert")
    model.base_model.requires_grad_(False)
    frozen = inject(model, LoRA(r=2))
    assert frozen == inject(build("bert")[0], LoRA(r=2))


def test_what_is_trained_whole_is_no_network_beside_the_frozen_one() -> None:
    model = Two(mlp().requires_grad_(False))
    assert inject(model, LoRA(r=2), train_also=["net"]) == ["other.0", "other.2"]


def test_packed_weights_are_not_frozen_by_anybody() -> None:
    model = Two(mlp())
    for layer in (model.net[0], model.net[2]):
        layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
        layer.bias = None
    assert inject(model, LoRA(r=2)) == ["net.0", "net.2", "other.0", "other.2"]


@pytest.mark.parametrize("method", [SeriesAdapter(bottleneck=2), BitFit(), LayerNormTuning()], ids=lambda m: m.name)
def test_methods_that_look_for_blocks_leave_it_alone_too(method: Any) -> None:
    model = nn.Module()
    model.policy, model.reward = build("bert")[0], build("roberta")[0].requires_grad_(False)
    names = inject(model, method)
    assert names
    assert not [name for name in names if name.startswith("reward")]


class Teacher(SteppedRegression):
    """A copy follows the network, parameter by parameter, as in BYOL and DINO."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def on_train_start(self) -> None:
        """Begin an average by hand, of the network itself."""
        self.by_hand = [parameter.detach().clone() for parameter in self.net.parameters()]

    def on_train_batch_end(self, *args: Any) -> None:
        for student, teacher in zip(self.net.parameters(), self.teacher.parameters(), strict=True):
            teacher.data = 0.5 * teacher.data + 0.5 * student.data
        self.by_hand = [
            0.5 * mean + 0.5 * p.detach() for mean, p in zip(self.by_hand, self.net.parameters(), strict=True)
        ]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(x)
        return self.net(x) - 0.5 * target

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=0.05)


@pytest.mark.parametrize(
    "method",
    [
        LoRA(r=2),
        AdaLoRA(init_r=2, target_r=1, tinit=1, tfinal=1, deltaT=1),
        Compacter(target_modules=["*.0", "*.2"], n=2, bottleneck=4),
    ],
    ids=lambda method: method.name,
)
@pytest.mark.filterwarnings("ignore:.*stay frozen")
def test_a_copy_that_follows_has_the_same_adapters(tmp_path: Path, method: Any) -> None:
    def fit(epochs: int, ckpt_path: Any = None) -> tuple[Teacher, ModelCheckpoint]:
        module, saver = Teacher(), ModelCheckpoint(tmp_path / str(epochs), save_last=True, save_top_k=0)
        strategy = PEFTStrategy(method, merge_on_train_end=False)
        run = trainer(tmp_path, strategy, max_epochs=4, callbacks=[saver])
        if ckpt_path is None and epochs < 4:
            module.on_train_epoch_end = lambda: setattr(run, "should_stop", module.current_epoch == epochs - 1)  # type: ignore
        run.fit(module, loader(), ckpt_path=ckpt_path)
        return module, saver

    whole, _ = fit(4)
    first, saver = fit(2)
    students = [p for name, p in first.net.named_parameters() if ".peft." in name]
    teachers = [p for name, p in first.teacher.named_parameters() if ".peft." in name]
    assert len(students) == len(teachers) > 0
    assert any(not torch.equal(s, t) for s, t in zip(students, teachers, strict=True))
    shared = set(map(id, first.net.parameters()))  # what Compacter's adapters have in common
    averages = [(m, p) for m, p in zip(first.by_hand, first.teacher.parameters(), strict=True) if id(p) not in shared]
    assert all(torch.equal(mean, parameter) for mean, parameter in averages)
    assert_same(base_state(first), base_state(Teacher()))
    loaded = Teacher.load_from_checkpoint(saver.last_model_path)
    assert torch.equal(loaded(inputs()), first(inputs()))
    assert_same(fit(4, saver.last_model_path)[0].state_dict(), whole.state_dict())


def test_what_setup_freezes_is_left_alone_by_load_from_checkpoint(tmp_path: Path) -> None:
    class Reward(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.reward = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8))

        def setup(self, stage: str) -> None:
            self.reward.requires_grad_(False)

        def loss(self, x: Tensor) -> Tensor:
            return super().loss(x) - 0.1 * self.reward(self(x)).mean()

    torch.manual_seed(0)
    module, run = Reward(), trainer(tmp_path, PEFTStrategy(LoRA(r=2)))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    assert not [name for name, _ in module.reward.named_parameters() if "peft" in name]
    with pytest.raises(PEFTError, match="beside another 'reward"):
        Reward.load_from_checkpoint(tmp_path / "one.ckpt")
    torch.manual_seed(0)
    loaded = Reward.load_from_checkpoint(tmp_path / "one.ckpt")
    torch.testing.assert_close(loaded(inputs()), module(inputs()), rtol=1e-5, atol=1e-5)


def test_nothing_but_frozen_layers_is_better_than_nothing() -> None:
    model = nn.Module()
    model.encoder, model.llm = nn.Conv1d(16, 64, 3), mlp().requires_grad_(False)
    assert inject(model, LoRA(r=2)) == ["llm.0", "llm.2"]

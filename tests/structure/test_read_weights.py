"""Weights that other code reads than the module that holds them: their adapters are never merged in a run."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import Llama, Regression, loader, trainer
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_peft import LoRA, PEFTError, PEFTStrategy, adapter_state_dict
from lightning_peft.operations.merge import is_merged


class Autoencoder(Regression):
    """Its decoder is the encoder's weight, transposed."""

    def build(self) -> nn.Module:
        return nn.ModuleDict({"first": nn.Linear(8, 8), "encoder": nn.Linear(8, 4)})

    def decode(self, h: Tensor) -> Tensor:
        return functional.linear(h, self.net["encoder"].weight.T)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.net["encoder"](self.net["first"](x)))[..., :4]


class Cast(Autoencoder):
    def decode(self, h: Tensor) -> Tensor:
        both = torch.stack([self.net["encoder"].weight.double().T * 2, torch.zeros(8, 4)])
        return (h.double() @ both[0].T).float()


class Looked(Autoencoder):
    """Looks rows up that an encoder of their own has made, as a tied embedding's head does."""

    def build(self) -> nn.Module:
        return nn.ModuleDict({"first": nn.Linear(8, 8), "encoder": nn.Embedding(4, 8)})

    def forward(self, x: Tensor) -> Tensor:
        known = self.net["encoder"](torch.arange(4)).mean(0)
        return functional.normalize(self.net["first"](x) + known) @ self.net["encoder"].weight.T


class InATuple(Autoencoder):
    def decode(self, h: Tensor) -> Tensor:
        return h @ self.net["encoder"].weight.split(4, dim=1)[0]


class Tied(nn.Linear):
    """Decodes by a method of its own, which is no call of the module."""

    def decode(self, h: Tensor) -> Tensor:
        return functional.linear(h, self.weight.T)


class InAMethod(Autoencoder):
    def build(self) -> nn.Module:
        return nn.ModuleDict({"first": nn.Linear(8, 8), "encoder": Tied(8, 4)})

    def decode(self, h: Tensor) -> Tensor:
        return self.net["encoder"].decode(h)


class OfTheState(Autoencoder):
    def decode(self, h: Tensor) -> Tensor:
        return h @ self.net["encoder"].state_dict()["weight"]


class Copied(Autoencoder):
    """Copies before it decodes."""

    def __init__(self) -> None:
        super().__init__()
        self.copy = nn.Parameter(torch.zeros(8, 4), requires_grad=False)

    def decode(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.copy.copy_(self.net["encoder"].weight.T)
        return functional.linear(h, self.copy)


class Checkpointed(Autoencoder):
    def decode(self, h: Tensor) -> Tensor:
        return checkpoint(super().decode, h, use_reentrant=False)


TIED = [Autoencoder, Cast, Looked, InATuple, InAMethod, OfTheState, Copied, Checkpointed]
METHOD = LoRA(r=2, alpha=4, target_modules=["net.first", "net.encoder"])


def by_formula(make: type[Autoencoder], state: dict[str, Tensor]) -> Autoencoder:
    """Return a module without adapters that computes W + alpha/r B A where a layer is called, and reads W elsewhere."""
    judge = make()
    for name, layer in judge.net.items():
        a, b = (next(t for key, t in state.items() if name in key and f"_{letter}" in key) for letter in "AB")
        weight = layer.weight.detach() + 2 * ((b @ a).T if isinstance(layer, nn.Embedding) else b @ a)
        bias = getattr(layer, "bias", None)
        call: Callable[[Tensor], Tensor] = partial(functional.linear, weight=weight, bias=bias)
        if isinstance(layer, nn.Embedding):
            call = partial(functional.embedding, weight=weight)
        layer.forward = call
    return judge


@pytest.mark.parametrize("make", TIED)
def test_outputs_after_a_run_are_those_of_training(tmp_path: Path, make: type[Autoencoder]) -> None:
    module, x = make(), torch.randn(3, 8)
    with pytest.warns(UserWarning, match=r"'net\.encoder' are also read .*exclude_modules=\['net\.encoder'\]"):
        trainer(tmp_path, PEFTStrategy(METHOD)).fit(module, loader())
    assert is_merged(module)
    judge = by_formula(make, adapter_state_dict(module))
    assert not torch.allclose(module(x), make()(x))
    torch.testing.assert_close(module(x), judge(x))


def test_what_the_warning_says_leaves_nothing_to_warn_of(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    excluded, trained = (Autoencoder() for _ in range(2))
    trainer(tmp_path, PEFTStrategy(LoRA(r=2, exclude_modules=["net.encoder"]))).fit(excluded, loader())
    trainer(tmp_path, PEFTStrategy(LoRA(r=2), train_also=["net.encoder"])).fit(trained, loader())
    assert not [warning for warning in recwarn if "also read" in str(warning.message)]
    assert is_merged(excluded)
    assert not torch.equal(trained.net["encoder"].weight, Autoencoder().net["encoder"].weight)


def test_a_run_that_is_to_leave_a_plain_module_ends_in_its_first_step(tmp_path: Path) -> None:
    module = Autoencoder()
    with pytest.raises(PEFTError, match=r"'net\.encoder'.*read by other code.*leave out merge_on_train_end='unload'"):
        trainer(tmp_path, PEFTStrategy(METHOD, merge_on_train_end="unload")).fit(module, loader())
    assert module.trainer.global_step == 0


class Harmless(Regression):
    """Reads weights in ways that a merge does not disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.net.append(nn.MultiheadAttention(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        own = self.net[0].weight
        x = x.to(own.dtype).type_as(own) + torch.zeros_like(own)[0] + own.new_ones(8)
        h = self.net[2](self.net[1](self.net[0](x)))
        return self.net[3](h, h, h)[0]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        for mine, theirs in ((self.net[0], self.teacher[0]), (self.net[2], self.teacher[2])):
            theirs.weight.data = 0.9 * theirs.weight.data + 0.1 * mine.weight.data
        decay = sum(p.square().sum() for p in self.parameters())
        distance = (self(batch[0]) - self.teacher(batch[0])).square().mean()
        return super().training_step(batch, batch_idx) + 0.1 * decay + distance


class InPlace(Harmless):
    """Writes averages and norms to the weights themselves; what a teacher says of them is compared with."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            own, teacher = ([layers[0].weight, layers[2].weight] for layers in (self.net, self.teacher))
            torch._foreach_mul_(teacher, 0.9)
            torch._foreach_add_(teacher, own, alpha=0.1)
            own[0].div_(own[0].norm())
        return (self(batch[0]) - self.teacher(batch[0])).square().mean()


@pytest.mark.filterwarnings("ignore:.*frozen weights have changed")
@pytest.mark.parametrize("make", [Harmless, InPlace, Llama, partial(Llama, tie_word_embeddings=True)])
def test_what_meets_nothing_that_is_trained_is_not_warned_of(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, make: Callable[[], Any]
) -> None:
    trainer(tmp_path, PEFTStrategy(LoRA(r=2))).fit(module := make(), loader())
    assert not [str(warning.message) for warning in recwarn if "also read" in str(warning.message)]
    assert is_merged(module)


class Counting(Autoencoder):
    def __init__(self) -> None:
        super().__init__()
        self.modes: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.modes.append(torch._C._len_torch_function_stack())
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*are also read")
def test_the_first_step_of_an_epoch_is_looked_at(tmp_path: Path) -> None:
    module = Counting()
    trainer(tmp_path, PEFTStrategy(METHOD), max_epochs=2).fit(module, loader())
    assert module.modes == [1, 0, 0, 0] * 2


class Later(Autoencoder):
    """Begins to decode in its second epoch."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.net["encoder"](self.net["first"](x))
        return self.decode(h)[..., :4] if self._trainer is None or self.current_epoch else h


def test_what_begins_in_a_later_epoch(tmp_path: Path) -> None:
    module, x = Later(), torch.randn(3, 8)
    with pytest.warns(UserWarning, match="'net.encoder' are also read"):
        trainer(tmp_path, PEFTStrategy(METHOD), max_epochs=2).fit(module, loader())
    judge = by_formula(Autoencoder, adapter_state_dict(module))
    torch.testing.assert_close(Autoencoder.forward(module, x), judge(x))


class Compiled(Regression):
    """Has a compiled network, or a compiled function within."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
        self.square = compiled(torch.square) if inside else torch.square
        self.net = self.net if inside else compiled(self.net)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.square(x))


@pytest.mark.parametrize("kind", ["function", "network", "module"])
def test_compiled_code_is_left_alone(tmp_path: Path, recwarn: pytest.WarningsRecorder, kind: str) -> None:
    torch.compiler.reset()
    counters.clear()
    module = Regression() if kind == "module" else Compiled(kind == "function")
    given: Any = torch.compile(module, backend="aot_eager") if kind == "module" else module
    trainer(tmp_path, PEFTStrategy(LoRA(r=2))).fit(given, loader())
    assert not [str(warning.message) for warning in recwarn if "also read" in str(warning.message)]
    assert is_merged(module)
    # A function that nothing tells of is compiled a second time.
    assert counters["stats"]["unique_graphs"] == (2 if kind == "function" else 1)

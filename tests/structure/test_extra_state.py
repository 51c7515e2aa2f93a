"""What modules write into a state that is neither parameter nor buffer is saved and loaded as without this package."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import SteppedRegression, inputs, loader, trainer
from torch import Tensor, nn
from torchmetrics import CatMetric

from lightning_peft import FullFinetuning, LoRA, PEFTError, PEFTStrategy, inject, load_adapter, save_adapter
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.core.view import ModelView
from lightning_peft.structure.extra_state import extra_state, load_extra_state


class Counting(nn.Module):
    """Counts the batches of training in a plain attribute, which its outputs depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += self.training
        return x * (1 + 0.1 * self.count)

    @property
    def counted(self) -> int:
        return self.count


class Extra(Counting):
    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        self.count = state


class Overriding(Counting):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "count"] = torch.tensor(self.count)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.count = int(state_dict.pop(prefix + "count", self.count))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Hooked(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(self._save)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(self._load)

    @staticmethod
    def _save(module: Any, state_dict: Any, prefix: str, _: Any) -> None:
        state_dict[prefix + "count"] = module.count

    @staticmethod
    def _load(module: Any, state_dict: Any, prefix: str, *_: Any) -> None:
        module.count = state_dict.pop(prefix + "count", module.count)


class Listing(Counting):
    """Has a metric whose state is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.metric = CatMetric()
        self.metric.persistent(True)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.metric.update(x.detach().mean())
        return x * (1 + 0.1 * self.counted)

    @property
    def counted(self) -> int:
        return len(self.metric.value)


KINDS: list[type[Counting]] = [Extra, Overriding, Hooked, Listing]
METHODS = {
    "adapter": lambda: PEFTStrategy(LoRA(r=2, target_modules=["net.0"]), merge_on_train_end=False),
    "full checkpoint": lambda: PEFTStrategy(
        LoRA(r=2, target_modules=["net.0"]), merge_on_train_end=False, checkpoint="full"
    ),
    "unload": lambda: PEFTStrategy(LoRA(r=2, target_modules=["net.0"]), merge_on_train_end="unload", checkpoint="full"),
    "everything": lambda: PEFTStrategy(FullFinetuning()),
}


def module_with(kind: type[Counting]) -> Any:
    class Whole(SteppedRegression):
        def __init__(self) -> None:
            super().__init__()
            self.part = kind()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.part(x))

    return Whole


@pytest.mark.parametrize("saving", [ModelCheckpoint, AdapterCheckpoint])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_and_a_loaded_module_have_it(
    tmp_path: Path, kind: type[Counting], method: str, saving: type[ModelCheckpoint]
) -> None:
    make, strategy = module_with(kind), METHODS[method]
    whole, first, resumed = make(), make(), make()
    trainer(tmp_path, strategy(), max_epochs=4).fit(whole, loader())
    saver = saving(tmp_path, save_last=True, save_top_k=0)
    trainer(tmp_path, strategy(), max_epochs=2, callbacks=[saver]).fit(first, loader())
    loaded = make.load_from_checkpoint(saver.last_model_path)
    assert loaded.part.counted == first.part.counted == whole.part.counted // 2 > 0
    if saving is AdapterCheckpoint and method == "adapter":
        with pytest.warns(UserWarning, match=r"beside state of 'part.*' that is neither parameter nor buffer"):
            load_adapter(make(), saver.last_model_path)
    torch.testing.assert_close(loaded.eval()(inputs()), first.eval()(inputs()))
    trainer(tmp_path, strategy(), max_epochs=4).fit(resumed, loader(), ckpt_path=saver.last_model_path)
    assert resumed.part.counted == whole.part.counted
    torch.testing.assert_close(resumed.eval()(inputs()), whole.eval()(inputs()), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand_it_is_as_in_a_plain_module(kind: type[Counting]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), kind())
    inject(model, LoRA(r=2, target_modules=["0"]))
    model(inputs())
    adapters = {name: tensor for name, tensor in model.state_dict().items() if ".peft." in name}
    model.load_state_dict(adapters)
    assert model[1].counted == 1


def test_what_hooks_rename_and_gather_is_not_taken_for_more() -> None:
    def rename(module: Any, state_dict: Any, prefix: str, _: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix + "0.")]:
            state_dict[prefix + key.removeprefix(prefix + "0.")] = state_dict.pop(key)

    model = nn.Sequential(nn.Linear(8, 8), Extra())
    model.register_state_dict_post_hook(rename)  # type: ignore[no-untyped-call]
    assert extra_state(ModelView(model)) == {"1": {"_extra_state": 0}}


def test_a_module_that_does_not_take_it_is_named() -> None:
    with pytest.raises(PEFTError, match="does not fit the extra state of '0': it has no 'count'"):
        load_extra_state(ModelView(nn.Sequential(Counting())), {"0": {"count": 3}}, "The checkpoint")


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_of_an_adapter_has_no_place_for_it_and_says_so(tmp_path: Path, kind: type[Counting]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), kind())
    inject(model, LoRA(r=2, target_modules=["0"]))
    model(inputs())
    with pytest.warns(UserWarning, match=r"neither parameter nor buffer \(1\.[\w.]+\)"):
        save_adapter(model, tmp_path / "adapter")

"""A checkpoint that holds the base as well fits a module whose constructor draws its weights at random."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import SteppedRegression, assert_same, by_hand, inputs, loader, trainer
from torch import nn

from lightning_peft import (
    BitFit,
    DoRA,
    FullFinetuning,
    LoRA,
    PEFTError,
    PEFTStrategy,
    VeRA,
    adapter_state_dict,
    eject,
    unmerge,
)
from lightning_peft.callbacks import AdapterCheckpoint

STRATEGIES: dict[str, Callable[[], PEFTStrategy]] = {
    "full fine-tuning": lambda: PEFTStrategy(FullFinetuning()),
    "full fine-tuning, full": lambda: PEFTStrategy(FullFinetuning(), checkpoint="full"),
    "LoRA, full": lambda: PEFTStrategy(LoRA(r=2), checkpoint="full"),
    "PiSSA, full": lambda: PEFTStrategy(LoRA(r=2, init="pissa"), checkpoint="full"),
    "DoRA, full": lambda: PEFTStrategy(DoRA(r=2), checkpoint="full"),
    "VeRA, full": lambda: PEFTStrategy(VeRA(r=4), checkpoint="full"),
    "BitFit, full": lambda: PEFTStrategy(BitFit(), checkpoint="full"),
    "LoRA and a head, full": lambda: PEFTStrategy(
        LoRA(r=2, target_modules="net.0"), train_also="net.2", checkpoint="full"
    ),
}


class Drawn(SteppedRegression):
    """Draws its weights anew in every instance."""

    count = 0

    def __init__(self) -> None:
        Drawn.count += 1
        super().__init__(seed=Drawn.count)


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_is_loaded_tested_and_gone_on_from(tmp_path: Path, name: str) -> None:
    straight = Drawn()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, STRATEGIES[name](), max_epochs=2, callbacks=[saver]).fit(straight, loader())
    unmerge(straight)
    expected = straight(inputs())
    first, last = tmp_path / "epoch=0.ckpt", tmp_path / "epoch=1.ckpt"
    torch.testing.assert_close(Drawn.load_from_checkpoint(last)(inputs()), expected, rtol=0, atol=0)
    tested = Drawn()
    trainer(tmp_path, STRATEGIES[name]()).test(tested, loader(), ckpt_path=last, verbose=False)
    torch.testing.assert_close(tested(inputs()), expected, rtol=0, atol=0)
    resumed = Drawn()
    trainer(tmp_path, STRATEGIES[name](), max_epochs=2).fit(resumed, loader(), ckpt_path=first)
    unmerge(resumed)
    assert_same(dict(resumed.state_dict()), dict(straight.state_dict()))


def test_full_fine_tuning_by_adapter_checkpoint(tmp_path: Path) -> None:
    module = Drawn()
    saver = AdapterCheckpoint(tmp_path, filename="one")
    trainer(tmp_path, PEFTStrategy(FullFinetuning()), callbacks=[saver]).fit(module, loader())
    assert_same(dict(Drawn.load_from_checkpoint(tmp_path / "one").state_dict()), dict(module.state_dict()))


@pytest.mark.parametrize("strategy", [lambda: PEFTStrategy(LoRA(r=2)), lambda: PEFTStrategy(BitFit())])
def test_what_is_not_in_the_file_has_to_be_there(tmp_path: Path, strategy: Callable[[], PEFTStrategy]) -> None:
    run = trainer(tmp_path, strategy())
    run.fit(Drawn(), loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(PEFTError, match="another base model"):
        Drawn.load_from_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(PEFTError, match="another base model"):
        trainer(tmp_path, strategy(), max_epochs=2).fit(Drawn(), loader(), ckpt_path=tmp_path / "one.ckpt")


def test_a_base_that_lacks_in_a_full_file_is_an_error(tmp_path: Path) -> None:
    run = trainer(tmp_path, STRATEGIES["LoRA, full"]())
    run.fit(Drawn(), loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    del checkpoint["state_dict"]["net.2.bias"]
    torch.save(checkpoint, tmp_path / "two.ckpt")
    with pytest.raises(PEFTError, match=r"does not fit the base model\. Missing: \['net\.2\.bias'\]"):
        Drawn.load_from_checkpoint(tmp_path / "two.ckpt")


class Compiled(Drawn):
    """Has a compiled part, whose tensors torch names otherwise."""

    def build(self) -> nn.Module:
        return torch.compile(super().build(), backend="eager")  # type: ignore[return-value]


def test_names_of_a_compiled_part(tmp_path: Path) -> None:
    module: Any = Compiled()
    run = trainer(tmp_path, STRATEGIES["LoRA, full"]())
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    loaded = Compiled.load_from_checkpoint(tmp_path / "one.ckpt")
    expected = by_hand(adapter_state_dict(module), inputs(), seed=Drawn.count - 1)
    torch.testing.assert_close(loaded(inputs()), expected, rtol=1e-5, atol=1e-5)


class Longer(Drawn):
    """Has a layer that a :class:`Drawn` has not."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(2, 2)


@pytest.mark.parametrize(("written", "read"), [(Drawn, Longer), (Longer, Drawn)])
@pytest.mark.parametrize("strategy", ["auto", STRATEGIES["full fine-tuning"]])
def test_strictness_about_layers_is_torchs_where_everything_is_trained(
    tmp_path: Path, written: type[Drawn], read: type[Drawn], strategy: Any
) -> None:
    """The judge is the same run without a strategy of ours."""
    module = written()
    saver = ModelCheckpoint(tmp_path, filename="one")
    trainer(tmp_path, strategy if strategy == "auto" else strategy(), callbacks=[saver]).fit(module, loader())
    where = "in the module but not in the ch|in the model state dict but" if read is Longer else "in the checkpoint"
    with pytest.warns(UserWarning, match=rf"Found keys that are .*({where}).*more\.weight.*more\.bias"):
        lenient = read.load_from_checkpoint(tmp_path / "one.ckpt", strict=False)
    torch.testing.assert_close(lenient(inputs()), module(inputs()), rtol=0, atol=0)
    keys = r'(Missing|Unexpected) key\(s\) in state_dict: "more\.weight", "more\.bias"'
    with pytest.raises(RuntimeError, match=keys):
        read.load_from_checkpoint(tmp_path / "one.ckpt", strict=True)


@pytest.mark.parametrize("strategy", ["auto", STRATEGIES["full fine-tuning"]])
def test_a_file_that_lacks_everything(tmp_path: Path, strategy: Any) -> None:
    """It is said of it that it has no parameters, not that it is of another base."""
    run = trainer(tmp_path, strategy if strategy == "auto" else strategy())
    run.fit(Drawn(), loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    torch.save({**checkpoint, "state_dict": {}}, tmp_path / "two.ckpt")
    with pytest.warns(UserWarning, match="contains no parameters"):
        Drawn.load_from_checkpoint(tmp_path / "two.ckpt", strict=False)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)"):
        Drawn.load_from_checkpoint(tmp_path / "two.ckpt", strict=True)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("strategy", ["auto", STRATEGIES["full fine-tuning"]])
def test_a_load_state_dict_of_the_modules_own_is_called_once_where_everything_is_trained(
    tmp_path: Path, strategy: Any, strict: bool
) -> None:
    """As without a strategy of ours, and with what the module says of strictness."""
    written = Drawn()
    run = trainer(tmp_path, strategy if strategy == "auto" else strategy())
    run.fit(written, loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    drawn = SteppedRegression(seed=99).state_dict()
    called: list[tuple[bool, bool]] = []

    class Own(Drawn):
        """Loads what it begins with by itself, before the checkpoint comes."""

        def __init__(self) -> None:
            super().__init__()
            self.strict_loading = strict

        def configure_model(self) -> None:
            self.load_state_dict(drawn)

        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
            called.append((state_dict is drawn, strict))
            return super().load_state_dict(state_dict, strict, assign)

    module = Own()
    trainer(tmp_path, strategy if strategy == "auto" else strategy()).test(
        module, loader(), ckpt_path=tmp_path / "one.ckpt"
    )
    loaded = Own.load_from_checkpoint(tmp_path / "one.ckpt")
    assert called == 2 * [(True, True), (False, strict)]
    assert_same(dict(module.state_dict()), dict(written.state_dict()))
    assert_same(dict(loaded.state_dict()), dict(written.state_dict()))
    if strategy != "auto":
        eject(loaded)
        assert_same(dict(loaded.state_dict()), dict(drawn))


def test_a_constructor_may_load_another_checkpoint(tmp_path: Path) -> None:
    saved = {}
    for name in ("teacher", "student"):
        saved[name] = Drawn()
        run = trainer(tmp_path, STRATEGIES["full fine-tuning" if name == "student" else "LoRA, full"]())
        run.fit(saved[name], loader())
        run.save_checkpoint(tmp_path / f"{name}.ckpt")

    class Student(Drawn):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = [Drawn.load_from_checkpoint(tmp_path / "teacher.ckpt")]

    student = Student.load_from_checkpoint(tmp_path / "student.ckpt")
    assert_same(dict(student.state_dict()), dict(saved["student"].state_dict()))
    unmerge(saved["teacher"])
    torch.testing.assert_close(student.teacher[0](inputs()), saved["teacher"](inputs()), rtol=0, atol=0)

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
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
from safetensors.torch import load_file
from strangers import unsealed
from torch import Tensor

from lightning_peft import BitFit, LoRA, PEFTError, PEFTStrategy, load_adapter, unmerge
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.storage.checkpoint_directory import AdapterDirectory

NAMES = {f"net.{layer}.peft.default.lora_{which}" for layer in (0, 2) for which in "AB"}


def lora(r: int = 2, alpha: float = 16, **options: Any) -> PEFTStrategy:
    return PEFTStrategy(LoRA(r=r, alpha=alpha), **options)


def fit(root: Path, module: Any = None, ckpt_path: Any = None, **options: Any) -> tuple[Any, Any]:
    module, run = module or Regression(), trainer(root, **options)
    run.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return module, run


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint file of one epoch."""
    root = tmp_path_factory.mktemp("saved")
    _, run = fit(root)
    run.save_checkpoint(root / "one.ckpt")
    return root / "one.ckpt"


def edited(saved: Path, to: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    checkpoint = torch.load(saved, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, to / "edited.ckpt")
    return to / "edited.ckpt"


# --- adapter state only -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("directory", [False, True])
def test_save_checkpoint_holds_adapter_state_only(tmp_path: Path, weights_only: bool, directory: bool) -> None:
    module, run = fit(tmp_path)
    path = tmp_path / "saved"
    run.save_checkpoint(path, weights_only, **({"storage_options": AdapterDirectory()} if directory else {}))
    checkpoint = run.strategy.load_checkpoint(path)
    assert_same(checkpoint["state_dict"], adapter_state(module))
    assert ("optimizer_states" in checkpoint) is not weights_only
    if directory:
        tensors = load_file(path / "adapter_model.safetensors")
        assert len(tensors) == len(NAMES)
        assert "state_dict" not in torch.load(path / "trainer_state.ckpt", weights_only=True)
    else:
        assert set(torch.load(path, weights_only=True)["state_dict"]) == NAMES
    other = Regression()
    trainer(tmp_path).test(other, loader(), ckpt_path=path, verbose=False, weights_only=True)
    torch.testing.assert_close(other(inputs()), by_hand(adapter_state(module), inputs()), rtol=1e-5, atol=1e-5)


def test_optimizer_state_is_that_of_adapters_by_name(saved: Path) -> None:
    (state,) = torch.load(saved, weights_only=True)["optimizer_states"]
    assert set(state["state"]) == NAMES


def test_model_checkpoint_holds_adapter_state_only(tmp_path: Path) -> None:
    fit(tmp_path, callbacks=[ModelCheckpoint(tmp_path, save_top_k=-1, save_last=True)], max_epochs=2)
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 3
    for file in files:
        assert set(torch.load(file, weights_only=True)["state_dict"]) == NAMES


def test_hooks_that_add_base_weights_are_filtered(tmp_path: Path) -> None:
    class Adding(Regression):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"]["net.0.weight"] = self.net[0].weight
            checkpoint["note"] = "kept"

    class AddingToo(Callback):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"].update(pl_module.state_dict())

    _, run = fit(tmp_path, Adding(), callbacks=[AddingToo()], enable_checkpointing=False)
    run.save_checkpoint(tmp_path / "file.ckpt")
    run.save_checkpoint(tmp_path / "directory", storage_options=AdapterDirectory())
    for path in (tmp_path / "file.ckpt", tmp_path / "directory"):
        checkpoint = run.strategy.load_checkpoint(path)
        assert set(checkpoint["state_dict"]) == NAMES
        assert checkpoint["note"] == "kept"


def test_a_hook_that_takes_an_adapter_out_is_refused(tmp_path: Path) -> None:
    class Removing(Regression):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            del checkpoint["state_dict"]["net.0.peft.default.lora_A"]

    _, run = fit(tmp_path, Removing())
    with pytest.raises(PEFTError, match=r"lacks the adapter tensor 'net\.0\.peft\.default\.lora_A'"):
        run.save_checkpoint(tmp_path / "file.ckpt")
    assert not (tmp_path / "file.ckpt").exists()


def test_modules_trained_whole_are_saved_and_resumed(tmp_path: Path) -> None:
    def strategy() -> PEFTStrategy:
        return PEFTStrategy(LoRA(r=2, target_modules="net.0"), train_also="net.2")

    module, run = fit(tmp_path, strategy=strategy())
    run.save_checkpoint(tmp_path / "dir", storage_options=AdapterDirectory())
    names = {n for n in NAMES if n.startswith("net.0")} | {"net.2.weight", "net.2.bias"}
    assert set(run.strategy.load_checkpoint(tmp_path / "dir")["state_dict"]) == names
    other = Regression()
    trainer(tmp_path, strategy()).test(other, loader(), ckpt_path=tmp_path / "dir", verbose=False)
    torch.testing.assert_close(other(inputs()), module(inputs()), rtol=1e-5, atol=1e-5)


# --- AdapterCheckpoint means what ModelCheckpoint means -----------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "monitor": {"monitor": "val_loss"},
    "top 2, worst": {"monitor": "val_loss", "save_top_k": 2, "mode": "max", "filename": "{epoch}-{val_loss:.2f}"},
    "all": {"save_top_k": -1},
    "last only": {"save_top_k": 0, "save_last": True},
    "last and best": {"monitor": "val_loss", "save_last": True},
    "last as link": {"monitor": "val_loss", "save_last": "link"},
    "steps": {"every_n_train_steps": 3, "save_top_k": -1},
    "steps, top 1, last": {"every_n_train_steps": 2, "save_last": True},
    "epochs": {"every_n_epochs": 2, "save_top_k": -1, "save_on_train_epoch_end": True},
    "weights": {"save_weights_only": True},
    "same name": {"filename": "same", "save_top_k": -1},
    "one name, no versions": {"filename": "same", "enable_version_counter": False},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_checkpoints_as_lightning(tmp_path: Path, setting: str) -> None:
    ours = AdapterCheckpoint(tmp_path / "ours", **SETTINGS[setting])
    stock = ModelCheckpoint(tmp_path / "stock", **SETTINGS[setting])
    fit(tmp_path, callbacks=[stock, ours], max_epochs=4)
    left = sorted(p.name for p in (tmp_path / "ours").iterdir())
    right = sorted(p.name.removesuffix(".ckpt") for p in (tmp_path / "stock").iterdir())
    assert left == right
    assert right
    for ours_value, stock_value in (
        (ours.best_model_path, stock.best_model_path),
        (ours.last_model_path, stock.last_model_path),
    ):
        assert Path(ours_value).name == Path(stock_value).name.removesuffix(".ckpt")
    assert ours.best_model_score == stock.best_model_score
    for name in left:
        file = torch.load(tmp_path / "stock" / f"{name}.ckpt", weights_only=True)
        loaded = trainer(tmp_path, lora()).strategy.load_checkpoint(tmp_path / "ours" / name, weights_only=True)
        assert_same(loaded["state_dict"], file["state_dict"])
        assert loaded["global_step"] == file["global_step"]
        assert ("optimizer_states" in loaded) == ("optimizer_states" in file)


def test_checkpoints_of_steps_hold_that_steps_adapters(tmp_path: Path) -> None:
    saver = AdapterCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(tmp_path, SteppedRegression(), callbacks=[saver], max_epochs=2)
    for steps in (3, 6):
        judge = SteppedRegression()
        fit(tmp_path, judge, max_steps=steps)
        loaded = SteppedRegression()
        load_adapter(loaded, tmp_path / f"step={steps}")
        assert_same(adapter_state(loaded), adapter_state(judge))


def test_adapter_checkpoint_needs_the_strategy(tmp_path: Path) -> None:
    with pytest.raises(PEFTError, match=r"SingleDeviceStrategy, which has no adapters.*PEFTStrategy"):
        fit(tmp_path, strategy="auto", callbacks=[AdapterCheckpoint(tmp_path)])


# --- resuming -----------------------------------------------------------------------------------------------------


def moments(run: Any, module: Any) -> dict[str, Tensor]:
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        f"{names[id(p)]}.{key}": value for p, state in run.optimizers[0].state.items() for key, value in state.items()
    }


@pytest.mark.parametrize("saver_class", [ModelCheckpoint, AdapterCheckpoint])
@pytest.mark.parametrize("steps", [4, 8, 3, 6])
def test_resuming_equals_the_uninterrupted_run(tmp_path: Path, saver_class: Any, steps: int) -> None:
    """Steps 4 and 8 are the ends of epochs, 3 and 6 lie within."""
    straight, straight_run = fit(tmp_path, SteppedRegression(), max_epochs=3)
    saver = saver_class(tmp_path, every_n_train_steps=steps, save_top_k=-1, filename="{step}")
    fit(tmp_path, SteppedRegression(), max_steps=steps, callbacks=[saver])
    (path,) = tmp_path.glob(f"step={steps}*")
    resumed, run = fit(tmp_path, SteppedRegression(), ckpt_path=path, max_epochs=3)
    assert run.global_step == straight_run.global_step == 12
    assert_same(resumed.state_dict(), straight.state_dict())
    assert_same(moments(run, resumed), moments(straight_run, straight))
    assert moments(run, resumed)["net.0.peft.default.lora_A.exp_avg"].any()
    assert run.lr_scheduler_configs[0].scheduler.state_dict()["last_epoch"] == 12


def test_resuming_with_configure_model_and_another_seed(tmp_path: Path) -> None:
    straight, _ = fit(tmp_path, LateRegression(), max_epochs=2)
    fit(tmp_path, LateRegression(), callbacks=[AdapterCheckpoint(tmp_path, filename="one")])
    run, resumed = trainer(tmp_path, max_epochs=2), LateRegression()
    torch.manual_seed(77)
    run.fit(resumed, loader(), ckpt_path=tmp_path / "one")
    assert_same(resumed.state_dict(), straight.state_dict())


def test_resuming_in_the_same_process_after_the_merge(tmp_path: Path) -> None:
    straight, _ = fit(tmp_path, max_epochs=2)
    module, _ = fit(tmp_path, callbacks=[AdapterCheckpoint(tmp_path, save_last=True, save_top_k=0)])
    fit(tmp_path, module, ckpt_path=tmp_path / "last", max_epochs=2)
    assert_same(module.state_dict(), straight.state_dict())


@pytest.mark.parametrize("name", ["last", ".last.old"])
def test_last_is_found(tmp_path: Path, name: str) -> None:
    """Also after a crash between the two renames of a replacement, when the directory stands aside."""
    straight, _ = fit(tmp_path, max_epochs=2)
    fit(tmp_path, callbacks=[AdapterCheckpoint(tmp_path, save_last=True)])
    (tmp_path / "last").rename(tmp_path / name)
    saver = AdapterCheckpoint(tmp_path, save_last=True)
    resumed, run = fit(tmp_path, Counted(), callbacks=[saver], ckpt_path="last", max_epochs=2)
    assert resumed.steps == 4
    assert run.global_step == 8
    assert_same(resumed.state_dict(), straight.state_dict())


class Counted(Regression):
    """Counts its training steps."""

    steps = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.steps += 1
        return super().training_step(batch, batch_idx)


def test_weights_without_trainer_state_are_not_resumed_from(tmp_path: Path) -> None:
    _, run = fit(tmp_path)
    run.save_checkpoint(tmp_path / "w", weights_only=True, storage_options=AdapterDirectory())
    with pytest.raises(KeyError, match="contains only the model"):
        fit(tmp_path, ckpt_path=tmp_path / "w")


def test_resuming_with_an_optimizer_that_never_stepped(tmp_path: Path) -> None:
    class Two(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
            first, _ = self.optimizers()
            first.zero_grad()
            self.manual_backward(self.loss(batch[0]))
            first.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.AdamW(self.net[0].parameters()), torch.optim.AdamW(self.net[2].parameters())]

    straight, _ = fit(tmp_path, Two(), max_epochs=2)
    _, run = fit(tmp_path, Two())
    run.save_checkpoint(tmp_path / "one.ckpt")
    resumed, _ = fit(tmp_path, Two(), ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    assert_same(resumed.state_dict(), straight.state_dict())


def test_a_run_that_broke_is_resumed_from_where_it_broke(tmp_path: Path) -> None:
    class Breaking(SteppedRegression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if self.global_step == 6:
                raise RuntimeError("fault")
            return super().training_step(batch, batch_idx)

    Breaking.__name__ = SteppedRegression.__name__
    straight, _ = fit(tmp_path, SteppedRegression(), max_epochs=3)
    with pytest.raises(RuntimeError, match="fault"):
        fit(
            tmp_path,
            Breaking(),
            callbacks=[AdapterCheckpoint(tmp_path, save_on_exception=True, filename="{step}")],
            max_epochs=3,
        )
    resumed, run = fit(tmp_path, SteppedRegression(), ckpt_path=tmp_path / "step=6", max_epochs=3)
    assert run.global_step == 12
    assert_same(resumed.state_dict(), straight.state_dict())


def test_a_checkpoint_that_is_asked_for_before_the_run_begins(tmp_path: Path) -> None:
    """It has what the run begins with: the adapters are injected for it, and are there when the run does begin."""
    module, run = Regression(), trainer(tmp_path)
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "before.ckpt")
    checkpoint = torch.load(tmp_path / "before.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == NAMES
    assert_same(checkpoint["state_dict"], adapter_state(module))
    run.fit(module, loader(), loader())
    straight, _ = fit(tmp_path)
    assert_same(dict(module.state_dict()), dict(straight.state_dict()))
    loaded = Regression.load_from_checkpoint(tmp_path / "before.ckpt")
    assert_same(adapter_state(loaded), checkpoint["state_dict"])


# --- strictness ---------------------------------------------------------------------------------------------------

A = "net.0.peft.default.lora_A"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["state_dict"].pop(A), r"Missing: net\.0\.peft\.default\.lora_A\."),
        (lambda c: c["state_dict"].update({"net.9.lora": torch.ones(1)}), r"Superfluous: net\.9\.lora\."),
        (lambda c: c["state_dict"].update({A: torch.ones(3, 8)}), r"lora_A has shape \[3, 8\].*has \[2, 8\]"),
        (lambda c: c["state_dict"][A].fill_(float("nan")), r"lora_A holds NaN"),
        (lambda c: c["lightning_peft"].update(version=99), r"version 99"),
        (lambda c: c["lightning_peft"].update(injections=3), r"damaged"),
        (lambda c: c.pop("lightning_peft"), r"not written by PEFTStrategy"),
        (lambda c: c.update(optimizer_states=[]), r"states of 0 optimizers.*made 1"),
    ],
)
def test_wrong_state_is_refused(tmp_path: Path, saved: Path, edit: Any, message: str) -> None:
    module = Regression()
    with pytest.raises(PEFTError, match=message):
        fit(tmp_path, module, ckpt_path=edited(saved, tmp_path, edit))
    assert_same(base_state(module), base_state(Regression()))


@pytest.mark.parametrize("strict", [True, False])
def test_strict_about_adapters_whatever_the_module_says(tmp_path: Path, saved: Path, strict: bool) -> None:
    module = Regression()
    module.strict_loading = strict
    with pytest.raises(PEFTError, match="Missing"):
        fit(tmp_path, module, ckpt_path=edited(saved, tmp_path, lambda c: c["state_dict"].pop(A)))


@pytest.mark.parametrize(
    ("strategy", "message"), [(lora(r=3), r"r=2 \(here 3\)"), (lora(alpha=8), r"alpha=16.*\(here 8\)")]
)
def test_another_configuration_is_refused(tmp_path: Path, saved: Path, strategy: Any, message: str) -> None:
    with pytest.raises(PEFTError, match=message):
        fit(tmp_path, strategy=strategy, ckpt_path=saved)


def test_another_method_is_refused(tmp_path: Path, saved: Path) -> None:
    def edit(c: dict[str, Any]) -> None:
        c["lightning_peft"]["injections"][""]["adapters"]["default"][0]["method"] = "other"

    with pytest.raises(PEFTError, match="method 'other'; this model has 'lora'"):
        fit(tmp_path, ckpt_path=edited(saved, tmp_path, edit))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train_also", ["net.2"], r"written with train_also=\['net\.2'\]; this model has \[\]"),
        ("adapters", {"mine": []}, r"holds the adapters \['mine'\]; this model has \['default'\]"),
    ],
)
def test_other_adapters_are_refused(tmp_path: Path, saved: Path, key: str, value: Any, words: str) -> None:
    def edit(c: dict[str, Any]) -> None:
        c["lightning_peft"]["injections"][""][key] = value

    with pytest.raises(PEFTError, match=words):
        fit(tmp_path, ckpt_path=edited(saved, tmp_path, edit))


def test_another_base_is_refused(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(PEFTError, match=r"another base model: Regression.*differ by \d+%\. Load the base model"):
        fit(tmp_path, Regression(seed=2), ckpt_path=saved)

    class Renamed(Regression):
        pass

    fit(tmp_path, Renamed(), ckpt_path=saved)  # equal weights under another name are the same base


def test_a_stock_checkpoint_is_refused(tmp_path: Path) -> None:
    _, run = fit(tmp_path, strategy="auto")
    run.save_checkpoint(tmp_path / "stock.ckpt")
    with pytest.raises(PEFTError, match=r"not written by PEFTStrategy: it holds no adapters.*leave ckpt_path out"):
        fit(tmp_path, ckpt_path=tmp_path / "stock.ckpt")


def test_changed_param_groups_are_refused(tmp_path: Path, saved: Path) -> None:
    class Grouped(Regression):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([{"params": layer.parameters()} for layer in (self.net[0], self.net[2])])

    Grouped.__name__ = Regression.__name__
    with pytest.raises(PEFTError, match=r"has 1 param groups.*made 2"):
        fit(tmp_path, Grouped(), ckpt_path=saved)


def test_lost_moments_are_refused(tmp_path: Path, saved: Path) -> None:
    path = edited(saved, tmp_path, lambda c: c["optimizer_states"][0]["state"].clear())
    with pytest.raises(PEFTError, match="zero moments"):
        fit(tmp_path, ckpt_path=path)


def test_a_directory_without_trainer_state_is_refused(tmp_path: Path) -> None:
    _, run = fit(tmp_path)
    run.save_checkpoint(tmp_path / "d", storage_options=AdapterDirectory())
    (tmp_path / "d" / "trainer_state.ckpt").unlink()
    with pytest.raises(PEFTError, match=r"holds no trainer_state\.ckpt.*load_adapter"):
        fit(tmp_path, ckpt_path=tmp_path / "d")


@pytest.mark.parametrize("file", ["trainer_state.ckpt", "adapter_model.safetensors"])
def test_truncated_files_are_refused(tmp_path: Path, file: str) -> None:
    _, run = fit(tmp_path)
    run.save_checkpoint(tmp_path / "d", storage_options=AdapterDirectory())
    content = (unsealed(tmp_path / "d") / file).read_bytes()
    (tmp_path / "d" / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(PEFTError, match=f"{file} is damaged or truncated"):
        fit(tmp_path, ckpt_path=tmp_path / "d")


# --- full checkpoints ---------------------------------------------------------------------------------------------


def test_full_checkpoints(tmp_path: Path) -> None:
    straight, _ = fit(tmp_path, strategy=lora(checkpoint="full"), max_epochs=2)
    module, run = fit(tmp_path, strategy=lora(checkpoint="full"))
    merged = base_state(module)
    run.save_checkpoint(tmp_path / "full.ckpt")
    assert_same(base_state(module), merged)
    state = torch.load(tmp_path / "full.ckpt", weights_only=True)["state_dict"]
    assert set(state) == set(base_state(Regression())) | NAMES
    # Saved after the merge, and yet the weights as they were before it.
    assert_same({n: t for n, t in state.items() if n not in NAMES}, base_state(Regression()))
    resumed, _ = fit(tmp_path, strategy=lora(checkpoint="full"), ckpt_path=tmp_path / "full.ckpt", max_epochs=2)
    assert_same(resumed.state_dict(), straight.state_dict())
    unmerge(resumed)
    assert_same(base_state(resumed), base_state(Regression()))


class Compiled(Regression):
    """A module of which a part is compiled, as ``parts`` says: all of the network, or its first layer."""

    def __init__(self, parts: str, bias: bool = True) -> None:
        super().__init__()
        if not bias:
            self.net[2] = torch.nn.Linear(16, 4, bias=False)
        if parts == "first":
            self.net[0] = torch.compile(self.net[0], backend="eager")
        elif parts == "all":
            self.net = torch.compile(self.net, backend="eager")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("saving", "resuming"), [("all", "all"), ("first", "first"), ("all", ""), ("", "first")])
def test_full_checkpoints_of_compiled_parts(tmp_path: Path, saving: str, resuming: str, strict: bool) -> None:
    def loaded(module: Regression) -> Regression:
        module.strict_loading = strict
        with torch.no_grad():
            for bias in (p for name, p in module.named_parameters() if name.endswith("bias")):
                bias.add_(1.0)  # the checkpoint has its own
        trainer(tmp_path, lora(checkpoint="full")).test(
            module, loader(), ckpt_path=tmp_path / "full.ckpt", verbose=False
        )
        return module

    module, run = fit(tmp_path, Compiled(saving), strategy=lora(checkpoint="full"))
    run.save_checkpoint(tmp_path / "full.ckpt")  # merged by now
    names = torch.load(tmp_path / "full.ckpt", weights_only=True)["state_dict"].keys()
    assert names == {*Regression().state_dict(), *NAMES}
    torch.testing.assert_close(loaded(Compiled(resuming))(inputs()), module(inputs()), rtol=1e-5, atol=1e-5)


def test_a_bias_that_a_merge_added_to_a_compiled_part_is_not_saved(tmp_path: Path) -> None:
    strategy = PEFTStrategy(
        [LoRA(r=2, target_modules=["net.0"]), BitFit(target_modules=["net.2"], create_missing=True)], checkpoint="full"
    )
    module, run = fit(tmp_path, Compiled("all", bias=False), strategy=strategy)
    assert module.net._orig_mod[2].bias is not None
    run.save_checkpoint(tmp_path / "full.ckpt")
    assert "net.2.bias" not in torch.load(tmp_path / "full.ckpt", weights_only=True)["state_dict"]


class SavesItself(Compiled):
    """Puts its state into a checkpoint by torch's names, which say where a part is compiled."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.state_dict()


@pytest.mark.parametrize("into", ["all", ""])
@pytest.mark.parametrize("checkpoint", ["adapter", "full"])
def test_a_hook_may_give_the_names_of_compiled_parts(tmp_path: Path, checkpoint: Any, into: str) -> None:
    strategy = lora(checkpoint=checkpoint, merge_on_train_end=False)
    module, run = fit(tmp_path, SavesItself("all"), strategy=strategy)
    run.save_checkpoint(tmp_path / "one.ckpt")
    names = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"].keys()
    assert names == NAMES if checkpoint == "adapter" else "net._orig_mod.0.peft.default.lora_A" in names
    loaded = Compiled(into)
    trainer(tmp_path, lora(checkpoint=checkpoint)).test(
        loaded, loader(), ckpt_path=tmp_path / "one.ckpt", verbose=False
    )
    torch.testing.assert_close(loaded(inputs()), module(inputs()))


@pytest.mark.parametrize("strict", [True, False])
def test_a_full_checkpoint_of_another_base_is_as_strict_as_asked(tmp_path: Path, strict: bool) -> None:
    module, run = fit(tmp_path, strategy=lora(checkpoint="full"))
    run.save_checkpoint(tmp_path / "full.ckpt")

    def edit(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["net.1.weight"] = checkpoint["state_dict"].pop("net.0.bias")

    path = edited(tmp_path / "full.ckpt", tmp_path, edit)
    own = Regression()
    own.strict_loading = strict
    with torch.no_grad():
        own.net[2].bias.add_(1.0)  # the checkpoint has its own

    def load() -> None:
        trainer(tmp_path, lora(checkpoint="full", merge_on_train_end=False)).test(
            own, loader(), ckpt_path=path, verbose=False
        )

    if strict:
        with pytest.raises(PEFTError, match=r"Missing: \['net.0.bias'\]. Superfluous: \['net.1.weight'\]"):
            load()
        return
    load()  # as Lightning does: what the file lacks stays, and all else is the file's
    assert_same(base_state(own), base_state(Regression()))
    unmerge(module)
    assert_same(adapter_state(own), adapter_state(module))


# --- writing ------------------------------------------------------------------------------------------------------


def test_an_interrupted_save_leaves_the_previous_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, run = fit(tmp_path)
    path = tmp_path / "d"
    run.save_checkpoint(path, storage_options=AdapterDirectory())
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    unmerge(module)
    with torch.no_grad():
        module.get_parameter(A).add_(1)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.save_checkpoint(path, storage_options=AdapterDirectory())
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    run.save_checkpoint(path, storage_options=AdapterDirectory())
    assert torch.equal(run.strategy.load_checkpoint(path)["state_dict"][A], module.get_parameter(A))


def test_a_full_disk_is_an_error_that_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = fit(tmp_path)

    save = torch.save

    def full(content: Any, file: Any) -> None:
        if hasattr(file, "name"):
            raise OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(PEFTError, match=r"Cannot write .*/d: No space left"):
        run.save_checkpoint(tmp_path / "d", storage_options=AdapterDirectory())
    assert not (tmp_path / "d").exists()


def test_a_foreign_directory_is_not_overwritten(tmp_path: Path) -> None:
    foreign = tmp_path / "d"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    saver = AdapterCheckpoint(tmp_path, filename="d", enable_version_counter=False)
    with pytest.raises(PEFTError, match="was not written by lightning_peft"):
        fit(tmp_path, callbacks=[saver])
    assert [p.name for p in foreign.iterdir()] == ["notes.txt"]


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    _, run = fit(tmp_path)
    (tmp_path / "blocker").write_text("a file")
    with pytest.raises(PEFTError, match="Cannot write"):
        run.save_checkpoint(tmp_path / "blocker" / "d", storage_options=AdapterDirectory())


def test_remote_paths_are_refused(tmp_path: Path) -> None:
    _, run = fit(tmp_path)
    with pytest.raises(PEFTError, match="local paths"):
        run.save_checkpoint("s3://bucket/d", storage_options=AdapterDirectory())

"""What callbacks log along a run; TensorBoard's own reader says what is in its files, NumPy what it should be."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_peft import IA3, LoRA, PEFTError, PEFTStrategy, SeriesAdapter, merge
from lightning_peft.callbacks import ChangeMonitor, GenerationSamples


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(Block(), Block())
        self.gradients: list[dict[str, np.ndarray]] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layers(batch).square().mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        found = {name: p.grad.numpy().copy() for name, p in self.named_parameters() if p.grad is not None}
        self.gradients.append(found)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def trainer(method: Any, tmp_path: Path, callback: L.Callback, **options: Any) -> L.Trainer:
    given: dict[str, Any] = {
        "strategy": PEFTStrategy(method, merge_on_train_end=False), "accelerator": "cpu", "max_steps": 5,
        "logger": TensorBoardLogger(tmp_path), "enable_checkpointing": False, "enable_progress_bar": False,
    }  # fmt: skip
    return L.Trainer(**{**given, **options}, callbacks=[callback])


def data() -> torch.utils.data.DataLoader[torch.Tensor]:
    return torch.utils.data.DataLoader(torch.randn(10, 6, generator=torch.Generator().manual_seed(1)), batch_size=2)


@pytest.mark.parametrize("method", [LoRA(r=2), IA3(target_modules=["up"], feedforward_modules=[])], ids=["LoRA", "IA3"])
def test_changes_and_gradients_by_module(method: Any, tmp_path: Path) -> None:
    model = Module()
    run = trainer(
        method, tmp_path, ChangeMonitor(every_n_steps=2, plots=str(tmp_path / "plots")), gradient_clip_val=0.1
    )
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    run.fit(model, data())
    events = EventAccumulator(run.log_dir, size_guidance={"scalars": 0}).Reload()
    names = [name for name in before if name.endswith("up.weight") or (isinstance(method, LoRA) and "down.w" in name)]
    assert {tag for tag in events.Tags()["scalars"] if "/" in tag} == {
        f"{kind}/{name.removesuffix('.weight')}" for kind in ("change", "gradient") for name in names
    }
    for name in (name.removesuffix(".weight") for name in names):
        seen = events.Scalars(f"gradient/{name}")
        assert [event.step for event in seen] == [2, 4]
        for event in seen:  # before they are clipped
            own = [grad for key, grad in model.gradients[event.step - 1].items() if key.startswith(f"{name}.")]
            assert event.value == pytest.approx(np.sqrt(sum((grad**2).sum() for grad in own)), rel=1e-5)
        assert [event.step for event in events.Scalars(f"change/{name}")] == [2, 4]
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"change.png", "gradient.png"}
    assert {"change", "gradient"} <= set(events.Tags()["images"])


@pytest.mark.parametrize("method", [LoRA(r=2), IA3(target_modules=["up"], feedforward_modules=[])], ids=["LoRA", "IA3"])
def test_a_change_is_what_a_merge_would_do(method: Any, tmp_path: Path) -> None:
    model, logged = Module(), dict[str, float]()
    run = trainer(method, tmp_path, ChangeMonitor(every_n_steps=1), max_steps=3, logger=CSVLogger(tmp_path))
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    run.logger.log_metrics = lambda metrics, step: logged.update(metrics)  # type: ignore[union-attr, method-assign]
    run.fit(model, data())
    merge(model)
    for name in (name.partition("/")[2] for name in logged if name.startswith("change")):
        weight = before[f"{name}.weight"]
        moved = model.get_submodule(name).weight.detach().numpy() - weight
        assert logged[f"change/{name}"] == pytest.approx(np.linalg.norm(moved) / np.linalg.norm(weight), rel=1e-4)


def test_what_changes_no_weight_has_gradients_alone(tmp_path: Path) -> None:
    logged: dict[str, float] = {}
    run = trainer(SeriesAdapter(bottleneck=2, target_modules=["up"]), tmp_path, ChangeMonitor(1), max_steps=2)
    run.logger.log_metrics = lambda metrics, step: logged.update(metrics)  # type: ignore[union-attr, method-assign]
    run.fit(Module(), data())
    assert {name.partition("/")[0] for name in logged if "/" in name} == {"gradient"}


def test_what_cannot_be_monitored_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PEFTError, match="every_n_steps=0"):
        ChangeMonitor(every_n_steps=0)
    with pytest.raises(PEFTError, match="no logger"):
        trainer(LoRA(), tmp_path, ChangeMonitor(), logger=False).fit(Module(), data())
    run = trainer(LoRA(), tmp_path, ChangeMonitor())
    monkeypatch.setattr(run.strategy, "__class__", type("Stand", (type(run.strategy), FSDPStrategy), {}))
    with pytest.raises(PEFTError, match="ChangeMonitor does not serve Stand"):
        ChangeMonitor().setup(run, Module(), "fit")


class Answers(Module):
    """Answers by the prompt, turned around."""

    def generate(self, prompts: list[str]) -> list[str]:
        return ["".join(reversed(prompt)) for prompt in prompts]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return


def answered(given: GenerationSamples, tmp_path: Path, batch: Any, **options: Any) -> L.Trainer:
    run = trainer(LoRA(r=2), tmp_path, given, max_steps=2, val_check_interval=2, **options)
    run.fit(Answers(), data(), torch.utils.data.DataLoader([batch, batch], batch_size=None))
    return run


def text(run: L.Trainer) -> list[str]:
    events = EventAccumulator(run.log_dir).Reload()
    return [event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/text_summary")]


def test_samples_stand_in_tensorboard(tmp_path: Path) -> None:
    batch = {"prompts": ["a|b", "two"], "answers": ["yes", "no\nmore"]}
    (shown,) = text(answered(GenerationSamples(count=3), tmp_path, batch))  # once, and not by the sanity check
    assert shown.splitlines() == [
        "| prompt | answer | expected |",
        "| --- | --- | --- |",
        r"| a\|b | b\|a | yes |",
        "| two | owt | no<br>more |",
        r"| a\|b | b\|a | yes |",
    ]
    own = text(answered(GenerationSamples(["<s>"]), tmp_path / "own", torch.zeros(2)))
    assert own[0].splitlines()[2] == "| &lt;s> | >s&lt; |"


def test_samples_are_printed_where_no_logger_takes_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    answered(GenerationSamples(["say"]), tmp_path, torch.zeros(2), logger=False)
    assert "prompt: say\nanswer: yas" in caplog.text


def test_no_samples_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(PEFTError, match="Module has no generate"):
        trainer(LoRA(), tmp_path, GenerationSamples()).fit(Module(), data())
    with pytest.raises(PEFTError, match="the validation data have no prompts"):
        answered(GenerationSamples(), tmp_path, torch.zeros(2))
    for wrong in ({"prompts": []}, {"count": 0}):
        with pytest.raises(PEFTError, match="no prompts were asked for"):
            GenerationSamples(**wrong)  # type: ignore[arg-type]
    run = trainer(LoRA(r=2), tmp_path, GenerationSamples(["a"]))
    with pytest.warns(UserWarning, match="this run has no validation"):
        run.fit(Answers(), data(), [])

    class Few(Answers):
        def generate(self, prompts: list[str]) -> list[str]:
            return prompts[1:]

    with pytest.raises(PEFTError, match=r"Few.generate returned 1 answers to 2 prompts"):
        trainer(LoRA(r=2), tmp_path, GenerationSamples(["a", "b"]), max_steps=2, val_check_interval=2).fit(
            Few(), data(), data()
        )


def test_a_run_that_is_too_short_or_resumed(tmp_path: Path) -> None:
    """What the logger of the resumed run holds is no second row of the step at which it was resumed."""

    class Slow(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    batches = torch.utils.data.DataLoader(torch.ones(12, 6), batch_size=2)
    run = trainer(LoRA(r=2), tmp_path, ChangeMonitor(4), max_steps=2, accumulate_grad_batches=2)
    with pytest.warns(UserWarning, match="ChangeMonitor has logged nothing.*ended at step 2"):
        run.fit(Slow(), batches)
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = trainer(
        LoRA(r=2), tmp_path, ChangeMonitor(2), max_steps=4, accumulate_grad_batches=2, logger=CSVLogger(tmp_path)
    )
    again.fit(Slow(), batches, ckpt_path=str(tmp_path / "run.ckpt"))
    rows = list(csv.DictReader((Path(again.log_dir or "") / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["4"]

"""What a run does to the loss on unrelated text: judged by transformers' own loss, row by row."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers as t
from tokenizers import Tokenizer, models, pre_tokenizers

from lightning_peft import FullFinetuning, LoRA, PEFTError, PEFTStrategy, PrefixTuning
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.tasks import CausalLM, ClassificationData, Forgetting, InstructionData, SequenceClassification

NAMES = ("val_forgetting", "val_other_loss")
OTHER = ["b a b a b", "a", "b b a"]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    raw = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "<unk>": 3}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    t.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", unk_token="<unk>").save_pretrained(tmp_path)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    t.LlamaForCausalLM(t.LlamaConfig(vocab_size=4, **size, eos_token_id=0, pad_token_id=0)).save_pretrained(tmp_path)
    return str(tmp_path)


def fit(
    model: str, method: Any, *, max_epochs: int = 4, resumed: str | None = None
) -> tuple[L.Trainer, CausalLM, InstructionData]:
    folder = Path(model)
    task = write(folder / "task.jsonl", [{"prompt": "a b", "answer": "a a a"}] * 4)
    other = write(folder / "other.jsonl", [{"text": text} for text in OTHER])
    module, data = CausalLM(model, lr=3e-2), InstructionData(task, task, batch_size=2, chat_template=False)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=max_epochs,
        enable_progress_bar=False,
        enable_model_summary=False,
        strategy=PEFTStrategy(method, merge_on_train_end=False),
        callbacks=[
            Forgetting(other, batch_size=2),
            AdapterCheckpoint(dirpath=folder / "checkpoints", save_last=True, enable_version_counter=False),
        ],
    )
    trainer.fit(module, data, ckpt_path=resumed)
    return trainer, module, data


def loss_of(model: Any) -> float:
    """The mean over the tokens of the rows, each with the token that ends it, by transformers alone."""
    rows = [torch.tensor([[{"a": 1, "b": 2}[word] for word in text.split()] + [0]]) for text in OTHER]
    with torch.no_grad():
        losses = [float(model.eval()(input_ids=row, labels=row).loss) * (row.shape[1] - 1) for row in rows]
    return sum(losses) / sum(row.shape[1] - 1 for row in rows)


@pytest.mark.parametrize("method", [LoRA(), FullFinetuning(), PrefixTuning(num_virtual_tokens=2)], ids=lambda m: m.name)
def test_the_loss_on_other_text_is_that_of_transformers(model: str, method: Any) -> None:
    trainer, module, data = fit(model, method)
    logged = trainer.callback_metrics
    # A prefix is there from the start, and the model before training has none.
    before, after = loss_of(t.AutoModelForCausalLM.from_pretrained(model)), loss_of(module.model)
    assert float(logged["val_other_loss"]) == pytest.approx(after, rel=1e-5)
    assert float(logged["val_forgetting"]) == pytest.approx(after - before, rel=1e-4)
    assert abs(after - before) > 0.02
    again = trainer.validate(module, data, verbose=False)[0]
    assert again["val_forgetting"] == pytest.approx(after - before, rel=1e-4)


class Modes(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.seen = {module.training for module in pl_module.model.modules()}


def test_modes_stay_as_they_were(model: str) -> None:
    """A model that is trained in evaluation mode, without its dropout, goes on so."""
    module, modes = CausalLM(model), Modes()
    task = write(Path(model) / "task.jsonl", [{"prompt": "a b", "answer": "a"}])
    other = write(Path(model) / "other.jsonl", [{"text": text} for text in OTHER])
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        max_steps=1,
        enable_checkpointing=False,
        strategy=PEFTStrategy(LoRA(r=2), train_mode=False),
        callbacks=[Forgetting(other), modes],
    )
    trainer.fit(module, InstructionData(task, task, chat_template=False))
    assert modes.seen == {False}


def test_a_resumed_run_knows_the_loss_from_before(model: str) -> None:
    whole, _, _ = fit(model, LoRA())
    fit(model, LoRA(), max_epochs=2)
    resumed, _, _ = fit(model, LoRA(), resumed=f"{model}/checkpoints/last")
    first, second = (next(c for c in run.callbacks if isinstance(c, Forgetting)) for run in (whole, resumed))  # type: ignore[attr-defined]
    assert first.before == second.before
    assert all(name in resumed.callback_metrics for name in NAMES)


@pytest.mark.parametrize("method", [LoRA(), FullFinetuning(), None], ids=["lora", "full", "no method"])
def test_a_validation_of_its_own(model: str, method: Any) -> None:
    """Of a checkpoint in another process: what adapters do, and what was trained as a whole, is known there too."""
    expected = {"val_forgetting": 0.0}
    if method is not None:
        trained, _, _ = fit(model, method)
        expected = {name: float(value) for name, value in trained.callback_metrics.items() if name in NAMES}
    task = write(Path(model) / "task.jsonl", [{"prompt": "a b", "answer": "a a a"}])
    other = write(Path(model) / "other.jsonl", [{"text": text} for text in OTHER])
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[Forgetting(other)],
        strategy="auto" if method is None else PEFTStrategy(method),
    )
    data = InstructionData(val_file=task, chat_template=False)
    path = None if method is None else f"{model}/checkpoints/last"
    (found,) = trainer.validate(CausalLM(model), data, ckpt_path=path, verbose=False)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_what_it_cannot_watch(model: str, tmp_path: Path) -> None:
    file = write(tmp_path / "labels.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = L.Trainer(**quiet, callbacks=[Forgetting(file)])
    with pytest.raises(PEFTError, match="Forgetting watches the task CausalLM, not SequenceClassification"):
        trainer.validate(SequenceClassification(model, num_labels=2), ClassificationData(file, file))
    trainer = L.Trainer(**quiet, callbacks=[Forgetting(str(tmp_path / "none.jsonl"))])
    task = write(tmp_path / "task.jsonl", [{"prompt": "a b", "answer": "a"}])
    with pytest.raises(PEFTError, match=r"Forgetting\(file\): file .*none\.jsonl' not found"):
        trainer.validate(CausalLM(model), InstructionData(val_file=task, chat_template=False))

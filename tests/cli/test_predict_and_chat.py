"""What `predict` writes, and a conversation in the terminal, judged by transformers' own generation."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers as t
from launch import run_script
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader, IterableDataset

from lightning_peft import LoRA, PEFTError, inject, save_adapter
from lightning_peft.callbacks import PredictionWriter
from lightning_peft.cli import main

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    raw.decoder = decoders.ByteLevel()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = t.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"], chat_template=CHATML
    )
    words.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    size = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    made = t.LlamaForCausalLM(t.LlamaConfig(**size, num_attention_heads=4))
    made.generation_config.eos_token_id = words.eos_token_id
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> str:
    """An adapter that changes what is generated."""
    net = t.AutoModelForCausalLM.from_pretrained(model)
    inject(net, LoRA(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save_adapter(net, tmp_path / "adapter")
    return str(tmp_path / "adapter")


def reply(model: Path, turns: list[dict[str, str]], adapter: str | None) -> str:
    """HF PEFT's model by transformers' own template and generation."""
    peft = pytest.importorskip("peft")
    net, words = t.AutoModelForCausalLM.from_pretrained(model), t.AutoTokenizer.from_pretrained(model)
    net = peft.PeftModel.from_pretrained(net, adapter) if adapter else net
    inputs = words.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = net.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=words.pad_token_id)
    return str(words.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_a_conversation(
    model: Path, adapter: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "red?",
        "green?",
        "/adapter none",
        "/new",
        "red?",
        "/adapter nowhere",
        "/adapter adapter",
        "/what",
        "/quit",
        "x",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    with pytest.raises(SystemExit) as end:
        main(["chat", adapter, f"--model={model}", "--max_new_tokens=6"])
    assert not end.value.code
    turns = [{"role": "user", "content": "red?"}]
    first = reply(model, turns, adapter)
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "green?"}]
    second, base = reply(model, turns, adapter), reply(model, turns[:1], None)
    assert base != first
    said = capsys.readouterr().out
    where = [
        said.index(text) for text in (first, second, base, "there is no adapter 'nowhere'; expected a directory or")
    ]
    assert where == sorted(where)


def test_values_out_of_bounds_are_refused(adapter: str, model: Path) -> None:
    with pytest.raises(SystemExit, match="expected a temperature from 0 on"):
        main(["chat", adapter, f"--model={model}", "--temperature=-1"])


def test_predict_writes_records_with_what_was_predicted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n}?", "id": n} for n in range(5)]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quiet = [f"--trainer.{name}={str(value).lower()}" for name, value in QUIET.items()]
    data = ["--data=InstructionData", "--data.predict_file=ask.jsonl", "--data.batch_size=2"]
    run = ["predict", "--model=CausalLM", f"--model.model={model}", "--model.max_new_tokens=6", *data, *quiet]
    main(run)
    written = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    expected = [reply(model, [{"role": "user", "content": row["prompt"]}], None).strip() for row in rows]
    assert written == [{**row, "prediction": text} for row, text in zip(rows, expected, strict=True)]
    assert list(tmp_path.glob(".*part")) == []
    with pytest.warns(UserWarning, match=r"predict without --ckpt_path: the adapters are new"):
        main([*run, "--trainer.strategy=peft_lora"])


class Doubles(L.LightningModule):
    def predict_step(self, batch: torch.Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return 2 * batch


class Stream(IterableDataset[float]):
    def __iter__(self) -> Iterator[float]:
        yield from (1.0, 2.0)


class Odd(L.LightningModule):
    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        return "one text for a batch"


class Summed(L.LightningModule):
    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return batch.sum(0, keepdim=True)


def test_any_module_can_be_asked(tmp_path: Path) -> None:
    writer = PredictionWriter(str(tmp_path / "new" / "out.jsonl"))
    trainer = L.Trainer(**QUIET, callbacks=[writer])
    trainer.predict(Doubles(), DataLoader(torch.arange(5.0), batch_size=2))
    assert [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()] == [
        {"prediction": 2.0 * n} for n in range(5)
    ]
    with pytest.raises(PEFTError, match="predict_step returned str for batch 0; expected a list or a tensor"):
        trainer.predict(Odd(), DataLoader(torch.arange(5.0), batch_size=2))
    with pytest.raises(PEFTError, match=r"returned 1 predictions for batch 0; expected .* each of its 2 examples"):
        trainer.predict(Summed(), DataLoader(torch.arange(5.0), batch_size=2))
    with pytest.warns(UserWarning, match="hold NaN or infinity"):
        trainer.predict(Doubles(), DataLoader(torch.tensor([1.0, float("nan")])))
    written = (tmp_path / "new" / "out.jsonl").read_text()
    assert written.splitlines() == ['{"prediction": 2.0}', '{"prediction": null}']
    with pytest.raises(PEFTError, match=r"of a stream, .* Lightning does not know which"):
        trainer.predict(Doubles(), [DataLoader(torch.arange(2.0), batch_size=2), DataLoader(Stream(), batch_size=2)])
    with pytest.raises(PEFTError, match="is a directory; expected a file"):
        L.Trainer(**QUIET, callbacks=[PredictionWriter(str(tmp_path))]).predict(
            Doubles(), DataLoader(torch.arange(5.0))
        )


PARTS = """
import sys
import lightning as L
import torch
from torch.utils.data import DataLoader
from lightning_peft.callbacks import PredictionWriter

class Doubles(L.LightningModule):
    def predict_step(self, batch, batch_idx):
        return 2 * batch

trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, callbacks=[PredictionWriter(sys.argv[1])])
trainer.predict(Doubles(), DataLoader(torch.arange(7.0), batch_size=2))
from distributed_script import finish
finish()
"""


def test_two_processes_write_one_file(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(PARTS)
    run_script(str(tmp_path / "script.py"), tmp_path / "out.jsonl")
    written = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == [2.0 * n for n in range(7)]

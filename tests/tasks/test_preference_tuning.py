"""Preference tuning, judged by the formula of the paper in plain code, and by what it is for."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lightning_peft import (
    FullFinetuning,
    LoRA,
    PEFTError,
    PEFTStrategy,
    adapter_summary,
    inject,
    load_adapter,
    save_adapter,
)
from lightning_peft.tasks import PreferenceData, PreferenceTuning
from lightning_peft.tasks.preference_tuning import dpo_losses

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
TRL = (0.7726662755012512, -0.15229451656341553)
"""The mean loss and margin."""
PAIRS = [{"prompt": f"{n}?", "chosen": "yes " * (n % 2 + 1), "rejected": "no"} for n in range(8)]


@pytest.fixture
def model(tmp_path: Path) -> str:
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    raw.decoder = decoders.ByteLevel()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>").save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    size = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    t.LlamaForCausalLM(t.LlamaConfig(**size, num_attention_heads=4)).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_loss_is_that_of_the_paper() -> None:
    """Values of TRL 0.24's `dpo_loss` for beta 0.3: -logsigmoid(beta * ((pc - rc) - (pr - rr)))."""
    policy = torch.tensor([-12.5, -30.25, -11.0, -28.75], dtype=torch.float64)
    reference = torch.tensor([-13.0, -29.5, -10.5, -30.0], dtype=torch.float64)
    losses, margins = dpo_losses(policy, reference, 0.3)
    delta = [(-12.5 + 13.0) - (-11.0 + 10.5), (-30.25 + 29.5) - (-28.75 + 30.0)]
    expected = [torch.log1p(torch.exp(torch.tensor(-0.3 * d, dtype=torch.float64))) for d in delta]
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-12, atol=0)
    torch.testing.assert_close(margins, torch.tensor([0.3 * d for d in delta], dtype=torch.float64))


def with_known_values(path: str) -> torch.nn.Module:
    """Give the model at ``path`` an adapter, both with values that no generator of random numbers decides."""
    model = t.AutoModelForCausalLM.from_pretrained(path)
    for adapts in (False, True):
        with torch.no_grad():
            for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                parameter.copy_(0.4 * torch.sin(torch.arange(parameter.numel()) * 0.7 + number).view_as(parameter))
        if not adapts:
            model.save_pretrained(path)
            inject(model, LoRA(r=4))
    return model


def test_the_loss_is_that_of_trl(model: str, tmp_path: Path) -> None:
    """Values of TRL 1.16's DPOTrainer for this model, this adapter and these pairs: `tests/judges/trl_values.py`."""
    save_adapter(with_known_values(model), tmp_path / "adapter")
    module = PreferenceTuning(model, beta=0.5)
    load_adapter(module.model, tmp_path / "adapter")
    data = PreferenceData(val_file=write(tmp_path / "pairs.jsonl", PAIRS))
    trainer = L.Trainer(**QUIET, strategy=PEFTStrategy(LoRA(r=4), merge_on_train_end=False))
    found = trainer.validate(module, data, verbose=False)[0]
    assert found["val_loss"] == pytest.approx(TRL[0], abs=5e-6)
    assert found["val_margin"] == pytest.approx(TRL[1], abs=5e-6)


def log_probability(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """One answer at a time, without padding."""
    start, end = tokenizer(prompt)["input_ids"], tokenizer(f" {answer}<eos>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        scores = model(torch.tensor([start + end])).logits[0].double().log_softmax(-1)
    return sum(scores[len(start) + i - 1, token].item() for i, token in enumerate(end))


@pytest.mark.parametrize("method", [LoRA(r=4), FullFinetuning()], ids=["LoRA", "FullFinetuning"])
def test_the_reference_is_the_model_that_training_began_with(model: str, tmp_path: Path, method: Any) -> None:
    file = write(tmp_path / "pairs.jsonl", PAIRS)
    module, data = PreferenceTuning(model, beta=0.5, lr=3e-3), PreferenceData(file, val_file=file, batch_size=3)
    strategy = PEFTStrategy(method, merge_on_train_end=False)
    trainer = L.Trainer(**QUIET, strategy=strategy, max_epochs=8)
    trainer.fit(module, data)
    base = t.AutoModelForCausalLM.from_pretrained(model)
    gained = []
    for pair in PAIRS:
        gains = [
            log_probability(module.model, module.tokenizer, pair["prompt"], pair[answer])
            - log_probability(base, module.tokenizer, pair["prompt"], pair[answer])
            for answer in ("chosen", "rejected")
        ]
        gained.append(0.5 * (gains[0] - gains[1]))
    margins = torch.tensor(gained)
    assert margins.mean() > 0.5
    found = trainer.validate(module, data, verbose=False)[0]
    assert found["val_margin"] == pytest.approx(margins.mean().item(), rel=1e-4)
    assert found["val_loss"] == pytest.approx(-torch.nn.functional.logsigmoid(margins).mean().item(), rel=1e-4)
    assert found["val_accuracy"] == pytest.approx((margins > 0).float().mean().item())


def test_a_merged_model_is_judged_too_and_stays_merged(model: str, tmp_path: Path) -> None:
    """As a run leaves it; what is measured is what a run whose adapters stay beside the weights measures."""
    file, found = write(tmp_path / "pairs.jsonl", PAIRS), []
    for merges in (True, False):
        torch.manual_seed(0)
        module, data = PreferenceTuning(model, lr=3e-3), PreferenceData(file, val_file=file, test_file=file)
        strategy = PEFTStrategy(LoRA(r=4), merge_on_train_end=merges)
        trainer = L.Trainer(**QUIET, strategy=strategy, max_epochs=3)
        trainer.fit(module, data)
        weight = module.model.get_submodule("model.layers.0.self_attn.q_proj").weight
        before = weight.detach().clone()
        found.append([trainer.validate(module, data, verbose=False)[0], trainer.test(module, data, verbose=False)[0]])
        assert adapter_summary(module).merged is merges
        assert torch.allclose(weight, before, atol=1e-6)
    assert found[0][0]["val_margin"] != 0
    for merged, beside in zip(*found, strict=True):
        assert merged == pytest.approx(beside, rel=1e-5)


def test_without_adapters_there_is_no_reference(model: str, tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", PAIRS)
    trainer, data = L.Trainer(**QUIET, max_epochs=1), PreferenceData(file, val_file=file)
    for run in (trainer.fit, trainer.validate):
        with pytest.raises(PEFTError, match="PreferenceTuning has no adapters"):
            run(PreferenceTuning(model), datamodule=data)
    with pytest.raises(PEFTError, match="answers to compare and none to predict"):
        trainer.predict(PreferenceTuning(model), data)


TURN = {"role": "user", "content": "red?"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' and 'rejected' are the same; expected two answers"),
        ({"prompt": "a", "chosen": "b"}, "expected a field 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "field 'completion' is ' '"),
        (
            {
                "chosen": [TURN, {"role": "assistant", "content": "x"}],
                "rejected": [{**TURN, "content": "green?"}, {"role": "assistant", "content": "y"}],
            },
            "differ before the last turn",
        ),
    ],
)
def test_pairs_that_are_none(model: str, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    data = PreferenceData(val_file=write(tmp_path / "pairs.jsonl", [row]), tokenizer=model)
    with pytest.raises(PEFTError, match=rf"pairs\.jsonl:1.*{message}"):
        data.setup("validate")


def test_answers_that_differ_behind_the_end(model: str, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b" * 20 + "c", "rejected": "b" * 20 + "d"}]
    data = PreferenceData(val_file=write(tmp_path / "pairs.jsonl", rows), tokenizer=model, max_length=16)
    with pytest.raises(PEFTError, match="are the same within max_length=16 tokens"):
        data.setup("validate")


def test_prompts_that_stand_in_the_conversations_too(model: str, tmp_path: Path) -> None:
    answers = {name: [TURN, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    rows = [answers, {**answers, "prompt": [TURN]}, {**answers, "prompt": TURN["content"]}]
    data = PreferenceData(val_file=write(tmp_path / "pairs.jsonl", rows), tokenizer=model)
    data.setup("validate")
    first, *others = data.pairs["val"]
    assert others == [first, first]

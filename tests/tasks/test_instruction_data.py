"""`InstructionData` with `CausalLM`: chat templates, packing, and what is said about the data."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lightning_peft import LoRA, PEFTError, PEFTStrategy, PromptTuning
from lightning_peft.adapters.virtual_tokens.infix import IGNORED
from lightning_peft.tasks import CausalLM, InstructionData

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
LLAMA = {**SMALL, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)),
    "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(**SMALL, state_size=4)),
}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture(params=["llama"])
def model(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A tiny instruct model; the fixture's parameter says of which architecture."""
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    raw.decoder = decoders.ByteLevel()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = t.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"], chat_template=CHATML
    )
    words.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    made = MODELS[request.param]()
    made.generation_config.eos_token_id = words.eos_token_id
    made.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def file(tmp_path: Path) -> str:
    rows = [{"prompt": f"{n}?", "completion": "yes " * (n % 3 + 1)} for n in range(9)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def fit(module: CausalLM, data: InstructionData, method: Any = None, **options: Any) -> L.Trainer:
    trainer = L.Trainer(**QUIET, strategy=PEFTStrategy(method or LoRA(r=2)), max_epochs=1, **options)
    trainer.fit(module, data)
    return trainer


def test_an_instruct_model_is_trained_in_its_own_words(model: str, file: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(CausalLM(model), InstructionData(file))
    shown = "<|im_start|>user\n0?<|im_end|>\n<|im_start|>assistant\n[[yes <|im_end|>]]"
    assert (
        f"The first of 9 training examples as the model sees it; what is in [[ ]] is learned:\n{shown}" in caplog.text
    )


def test_without_its_template_prompts_are_used_as_they_are(model: str, file: str) -> None:
    data = InstructionData(val_file=file, tokenizer=model, chat_template=False)
    data.setup("validate")
    words = t.AutoTokenizer.from_pretrained(model)
    assert words.decode(data.examples["val"][0].ids) == "0? yes <|im_end|>"


def test_conversations_and_their_tokens_are_completed_alike(model: str, file: str) -> None:
    module, words = CausalLM(model, max_new_tokens=5), t.AutoTokenizer.from_pretrained(model)
    turns = [{"role": "user", "content": "3?"}]
    text = words.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    answers = module.generate([turns, text, words(text)["input_ids"]])
    assert len(set(answers)) == 1
    data = InstructionData(predict_file=file, test_file=file)
    predicted = L.Trainer(**QUIET).predict(module, data)
    assert predicted is not None
    assert predicted[0][3] == answers[0]
    assert "test_exact_match" in L.Trainer(**QUIET).test(module, data, verbose=False)[0]
    words.chat_template = None
    module.tokenizer.chat_template = None
    with pytest.raises(PEFTError, match="the tokenizer has no chat template"):
        module.generate([turns])


def test_packed_training_learns_as_much_from_an_epoch(model: str, file: str) -> None:
    """One step over all examples, by SGD: the same tokens with the same mean loss are the same step."""

    class Plain(CausalLM):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    trained = []
    for packing in (False, True):
        torch.manual_seed(0)
        module = Plain(model)
        data = InstructionData(file, batch_size=9, max_length=128, packing=packing)
        trainer = fit(module, data)
        assert trainer.global_step == 1
        batch = next(iter(data.train_dataloader()))
        assert (batch["labels"] != IGNORED).sum() == sum(len("yes ") * (n % 3 + 1) + 1 for n in range(9))
        assert len(batch["labels"]) == (9 if not packing else 3)
        trained.append({name: p.detach().clone() for name, p in module.named_parameters()})
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", ["mamba"], indirect=True)
def test_packing_is_refused_where_texts_would_mix(model: str, file: str) -> None:
    with pytest.raises(PEFTError, match=r"packing: MambaForCausalLM does not keep texts apart .* Set packing=False"):
        fit(CausalLM(model), InstructionData(file, packing=True), LoRA(r=2, target_modules=["x_proj"]))


def test_packing_is_refused_behind_a_prompt(model: str, file: str) -> None:
    with pytest.raises(PEFTError, match=r"packing: LlamaForCausalLM does not keep texts apart"):
        fit(CausalLM(model), InstructionData(file, packing=True), PromptTuning(num_virtual_tokens=4))


def test_what_is_cut_off_is_said_with_what_it_costs(model: str, file: str) -> None:
    data = InstructionData(val_file=file, tokenizer=model, max_length=30)
    with pytest.warns(
        UserWarning, match=r"3 of 9 examples in .* are cut off at max_length=30: 12 of 81 tokens to learn \(14\.8%\)"
    ):
        data.setup("validate")
    assert max(len(example.ids) for example in data.examples["val"]) == 30


def test_workers_that_are_spawned_get_what_puts_batches_together(model: str, file: str) -> None:
    data = InstructionData(file, predict_file=file)
    L.Trainer(strategy=PEFTStrategy(LoRA(r=2)), max_steps=1, **QUIET).fit(CausalLM(model), data)
    data.setup("predict")
    for loader in (data.train_dataloader(), data.predict_dataloader()):
        batch = [loader.dataset[0]]
        assert pickle.loads(pickle.dumps(loader.collate_fn))(batch).keys() == loader.collate_fn(batch).keys()

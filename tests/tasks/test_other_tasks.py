"""Encoder-decoders, labels for words, metrics of texts: judged by transformers' own loss and by plain counting."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from lightning_peft import LoRA, PEFTError, PEFTStrategy
from lightning_peft.callbacks import PredictionWriter
from lightning_peft.tasks import Seq2Seq, Seq2SeqData, TokenClassification, TokenData
from lightning_peft.tasks.answers.text_metrics import text_metrics

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
MODELS = {
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "bart": lambda: t.BartForConditionalGeneration(
        t.BartConfig(
            vocab_size=300,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            forced_eos_token_id=None,
            init_std=0.5,
        )
    ),
    "bert": lambda: t.BertModel(
        t.BertConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    ),
}


@pytest.fixture(params=["t5"])
def model(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A tiny model, with a tokenizer that ends texts as T5's does; the fixture's parameter says which."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({"<pad>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(letters)}}, []))
    raw.decoder = decoders.ByteLevel()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    words = t.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>")
    words.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    MODELS[request.param]().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SUMMARIES = [{"document": f"all about {word} and more", "summary": word} for word in ("red", "green", "blue", "grey")]


@pytest.mark.parametrize("model", ["t5", "bart"], indirect=True)
def test_an_encoder_decoder_learns_answers(model: str, tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", SUMMARIES)
    module = Seq2Seq(model, lr=2e-2, max_new_tokens=8, metrics=["exact_match", "rouge"])
    data = Seq2SeqData(file, file, file, file, prefix="say: ", batch_size=4)
    before = L.Trainer(**QUIET).validate(module, data, verbose=False)[0]["val_loss"]
    losses = []
    for row in SUMMARIES:  # one at a time, without padding
        inputs = module.tokenizer(f"say: {row['document']}", return_tensors="pt")
        labels = module.tokenizer(text_target=row["summary"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            losses += [module.model.eval()(**inputs, labels=labels).loss.item()] * labels.shape[1]
    assert before == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    trainer = L.Trainer(**QUIET, strategy=PEFTStrategy(LoRA(r=8)), max_epochs=60)
    trainer.fit(module, data)
    after = trainer.test(module, data, verbose=False)[0]
    assert after["test_loss"] < 0.7 * before
    predicted = [text for batch in trainer.predict(module, data) or [] for text in batch]
    right = [float(text == row["summary"]) for text, row in zip(predicted, SUMMARIES, strict=True)]
    assert after["test_exact_match"] == pytest.approx(sum(right) / 4)
    assert {"test_rouge1", "test_rouge2", "test_rougeL"} <= set(after)


def test_an_encoder_decoder_says_what_is_cut_off(model: str, tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", SUMMARIES)
    data = Seq2SeqData(val_file=file, tokenizer=model, max_length=12, max_answer_length=4)
    with pytest.warns(UserWarning, match="are cut off") as said:
        data.setup("validate")
    texts = " ".join(str(warning.message) for warning in said)
    assert "4 of 4 texts in" in texts
    assert "4 of 4 answers in" in texts


TAGGED = [
    {"tokens": ["Ann", "sees", "Bob"], "tags": ["NAME", "O", "NAME"]},
    {"tokens": ["rain"], "tags": ["O"]},
    {"tokens": ["Cy", "runs"], "tags": ["NAME", "O"]},
]


@pytest.mark.parametrize("model", ["bert"], indirect=True)
def test_words_are_labelled(model: str, tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", TAGGED)
    module, data = TokenClassification(model, num_labels=2, lr=2e-2), TokenData(file, file, file, file, batch_size=2)
    trainer = L.Trainer(**QUIET, strategy=PEFTStrategy(LoRA(r=4)), max_epochs=30)
    trainer.fit(module, data)
    predicted = [data.readable(batch) for batch in trainer.predict(module, data) or []]
    words = [tags for batch in predicted for tags in batch]
    assert [len(tags) for tags in words] == [3, 1, 2]
    assert words == [row["tags"] for row in TAGGED]
    found = trainer.test(module, data, verbose=False)[0]
    assert (found["test_accuracy"], found["test_f1"]) == (1.0, 1.0)


@pytest.mark.parametrize("model", ["bert"], indirect=True)
def test_the_first_part_of_a_word_alone_is_judged(model: str, tmp_path: Path) -> None:
    data = TokenData(write(tmp_path / "data.jsonl", TAGGED), val_file=str(tmp_path / "data.jsonl"), tokenizer=model)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    assert (batch["labels"] != -100).sum(1).tolist() == [3, 1, 2]
    parts = t.AutoTokenizer.from_pretrained(model).convert_ids_to_tokens(batch["input_ids"][0][batch["starts"][0]])
    assert parts == ["Ġ", "Ġ", "Ġ"]


@pytest.mark.parametrize("model", ["bert"], indirect=True)
def test_words_behind_the_end_are_told_of(model: str, tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", [*TAGGED, {"tokens": ["word"] * 9, "tags": ["O"] * 9}])
    data = TokenData(file, predict_file=file, tokenizer=model, max_length=24)
    trainer = L.Trainer(**QUIET, callbacks=[PredictionWriter(str(tmp_path / "out.jsonl"))])
    with pytest.warns(UserWarning, match=r"1 of 4 texts in .* are cut off at max_length=24"):
        trainer.predict(TokenClassification(model, num_labels=2), data)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [len(row["prediction"]) for row in rows] == [3, 1, 2, 9]
    # A word is a space and four letters, and the text ends with a token of its own.
    assert [label is None for label in rows[3]["prediction"]] == [False] * 5 + [True] * 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 words and 1 labels"),
        ({"tokens": "a b", "tags": ["O"]}, "field 'tokens' is 'a b'; expected a list of words"),
        ({"tokens": ["a"], "tags": [1.5]}, r"field 'tags' is \[1\.5\]; expected a list of texts or whole numbers"),
        ({"words": ["a"]}, r"expected labels in labels or "),
    ],
)
def test_what_is_no_tagged_text(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(PEFTError, match=rf"data\.jsonl:1.*{message}"):
        TokenData(write(tmp_path / "data.jsonl", [row])).setup("fit")


def test_metrics_by_name() -> None:
    made = text_metrics(["exact_match", "rouge", "bleu", "sacre_bleu", "chrf", "edit_distance", "word_error_rate"])
    for metric in made.values():
        metric.update(["the red apple is here now"], ["the red apple is here now"])
        metric.update(["a b c d"], ["a b c x"])
    values = {name: round(metric.compute().item(), 4) for name, metric in made.items()}
    assert values["exact_match"] == 0.5
    assert values["rouge1"] == 0.875  # (1 + 3/4) / 2
    assert values["rouge2"] == round((1 + 2 / 3) / 2, 4)
    assert values["rougeL"] == 0.875
    assert values["edit_distance"] == 0.5
    assert values["word_error_rate"] == 0.1
    # Of 10, 8, 6 and 4 n-grams 9, 7, 5 and 3 are right.
    assert values["bleu"] == pytest.approx((9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25, abs=1e-4)
    assert values["bleu"] == values["sacre_bleu"]
    with pytest.raises(PEFTError, match="there is no 'rogue'; expected some of rouge, exact_match"):
        text_metrics(["rogue"])
    with pytest.raises(PEFTError, match="metrics='bleu': expected a list"):
        text_metrics("bleu")


def test_settings_of_generation(model: str) -> None:
    assert Seq2Seq(model, generation={"num_beams": 2}, max_new_tokens=3).generate(["say"])
    with pytest.raises(PEFTError, match=r"generation=\{'warmth': 1\}: transformers refuses it"):
        Seq2Seq(model, generation={"warmth": 1}, max_new_tokens=3).generate(["say"])

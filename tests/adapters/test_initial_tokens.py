"""What prompts and prefixes start as, against HF PEFT and against the base model with the text before its input."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t
from families import CACHE, build, outputs
from modules import Llama, loader, trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from lightning_peft import (
    DoRA,
    LoRA,
    PEFTError,
    PEFTMethod,
    PEFTStrategy,
    PrefixTuning,
    PromptTuning,
    inject,
    load_adapter,
    save_adapter,
    set_adapter,
)
from lightning_peft.core.view import ModelView
from lightning_peft.storage.base_weights import materialise

TEXT = "is this review good or bad"
WORDS = ["<unk>", *TEXT.split(), *(f"w{number}" for number in range(43))]
FAMILIES = ("llama", "gpt2", "gemma3")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    t.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>").save_pretrained(path)
    return str(path)


def prompt(model: nn.Module) -> Tensor:
    return next(iter(ModelView(model).adapter_parameters.values()))


@pytest.mark.parametrize("number", [4, 6, 15])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_from_a_text_is_that_of_peft(family: str, number: int, tokenizer: str) -> None:
    """Cut to 4 tokens, taken as it is, repeated to 15."""
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=number,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=TEXT,
        tokenizer_name_or_path=tokenizer,
    )
    judge: Any = peft.get_peft_model(build(family)[0], config)
    expected = judge.prompt_encoder["default"].embedding.weight
    for options in ({"tokenizer_name_or_path": tokenizer}, {}):
        model = build(family)[0]
        model.config._name_or_path = tokenizer  # where from_pretrained found the model
        inject(model, PromptTuning(num_virtual_tokens=number, init_text=TEXT, **options))
        assert torch.equal(prompt(model), expected)


def test_other_prompts() -> None:
    model = build("llama")[0]
    rows = model.get_input_embeddings().weight

    def made(**options: Any) -> Tensor:
        fresh = build("llama")[0]
        inject(fresh, PromptTuning(num_virtual_tokens=5, **options), seed=1)
        return torch.cat(list(ModelView(fresh).adapter_parameters.values()))

    assert torch.equal(made(init_ids=[7, 9]), rows[[7, 9, 7, 9, 7]])
    assert torch.equal(made(init_ids=[7, 9, 11], num_infix_tokens=2), rows[[7, 9, 11, 7, 9, 11, 7]])
    drawn = made()
    assert all(any(torch.equal(row, other) for other in rows) for row in drawn)
    assert 0.5 < made(init="random").std() < 1.5
    assert 0.5 < made(init="random", every_layer=True)[5:].std() < 1.5


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_of_every_layer_start_as_the_layers_make_them(family: str) -> None:
    method = PromptTuning(num_virtual_tokens=5)
    (model, inputs), (other, _) = build(family), build(family)
    inject(model, method, seed=1)
    inject(other, PromptTuning(num_virtual_tokens=5, every_layer=True), seed=1)
    assert (outputs(model, inputs) - outputs(other, inputs)).abs().max() <= 1e-5
    assert (outputs(model, inputs) - outputs(build(family)[0], inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2", "bloom", "falcon", "opt", "phi3", "gpt_neox"])
def test_a_prefix_from_a_text_is_the_text_before_the_input(family: str) -> None:
    model, inputs = build(family)
    model.double().train()
    inject(model, PrefixTuning(num_virtual_tokens=6, init_ids=[7, 9, 11, 8]))
    assert all(part.training for part in model.modules())
    ids = inputs["input_ids"]
    text = torch.tensor([[7, 9, 11, 8, 7, 9]]).expand(len(ids), -1)
    judge = build(family)[0].double()
    expected = judge(input_ids=torch.cat([text, ids], dim=1)).logits[:, 6:]
    assert (model.eval()(**inputs).logits - expected).abs().max() <= 1e-9
    assert (expected - judge(input_ids=ids).logits).abs().max() > 1e-3


GENERATE: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"use_cache": False},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 5},
    "assisted": {"prompt_lookup_num_tokens": 2},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("options", GENERATE)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom"])
@pytest.mark.parametrize("cls", [PrefixTuning, PromptTuning])
def test_what_is_generated_is_what_the_base_generates_after_the_text(cls: Any, family: str, options: str) -> None:
    """With padding on the left of a row, which assisted generation does not allow: it takes one row."""
    model, inputs = build(family)
    rows = 1 if options == "assisted" else 2
    ids = inputs["input_ids"][:rows]
    mask = torch.ones_like(ids)
    mask[1:, :2] = 0
    text = torch.tensor([[7, 9, 11]]).expand(rows, -1)
    inject(model.double(), cls(num_virtual_tokens=3, init_ids=[7, 9, 11]))

    def generated(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        torch.manual_seed(0)
        given = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **GENERATE[options]}
        return model.generate(input_ids=ids, attention_mask=mask, **given)[:, ids.shape[1] :]

    if options == "static cache" and (cls is PromptTuning or family == "gemma3"):
        with pytest.raises(PEFTError, match="without cache_implementation"):
            generated(model, ids, mask)
        return
    found = generated(model, ids, mask)
    ids, mask = torch.cat([text, ids], dim=1), torch.cat([torch.ones_like(text), mask], dim=1)
    assert torch.equal(found, generated(build(family)[0].double(), ids, mask))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_prefix_from_a_text_is_that_of_peft(family: str, tokenizer: str, tmp_path: Path) -> None:
    model, inputs = build(family)
    method = PrefixTuning(num_virtual_tokens=5, init_text=TEXT, tokenizer_name_or_path=tokenizer)
    inject(model, method)
    judge = peft.get_peft_model(
        build(family)[0], peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ).eval()
    with torch.no_grad():
        result: Any = build(family)[0](input_ids=torch.tensor([[WORDS.index(word) for word in TEXT.split()]]))
    held = [(layer.keys, layer.values) for layer in result[CACHE].layers]
    expected = peft.initialize_kv_prefix_from_past_key_values(judge, past_key_values=held)
    assert (prompt(model) - expected).abs().max() <= 1e-6
    assert (outputs(judge, inputs) - outputs(model, inputs)).abs().max() <= 1e-5
    save_adapter(model, tmp_path / "prefix")
    fresh = build(family)[0]
    load_adapter(fresh, tmp_path / "prefix")
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))


def test_another_adapter_has_no_part_in_what_a_prefix_starts_as() -> None:
    model, inputs = build("llama")
    inject(model, LoRA(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for parameter in ModelView(model).adapter_parameters.values():
            parameter.fill_(0.5)
    inject(model, PrefixTuning(num_virtual_tokens=3, init_ids=[7, 9, 11]), name="prefix")
    set_adapter(model, "prefix")
    alone = build("llama")[0]
    inject(alone, PrefixTuning(num_virtual_tokens=3, init_ids=[7, 9, 11]))
    assert torch.equal(outputs(model, inputs), outputs(alone, inputs))


def test_a_saved_adapter_needs_no_tokenizer(tokenizer: str, tmp_path: Path) -> None:
    model, inputs = build("llama")
    method = PromptTuning(num_infix_tokens=2, init_text=TEXT, tokenizer_name_or_path=tokenizer)
    inject(model, method)
    save_adapter(model, tmp_path / "adapter")
    assert tokenizer not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    fresh = build("llama")[0]
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))


@pytest.mark.parametrize(
    "method",
    [
        PromptTuning(num_infix_tokens=2),
        PromptTuning(every_layer=True),
        PrefixTuning(init_ids=[3]),
    ],
    ids=["prompt", "layers", "prefix"],
)
def test_a_model_without_weights_is_refused(method: PEFTMethod) -> None:
    with torch.device("meta"):
        model = t.LlamaForCausalLM(build("llama")[0].config)
    inject(model, method)
    with pytest.raises(PEFTError, match="had no values yet"):
        materialise(model, torch.device("cpu"))


READING: dict[str, tuple[PEFTMethod, PEFTMethod]] = {
    "prompt": (PromptTuning(), PromptTuning(init="random")),
    "prefix": (PrefixTuning(init_ids=[3]), PrefixTuning()),
    "dora": (DoRA(r=2), LoRA(r=2)),
    "pissa": (LoRA(r=2, init="pissa"), LoRA(r=2)),
}


@pytest.mark.parametrize("name", READING)
def test_weights_that_come_later_are_no_start(name: str, tmp_path: Path) -> None:
    reading, other = READING[name]
    module = Llama()
    module.model.save_pretrained(tmp_path)
    with pytest.raises(PEFTError, match="base_weights are loaded after the injection"):
        trainer(tmp_path, PEFTStrategy(reading, base_weights=str(tmp_path))).fit(module, loader())
    trainer(tmp_path, PEFTStrategy(other, base_weights=str(tmp_path))).fit(Llama(), loader())


def test_a_sliding_window_keeps_too_little() -> None:
    config = t.MistralConfig(**{**vars(build("mistral")[0].config), "sliding_window": 4})
    with pytest.raises(PEFTError, match="fewer tokens than a sliding window"):
        inject(t.MistralForCausalLM(config), PrefixTuning(num_virtual_tokens=8, init_ids=[3, 4]))


def from_text(cls: Any, **options: Any) -> None:
    inject(build("llama")[0], cls(**{"init_text": TEXT, **options}))


@pytest.mark.parametrize("cls", [PromptTuning, PrefixTuning])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "does not say where its tokenizer is"),
        ({"tokenizer_name_or_path": "/nowhere"}, "no tokenizer could be read from '/nowhere'"),
        ({"init_text": ""}, "a text was expected"),
        ({"init_text": None, "init_ids": []}, "at least one token id"),
        ({"init_ids": [3]}, "at least one token id, or a text"),
        ({"init_text": None, "init_ids": [50]}, "the model has 50 tokens"),
        ({"init_text": None, "tokenizer_name_or_path": "x"}, "without init_text"),
    ],
)
def test_bad_input(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PEFTError, match=message):
        from_text(cls, **options)


@pytest.mark.parametrize("cls", [PromptTuning, PrefixTuning])
def test_a_text_without_tokens(cls: Any, tokenizer: str) -> None:
    with pytest.raises(PEFTError, match="has no tokens"):
        from_text(cls, init_text="  ", tokenizer_name_or_path=tokenizer)


def test_a_text_and_another_start_do_not_go_together() -> None:
    with pytest.raises(PEFTError, match="init='random' was given with a text"):
        PromptTuning(init="random", init_text=TEXT)
    with pytest.raises(PEFTError, match="prefix_projection=True"):
        PrefixTuning(prefix_projection=True, init_ids=[3])

"""Prefix and prompt tuning against HF PEFT, with padding, caches, beams and activation checkpointing."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t
from families import CACHE, build, outputs, randomise
from judges.hf_peft import VIRTUAL as METHODS
from judges.hf_peft import VIRTUAL_FAMILIES as FAMILIES
from judges.hf_peft import trainable_judge
from torch import Tensor, nn

from lightning_peft import PEFTError, PrefixTuning, PromptTuning, inject, load_adapter, save_adapter
from lightning_peft.core.view import ModelView

PADDING = {"none": [[1, 1, 1, 1, 1, 1, 1]] * 2, "left": [[0, 0, 1, 1, 1, 1, 1], [1] * 7], "right": [[1] * 5 + [0] * 2]}


def masked(model: nn.Module, inputs: dict[str, Any], padding: str) -> tuple[dict[str, Any], Tensor]:
    mask = torch.tensor(PADDING[padding])
    mask = mask.expand(2, -1) if len(mask) == 1 else mask
    return {**inputs, "attention_mask": mask}, mask.bool()


def injected(family: str, name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    model, inputs = build(family)
    model.to(dtype)
    inject(model, METHODS[name])
    draw(ModelView(model).adapter_parameters.values())
    return model, inputs


def draw(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def own_positions(logits: Tensor, name: str, prompt: int = 4) -> Tensor:
    return logits[:, prompt:] if name == "prompt" else logits


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_logits_and_gradients_are_those_of_peft(
    name: str, family: str, padding: str, dtype: torch.dtype, bound: float, tmp_path: Path
) -> None:
    model, inputs = injected(family, name, dtype)
    inputs, mask = masked(model, inputs, padding)
    save_adapter(model, tmp_path / "ours")
    judge = trainable_judge(family, tmp_path / "ours", model)
    ours, theirs = outputs(model, inputs), own_positions(outputs(judge, inputs), name)
    assert (ours - outputs(build(family)[0].to(dtype), inputs)).abs().max() > 1e-3
    assert (ours - theirs)[mask].abs().max() <= bound
    ours[mask].square().sum().backward()
    theirs[mask].square().sum().backward()
    ((_, parameter),) = ModelView(model).adapter_parameters.items()
    (other,) = [p for p in judge.parameters() if p.requires_grad]
    assert other.grad.abs().max() > 1e-6
    assert (parameter.grad - other.grad).abs().max() <= bound * other.grad.abs().max().clamp(min=1.0)

    judge.save_pretrained(tmp_path / "theirs")
    loaded = build(family)[0].to(dtype)
    load_adapter(loaded, tmp_path / "theirs")
    assert torch.equal(outputs(loaded, inputs), ours)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_that_of_peft(name: str, family: str, tmp_path: Path) -> None:
    model, inputs = injected(family, name)
    save_adapter(model, tmp_path / "ours")
    judge: Any = peft.PeftModel.from_pretrained(build(family)[0], tmp_path / "ours").eval()
    labels = inputs["input_ids"].clone()
    labels[:, :2] = -100
    ours, theirs = model(**inputs, labels=labels).loss, judge(**inputs, labels=labels).loss
    assert (ours - theirs).abs() <= 1e-5
    assert (ours - build(family)[0](**inputs, labels=labels).loss).abs() > 1e-4


GENERATE: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"use_cache": False},
    "beams": {"num_beams": 3},
}


def generated(model: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    return model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_generated_tokens_are_those_of_peft(name: str, family: str, tmp_path: Path) -> None:
    """peft's ``generate`` disagrees with its own forward on transformers 5.24, which is the judge here instead."""
    model, inputs = injected(family, name)
    inputs, _ = masked(model, inputs, "none")
    save_adapter(model, tmp_path / "ours")
    judge: Any = peft.PeftModel.from_pretrained(build(family)[0], tmp_path / "ours").eval()
    ids = inputs["input_ids"]
    for _ in range(8):
        following = judge(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, following], dim=1)
    assert torch.equal(generated(model, inputs), ids)
    assert torch.equal(generated(model, inputs, use_cache=False), ids)
    assert not torch.equal(generated(build(family)[0], inputs), ids)
    beams = generated(model, inputs, num_beams=3)
    assert torch.equal(beams, generated(model, inputs, num_beams=3, use_cache=False))


@pytest.mark.parametrize("options", GENERATE)
@pytest.mark.parametrize("family", [*FAMILIES, "opt", "bloom", "gemma3", "phi3", "falcon", "gpt_neox"])
@pytest.mark.parametrize("name", METHODS)
def test_padding_changes_nothing_that_is_generated(name: str, family: str, options: str) -> None:
    model, inputs = injected(family, name)
    ids = inputs["input_ids"]
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(10) >= 3).long().expand(2, -1)
    plain = generated(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **GENERATE[options])
    found = generated(model, {"input_ids": padded, "attention_mask": mask}, **GENERATE[options])
    assert torch.equal(found[:, 3:], plain)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_prefix_and_a_static_cache(family: str) -> None:
    model, inputs = injected(family, "prefix")
    inputs, _ = masked(model, inputs, "left")
    if family == "gemma3":
        with pytest.raises(PEFTError, match="without cache_implementation"):
            generated(model, inputs, cache_implementation="static")
        return
    assert torch.equal(generated(model, inputs, cache_implementation="static"), generated(model, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_under_activation_checkpointing_leaves_no_cache(family: str) -> None:
    """The configuration asks for a cache; the keys of a layer that runs twice would be in it twice."""
    losses = []
    for checkpointing in (False, True):
        model, inputs = injected(family, "prefix")
        model.config.use_cache = True
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        result = model.train()(**inputs, labels=inputs["input_ids"], use_cache=True)
        cache = t.DynamicCache(config=model.config)
        again = model(**inputs, labels=inputs["input_ids"], use_cache=True, **{CACHE: cache}).loss
        again.backward()
        (parameter,) = ModelView(model).adapter_parameters.values()
        losses.append((result.loss, again, parameter.grad))
        if checkpointing:
            assert cache.get_seq_length() == 0
            assert CACHE not in result or result[CACHE].get_seq_length() == 0
            # Without a gradient nothing runs twice: then the model has the cache that it would have alone.
            stock: Any = build(family)[0].train()
            stock.gradient_checkpointing_enable({"use_reentrant": False})
            with torch.no_grad():
                held = [part(**inputs, use_cache=True).get(CACHE) for part in (model, stock)]
            ours, theirs = (0 if cache is None else cache.get_seq_length() for cache in held)
            assert ours == theirs
    (plain, plain_again, gradient), (loss, again, checkpointed) = losses
    assert plain == plain_again == loss == again
    assert gradient.abs().max() > 1e-6
    assert (gradient - checkpointed).abs().max() <= 1e-7


@pytest.mark.parametrize("name", METHODS)
def test_a_filled_cache_and_activation_checkpointing_are_refused(name: str) -> None:
    model, inputs = injected("llama", name)
    cache = model(**inputs, use_cache=True)[CACHE]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(PEFTError, match="while activations are checkpointed"):
        model.train()(input_ids=inputs["input_ids"][:, :1], **{CACHE: cache})


@pytest.mark.parametrize("name", METHODS)
def test_virtual_tokens_in_pieces_are_refused(name: str) -> None:
    model, inputs = injected("llama", name)
    for parameter in ModelView(model).adapter_parameters.values():
        # As ZeRO-3 leaves them.
        parameter.ds_shape, parameter.ds_tensor = parameter.shape, parameter.data  # type: ignore[attr-defined]
        parameter.data = parameter.data.new_empty(0)
    with pytest.raises(PEFTError, match="ZeRO-3 has the virtual tokens in pieces"):
        model(**inputs)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("name", METHODS)
def test_texts_too_long_for_the_table_of_positions_are_refused(name: str, family: str) -> None:
    """4 virtual tokens leave 1020 of GPT-2's 1024 positions, and 60 of this OPT's 64."""
    model, _ = injected(family, name)
    limit = model.config.max_position_embeddings
    ids = torch.ones(1, limit - 3, dtype=torch.long)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-2], use_cache=True)[CACHE]
        model(input_ids=ids[:, :1], **{CACHE: cache})
    with pytest.raises(PEFTError, match=f"take {limit + 1} positions.*table of {limit}"):
        model(input_ids=ids)
    with pytest.raises(PEFTError, match=f"Cut the texts to {limit - 4} tokens"):
        model(input_ids=ids[:, :1], **{CACHE: cache})


def test_the_decoder_sees_a_prefix_as_taken_positions() -> None:
    model, inputs = injected("llama", "prefix")
    seen: list[int] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(kwargs[CACHE].get_seq_length())

    model.model.register_forward_pre_hook(look, with_kwargs=True)
    cache = model(**inputs, use_cache=True)[CACHE]
    model(input_ids=inputs["input_ids"][:, :1], **{CACHE: cache})
    assert seen == [4, 11]
    assert cache.get_seq_length() == 8


def test_a_text_that_keeps_its_positions() -> None:
    """It may be as long as the table of positions, and padding before it changes nothing."""
    model = t.GPT2LMHeadModel(t.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8)).double().eval()
    inject(model, PrefixTuning(num_virtual_tokens=8, keep_positions=True), seed=0)
    text = torch.tensor([[3, 4, 5]])
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "output_logits": True}
    options |= {"return_dict_in_generate": True, "min_new_tokens": 3, "max_new_tokens": 3}
    found = model.generate(text, **options)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), text], dim=1)
    again = model.generate(padded, attention_mask=(padded != 0).long(), **options)
    assert torch.equal(again.sequences[:, 2:], found.sequences)
    for one, other in zip(found.logits, again.logits, strict=True):
        assert (one - other).abs().max() <= 1e-12
    assert model(found.sequences[:, :1].expand(1, 8)).logits.shape[1] == 8
    bloom = t.BloomForCausalLM(t.BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=11))
    with pytest.raises(PEFTError, match="a BloomModel takes no position_ids"):
        inject(bloom, PrefixTuning(keep_positions=True))


def test_a_prompt_refuses_caches_that_it_is_not_in() -> None:
    model, inputs = injected("llama", "prompt")
    with pytest.raises(PEFTError, match="static cache"):
        generated(model, inputs, cache_implementation="static")
    cache = build("llama")[0](**inputs, use_cache=True)[CACHE]
    with pytest.raises(PEFTError, match="Begin with an empty cache"):
        model(input_ids=inputs["input_ids"][:, :1], **{CACHE: cache})
    cache = model(**inputs, use_cache=True)[CACHE]
    ids = torch.cat([inputs["input_ids"], inputs["input_ids"][:, :1]], dim=1)
    step = model(input_ids=ids[:, -1:], **{CACHE: cache}).logits
    assert (step - model(input_ids=ids).logits[:, -1:]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_sliding_windows(name: str) -> None:
    """Token by token, beyond the window, as in one pass."""
    config = t.MistralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        sliding_window=6,
    )
    model: Any = t.MistralForCausalLM(config).eval()
    inject(model, METHODS[name])
    draw(ModelView(model).adapter_parameters.values())
    ids = torch.randint(50, (2, 14), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache, steps = None, []
        for position in range(14):
            result = model(input_ids=ids[:, position : position + 1], use_cache=True, **{CACHE: cache})
            cache = result[CACHE]
            steps.append(result.logits)
    assert (torch.cat(steps, dim=1) - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_activation_checkpointing_changes_nothing(name: str, family: str, reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> tuple[float, dict[str, Tensor]]:
        model, inputs = injected(family, name)
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        return loss.item(), {key: p.grad for key, p in ModelView(model).adapter_parameters.items()}

    loss, plain = gradients(False)
    again, checkpointed = gradients(True)
    assert again == loss
    for key, gradient in plain.items():
        assert gradient.abs().max() > 1e-6
        assert (checkpointed[key] - gradient).abs().max() <= 1e-7, key


def test_a_projected_prefix_is_folded_on_save(tmp_path: Path) -> None:
    model, inputs = build("llama")
    inject(model, PrefixTuning(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=12))
    randomise(model)
    save_adapter(model, tmp_path / "ours")
    judge: Any = peft.PeftModel.from_pretrained(build("llama")[0], tmp_path / "ours").eval()
    assert (outputs(judge, inputs) - outputs(model, inputs)).abs().max() <= 1e-5
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=12
    )
    judge = peft.get_peft_model(build("llama")[0], config).eval()
    encoder, parts = judge.prompt_encoder["default"], ModelView(model).adapter_parameters
    pairs = {"virtual_tokens": encoder.embedding.weight, "down": encoder.transform[0].weight}
    pairs |= {"down_bias": encoder.transform[0].bias, "up": encoder.transform[2].weight}
    pairs |= {"up_bias": encoder.transform[2].bias}
    ours = {key: parts[f"model.peft.default.prefixes.{key}"] for key in pairs}
    assert len(ours) == len(parts)
    for key, other in pairs.items():
        other.data.copy_(ours[key])
    assert (outputs(judge, inputs) - outputs(model, inputs)).abs().max() <= 1e-5
    outputs(judge, inputs).square().sum().backward()
    outputs(model, inputs).square().sum().backward()
    for key, other in pairs.items():
        assert (ours[key].grad - other.grad).abs().max() <= 1e-5 * other.grad.abs().max().clamp(min=1.0), key
    judge.save_pretrained(tmp_path / "theirs")
    loaded = build("llama")[0]
    load_adapter(loaded, tmp_path / "theirs")
    assert (outputs(loaded, inputs) - outputs(judge, inputs)).abs().max() <= 1e-5


def test_parameter_counts() -> None:
    """SmolLM2-135M: 2 · 30 layers · 3 heads · 64 = 11,520 a token of a prefix; 576 a token of a prompt."""
    config = t.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    sizes = {
        PrefixTuning(num_virtual_tokens=7): 7 * 11_520,
        PrefixTuning(num_virtual_tokens=7, prefix_projection=True, encoder_hidden_size=100): 7 * 192
        + (192 * 100 + 100)
        + (100 * 11_520 + 11_520),
        PromptTuning(num_virtual_tokens=7): 7 * 576,
    }
    for method, expected in sizes.items():
        with torch.device("meta"):
            model = t.LlamaForCausalLM(config)
        inject(model, method)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrefixTuning(num_virtual_tokens=0), "at least 1"),
        (lambda: PromptTuning(num_virtual_tokens=-3), "at least 1"),
        (lambda: PrefixTuning(encoder_hidden_size=8), "prefix_projection=True"),
        (lambda: PrefixTuning(init_ids=[1], keep_positions=True), "keep_positions=True; its keys and values"),
        (lambda: PromptTuning(init="text"), "'vocabulary' or 'random'"),
        (lambda: PromptTuning(init_ids=[]), "at least one token id"),
        (lambda: inject(build("llama")[0], PromptTuning(init_ids=[50])), "the model has 50 tokens"),
        (lambda: inject(build("gpt2")[0], PrefixTuning(num_virtual_tokens=1024)), "1024 positions"),
        (lambda: inject(build("gpt2")[0], PromptTuning(num_virtual_tokens=2000)), "1024 positions"),
        (lambda: inject(build("clip")[0], PromptTuning()), "decoder-only"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(PEFTError, match=message):
        make()

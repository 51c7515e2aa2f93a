"""LoReFT against its equation in float64, applied by hand to the tokens that it is for."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from families import build
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lightning_peft import LoRA, LoReFT, PEFTError, PEFTMethod, PromptTuning, inject, merge
from lightning_peft.adapters.virtual_tokens.infix import answers
from lightning_peft.core.view import ModelView

LENGTH = 7
FAMILIES = ("llama", "gpt2", "qwen2", "opt")
# Of each row: the first column of the text, of its answer, and the column after the last.
ROWS = {"none": [(0, 4, 7), (0, 2, 7)], "left": [(2, 5, 7), (0, 3, 7)], "right": [(0, 4, 7), (0, 2, 5)]}


def made(family: str, **options: Any) -> Any:
    model = build(family)[0].double()
    inject(model, LoReFT(r=3, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ModelView(model).adapter_parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


@contextmanager
def by_hand(plain: nn.Module, model: nn.Module, places: Tensor) -> Iterator[None]:
    """Within it, the layers of ``plain`` give what equation 2 makes of theirs in ``places`` ``[batch, tokens]``."""
    with ExitStack() as stack:
        for name, _, slot in ModelView(model).slots:
            if not hasattr(adapter := slot["default"], "rotation"):
                continue
            rows = torch.linalg.qr(adapter.rotation.detach().mT)
            r = (rows.Q * rows.R.diagonal().sign()).mT
            assert (r @ r.mT - torch.eye(3)).abs().max() <= 1e-12
            w, b = adapter.source.detach(), adapter.source_bias.detach()

            def changed(module: nn.Module, args: Any, output: Any, r: Tensor = r, w: Tensor = w, b: Tensor = b) -> Any:
                h = output[0] if isinstance(output, tuple) else output
                new = h.clone()
                for row, column in places.nonzero():
                    new[row, column] = h[row, column] + r.T @ (w @ h[row, column] + b - r @ h[row, column])
                return (new, *output[1:]) if isinstance(output, tuple) else new

            stack.callback(plain.get_submodule(name).register_forward_hook(changed).remove)
        yield


def batch(family: str, padding: str) -> tuple[dict[str, Tensor], Tensor]:
    ids, columns = build(family)[1]["input_ids"][:, :LENGTH], torch.arange(LENGTH)
    mask = torch.stack([(columns >= first) & (columns < last) for first, _, last in ROWS[padding]])
    labels = torch.full_like(ids, -100)
    for row, (_, answer, last) in enumerate(ROWS[padding]):
        labels[row, answer:last] = ids[row, answer:last]
    return {"input_ids": ids, "attention_mask": mask.long()}, labels


def places(padding: str, first: int, last: int) -> Tensor:
    found = torch.zeros(2, LENGTH, dtype=torch.bool)
    for row, (start, answer, stop) in enumerate(ROWS[padding]):
        end = answer if last else stop
        found[row, start : min(start + first, end)] = True
        found[row, max(end - last, start) : end] = True
    return found


@pytest.mark.parametrize("padding", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("first", "last"), [(2, 0), (1, 2), (0, 1)])
def test_it_is_its_equation(first: int, last: int, family: str, padding: str) -> None:
    model, plain = made(family, prefix_positions=first, suffix_positions=last), build(family)[0].double()
    inputs, labels = batch(family, padding)
    found = model(**inputs, labels=labels).logits
    with by_hand(plain, model, places(padding, first, last)):
        expected = plain(**inputs).logits
    real = inputs["attention_mask"] != 0
    assert (found - expected)[real].abs().max() <= 1e-9
    assert (plain(**inputs).logits - expected)[real].abs().max() > 1e-3


def test_it_starts_as_the_identity_in_the_layers_that_are_named() -> None:
    model, (plain, inputs) = build("llama")[0], build("llama")
    hosts = inject(model, LoReFT(layers=[1]))
    assert hosts == ["model", "model.layers.1"]
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert merge(model).kept


def test_it_compiles_as_one_program() -> None:
    model, (plain, inputs) = made("llama", prefix_positions=2), build("llama")
    expected = model(**inputs).logits
    assert (expected - plain.double()(**inputs).logits).abs().max() > 1e-3
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**inputs).logits, expected)


def test_generating_goes_on_from_the_changed_prompt() -> None:
    """What is generated is no prompt: with a cache, each token is what the whole text with these labels gives."""
    model = made("llama", prefix_positions=2, suffix_positions=2)
    prompt = torch.tensor([[5, 9, 3, 17]])
    text = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    labels = torch.where(torch.arange(text.shape[1]) < 4, -100, text)
    logits = model(input_ids=text, labels=labels).logits
    assert torch.equal(logits[0, 3:-1].argmax(-1), text[0, 4:])
    with answers(labels):
        assert torch.equal(model(input_ids=text).logits, logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activations_that_are_computed_again(reentrant: bool) -> None:
    inputs, labels = batch("llama", "left")
    found = []
    for checkpointed in (False, True):
        model = made("llama", prefix_positions=1, suffix_positions=2).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        found.append([p.grad for p in ModelView(model).adapter_parameters.values()])
    for plain, again in zip(*found, strict=True):
        assert plain.abs().max() > 0
        assert (plain - again).abs().max() <= 1e-12


@pytest.mark.parametrize(
    "method",
    [
        LoReFT(r=3, prefix_positions=2),
        PromptTuning(num_virtual_tokens=3, num_infix_tokens=2, every_layer=True),
        LoRA(r=3, alora_invocation_tokens=[5]),
    ],
    ids=["loreft", "prompt_tuning", "alora"],
)
def test_two_calls_before_layers_are_computed_again(method: PEFTMethod) -> None:
    """In wrappers around layers and what hangs on them: each call's are computed with what is known of that call."""
    found = []
    for wrap in (False, True):
        model = build("llama")[0].double().train()
        inject(model, method, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in ModelView(model).adapter_parameters.values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        if wrap:
            apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
        total = 0
        for sign, padding in ((1, "left"), (-2, "right")):
            inputs, labels = batch("llama", padding)
            inputs["input_ids"] = inputs["input_ids"].scatter(1, torch.tensor([[2 + sign], [3]]), 5)
            total = total + sign * model(**inputs, labels=labels, use_cache=False).loss
        total.backward()
        found.append([p.grad for p in ModelView(model).adapter_parameters.values()])
    assert max(plain.abs().max() for plain in found[0]) > 1e-3
    assert max((plain - again).abs().max() for plain, again in zip(*found, strict=True)) <= 1e-12


def test_without_labels_the_end_of_a_prompt_is_not_known() -> None:
    inputs, _ = batch("llama", "none")
    model = made("llama", suffix_positions=1).train()
    with pytest.raises(PEFTError, match=r"LoReFT: the model was called without labels in training.*its last tokens"):
        model(**inputs)
    with pytest.raises(PEFTError, match=r"LoReFT: labels were given that are answers from a text's first token on"):
        model(**inputs, labels=inputs["input_ids"])
    made("llama").train()(**inputs)  # the beginning of a text is known
    with pytest.raises(PEFTError, match=r"LoReFT: an attention mask of shape \[2, 1, 7, 7\] was given"):
        made("llama")(input_ids=inputs["input_ids"], attention_mask=torch.ones(2, 1, 7, 7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0 was given"),
        ({"prefix_positions": -1}, "prefix_positions=-1 was given"),
        ({"prefix_positions": 0}, "one of them is at least 1"),
        ({"r": 33}, "r=33 was given, but hidden states have 32"),
    ],
)
def test_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(PEFTError, match=f"LoReFT: .*{message}"):
        inject(build("llama")[0], LoReFT(**options))

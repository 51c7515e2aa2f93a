"""Infix tokens and activations in every layer, against the base model called with embeddings put together here."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from families import build, outputs
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_peft import LoRA, PEFTError, PromptTuning, inject, load_adapter, save_adapter
from lightning_peft.adapter import adapter_parameters
from lightning_peft.infix import answers
from lightning_peft.virtual_tokens import find_decoder

PREFIX, INFIX, LENGTH = 3, 2, 7
METHODS = {
    "infix": PromptTuning(num_virtual_tokens=PREFIX, num_infix_tokens=INFIX),
    "layers": PromptTuning(num_virtual_tokens=PREFIX, num_infix_tokens=INFIX, every_layer=True),
    "prefix layers": PromptTuning(num_virtual_tokens=PREFIX, every_layer=True),
}
FAMILIES = ("llama", "gpt2", "qwen2")
MORE = (*FAMILIES, "opt", "bloom", "gemma3", "phi3", "falcon", "gpt_neox")
# Of each row: the first column of the text, of its answer, and the column after the last.
ROWS = {"none": [(0, 4, 7), (0, 2, 7)], "left": [(2, 5, 7), (0, 3, 7)], "right": [(0, 4, 7), (0, 2, 5)]}


def injected(family: str, name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """A model, token ids, and the trained tensors: those of the prefix, the infix, and each layer but the first."""
    model, inputs = build(family)
    model.to(dtype)
    inject(model, METHODS[name])
    generator = torch.Generator().manual_seed(5)
    found = adapter_parameters(model)
    with torch.no_grad():
        for parameter in found.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model, inputs["input_ids"], found


def base(family: str, dtype: torch.dtype = torch.float64) -> Any:
    return build(family)[0].to(dtype)


@contextmanager
def given_to_layers(model: Any, states: list[Tensor], columns: Tensor) -> Iterator[None]:
    """Within it, every layer but the first finds ``states`` in ``columns`` of its input."""
    decoder = find_decoder(model, "")
    with ExitStack() as stack:
        for name, state in zip(decoder.layers()[1:], states, strict=False):

            def replaced(module: nn.Module, args: tuple[Any, ...], state: Tensor = state) -> tuple[Any, ...]:
                hidden = args[0].clone()
                hidden[:, columns] = state
                return (hidden, *args[1:])

            stack.callback(model.get_submodule(name).register_forward_pre_hook(replaced).remove)
        yield


def judged(model: Any, ids: Tensor, prompt: int, found: dict[str, Tensor]) -> Tensor:
    """Logits ``[tokens, vocabulary]`` of one text without padding, by the base model."""
    virtual = [tensor for name, tensor in found.items() if name.endswith("_embeddings")]
    prefix, infix = (*virtual, virtual[0][:0])[:2]
    embeds = model.get_input_embeddings()(ids)
    embeds = torch.cat([prefix, embeds[:prompt], infix, embeds[prompt:]])
    places = torch.arange(len(embeds))
    text = (places >= PREFIX) & ~((places >= PREFIX + prompt) & (places < PREFIX + prompt + len(infix)))
    states = [tensor for name, tensor in found.items() if name.endswith("activations")]
    with given_to_layers(model, states, places[~text]):
        logits: Tensor = model(inputs_embeds=embeds[None]).logits[0]
    kept = places[text]
    # The token before the answer is followed by what the last infix token predicts.
    kept[prompt - 1] = PREFIX + prompt + len(infix) - 1
    return logits[kept]


def arguments(ids: Tensor, padding: str) -> tuple[dict[str, Tensor], Tensor]:
    """Ids, mask and positions, and labels that show the answers."""
    columns, labels = torch.arange(LENGTH), torch.full_like(ids, -100)
    mask = torch.stack([(columns >= first) & (columns < last) for first, _, last in ROWS[padding]])
    for row, (_, answer, last) in enumerate(ROWS[padding]):
        labels[row, answer:last] = ids[row, answer:last]
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    found = {"input_ids": ids, "attention_mask": mask.long()}
    return {**found, "position_ids": positions} if padding == "left" else found, labels


@pytest.mark.parametrize("padding", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_logits_gradients_and_loss(name: str, family: str, padding: str) -> None:
    model, ids, found = injected(family, name)
    inputs, labels = arguments(ids, padding)
    result, judge = model(**inputs, labels=labels), base(family)
    copies = {key: tensor.detach().clone().requires_grad_() for key, tensor in found.items()}
    ours, theirs = [], []
    for row, (first, answer, last) in enumerate(ROWS[padding]):
        expected = judged(judge, ids[row, first:last], answer - first, copies)
        assert (result.logits[row, first:last] - expected).abs().max() <= 1e-9
        for losses, logits in ((theirs, expected), (ours, result.logits[row, first:last])):
            losses.append(cross_entropy(logits[answer - first - 1 : -1], ids[row, answer:last], reduction="none"))
    loss = torch.cat(theirs).mean()
    assert (result.loss - loss).abs() <= 1e-6  # transformers takes the loss in float32
    loss.backward()
    torch.cat(ours).mean().backward()
    assert len(found) == {"infix": 2, "layers": 3, "prefix layers": 2}[name]
    for key, copy in copies.items():
        assert copy.grad.abs().max() > 1e-6, key
        assert (found[key].grad - copy.grad).abs().max() <= 1e-9, key
    with answers(labels):
        assert torch.equal(model(**inputs).logits, result.logits)


def generated(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(input_ids=ids, attention_mask=mask, **options)


@pytest.mark.parametrize("family", MORE)
@pytest.mark.parametrize("name", METHODS)
def test_generated_tokens(name: str, family: str) -> None:
    """Greedy decoding with padding on the left, against passes of the base model over all that there is so far."""
    model, ids, found = injected(family, name)
    judge = base(family)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    new = generated(model, ids, mask)[:, LENGTH:]
    with torch.no_grad():
        for row, first in enumerate((2, 0)):
            text, size = ids[row, first:], LENGTH - first
            for _ in range(6):
                text = torch.cat([text, judged(judge, text, size, found)[-1].argmax()[None]])
            assert torch.equal(new[row], text[size:])
    assert not torch.equal(new, generated(judge, ids, mask)[:, LENGTH:])


@pytest.mark.parametrize("name", METHODS)
def test_beams(name: str) -> None:
    """Three beams for two texts find what they find for each text alone, and no worse an answer than one beam."""
    model, ids, found = injected("llama", name)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    beams = generated(model, ids, mask, num_beams=3)
    assert torch.equal(beams[:1, 2:], generated(model, ids[:1, 2:], mask[:1, 2:], num_beams=3))
    assert torch.equal(beams[1:], generated(model, ids[1:], mask[1:], num_beams=3))
    judge = base("llama")

    def score(text: Tensor) -> float:
        logits = judged(judge, text, 5, found)[4:-1].log_softmax(-1)
        return float(logits.gather(1, text[5:, None]).sum())

    assert score(beams[0, 2:]) >= score(generated(model, ids, mask)[0, 2:])

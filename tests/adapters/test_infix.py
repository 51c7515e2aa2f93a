"""Infix tokens and activations in every layer, against the base model called with embeddings put together here."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from families import CACHE, build
from modules import Llama, assert_same
from resuming import straight_and_resumed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_peft import PEFTError, PromptTuning, adapter_state_dict, inject, load_adapter
from lightning_peft.adapters.virtual_tokens.infix import answers
from lightning_peft.adapters.virtual_tokens.virtual_tokens import find_decoder
from lightning_peft.core.view import ModelView
from lightning_peft.tasks.answers.answer_loss import answer_logits

PREFIX, INFIX, LENGTH = 3, 2, 7
METHODS = {
    "infix": PromptTuning(num_virtual_tokens=PREFIX, num_infix_tokens=INFIX),
    "layers": PromptTuning(num_virtual_tokens=PREFIX, num_infix_tokens=INFIX, every_layer=True),
    "prefix layers": PromptTuning(num_virtual_tokens=PREFIX, every_layer=True),
}
FAMILIES = ("llama", "gpt2", "qwen2")
MORE = ("opt", "bloom", "gemma3", "phi3", "falcon", "gpt_neox")
# Of each row: the first column of the text, of its answer, and the column after the last.
ROWS = {"none": [(0, 4, 7), (0, 2, 7)], "left": [(2, 5, 7), (0, 3, 7)], "right": [(0, 4, 7), (0, 2, 5)]}


def injected(family: str, name: str) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """A model, token ids, and the trained tensors: those of the prefix, the infix, and each layer but the first."""
    model, inputs = base(family), build(family)[1]
    inject(model, METHODS[name])
    generator = torch.Generator().manual_seed(5)
    found = ModelView(model).adapter_parameters
    with torch.no_grad():
        for parameter in found.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model, inputs["input_ids"], found


def base(family: str) -> Any:
    return build(family)[0].double()


@contextmanager
def given_to_layers(model: Any, states: list[Tensor], columns: Tensor) -> Iterator[None]:
    """Within it, every layer but the first finds ``states`` in ``columns`` of its input."""
    decoder = find_decoder(ModelView(model), "")
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
    padded = torch.where(inputs["attention_mask"] == 0, ids, labels)
    with answers(padded):
        assert torch.equal(model(**inputs).logits, result.logits)


def generated(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(input_ids=ids, attention_mask=mask, **options)


@pytest.mark.parametrize(
    ("name", "family"),
    [*((name, family) for name in METHODS for family in FAMILIES), *(("layers", family) for family in MORE)],
)
def test_generated_tokens(name: str, family: str) -> None:
    """Greedy decoding with padding on the left, against passes of the base model over all that there is so far."""
    model, ids, found = injected(family, name)
    judge = base(family)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    steps = generated(model, ids, mask, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        for row, first in enumerate((2, 0)):
            text, size = ids[row, first:], LENGTH - first
            for step in steps.logits:
                expected = judged(judge, text, size, found)[-1]
                # generate gives them in float32.
                assert (step[row] - expected).abs().max() <= 1e-6
                text = torch.cat([text, expected.argmax()[None]])
            assert torch.equal(steps.sequences[row, first:], text)


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


def test_a_text_goes_on_from_a_cache() -> None:
    model, ids, found = injected("llama", "layers")
    begun = model(input_ids=ids[:, :4], use_cache=True)
    step = model(input_ids=ids[:, 4:], attention_mask=torch.ones_like(ids), **{CACHE: begun[CACHE]})
    for row in range(2):
        expected = judged(base("llama"), ids[row], 4, found)
        assert (step.logits[row] - expected[4:]).abs().max() <= 1e-9
        assert (begun.logits[row] - expected[:4]).abs().max() <= 1e-9


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_activation_checkpointing(name: str, family: str, reentrant: bool) -> None:
    """Two forward passes with different prompts before one backward pass."""

    def gradients(checkpointing: bool) -> list[Tensor]:
        model, ids, found = injected(family, name)
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        losses = []
        for padding in ("none", "right"):
            inputs, labels = arguments(ids, padding)
            losses.append(model.train()(**inputs, labels=labels).loss)
        sum(losses).backward()  # type: ignore[union-attr]
        return [parameter.grad for parameter in found.values()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert plain.abs().max() > 1e-6
        assert (checkpointed - plain).abs().max() <= 1e-9


def test_a_classifier_reads_the_last_infix_token() -> None:
    config = t.LlamaConfig(**{**vars(build("llama")[0].config), "num_labels": 3, "pad_token_id": 0})
    torch.manual_seed(0)
    model: Any = t.LlamaForSequenceClassification(config).double().eval()
    ids, labels = torch.randint(3, 50, (2, LENGTH)), torch.tensor([0, 2])
    ids[1, 5:] = 0
    inject(model, METHODS["infix"])
    prefix, infix = ModelView(model).adapter_parameters.values()
    result = model.train()(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels)
    result.loss.backward()
    assert infix.grad.abs().max() > 1e-6
    judge: Any = t.LlamaForSequenceClassification(config).double().eval()
    judge.load_state_dict({k: v for k, v in model.state_dict().items() if ".peft." not in k})
    for row, size in enumerate((7, 5)):
        embeds = torch.cat([prefix, judge.get_input_embeddings()(ids[row, :size]), infix])
        hidden = judge.model(inputs_embeds=embeds[None]).last_hidden_state[0, -1]
        assert (judge.score(hidden) - result.logits[row]).abs().max() <= 1e-9


def test_the_tasks_show_where_answers_begin() -> None:
    model, ids, _ = injected("llama", "infix")
    inputs, labels = arguments(ids, "left")
    logits, targets = answer_logits(model.train(), ids, inputs["attention_mask"], labels)
    assert (cross_entropy(logits, targets) - model(**inputs, labels=labels).loss).abs() <= 1e-6


class Answering(Llama):
    """Learns answers after prompts of different lengths."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.global_step)
        ids = torch.randint(32, (2, 6), generator=generator)
        labels = torch.where(torch.arange(6) >= torch.tensor([[2], [4]]), ids, -100)
        loss: Tensor = self.model(input_ids=ids, labels=labels).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def test_fit_save_load_and_resume(tmp_path: Path) -> None:
    straight, resumed = straight_and_resumed(tmp_path, Answering, METHODS["layers"])
    assert_same(adapter_state_dict(straight), adapter_state_dict(resumed))
    module = Answering()
    load_adapter(module, tmp_path / "straight" / "last")
    assert_same(adapter_state_dict(straight), adapter_state_dict(module))
    ids = torch.arange(6)[None]
    expected = straight.model.eval()(input_ids=ids).logits  # type: ignore[operator, union-attr]
    assert torch.equal(module.model.eval()(input_ids=ids).logits, expected)
    assert not torch.equal(Answering().model(input_ids=ids).logits, expected)


def call(train: bool = False, **options: Any) -> None:
    model, ids, _ = injected("llama", "infix")
    model.train(train)(**{"input_ids": ids, **options})


def generate(**options: Any) -> None:
    # A text that repeats itself, so that looking up what followed before finds a candidate.
    ids = torch.tensor([[3, 4, 5, 3, 4, 5, 3]])
    generated(injected("llama", "infix")[0], ids, torch.ones_like(ids), **options)


def go_on_from_uneven_prompts() -> None:
    model, ids, _ = injected("llama", "infix")
    mask = arguments(ids, "right")[0]["attention_mask"]
    cache = model(input_ids=ids, attention_mask=mask, use_cache=True)[CACHE]
    model(input_ids=ids[:, :1], attention_mask=torch.cat([mask, mask[:, :1]], dim=1), **{CACHE: cache})


ONES = torch.ones(2, LENGTH, dtype=torch.long)
REFUSED: dict[str, tuple[Any, str]] = {
    "training without labels": (lambda: call(train=True), "called without labels in training"),
    "no cache": (lambda: generate(use_cache=False), "called without labels with use_cache=False"),
    "assisted": (lambda: generate(prompt_lookup_num_tokens=2), "called without labels with logits_to_keep"),
    "static cache": (lambda: generate(cache_implementation="static"), "Generate without cache_implementation"),
    "no prompt": (lambda: call(labels=ONES), "answers from a text's first token on"),
    "other labels": (lambda: call(labels=ONES[:, 1:]), r"labels of shape \[2, 6\]"),
    "uneven prompts": (go_on_from_uneven_prompts, "Pad them on the left"),
    "negative": (lambda: PromptTuning(num_infix_tokens=-1), "num_infix_tokens=-1 was given"),
    "too many": (
        lambda: inject(build("gpt2")[0], PromptTuning(num_virtual_tokens=1000, num_infix_tokens=24)),
        "1024 virtual tokens were asked for, but the model has 1024 positions",
    ),
    "trained whole": (
        lambda: inject(build("llama")[0], METHODS["layers"], train_also=["model.layers.1"]),
        "train_also trains 'model.layers.1' whole",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused(case: str) -> None:
    run, message = REFUSED[case]
    with pytest.raises(PEFTError, match=message):
        run()

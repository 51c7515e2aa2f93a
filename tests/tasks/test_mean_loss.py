"""The loss that is computed in the memory of the scores: equal to `cross_entropy`, in less than half of its memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.measure import peak_bytes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_peft import LoRA, inject
from lightning_peft.tasks.answers import mean_loss as module
from lightning_peft.tasks.answers.answer_loss import answer_logits, answer_loss
from lightning_peft.tasks.answers.mean_loss import mean_loss

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 60,
}


@pytest.fixture(autouse=True)
def chunks_of_seven_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 7 * 60)


def scores(dtype: torch.dtype, head: Any = lambda x: x) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, the scores that a head makes of them, and targets, of which some are to be ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 10, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(60, 16, generator=generator).to(dtype)
    targets = torch.randint(60, (3, 10), generator=generator)
    targets[0, :4] = targets[:, -1] = -100
    return hidden, head(nn.functional.linear(hidden, weight)), targets


@pytest.mark.parametrize("head", [lambda x: x, torch.tanh, lambda x: 3 * torch.tanh(x / 3), lambda x: x[:, 1:]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_loss_and_its_gradient(dtype: torch.dtype, head: Any) -> None:
    """Heads that keep what they return, and those that return a view, too."""
    found = []
    for loss in (
        mean_loss,
        lambda s, t: cross_entropy(s.flatten(0, 1).to(torch.promote_types(dtype, torch.float32)), t.flatten()),
    ):
        hidden, made, targets = scores(dtype, head)
        value = loss(made, targets[:, -made.shape[1] :])
        (100 * value).backward()
        found.append((value, hidden.grad))
    (value, gradient), (expected, theirs) = found
    torch.testing.assert_close(value, expected)
    # One rounding of the scores' gradient.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
    assert gradient is not None
    assert (gradient - theirs).norm() <= tolerance * theirs.norm()


def test_small_gradients_of_float16_do_not_vanish() -> None:
    """What a gradient scaler multiplies the loss by is there before anything is rounded."""
    grads = []
    for loss in (mean_loss, lambda s, t: cross_entropy(s.flatten(0, 1).float(), t.flatten())):
        made = torch.zeros(1, 1000, 60, dtype=torch.float16).requires_grad_()
        (2.0**16 * loss(made * 1, torch.zeros(1, 1000, dtype=torch.long))).backward()
        grads.append(made.grad)
    assert grads[0] is not None
    assert grads[0].any(dim=-1).all()
    torch.testing.assert_close(*grads)


def test_it_is_differentiated_once() -> None:
    _, made, targets = scores(torch.float32)
    loss = mean_loss(made, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="its memory used"):
        loss.backward()


def test_without_gradients_the_scores_stay() -> None:
    _, made, targets = scores(torch.float32)
    before = made.detach().clone()
    with torch.no_grad():
        loss = mean_loss(made, targets)
    assert torch.equal(made, before)
    torch.testing.assert_close(loss, cross_entropy(before.flatten(0, 1), targets.flatten()))
    assert mean_loss(made, torch.full_like(targets, -100)).isnan()  # as torch's


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_ignored_may_be_anything(value: float) -> None:
    hidden, made, targets = scores(torch.float32)
    with torch.no_grad():
        made[0, 1] = value
    mean_loss(made, targets).backward()
    assert hidden.grad is not None
    other, again, _ = scores(torch.float32)
    cross_entropy(again.flatten(0, 1), targets.flatten()).backward()
    torch.testing.assert_close(hidden.grad, other.grad)


def test_a_batch_without_answers_has_no_gradient() -> None:
    hidden, made, targets = scores(torch.float32)
    loss = mean_loss(made, targets.fill_(-100))
    assert loss.isnan()
    loss.backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_scores_that_are_used_otherwise() -> None:
    """What is kept of them is what they were; what else is computed of what they have become is refused."""
    _, made, targets = scores(torch.float32)
    loss = mean_loss(made, targets)
    with pytest.raises(RuntimeError, match="something else was computed of the scores after their loss"):
        (loss + made.square().mean()).backward()
    _, made, targets = scores(torch.float32)
    made.retain_grad()
    before = made.detach().clone()
    mean_loss(made, targets).backward()
    assert made.equal(before)
    assert made.grad is not None


@pytest.mark.parametrize("looked_at", [lambda model: model, lambda model: model.lm_head])
def test_a_hook_sees_the_scores(looked_at: Any) -> None:
    model, kept = LlamaForCausalLM(LlamaConfig(**SMALL)), []
    inject(model, LoRA(r=2, target_modules="all-linear"))
    batch = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"]).logits[:, :-1]
    looked_at(model).register_forward_hook(lambda *call: kept.append(getattr(call[-1], "logits", call[-1])))
    answer_loss(model, batch["input_ids"], None, batch["labels"]).backward()
    torch.testing.assert_close(kept[0][:, :5].detach(), expected)


def test_memory_and_not_more_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores and a few rows, where `cross_entropy` has three tensors of their size."""
    monkeypatch.setattr(module, "_CHUNK", 2**12)
    hidden, weight = torch.randn(2, 128, 16, requires_grad=True), torch.randn(1024, 16)
    targets = torch.randint(1024, (2, 128))
    size = 4 * targets.numel() * 1024

    def peak(loss: Any) -> float:
        return peak_bytes(lambda: loss(nn.functional.linear(hidden, weight), targets).backward()) / size

    assert peak(mean_loss) < 1.25
    assert peak(lambda s, t: cross_entropy(s.flatten(0, 1), t.flatten())) > 2.9


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_model_learns_the_same(kind: str, side: str, tmp_path: Path) -> None:
    """Against `cross_entropy` of the scores of answers, in a model whose head is plain and in one that caps scores."""
    torch.manual_seed(0)
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**SMALL))
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0))
    inject(model, LoRA(r=2))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(60, (2, 9))
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :4] = -100
    empty = slice(0, 3) if side == "left" else slice(6, 9)
    mask[1, empty], labels[1, empty] = 0, -100
    given = (model, ids, mask, labels)
    gradients = []
    for loss in (lambda: answer_loss(*given), lambda: cross_entropy(*answer_logits(*given))):
        model.zero_grad()
        value = loss()
        value.backward()
        gradients.append([value, *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)

"""The mean loss of a language model's tokens, computed where its scores are: nothing else is as large as they are.

torch's `cross_entropy` keeps the logarithm of every probability for the backward pass, and makes two gradients of that
size there, all in float32. Here a few rows at a time become the gradient of their own loss, where the scores were.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from lightning_peft.adapters.virtual_tokens.infix import IGNORED

# Fake tensors stand for whole ones where memory is planned.
_WHOLE = (Tensor, FakeTensor)
_CHUNK = 2**22
"""So many scores are looked at together: 16 MB of float32."""

# What these nodes return they do not keep, so that it may be written to; the others (tanh, for one) may.
_KEEP_NOTHING = frozenset({"UnsafeViewBackward0", "MmBackward0", "AddmmBackward0", "AddBackward0", "ToCopyBackward0"})


def mean_loss(logits: Tensor, targets: Tensor, overwrites: bool = True) -> Tensor:
    """Return the mean of the negative logarithms of the targets' probabilities, as `cross_entropy` computes it.

    It is for scores that nobody looks at afterwards, and to be differentiated once, by autograd's engine.

    Args:
        logits: Scores, (…, vocabulary).
        targets: The tokens, (…); `IGNORED` where there is none.
        overwrites: Whether the scores may be overwritten, if they require a gradient.
    """
    plain = type(logits) not in _WHOLE or not logits.is_contiguous() or torch.compiler.is_compiling()
    if plain or not (logits.requires_grad and torch.is_grad_enabled()):
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy(wide.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)
    loss: Tensor = _MeanLoss.apply(logits, targets.flatten(), overwrites)[0]
    return loss


class _MeanLoss(torch.autograd.Function):
    """Scores and targets ↦ the mean loss, and the scores, which are its gradient by now."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, overwrites: bool) -> tuple[Tensor, ...]:
        # Unscaled gradients of float16 would vanish.
        in_place = (
            overwrites
            and not logits.retains_grad
            and logits.dtype != torch.float16
            and type(logits.grad_fn).__name__ in _KEEP_NOTHING
        )
        ctx.dtype, rows = logits.dtype, logits.detach().flatten(0, -2)
        wider = torch.promote_types(logits.dtype, torch.float32)
        gradient = rows if in_place else torch.empty_like(rows, dtype=wider)
        counted = targets != IGNORED
        places, count = targets.where(counted, 0)[:, None], counted.sum()
        total = torch.zeros((), dtype=wider, device=logits.device)
        step = max(1, _CHUNK // rows.shape[1])
        for start in range(0, len(rows), step):
            chunk = slice(start, start + step)
            chosen, place = counted[chunk, None], places[chunk]
            scores = rows[chunk].log_softmax(-1, dtype=wider)
            total -= scores.gather(1, place).where(chosen, 0).sum()
            scores.exp_().scatter_add_(1, place, -torch.ones_like(place, dtype=wider))
            # Filled, not multiplied by zero: what is ignored may be NaN.
            gradient[chunk] = scores.div_(count.clamp(min=1)).masked_fill_(~chosen, 0)
        ctx.gradient = gradient.view(logits.shape)
        ctx.set_materialize_grads(False)
        if not in_place:
            return (total / count,)
        ctx.mark_dirty(logits)
        return total / count, logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *of_scores: Tensor | None) -> tuple[Tensor, None, None]:
        if any(other is not None for other in of_scores):
            raise RuntimeError(
                "mean_loss: something else was computed of the scores after their loss, which has overwritten them. "
                "Compute the loss by torch's cross_entropy of answer_logits, in a training_step of your own."
            )
        if ctx.gradient is None:
            raise RuntimeError("mean_loss: the gradient has been taken, and its memory used. Compute the loss anew.")
        gradient, ctx.gradient = ctx.gradient.mul_(grad), None
        return gradient.to(ctx.dtype), None, None

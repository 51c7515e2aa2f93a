"""The two products of a low-rank change with backward passes written by hand, and the rule for when they are used.

Beside a layer they launch six kernels and keep, for the backward pass, its input and ``[r, tokens]`` numbers:

    forward    H = A Xᵀ           Y += s · Hᵀ Bᵀ
    backward   dH = s · Bᵀ dYᵀ    dB = s · dYᵀ Hᵀ    dA = dH X    dX += dHᵀ A

H has its long side last: on CPUs the other way round takes up to four times as long.

:class:`Reduce` also hands the input on to the layer. What comes back through that is the layer's own dX, a tensor of
nobody else's, to which it adds in place. Layers that share an input share X, and one product with all their A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn import functional

from lightning_peft.low_rank.dropout import drop, kept_fraction
from lightning_peft.weights import is_conv1d

_NARROW = (torch.float16, torch.bfloat16)
# Fake tensors stand for whole ones where memory is planned.
_WHOLE = (Tensor, nn.Parameter, FakeTensor)


def applies(base: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether the products here are right for ``base``; where they are not, the plain expression is used.

    They need a layer that returns a new tensor, and tensors that are whole: no pieces on several processes, no
    wrappers. ``torch.compile`` fuses the plain expression by itself, and forward-mode differentiation and
    ``torch.func`` take it apart.

    Args:
        base: The adapted module.
        x: Its input.
        a: A, or several.
        b: B, or several.
    """
    if torch.compiler.is_compiling():
        return False
    dtype, own = compute_dtype(x), a.dtype
    return (
        (type(base) is nn.Linear or is_conv1d(base))
        and "forward" not in base.__dict__
        and not base._backward_hooks
        and type(x) in _WHOLE
        and type(a) in _WHOLE
        and type(b) in _WHOLE
        and b.dtype == own
        and not hasattr(a, "ds_id")
        and (x.dtype == own == dtype or (dtype in _NARROW and {x.dtype, own} <= {dtype, torch.float32}))
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer computes with ``x``."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


class Reduce(torch.autograd.Function):
    """x, A_1 … A_n, B_1 … B_n ↦ x, A_1 xᵀ, …, A_n xᵀ, B_1, …, B_n, all in the dtype in which the layers compute.

    x ``[..., in]``, A_i ``[r_i, in]``, B_i ``[out_i, r_i]``, A_i xᵀ ``[r_i, tokens]``. The B_i pass through to be cast
    together with the A_i; where there is nothing to cast ``None`` is returned for them, and for x if it needs no
    gradient. Dropout zeroes elements of x for all A_i alike.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: float, *matrices: Tensor) -> tuple[Tensor | None, ...]:
        """Return x for the layers, the products, and the B_i."""
        dtype, count = compute_dtype(x), len(matrices) // 2
        every_a = matrices[:count]
        ctx.ranks, ctx.own, ctx.x_dtype = [a.shape[0] for a in every_a], matrices[0].dtype, x.dtype
        ctx.shape, ctx.kept, ctx.casts = x.shape, kept_fraction(dropout, x.device), matrices[0].dtype != dtype
        ctx.set_materialize_grads(False)
        read = x.to(dtype)
        reducing, every_b = _cast(matrices, dtype) if ctx.casts else (_joined(every_a), (None,) * count)
        rows = _rows(read)
        rows, mask, scale = drop(rows, dropout) if dropout else (rows, None, 1.0)
        products = _scaled_product(reducing, rows.T, scale)
        trains_a = any(ctx.needs_input_grad[2 : 2 + count])
        # Joining A again is cheaper than keeping a copy; casting it is not.
        ctx.save_for_backward(read if trains_a else None, mask, reducing if ctx.casts else None, *every_a)
        handed_on = read if ctx.needs_input_grad[0] or read is not x else None
        if handed_on is not None and not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(handed_on)
        return handed_on, *products.split(ctx.ranks), *every_b

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return dX, the dA_i and the dB_i, in the dtypes that came in."""
        read, mask, reducing, *every_a = ctx.saved_tensors
        count = len(every_a)
        of_b = [None if g is None else g.to(ctx.own, memory_format=torch.contiguous_format) for g in grads[count:]]
        given = next((g for g in grads[:count] if g is not None), None)
        if given is None:
            return None if dx is None else dx.to(ctx.x_dtype), None, *(None,) * count, *of_b
        dh = _joined([_or_zeros(g, given, r) for g, r in zip(grads, ctx.ranks, strict=False)])
        of_a: Sequence[Tensor | None] = (None,) * count
        if read is not None:
            rows = _rows(read)
            rows = rows if mask is None else rows * mask
            of_every_a = _scaled_product(dh, rows, 1 / ctx.kept).to(ctx.own).split(ctx.ranks)
            of_a = [None if g is None else of for g, of in zip(grads, of_every_a, strict=False)]
        if ctx.needs_input_grad[0]:
            # The joined copy has no graph, which the second derivative needs.
            if reducing is None or torch.is_grad_enabled():
                reducing = _joined(every_a).to(dh.dtype)
            dx = _add_product(dx, dh, reducing, mask, ctx.kept).view(ctx.shape).to(ctx.x_dtype)
        return dx, None, *of_a, *of_b


class Expand(torch.autograd.Function):
    """y, h, B ↦ y + s · hᵀ Bᵀ, in place unless y is a view; y ``[..., out]``, h ``[r, tokens]``, B ``[out, r]``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
        """Return the sum."""
        ctx.save_for_backward(h, b)
        ctx.scale = scale
        if y._is_view():
            # Autograd would answer a change of a view with copies of its gradient.
            return torch.addmm(_rows(y), h.T, b.T, alpha=scale).view(y.shape)
        ctx.mark_dirty(y)
        _rows(y).addmm_(h.T, b.T, alpha=scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dY as it is, dh and dB."""
        h, b = ctx.saved_tensors
        rows = _rows(dy)
        dh = _scaled_product(b.T, rows.T, ctx.scale)
        return dy, dh, _of_b(rows, h, ctx.scale) if ctx.needs_input_grad[2] else None, None


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return y + s · (x Aᵀ) Bᵀ, in place, without a graph; x ``[..., in]``, y ``[..., out]``."""
    # For one token at a time, where calls cost more than what they compute.
    if not (x.dtype == a.dtype == y.dtype):
        x, a, b = x.to(y.dtype), a.to(y.dtype), b.to(y.dtype)
    _rows(y).addmm_(_rows(functional.linear(x, a)), b.t(), alpha=scale)
    return y


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _of_b(dy: Tensor, h: Tensor, scale: float) -> Tensor:
    if dy.device.type != "cpu":
        return _scaled_product(dy.T, h.T, scale)
    # Autograd copies what is laid out like this, which costs far less: a product with few columns is slow on CPUs.
    return _scaled_product(h, dy, scale).T


def _cast(matrices: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return all A, joined, and every B, cast to ``dtype`` by one kernel."""
    sizes = [m.numel() for m in matrices]
    flat = torch.empty(sum(sizes), dtype=dtype, device=matrices[0].device)
    torch.cat([m.reshape(-1) for m in matrices], out=flat)
    count = len(matrices) // 2
    of_a, *of_b = flat.split([sum(sizes[:count]), *sizes[count:]])
    return of_a.view(-1, matrices[0].shape[1]), [f.view_as(m) for f, m in zip(of_b, matrices[count:], strict=True)]


def _or_zeros(grad: Tensor | None, other: Tensor, rank: int) -> Tensor:
    return other.new_zeros(rank, other.shape[1]) if grad is None else grad


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return scale · left right; with beta = 0 the first argument is not read."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _add_product(dx: Tensor | None, dh: Tensor, a: Tensor, mask: Tensor | None, kept: float) -> Tensor:
    """Return dx + dhᵀ A, where ``mask`` kept it; in place if nobody differentiates the backward pass."""
    if dx is None:
        product = dh.T @ a
        return product if mask is None else product * mask / kept
    if torch.is_grad_enabled() or not dx.is_contiguous():
        return dx + _add_product(None, dh, a, mask, kept).view(dx.shape)
    if mask is None:
        _rows(dx).addmm_(dh.T, a)
    else:
        _rows(dx).addcmul_(dh.T @ a, mask, value=1 / kept)
    return dx

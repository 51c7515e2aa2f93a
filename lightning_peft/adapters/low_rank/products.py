"""The two products of a low-rank change with a backward pass written by hand, and the rule for when they are used.

Beside a layer they launch six kernels and keep, for the backward pass, its input and ``[r, tokens]`` numbers:

    forward    H = A Xᵀ           Y += s · Hᵀ Bᵀ
    backward   dH = s · Bᵀ dYᵀ    dB = s · dYᵀ Hᵀ    dA = dH X    dX += dHᵀ A

H has its long side last: on CPUs the other way round takes up to four times as long.

A frozen layer is called without a graph, and its dX = dY W computed here as well: it is a tensor of nobody else's, to
which can be added in place, and one node of autograd's graph serves a layer. Layers that share an input share X; the
first of them, :class:`First`, computes one product with all their A, :class:`Following` adds the others'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from lightning_peft.adapters.low_rank.dropout import drop, drop_again, kept_fraction
from lightning_peft.tensors.weights import is_conv1d, weight_of

# From so many elements of an input on, the backward pass by hand spares time: measured in stacks of projections.
_MANY_ON_CPU, _MANY = 2**16, 2**23
_NARROW = (torch.float16, torch.bfloat16)
# Fake tensors stand for whole ones where memory is planned.
_WHOLE = (Tensor, nn.Parameter, FakeTensor)


def is_large(x: Tensor, drops: bool) -> bool:
    """Whether the kernels that read ``x`` take longer than Python needs to launch them.

    Where they do not, the plain expression is faster: autograd's own functions launch more kernels, but from C++. With
    dropout they keep a copy of ``x`` for each layer, and are left to what is small on any device.
    """
    count = x.numel()
    # What is small on every device is so without a look at the device, which takes as long as all else here.
    return count >= _MANY_ON_CPU and (drops or count >= _MANY or x.device.type == "cpu")


def product_dtype(base: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> torch.dtype | None:
    """Return the dtype in which to compute the products here beside ``base``; ``None`` where they are not right.

    Then the plain expression is used. The products need a layer that returns a new tensor, and tensors that are whole:
    no pieces on several processes, no wrappers. ``torch.compile`` fuses the plain expression by itself, and
    forward-mode differentiation and ``torch.func`` take it apart.

    Args:
        base: The adapted module.
        x: Its input.
        a: A, or several.
        b: B, or several.
    """
    if torch.compiler.is_compiling() or not (
        (type(base) is nn.Linear or is_conv1d(base))
        and "forward" not in base.__dict__
        # Nobody else may look at what goes in: it has no graph.
        and len(base._forward_pre_hooks) == len(base._forward_hooks) == 1
        and not base._backward_hooks
        and not _has_any_global_hook()
        and type(base.weight) in _WHOLE
        and type(x) in _WHOLE
        and type(a) in _WHOLE
        and type(b) in _WHOLE
        and "ds_id" not in a.__dict__
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
    ):
        return None
    dtype, given, own = compute_dtype(x), x.dtype, a.dtype
    if b.dtype != own:
        return None
    if given == own == dtype or (dtype in _NARROW and {given, own} <= {dtype, torch.float32}):
        return dtype
    return None


def frozen_matrix(base: nn.Module) -> Tensor | None:
    """Return the weight of a layer that :func:`product_dtype` allows as ``[out, in]``, if the layer is frozen."""
    weight, bias = weight_of(base), base.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    return weight if type(base) is nn.Linear else weight.t()


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer computes with ``x``."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


class First(torch.autograd.Function):
    """y, x, A_1 … A_n, B_1 … B_n ↦ y + s · H_1ᵀ B_1ᵀ, H_1, …, H_n, B_2, …, B_n, x, where H_i = A_i xᵀ.

    y ``[..., out]``, x ``[..., in]``, A_i ``[r_i, in]``, B_i ``[out_i, r_i]``, H_i ``[r_i, tokens]``. y is changed in
    place unless it is a view. Where the layers compute in another dtype than that of the matrices, these are cast by
    one kernel and B_2 … B_n returned; otherwise the latter neither come nor go. x returns only if it was cast. Dropout
    zeroes elements of x for all A_i alike.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        fixed: tuple[Tensor, Tensor | None, float, float, int],
        *matrices: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return the sum, the products, and what was cast.

        Args:
            ctx: Autograd's.
            y: What the layer returned.
            x: What it was to be called with.
            fixed: What has no gradient (autograd takes time for every argument): x without its graph in the dtype in
                which the layer computes; the weight ``[out, in]`` if it is frozen, for dX; s; the probability of an
                element to be zeroed; n.
            matrices: A_1 … A_n, then B_1, then B_2 … B_n if they are to be cast.
        """
        ctx.set_materialize_grads(False)
        read, weight, scale, dropout, count = fixed
        every_a, own_b, dtype, needs = matrices[:count], matrices[count], read.dtype, ctx.needs_input_grad
        ctx.scale, ctx.dropout, ctx.shape, ctx.x_dtype = scale, dropout, x.shape, x.dtype
        casts = own_b.dtype != dtype
        reducing, (b, *others) = _cast(matrices, count, dtype) if casts else (_joined(every_a), (own_b,))
        rows, mask, left = drop(_rows(read), dropout) if dropout else (_rows(read), None, 1.0)
        product = _scaled_product(reducing, rows.t(), left)
        products = (product,) if count == 1 else product.split_with_sizes([len(a) for a in every_a])
        result = _add(ctx, y, products[0], b, scale)
        cast_x = () if ctx.x_dtype == dtype else (read.detach(),)
        ctx.save_for_backward(
            (cast_x[0] if cast_x else x) if any(needs[3 : 3 + count]) else None,
            mask,
            # Joining A again is cheaper than keeping a copy; casting it is not.
            reducing if casts else None,
            b if casts else None,
            weight if needs[1] else None,
            products[0],
            own_b,
            *every_a,
        )
        return result, *products, *others, *cast_x

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return dY as it is where the layer has a graph of its own, dX, the dA_i and the dB_i."""
        x, mask, reducing, b, weight, h, own_b, *every_a = ctx.saved_tensors
        count, needs = len(every_a), ctx.needs_input_grad
        casts_x = ctx.x_dtype != h.dtype
        every_dh, of_cast_b = [*grads[:count]], grads[count : len(grads) - casts_x]
        kept = kept_fraction(ctx.dropout, h.device) if ctx.dropout else 1.0
        dx = of_own_b = None
        # What was cast or joined has no graph, which the second derivative needs.
        again = torch.is_grad_enabled()
        if dy is not None:
            of_y, dtype = _rows(dy), h.dtype
            b = own_b.to(dtype) if b is None or again else b
            dh = _scaled_product(b.t(), of_y.t(), ctx.scale)
            every_dh[0] = dh if every_dh[0] is None else every_dh[0] + dh
            of_own_b = _of_b(of_y, h, ctx.scale).to(own_b.dtype) if needs[3 + count] else None
            dx = None if weight is None else of_y @ weight.to(dtype)
        given = next((dh for dh in every_dh if dh is not None), None)
        of_a: Sequence[Tensor | None] = (None,) * count
        if given is not None:
            dh = _joined([_or_zeros(g, a, given) for g, a in zip(every_dh, every_a, strict=True)])
            if x is not None:
                rows, left = (_rows(x), 1.0) if mask is None else drop_again(_rows(x), mask, kept)
                of_every_a = _scaled_product(dh, rows, left).to(own_b.dtype)
                of_a = (of_every_a,) if count == 1 else of_every_a.split_with_sizes([len(a) for a in every_a])
                of_a = [None if g is None else of for g, of in zip(every_dh, of_a, strict=True)]
            if needs[1]:
                reducing = _joined(every_a).to(dh.dtype) if reducing is None or again else reducing
                dx = _add_product(dx, dh, reducing, mask, kept)
        if casts_x and grads[-1] is not None:
            dx = _rows(grads[-1]) if dx is None else dx + _rows(grads[-1])
        of_b = [None if g is None else g.to(own_b.dtype, memory_format=torch.contiguous_format) for g in of_cast_b]
        return dy if needs[0] else None, _like(dx, ctx.shape, ctx.x_dtype), None, *of_a, of_own_b, *of_b


class Following(torch.autograd.Function):
    """y, H, B ↦ y + s · Hᵀ Bᵀ; y ``[..., out]``, H ``[r, tokens]``, B ``[out, r]``, all as for :class:`First`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor | None, h: Tensor, b: Tensor, scale: float) -> Tensor:
        """Return the sum."""
        ctx.scale, ctx.shape, ctx.x_dtype, needs = scale, x.shape, x.dtype, ctx.needs_input_grad
        ctx.save_for_backward(weight if needs[1] else None, h, b)
        return _add(ctx, y, h, b, scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dY as it is where the layer has a graph of its own, dX without what comes from H, dH and dB."""
        weight, h, b = ctx.saved_tensors
        rows, needs = _rows(dy), ctx.needs_input_grad
        dx = None if weight is None else rows @ weight.to(h.dtype)
        dh = _scaled_product(b.t(), rows.t(), ctx.scale)
        db = _of_b(rows, h, ctx.scale) if needs[4] else None
        return dy if needs[0] else None, _like(dx, ctx.shape, ctx.x_dtype), None, dh, db, None


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return y + s · (x Aᵀ) Bᵀ, in place, without a graph; x ``[..., in]``, y ``[..., out]``."""
    # For one token at a time, where calls cost more than what they compute. Casts are not kept for the next token: that
    # the values are others, autograd's counter does not tell if they were written through ``.data``.
    if not (x.dtype == a.dtype == y.dtype):
        x, a, b = x.to(y.dtype), a.to(y.dtype), b.to(y.dtype)
    _rows(y).addmm_(torch.mm(_rows(x), a.t()), b.t(), alpha=scale)
    return y


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _like(dx: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    return None if dx is None else dx.view(shape).to(dtype)


def _add(ctx: Any, y: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
    if y._is_view() or not y.is_contiguous():
        # Autograd would answer a change of a view with copies of its gradient.
        return torch.addmm(_rows(y), h.t(), b.t(), alpha=scale).view(y.shape)
    ctx.mark_dirty(y)
    _rows(y).addmm_(h.t(), b.t(), alpha=scale)
    return y


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _of_b(dy: Tensor, h: Tensor, scale: float) -> Tensor:
    if dy.device.type != "cpu":
        return _scaled_product(dy.T, h.T, scale)
    # Autograd copies what is laid out like this, which costs far less: a product with few columns is slow on CPUs.
    return _scaled_product(h, dy, scale).T


def _cast(matrices: Sequence[Tensor], count: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return the ``count`` A, joined, and every B, cast to ``dtype`` by one kernel."""
    sizes = [m.numel() for m in matrices]
    flat = torch.empty(sum(sizes), dtype=dtype, device=matrices[0].device)
    torch.cat([m.reshape(-1) for m in matrices], out=flat)
    of_a, *of_b = flat.split([sum(sizes[:count]), *sizes[count:]])
    return of_a.view(-1, matrices[0].shape[1]), [f.view_as(m) for f, m in zip(of_b, matrices[count:], strict=True)]


def _or_zeros(grad: Tensor | None, a: Tensor, other: Tensor) -> Tensor:
    return other.new_zeros(len(a), other.shape[1]) if grad is None else grad


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return scale · left right; with beta = 0 the first argument is not read."""
    return torch.mm(left, right) if scale == 1 else torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _add_product(dx: Tensor | None, dh: Tensor, a: Tensor, mask: Tensor | None, kept: float) -> Tensor:
    """Return dx + dhᵀ A, where ``mask`` kept it; in place if nobody differentiates the backward pass."""
    if dx is None or torch.is_grad_enabled():
        product = dh.t() @ a
        product = product if mask is None else product * mask / kept
        return product if dx is None else dx + product
    return dx.addmm_(dh.t(), a) if mask is None else dx.addcmul_(dh.t() @ a, mask, value=1 / kept)

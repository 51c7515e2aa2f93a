"""Parameters that are whole beside others in pieces: torch's kernels for many tensors want lists of one kind.

Under FSDP2 and tensor parallelism adapters may be whole where what else is trained is in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Adam, Optimizer

from lightning_peft.errors import PEFTError
from lightning_peft.tensors.sharding import by_kind, whole

_WHOLE_ONLY = frozenset({"Adafactor", "Muon", "Rprop"})
"""Names of optimizers, torch's and those of others, that fail or err on parameters in pieces (torch 2.13)."""


def clip_by_norm(optimizer: Optimizer, limit: float) -> None:
    """Scale gradients so that the norm of all of them, on all processes, is at most ``limit``."""
    kinds = by_kind(_with_gradients(optimizer))
    norms = [whole(nn.utils.get_total_norm([_gradient(p) for p in parameters])) for parameters in kinds]
    for parameters in kinds:
        nn.utils.clip_grads_with_norm_(parameters, limit, nn.utils.get_total_norm(norms))


def clip_by_value(optimizer: Optimizer, limit: float) -> None:
    """Limit each element of the gradients to ``limit`` in size."""
    for parameters in by_kind(_with_gradients(optimizer)):
        nn.utils.clip_grad_value_(parameters, limit)


@contextmanager
def mixture_explained() -> Iterator[None]:
    """Within it the user's own clipping of parameters of several kinds at once fails in words.

    Raises:
        PEFTError: What torch refuses there.
    """
    try:
        yield
    except RuntimeError as error:
        if "aten._foreach_" not in str(error) or "mixed torch.Tensor and DTensor" not in str(error):
            raise
        raise PEFTError(
            "Of what is trained, some is whole on every process and some in pieces, which torch's kernels for many "
            f"tensors do not take together ({error}). Instead of torch.nn.utils.clip_grad_norm_ or clip_grad_value_ "
            "call self.clip_gradients(optimizer, gradient_clip_val=…), or set the Trainer's gradient_clip_val."
        ) from error


@contextmanager
def stepped_by_kind(optimizer: Optimizer) -> Iterator[None]:
    """Within it ``optimizer.step`` takes the parameters of each kind by themselves, where a param group has several.

    Groups are divided for the update alone: closures, hooks, schedulers and checkpoints find them as they were made.
    """
    divided = [part for group in optimizer.param_groups for part in _parts(group)]
    if len(divided) == len(optimizer.param_groups):
        yield
        return
    own, step = vars(optimizer).get("step"), optimizer.step

    def stepped(closure: Any = None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        groups = optimizer.param_groups
        parts = [_parts(group) for group in groups]
        optimizer.param_groups = [part for found in parts for part in found]
        try:
            step()
        finally:
            optimizer.param_groups = groups
        for group, (first, *_) in zip(groups, parts, strict=True):
            # Some optimizers count steps, or estimate a learning rate, in the group.
            group.update({key: value for key, value in first.items() if key not in ("params", "param_names")})
        return result

    optimizer.step = stepped  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del optimizer.step
        else:
            optimizer.step = own  # type: ignore[method-assign]


def refuse_pieces(optimizer: Optimizer) -> None:
    """Check that ``optimizer`` steps a parameter in pieces as it would the whole.

    Raises:
        PEFTError: It looks at more than one element at a time, or torch has its kernel for whole tensors only.
    """
    kind = type(optimizer)
    whole_only = _WHOLE_ONLY.intersection(base.__name__ for base in kind.__mro__)
    for group in optimizer.param_groups:
        fused = group.get("fused") and not isinstance(optimizer, Adam)
        if (whole_only or fused) and any(isinstance(parameter, DTensor) for parameter in group["params"]):
            reason = "looks at more than one element at a time" if whole_only else "has fused=True"
            raise PEFTError(
                f"{kind.__name__} {reason}, and some of the parameters that it is to train are in pieces on several "
                "processes, where it would go wrong. Use AdamW or SGD, without fused=True; or, if those are adapters, "
                "leave self.trainer.strategy.inject() out of configure_model: what is injected at setup is whole "
                "beside layers that fully_shard has cut up."
            )


def _with_gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _parts(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Return ``group`` in groups of one kind each; itself, if it is of one."""
    kinds = by_kind(group["params"])
    return [group] if len(kinds) < 2 else [{**group, "params": params} for params in kinds]

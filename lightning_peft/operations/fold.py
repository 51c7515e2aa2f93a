"""One adapter folded into the weights of its host, and these as they were."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.to_the_end import to_the_end
from lightning_peft.errors import NotFiniteError, PEFTError
from lightning_peft.operations.shards import gathered
from lightning_peft.tensors.sharding import in_flat_pieces, kept_part, whole, write
from lightning_peft.tensors.weights import as_matrix, as_stored, is_transposed, weight_of, widened

_ELEMENTS = 2**18
"""Of a weight that is merged by rows so many are computed with at once: 1 MB in float32."""
_NARROW = (torch.float16, torch.bfloat16)
_PARTS = 16
"""Into no more parts is a weight cut that a model holds: of small ones a GPU would wait for Python."""


def weight_names(adapter: Adapter) -> tuple[str, ...]:
    """Return the names, in the host, of the weights that a merge changes."""
    return adapter.replaces or ("weight",)


def fold_into(
    name: str,
    host: nn.Module,
    adapter: Adapter,
    shared: Collection[int],
    keep: bool,
    note: Callable[[dict[str, Any]], None],
) -> float:
    """Merge one host: all is computed before anything is written, and what is being written is written to the end.

    Args:
        name: The adapted module's name, for messages.
        host: The adapted module.
        adapter: Its adapter.
        shared: Ids of parameters that belong to other modules too: ``host`` gets new ones in their place.
        keep: Whether to keep what :func:`restore` needs; without, a weight needs no more memory than its change.
        note: Is told what :func:`restore` needs, before a weight changes: each process keeps what it holds.

    Returns:
        What rounding took, relative to the change.

    Raises:
        NotFiniteError: The new weights would hold NaN or infinity. ``host`` is as it was.
    """
    weights = {name: host.get_parameter(name) for name in weight_names(adapter)}
    own = [key for key, weight in weights.items() if id(weight) in shared]
    bias = host._parameters.get("bias")
    old_bias = None if bias is None else kept_part(bias).to("cpu", copy=True)
    backup: dict[str, Any] = {
        key: weight if key in own else kept_part(weight).to("cpu", copy=True) if keep else None
        for key, weight in weights.items()
    }
    with gathered(*_owners(host, adapter)):
        whole_bias = None if bias is None else whole(bias)
        before = {key: whole(weight_of(host) if key == "weight" else host.get_parameter(key)) for key in weights}
        stored, new_bias, loss = _folded(name, host, _whole_adapter(adapter), before, whole_bias)
        new = {key: nn.Parameter(stored[key].contiguous(), requires_grad=False) for key in own}
        if whole_bias is None and new_bias is not None:
            new["bias"] = nn.Parameter(new_bias.to(weights["weight"]), requires_grad=False)
            backup["added_bias"] = True
        elif bias is not None and new_bias is not None and new_bias is not whole_bias and id(bias) in shared:
            new["bias"], backup["bias"] = nn.Parameter(new_bias.to(bias), requires_grad=False), bias
        elif bias is not None and new_bias is not None and new_bias is not whole_bias:
            weights["bias"], stored["bias"] = bias, new_bias
            backup["bias"] = old_bias

        def put() -> None:
            note(backup)
            for key, weight in weights.items():
                if key not in new:
                    write(weight, stored[key])
            for key, parameter in new.items():
                _set(host, key, parameter)

        to_the_end(put)
    return loss


def merged_values(
    host: nn.Module, adapter: Adapter, values: Mapping[str, Tensor], name: str = ""
) -> tuple[dict[str, Tensor], float]:
    """Return what a merge would make of the weights and the bias ``values`` of ``host``, and what rounding would take.

    They are whole and as it stores them.

    Raises:
        NotFiniteError: They would hold NaN or infinity.
    """
    weights = {name: values[name] for name in weight_names(adapter)}
    stored, bias, loss = _folded(name, host, _whole_adapter(adapter), weights, values.get("bias"))
    return (stored if bias is None else {**stored, "bias": bias.to(next(iter(weights.values())).dtype)}), loss


def can_fold_rows(host: nn.Module, adapter: Adapter) -> bool:
    """Whether :func:`fold_rows` merges ``adapter`` into ``host``."""
    return adapter.folds_by_row and isinstance(host, nn.Linear)


@torch.no_grad()
def fold_rows(host: nn.Module, adapter: Adapter, weight: Tensor, name: str = "") -> float:
    """Merge some rows after others into ``weight``, in place: beside it, none but these are in memory.

    Args:
        host: The adapted module.
        adapter: Its adapter, which is whole.
        weight: The host's weight, whole and as it stores it.
        name: The module's name, for messages.

    Returns:
        What rounding took, relative to the change.

    Raises:
        NotFiniteError: The new rows would hold NaN or infinity. Those before them are merged.
    """
    return _fold_rows(adapter, weight, weight, name, _ELEMENTS)


def _fold_rows(adapter: Adapter, weight: Tensor, out: Tensor, name: str, elements: int) -> float:
    """Write the rows of ``weight``, merged, into ``out``, ``elements`` of them at once, and return what rounding took.

    Raises:
        NotFiniteError: As :func:`fold_rows`.
    """
    rounding, start = _Rounding(), 0
    step = max(1, elements // weight.shape[1])
    for rows, merged in zip(weight.split(step), out.split(step), strict=True):
        before = widened(rows)
        after, _ = _of_rows(adapter, start, len(rows)).fold(before, None)
        stored = after.to(rows.dtype)
        _refuse_non_finite(name, after, stored)
        rounding.add(before, after, stored)
        merged.copy_(stored)
        start += len(rows)
    return rounding.loss


def _of_rows(adapter: Adapter, start: int, length: int) -> Adapter:
    """Return an adapter of ``length`` rows of the weight, from ``start`` on, which has a part of the same tensors."""
    twin = copy.copy(adapter)
    twin._parameters, twin._buffers = dict(adapter._parameters), dict(adapter._buffers)
    for name, axes in adapter.axes.items():
        if "out" not in axes:
            continue
        part = adapter.state_dict(keep_vars=True)[name].detach().narrow(axes.index("out"), start, length)
        if name in twin._parameters:
            twin._parameters[name] = nn.Parameter(part, requires_grad=False)
        else:
            twin._buffers[name] = part
    twin.rows_from = start
    return twin


def has_effect(host: nn.Module, adapter: Adapter, given: Mapping[str, Tensor]) -> bool:
    """Whether merging ``adapter`` would change ``host`` if that had the weights and the bias ``given``, by name.

    It would not, if there are no values that could be compared.
    """
    own = {name: host.get_parameter(name) for name in weight_names(adapter)}
    if any(map(in_flat_pieces, own.values())):
        return False
    if host._parameters.get("bias") is not None:
        own["bias"] = host.get_parameter("bias")
    before = {name: whole(given.get(name, parameter)).to(parameter) for name, parameter in own.items()}
    if any(tensor.is_meta for tensor in (*before.values(), *adapter.parameters())):
        return False
    try:
        after, _ = merged_values(host, adapter, before)
    except NotFiniteError:
        return True
    return any(name not in before or not torch.equal(value, before[name]) for name, value in after.items())


def restore(host: nn.Module, backup: dict[str, Any]) -> None:
    """Undo :func:`fold_into`, bit for bit.

    Raises:
        PEFTError: Nothing was kept.
    """
    for name, old in backup.items():
        if old is None:
            raise PEFTError(
                "merge(model, unload=True) was interrupted: it keeps no copies, so the weights that it has changed "
                "cannot be restored. Call it again to finish it, or load the base model again."
            )
        if isinstance(old, nn.Parameter):
            _set(host, name, old)
        elif isinstance(old, Tensor):
            kept_part(host.get_parameter(name)).copy_(old)
    if backup.get("added_bias"):
        host.register_parameter("bias", None)


def check_fold(name: str, host: nn.Module, adapter: Adapter) -> None:
    """Check, at the cost of computing it, what :func:`fold_into` would give ``host``.

    Raises:
        NotFiniteError: It would hold NaN or infinity.
    """
    with gathered(*_owners(host, adapter)):
        bias = host._parameters.get("bias")
        weights = {
            key: whole(weight_of(host) if key == "weight" else host.get_parameter(key)) for key in weight_names(adapter)
        }
        _folded(name, host, _whole_adapter(adapter), weights, None if bias is None else whole(bias))


def _folded(
    name: str, host: nn.Module, adapter: Adapter, weights: Mapping[str, Tensor], bias: Tensor | None
) -> tuple[dict[str, Tensor], Tensor | None, float]:
    """Return the new weights as they are stored, the new bias, and what rounding took of the change.

    ``weights`` are those of before, whole and as they are stored.

    Raises:
        NotFiniteError: The new weights would hold NaN or infinity.
    """
    if adapter.replaces:
        before = {key: widened(weight) for key, weight in weights.items()}
        after = {key: weight.detach() for key, weight in adapter.replace(before).items()}
        stored = {key: weight.to(weights[key].dtype) for key, weight in after.items()}
        for key, weight in after.items():
            _refuse_non_finite(f"{name}.{key}", weight, stored[key])
        rounding = _Rounding()
        for key in before:
            rounding.add(before[key], after[key], stored[key])
        return stored, bias, rounding.loss
    weight = weights["weight"]
    if can_fold_rows(host, adapter) and weight.dtype in _NARROW:
        # As a whole it would be computed with, and its change, in float32: five times what it takes itself.
        new = torch.empty_like(weight)
        return {"weight": new}, bias, _fold_rows(adapter, weight, new, name, max(_ELEMENTS, weight.numel() // _PARTS))
    matrix = as_matrix(host, weight)
    folded, bias = adapter.fold(matrix, bias)
    new = as_stored(host, folded, weight.dtype)
    _refuse_non_finite(name, folded, new)
    if bias is not None:
        _refuse_non_finite(f"{name}.bias", bias, bias.to(new.dtype))
    rounding = _Rounding()
    rounding.add(matrix, folded, new.T if is_transposed(host) else new.flatten(1))
    return {"weight": new}, bias, rounding.loss


def _refuse_non_finite(name: str, values: Tensor, stored: Tensor) -> None:
    if not stored.numel() or torch.isfinite(torch.stack(torch.aminmax(stored))).all():
        return
    raise NotFiniteError(
        f"Merged, the weight of {name!r} would hold values up to {values.abs().max():.3g}; {stored.dtype} holds no "
        f"more than {torch.finfo(stored.dtype).max:.3g}. No weight has changed. Load an earlier checkpoint, or, if the "
        "values are right, the base model in a wider dtype."
    )


@dataclass
class _Rounding:
    """What rounding took of changes, as norms over all of them."""

    change: float = 0.0
    lost: float = 0.0

    def add(self, before: Tensor, after: Tensor, stored: Tensor) -> None:
        """Count a change from weights before to weights after; ``before``, if rounding there was, is used up."""
        if stored.dtype != after.dtype:
            self.change = math.hypot(self.change, torch.linalg.vector_norm(before.sub_(after)))
            self.lost = math.hypot(self.lost, torch.linalg.vector_norm(before.copy_(stored).sub_(after)))

    @property
    def loss(self) -> float:
        """What was lost, relative to the change."""
        return self.lost / self.change if self.change > 0 else 0.0


def _set(host: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, leaf = _owner(host, name)
    setattr(owner, leaf, parameter)


def _owner(host: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return host.get_submodule(path), leaf


def _owners(host: nn.Module, adapter: Adapter) -> list[nn.Module]:
    """Return ``host`` and the modules in it whose parameters a merge changes."""
    return [host, *(_owner(host, name)[0] for name in weight_names(adapter))]


def _whole_adapter(adapter: Adapter) -> Adapter:
    """Return ``adapter``, or a copy of it whose tensors are whole if they are in pieces, and which nothing hooks."""
    in_pieces = any(isinstance(p, DTensor) or hasattr(p, "ds_tensor") for p in adapter.parameters())
    return cast(Adapter, _with_whole_tensors(adapter)) if in_pieces else adapter


def _with_whole_tensors(module: nn.Module) -> nn.Module:
    # A deep copy would follow what an adapter knows of others.
    twin, own = copy.copy(module), module._parameters
    whole_of = {n: None if p is None else nn.Parameter(whole(p), requires_grad=False) for n, p in own.items()}
    buffers = {n: None if b is None else whole(b) for n, b in module._buffers.items()}
    children = {n: None if m is None else _with_whole_tensors(m) for n, m in module._modules.items()}
    # ZeRO-3's would put parameters back into pieces.
    unhooked = {hooks: OrderedDict[int, Any]() for hooks in ("_forward_pre_hooks", "_forward_hooks")}
    twin.__dict__.update(_parameters=whole_of, _buffers=buffers, _modules=children, **unhooked)
    return twin

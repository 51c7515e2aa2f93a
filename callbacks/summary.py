"""PEFTSummary: what is adapted, how much of the model is trained, and what that saves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelSummary
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, optim
from torch.optim import Optimizer

from lightning_peft.core.registry import registries
from lightning_peft.core.view import ModelView
from lightning_peft.structure.experts import expert_weights
from lightning_peft.tensors.sharding import full_shape

# What torch's optimizers keep for each element of a parameter, and the options with which they keep one more. Adafactor
# and LBFGS keep what does not go by elements; Muon is not in every torch that is served.
_STATE_ELEMENTS: dict[type[Optimizer], int] = {
    optim.ASGD: 1,
    optim.Adadelta: 2,
    optim.Adagrad: 1,
    optim.Adam: 2,
    optim.AdamW: 2,
    optim.Adamax: 2,
    optim.NAdam: 2,
    optim.RAdam: 2,
    optim.RMSprop: 1,
    optim.Rprop: 2,
    optim.SGD: 0,
    optim.SparseAdam: 2,
}
_MORE_STATE = ("amsgrad", "centered", "momentum")


class PEFTSummary(Callback):
    """Print a table when fit starts. ``PEFTStrategy`` adds one; ``Trainer(enable_model_summary=False)`` silences it."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table on rank 0."""
        if any(isinstance(callback, ModelSummary) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            rank_zero_info(summary_table(pl_module, trainer.optimizers, type(trainer.strategy).__name__))


def summary_table(module: pl.LightningModule, optimizers: Iterable[Optimizer], strategy: str) -> str:
    """Return the table as text.

    Sizes are for one process: an adapter checkpoint against one of the whole model under the same optimizer.
    """
    lines = [("strategy", strategy)]
    view = ModelView(module)
    for prefix, _, registry in registries(view):
        for name, methods in registry.methods.items():
            where = f" in {prefix}" if prefix else ""
            lines.append(("method", f"{' + '.join(type(m).__name__ for m in methods)}, adapter {name!r}{where}"))
            for what, hosts in (("adapted", registry.hosts[name]), ("trained in place", registry.chosen)):
                kinds = sorted({host.rsplit(".", 1)[-1] for host in hosts})
                unit = "modules" if what == "adapted" else "parameters"
                lines += [(what, f"{len(hosts)} {unit}: {', '.join(kinds)}")] if hosts else []
            lines += _experts(view.part(prefix), name)
        if registry.train_also:
            lines.append(("trained whole", ", ".join(registry.train_also)))
    adapters = {id(p) for p in view.adapter_parameters.values()}
    trained = [p for p in module.parameters() if p.requires_grad]
    total = sum(full_shape(p).numel() for p in module.parameters())
    count = sum(full_shape(p).numel() for p in trained)
    lines.append(("parameters", f"{count:,} trained of {total:,} ({count / total:.2%})"))
    states = [state_elements(optimizer) for optimizer in optimizers]
    if states and None not in states:
        factor = 1 + max(state for state in states if state is not None)
        moments = (factor - 1) * _bytes(trained)
        full = factor * _bytes(p for p in module.parameters() if id(p) not in adapters)
        lines.append(("optimizer state", _size(moments)))
        lines.append(("checkpoint", f"{_size(factor * _bytes(trained))}; of the whole model {_size(full)}"))
    width = max(len(key) for key, _ in lines)
    return "\n".join(["", *(f"  {key:<{width}}  {value}" for key, value in lines)])


def _experts(root: ModelView, adapter: str) -> list[tuple[str, str]]:
    """Return what to say of adapted experts that stand in one parameter."""
    holders = {name.rpartition(".")[0] for name in expert_weights(root)}
    found = [(host, slot[adapter]) for name, host, slot in root.slots if name in holders and adapter in slot]
    if not found:
        return []
    count = sum(cast(int, host.num_experts) for host, _ in found)
    values = sum(full_shape(p).numel() for _, module in found for p in module.parameters())
    return [("experts", f"{count:,} in {len(found)} modules, with {values:,} parameters of adapters")]


def state_elements(optimizer: Optimizer) -> int | None:
    """Return how many state elements ``optimizer`` keeps per parameter element (AdamW: 2), or ``None`` if unknown."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # DeepSpeed wraps the one that was configured
    count = _STATE_ELEMENTS.get(type(optimizer))
    return None if count is None else count + sum(bool(optimizer.defaults.get(option)) for option in _MORE_STATE)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(full_shape(tensor).numel() * tensor.element_size() for tensor in tensors)


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"

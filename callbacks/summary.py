"""PEFTSummary: what is adapted, how much of the model is trained, and what that saves."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelSummary
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn, optim
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
    """Print a table when fit starts, and give the methods' hyper-parameters to every logger.

    ``PEFTStrategy`` adds one; ``Trainer(enable_model_summary=False)`` leaves out the table.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table on rank 0; log the hyper-parameters, as ``peft/LoRA/r`` where a logger makes names flat."""
        found = hyper_parameters(pl_module)
        for logger in trainer.loggers if any(found.values()) else ():
            logger.log_hyperparams({"peft": found})
        if any(isinstance(callback, ModelSummary) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            rank_zero_info(summary_table(pl_module, trainer.optimizers, type(trainer.strategy).__name__))


@dataclass(frozen=True)
class AdapterSummary:
    """What of a model is adapted, and how much of it is trained. ``str`` and notebooks show it as a table."""

    trained: int
    """Parameters that require a gradient."""
    total: int
    """All parameters, those of adapters included; whole ones where they are sharded."""
    active: tuple[str, ...]
    """Names of the adapters that run."""
    merged: bool
    """Whether adapters are in the weights at present."""
    modules: Mapping[str, Mapping[str, int]]
    """By adapter: the adapted modules, each with its number of parameters of the adapter."""
    lines: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return _table(self.lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def adapter_summary(model: nn.Module) -> AdapterSummary:
    """Count what is adapted and trained in a model, with or without a Trainer.

    Args:
        model: A model, adapted or not.
    """
    view = ModelView(model)
    lines = list(_adapters(view))
    trained, total = _count(p for p in model.parameters() if p.requires_grad), _count(model.parameters())
    found = registries(view)
    active = tuple(dict.fromkeys(registry.active for _, _, registry in found if registry.methods))
    merged = any(slot.merged is not None for _, _, slot in view.slots)
    if found:
        lines.append(("active", f"{', '.join(active)}{', merged into the weights' if merged else ''}"))
    lines.append(("parameters", _share(trained, total)))
    names = dict.fromkeys(name for _, _, registry in found for name in registry.methods)
    modules = {
        name: {host: _count(slot[name].parameters()) for host, _, slot in view.slots if name in slot} for name in names
    }
    return AdapterSummary(trained, total, active, merged, modules, tuple(lines))


def hyper_parameters(module: nn.Module) -> dict[str, Any]:
    """Return the hyper-parameters of every method in a model, by its class; by adapter as well if there are several."""
    found = {
        name: {type(method).__name__: _without_name(method.config()) for method in methods}
        for _, _, registry in registries(ModelView(module))
        for name, methods in registry.methods.items()
    }
    return next(iter(found.values())) if len(found) == 1 else found


def _without_name(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "method"}


def summary_table(module: pl.LightningModule, optimizers: Iterable[Optimizer], strategy: str) -> str:
    """Return the table as text.

    Sizes are for one process: an adapter checkpoint against one of the whole model under the same optimizer.
    """
    view = ModelView(module)
    lines = [("strategy", strategy), *_adapters(view)]
    adapters = {id(p) for p in view.adapter_parameters.values()}
    trained = [p for p in module.parameters() if p.requires_grad]
    lines.append(("parameters", _share(_count(trained), _count(module.parameters()))))
    states = [state_elements(optimizer) for optimizer in optimizers]
    if states and None not in states:
        factor = 1 + max(state for state in states if state is not None)
        moments = (factor - 1) * _bytes(trained)
        full = factor * _bytes(p for p in module.parameters() if id(p) not in adapters)
        lines.append(("optimizer state", _size(moments)))
        lines.append(("checkpoint", f"{_size(factor * _bytes(trained))}; of the whole model {_size(full)}"))
    return _table(lines)


def _adapters(view: ModelView) -> Iterator[tuple[str, str]]:
    """Yield what to say of each adapter of a model, and of what is trained whole."""
    for prefix, _, registry in registries(view):
        for name, methods in registry.methods.items():
            where = f" in {prefix}" if prefix else ""
            yield "method", f"{' + '.join(type(m).__name__ for m in methods)}, adapter {name!r}{where}"
            for what, hosts in (("adapted", registry.hosts[name]), ("trained in place", registry.chosen)):
                kinds = sorted({host.rsplit(".", 1)[-1] for host in hosts})
                unit = "modules" if what == "adapted" else "parameters"
                if hosts:
                    yield what, f"{len(hosts)} {unit}: {', '.join(kinds)}"
            yield from _experts(view.part(prefix), name)
        if registry.train_also:
            yield "trained whole", ", ".join(registry.train_also)


def _table(lines: Collection[tuple[str, str]]) -> str:
    width = max(len(key) for key, _ in lines)
    return "\n".join(["", *(f"  {key:<{width}}  {value}" for key, value in lines)])


def _share(trained: int, total: int) -> str:
    return f"{trained:,} trained of {total:,} ({trained / total if total else 0:.2%})"


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(full_shape(p).numel() for p in parameters)


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

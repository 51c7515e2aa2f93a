"""Biases that are trained beside adapters: HF PEFT's ``bias="all"`` and ``"lora_only"``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_peft.adapters.low_rank.own_weights import attention_weights
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.formats.addition import Addition, Used
from lightning_peft.formats.counterpart import PREFIX, Shapes
from lightning_peft.methods.bitfit import BitFit
from lightning_peft.methods.lora import LoRA
from lightning_peft.targets.naming import targets_from

_WRAPPED = "base_layer."


class Biases(Addition):
    """Whatever biases the file holds; the key only tells HF PEFT which of them to train further."""

    method = BitFit
    key = "bias"
    types = frozenset({"LORA", "ADALORA"})

    def writes(self, method: PEFTMethod) -> bool:
        """Whether it trains biases that are there: HF PEFT adds none."""
        return isinstance(method, BitFit) and not method.create_missing

    def value(self, root: ModelView, main: Used, given: Sequence[Used], chosen: Sequence[str]) -> str:
        """Return whether biases beside those of adapted modules are trained."""
        alone = {name.rpartition(".")[0] for name in chosen} <= set(main.hosts)
        return "lora_only" if alone else "all"

    def names(self, root: ModelView, main: Used, given: Sequence[Used], chosen: Sequence[str]) -> dict[str, str]:
        """Return the biases, which stand in what HF PEFT wraps where their module is adapted."""
        leads = _leads(root, main)
        owners = {name: name.rpartition(".")[0] for name in chosen}
        return {
            f"{PREFIX}{leads.get(owner, f'{owner}.' if owner else '')}{name.rpartition('.')[2]}": name
            for name, owner in owners.items()
        }

    def owns(self, config: Mapping[str, Any], name: str) -> bool:
        """Whether it is a bias, if any are trained."""
        return config.get(self.key, "none") != "none" and name.rpartition(".")[2].endswith("bias")

    def read(
        self, root: ModelView, config: Mapping[str, Any], names: Sequence[str], shapes: Shapes, source: str
    ) -> list[PEFTMethod]:
        """Return the method that trains these biases, if the model has any."""
        if config.get(self.key, "none") not in ("none", "all", "lora_only"):
            raise PEFTError(f"{source} uses bias={config[self.key]!r}; 'none', 'all' or 'lora_only' was expected.")
        found = {name.removeprefix(PREFIX).replace(_WRAPPED, "") for name in names}
        if lost := sorted(name for name in found if root.parameter(name) is None):
            raise PEFTError(
                f"{source} trains {lost[0]!r}, which this {root.kind} does not have. Load its own base model."
            )
        if not found:
            return []
        everywhere = {name for name in root.parameters if name.rpartition(".")[2].endswith("bias")}
        owners = {name.rpartition(".")[0] for name in found}
        return [BitFit(target_modules=None if found == everywhere else targets_from(owners, root))]


def _leads(root: ModelView, main: Used) -> dict[str, str]:
    """Return what stands before a parameter's own name in the file, by the name of the module that holds it."""
    modules = root.modules
    hosts = {host: modules[host] for host in main.hosts}
    targets = main.method.targets_of(root, hosts) if isinstance(main.method, LoRA) else {}
    # HF PEFT nests one wrapper a weight around modules that read their weights themselves.
    leads = {host: f"{host}.{_WRAPPED}" + _WRAPPED * (len(targets.get(host, ())) - 1) for host in hosts}
    for host, module in hosts.items():
        if isinstance(module, nn.MultiheadAttention):
            leads[host] = f"{host}.{_WRAPPED}"
            for inner in (weight.rpartition(".")[0] for weight in attention_weights(module) if "." in weight):
                leads[f"{host}.{inner}"] = f"{host}.{_WRAPPED}{inner}.{_WRAPPED}"
    return leads

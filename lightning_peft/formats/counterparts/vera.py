"""VeRA in HF PEFT's format, where the shared projections stand at the root."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from lightning_peft.core.adapter import CHILD
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.formats.counterpart import Counterpart, Shapes, targets_for_hf
from lightning_peft.methods.vera import VeRA, VeRAAdapter
from lightning_peft.targets.naming import targets_from
from lightning_peft.tensors.weights import is_conv1d

_SHARED = {"base_model.vera_A": "vera_A", "base_model.vera_B": "vera_B"}


class VeRAInHF(Counterpart):
    """``VERA``."""

    method = VeRA
    peft_type = "VERA"
    keys = frozenset({"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial"})
    plain: ClassVar[Mapping[str, tuple[Any, ...]]] = {"bias": ("none",)}
    parameters: ClassVar[Mapping[str, str]] = {
        "vera_lambda_b": "vera_lambda_b",
        "vera_lambda_d": "vera_lambda_d",
    }

    def config(self, root: ModelView, method: VeRA, hosts: Iterable[str], chosen: Iterable[str]) -> dict[str, Any]:
        """Return the hyper-parameters; the projections are always saved."""
        hosts = list(hosts)
        modules = root.modules
        return {
            "r": method.r,
            "d_initial": method.d_initial,
            "vera_dropout": method.dropout,
            "projection_prng_key": method.projection_seed,
            "save_projection": True,
            "target_modules": targets_for_hf(hosts, root),
            "bias": "none",
            "fan_in_fan_out": all(is_conv1d(modules[host]) for host in hosts),
        }

    def names(self, root: ModelView, method: VeRA, hosts: Iterable[str], chosen: Iterable[str]) -> dict[str, str]:
        """Return the names of the vectors, and those of the projections, which are the first host's."""
        hosts = list(hosts)
        _refuse_several(root)
        first = next(name for name in root.modules if name in hosts)
        shared = {in_file: f"{first}.{CHILD}.projections.{name}" for in_file, name in _SHARED.items()}
        return {**super().names(root, method, hosts, chosen), **shared}

    def owns(self, name: str) -> bool:
        """Whether the tensor is a vector or a projection."""
        return name in _SHARED or super().owns(name)

    def read(self, root: ModelView, config: Mapping[str, Any], shapes: Shapes, source: str) -> PEFTMethod:
        """Return the VeRA."""
        r, key = config.get("r"), config.get("projection_prng_key", 0)
        for what, value in (("r", r), ("projection_prng_key", key)):
            if not isinstance(value, int):
                raise PEFTError(f"{source}: its configuration has {what}={value!r}; a whole number was expected.")
        if config.get("save_projection", True) and not _SHARED.keys() <= shapes.keys():
            raise PEFTError(f"{source} lacks the projections that its configuration speaks of. It is damaged.")
        return VeRA(
            r=config["r"],
            d_initial=config.get("d_initial", 0.1),
            projection_seed=key,
            dropout=config.get("vera_dropout", 0.0),
            target_modules=targets_from(self.hosts(root, shapes, source), root),
        )


def _refuse_several(root: ModelView) -> None:
    found: dict[str, set[int]] = {}
    for _, _, slot in root.slots:
        for name, adapter in slot.items():
            if isinstance(adapter, VeRAAdapter):
                found.setdefault(name, set()).add(id(adapter.projections))
    if any(len(projections) > 1 for projections in found.values()):
        raise PEFTError(
            f"VeRA was injected into several parts of this {root.kind}, each with random projections of its "
            "own; a directory has place for one pair. Save the parts one by one, or inject into the whole."
        )

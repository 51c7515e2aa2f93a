"""Layer-norm tuning in HF PEFT's format, which writes whole norms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.formats.counterpart import PREFIX, Counterpart, Shapes, targets_for_hf
from lightning_peft.methods.layer_norm_tuning import LayerNormTuning
from lightning_peft.targets.naming import targets_from

_INSIDE = "ln_tuning_layers"


class LayerNormTuningInHF(Counterpart):
    """``LN_TUNING``."""

    method = LayerNormTuning
    peft_type = "LN_TUNING"

    def config(
        self, root: ModelView, method: LayerNormTuning, hosts: Iterable[str], chosen: Iterable[str]
    ) -> dict[str, Any]:
        """Return the names of the norms."""
        return {"target_modules": targets_for_hf({name.rpartition(".")[0] for name in chosen}, root)}

    def names(
        self, root: ModelView, method: LayerNormTuning, hosts: Iterable[str], chosen: Iterable[str]
    ) -> dict[str, str]:
        """Return the names of the norms' parameters."""
        parts = {name: name.rpartition(".") for name in chosen}
        return {f"{PREFIX}{norm}.{_INSIDE}.{leaf}": name for name, (norm, _, leaf) in parts.items()}

    def owns(self, name: str) -> bool:
        """Whether the tensor is a norm's."""
        return f".{_INSIDE}." in name

    def read(self, root: ModelView, config: Mapping[str, Any], shapes: Shapes, source: str) -> PEFTMethod:
        """Return the method with the norms that the file holds."""
        norms = {name[len(PREFIX) :].partition(f".{_INSIDE}.")[0] for name in shapes if self.owns(name)}
        return LayerNormTuning(target_modules=targets_from(norms, root))

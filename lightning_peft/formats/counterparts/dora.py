"""DoRA in HF PEFT's format: LoRA's, with one more tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from lightning_peft.formats.counterparts.lora import KEYS, PLAIN, LoRAInHF
from lightning_peft.methods.dora import DoRA
from lightning_peft.methods.lora import LoRA

_MAGNITUDE = {"lora_magnitude_vector": "lora_magnitude_vector"}


class DoRAInHF(LoRAInHF):
    """``LORA`` with ``use_dora``."""

    method: ClassVar[type[LoRA]] = DoRA
    use_dora: ClassVar[bool] = True
    convolutions: ClassVar[tuple[type[nn.Module], ...]] = ()
    keys = KEYS
    plain: ClassVar[Mapping[str, tuple[Any, ...]]] = PLAIN
    parameters: ClassVar[Mapping[str, str]] = {**LoRAInHF.parameters, **_MAGNITUDE}

    def parameters_of(self, module: nn.Module, method: Any) -> Mapping[str, str]:
        """Return LoRA's and the magnitudes."""
        return {**super().parameters_of(module, method), **_MAGNITUDE}

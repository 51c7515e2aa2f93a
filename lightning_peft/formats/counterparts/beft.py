"""BEFT in HF PEFT's format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.formats.counterpart import Counterpart, Shapes, targets_for_hf
from lightning_peft.methods.beft import BEFT
from lightning_peft.targets.naming import targets_from


class BEFTInHF(Counterpart):
    """``BEFT``."""

    method = BEFT
    peft_type = "BEFT"
    on_conv1d = False
    parameters: ClassVar[Mapping[str, str]] = {"beft_bias": "beft_bias"}

    def config(self, root: ModelView, method: BEFT, hosts: Iterable[str], chosen: Iterable[str]) -> dict[str, Any]:
        """Return the targets."""
        return {"target_modules": targets_for_hf(hosts, root)}

    def read(self, root: ModelView, config: Mapping[str, Any], shapes: Shapes, source: str) -> PEFTMethod:
        """Return the BEFT."""
        return BEFT(target_modules=targets_from(self.hosts(root, shapes, source), root))

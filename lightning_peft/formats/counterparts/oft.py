"""OFT in HF PEFT's format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.formats.counterpart import Counterpart, Shapes, targets_for_hf
from lightning_peft.methods.oft import OFT
from lightning_peft.targets.naming import targets_from

_SAME = ("r", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms")
_SERIES_SINCE = (0, 18)
"""The release of HF PEFT from which on the series is today's; earlier ones say none in their files."""


class OFTInHF(Counterpart):
    """``OFT``, as it is since release 0.14."""

    method = OFT
    peft_type = "OFT"
    on_conv1d = False
    # Dropout of blocks is a key that HF PEFT does nothing with.
    keys = frozenset({"oft_block_size", "module_dropout", "eps", *_SAME})
    plain: ClassVar[Mapping[str, tuple[Any, ...]]] = {"bias": ("none",), "coft": (False,)}
    parameters: ClassVar[Mapping[str, str]] = {"oft_R.weight": "oft_R"}

    def config(self, root: ModelView, method: OFT, hosts: Iterable[str], chosen: Iterable[str]) -> dict[str, Any]:
        """Return the hyper-parameters."""
        return {
            **{key: getattr(method, key) for key in _SAME},
            "oft_block_size": method.block_size,
            "target_modules": targets_for_hf(hosts, root),
            "bias": "none",
            # Without a version HF PEFT takes the series for that of an older one.
            "peft_version": "0.21.0",
        }

    def read(self, root: ModelView, config: Mapping[str, Any], shapes: Shapes, source: str) -> PEFTMethod:
        """Return the OFT."""
        if "oft_block_size" not in config:
            raise PEFTError(
                f"{source} has no oft_block_size: it is of an OFT that HF PEFT had before its release 0.14, and cannot "
                "be read by newer ones either. Train it anew, or merge it with the release that wrote it."
            )
        if config.get("use_cayley_neumann") and _release(config) < _SERIES_SINCE:
            raise PEFTError(
                f"{source} was trained with use_cayley_neumann before HF PEFT's release 0.18, which changed the "
                "series: its outputs would be others. Merge it with the release that wrote it, or train it anew."
            )
        return OFT(
            **{key: config[key] for key in _SAME if key in config},
            block_size=config["oft_block_size"],
            target_modules=targets_from(self.hosts(root, shapes, source), root),
        )


def _release(config: Mapping[str, Any]) -> tuple[int, ...]:
    parts = str(config.get("peft_version") or "0").partition("@")[0].split(".")[:2]
    return tuple(int(part) for part in parts if part.isdecimal())

"""Keys of HF PEFT's configurations: none is passed over in silence that might change what an adapter computes."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from lightning_peft.errors import PEFTError

COMMON = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode", "runtime_config"),
        *("base_model_name_or_path", "revision", "fan_in_fan_out", "init_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    }
)
"""Keys of every method: where adapters are the names of the tensors say, and what trained them is no matter."""
OFF: tuple[Any, ...] = (None, False, 0, "", {}, [])
"""Values of a key of which nothing is asked for."""


def refuse_values(config: Mapping[str, Any], plain: Mapping[str, Collection[Any]], method: str, source: str) -> None:
    """Raise :class:`PEFTError` if a key of ``plain`` has another value than those that leave the method as it is here.

    Args:
        config: The configuration.
        plain: Keys of options that the method has not here, each with the values that change nothing.
        method: The method's name.
        source: What to call the file.
    """
    for key, values in plain.items():
        if key in config and config[key] not in values:
            raise PEFTError(
                f"{source} uses {key}={config[key]!r}, which {method} has not here, so that its outputs would be "
                "others: it cannot be read."
            )


def warn_of_unknown(config: Mapping[str, Any], known: Collection[str], source: str) -> None:
    """Warn of keys beside ``known`` and the common ones, of newer releases or other programs."""
    unknown = [key for key, value in config.items() if key not in known and key not in COMMON and value not in OFF]
    if unknown:
        said = ", ".join(f"{key}={config[key]!r}" for key in unknown)
        warnings.warn(
            f"{source}: its configuration says {said}, which is not known here and has no effect. If it changes "
            "what the adapter computes, the outputs are others than where it was trained: compare a few.",
            stacklevel=2,
        )

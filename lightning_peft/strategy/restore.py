"""``MyModule.load_from_checkpoint(path)`` on checkpoints with adapters.

Lightning offers no public place for it: stock ``load_from_checkpoint`` lists every base weight as missing, or, with
``strict=False``, returns the base model and drops the adapters without a word. So two functions of
``lightning.pytorch.core.saving`` are wrapped, here and nowhere else.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.core import saving

from lightning_peft.core.view import ModelView
from lightning_peft.storage import checkpoint as files
from lightning_peft.strategy.plain_values import without_class_paths

_load_file = saving.pl_load
_load_state = saving._load_state

_TRUSTED = "lightning_peft_trusted"
"""Under it, what read a checkpoint tells what makes the module that ``weights_only=False`` was given."""


def _load_file_or_directory(path: Any, *args: Any, **kwargs: Any) -> Any:
    weights_only = kwargs.get("weights_only")
    if isinstance(path, str | os.PathLike) and files.is_directory(path):
        checkpoint = files.read_directory(path, weights_only)
    else:
        checkpoint = _load_file(path, *args, **kwargs)
    if files.KEY in checkpoint:
        checkpoint[_TRUSTED] = weights_only is False
    return checkpoint


class _NotYet:
    """What is passed for ``strict`` while there are no adapters: it is false, and no module's own wish contradicts it.

    Args:
        strict: What was asked for, which is kept where it does contradict.
    """

    def __init__(self, strict: bool | None) -> None:
        self._strict = strict

    def __bool__(self) -> bool:
        return False

    def __eq__(self, wish: object) -> bool:
        return self._strict is None or self._strict == wish

    def __repr__(self) -> str:
        return repr(self._strict)


def _load_state_with_adapters(cls: Any, checkpoint: dict[str, Any], strict: bool | None = None, **kwargs: Any) -> Any:
    if files.KEY not in checkpoint:
        return _load_state(cls, checkpoint, strict=strict, **kwargs)
    if not checkpoint.pop(_TRUSTED, False):
        cls, checkpoint = without_class_paths(cls, checkpoint, kwargs)
    if not issubclass(cls, LightningModule):
        return _load_state(cls, checkpoint, strict=strict, **kwargs)
    # Lightning makes the module and calls its hooks, which may change the state; what is no adapter's it loads.
    given = {**checkpoint, "state_dict": dict(checkpoint["state_dict"])}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found keys that are (not )?in the model state dict but")
        model = _load_state(cls, given, strict=_NotYet(strict), **kwargs)
    assert isinstance(model, LightningModule)
    files.inject_from(given, model)
    files.apply(given, ModelView(model), model.strict_loading if strict is None else strict)
    return model


def install() -> None:
    """Make ``load_from_checkpoint`` read checkpoints with adapters."""
    saving.pl_load = _load_file_or_directory  # type: ignore[assignment]
    saving._load_state = _load_state_with_adapters  # type: ignore[assignment]

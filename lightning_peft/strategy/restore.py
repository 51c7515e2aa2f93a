"""``MyModule.load_from_checkpoint(path)`` on checkpoints with adapters.

Lightning offers no public place for it: stock ``load_from_checkpoint`` lists every base weight as missing, or, with
``strict=False``, returns the base model and drops the adapters without a word. So three functions of
``lightning.pytorch.core.saving``, a module's ``load_state_dict`` and how a file is read are wrapped, here and nowhere
else.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.core import saving
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_peft.core.adapter import CHILD, clean_name
from lightning_peft.core.registry import registries
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError, listed
from lightning_peft.operations.eject import eject
from lightning_peft.operations.merge import merge
from lightning_peft.storage import checkpoint as files
from lightning_peft.storage import checkpoint_directory as directories
from lightning_peft.storage.after_hooks import follow
from lightning_peft.storage.hyper_parameters import eject_from_modules, without_class_paths
from lightning_peft.storage.loading import load_adapter
from lightning_peft.storage.plain import is_plain, leaves_plain
from lightning_peft.storage.readable import check_sums, reading

_load_file = saving.pl_load
_load_state = saving._load_state
_is_overridden = saving.is_overridden
_read = TorchCheckpointIO.load_checkpoint

_TRUSTED = "lightning_peft_trusted"
"""Under it, what read a checkpoint tells what makes the module that ``weights_only=False`` was given."""


def _load_checked(path: Any, *args: Any, **kwargs: Any) -> Any:
    is_path = isinstance(path, str | os.PathLike)
    try:
        checkpoint = _load_file(path, *args, **kwargs)
    except Exception as error:
        if is_path:
            check_sums(path)
            if not isinstance(error, pickle.UnpicklingError):  # torch says what to do about it
                with reading(path):
                    raise
        raise
    if is_path and files.KEY in checkpoint:
        check_sums(path)
    return checkpoint


def _load_file_or_directory(path: Any, *args: Any, **kwargs: Any) -> Any:
    weights_only = kwargs.get("weights_only")
    if isinstance(path, str | os.PathLike) and directories.is_directory(path):
        checkpoint = directories.read_directory(path, weights_only)
    else:
        checkpoint = _load_checked(path, *args, **kwargs)
    if files.KEY in checkpoint:
        checkpoint[_TRUSTED] = weights_only is False
        eject_from_modules(checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY))
    return checkpoint


class _Making(NamedTuple):
    """A checkpoint with adapters, of which Lightning makes a module."""

    given: dict[str, Any]
    """As it is given to Lightning, and to hooks of the module."""
    read: Mapping[str, Any]
    """Its state as it was before hooks may have changed it."""


_MAKING: ContextVar[_Making | None] = ContextVar("making", default=None)


class _NoKeys(NamedTuple):
    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()


def _load_state_dict(module: LightningModule, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    lost = _lost_adapters(module, state_dict)
    try:
        keys = super(LightningModule, module).load_state_dict(state_dict, *args, **kwargs)
    except RuntimeError as error:
        if lost:
            raise PEFTError(lost) from error
        raise
    if lost:
        rank_zero_warn(f"{lost} They are left out.")
    return keys


def _lost_adapters(module: LightningModule, state_dict: Mapping[str, Any]) -> str:
    """Return what to say if the state has adapters for which ``module`` has no place."""
    adapters = [name for name in state_dict if CHILD in name.split(".")]
    if not adapters or registries(ModelView(module)):
        return ""
    return (
        f"The state has adapters ({adapters[0]!r}, …), and this {type(module).__name__} has none. Load the checkpoint "
        "with load_from_checkpoint, or by the ckpt_path of a Trainer with the PEFTStrategy that wrote it."
    )


def _load_state_with_adapters(cls: Any, checkpoint: dict[str, Any], strict: bool | None = None, **kwargs: Any) -> Any:
    if files.KEY not in checkpoint:
        try:
            return _made(cls, checkpoint, strict=strict, **kwargs)
        except RuntimeError:
            files.refuse_hf_tensors(checkpoint)
            raise
    files.check_entries(checkpoint)
    if not checkpoint.pop(_TRUSTED, False):
        cls, checkpoint = without_class_paths(cls, checkpoint, kwargs)
    if not issubclass(cls, LightningModule) or is_plain(checkpoint):
        return _made(cls, checkpoint, strict=strict, **kwargs)
    making = _Making({**checkpoint, "state_dict": dict(checkpoint["state_dict"])}, checkpoint["state_dict"])
    model = _made(cls, making.given, making, strict=strict, **kwargs)
    if leaves_plain(checkpoint):
        merge(model, unload=True)
    return model


def _made(cls: Any, checkpoint: dict[str, Any], making: _Making | None = None, **kwargs: Any) -> Any:
    """Return what Lightning makes of a checkpoint; its state is loaded here, if that has adapters."""
    token = _MAKING.set(making)  # also to none: a constructor may load another checkpoint
    try:
        return _load_state(cls, checkpoint, **kwargs)
    finally:
        _MAKING.reset(token)


def _is_overridden_once_made(method_name: str, instance: Any = None, parent: Any = None) -> bool:
    """Answer what Lightning asks about a module as soon as it has made it, and see to what it calls at last.

    Where it calls the module's ``load_state_dict``, adapters are injected first: so one of the module's own is called
    once, with the state of a module as it is then.
    """
    if making := _MAKING.get():
        vars(instance)["load_state_dict"] = partial(_load_with_adapters, instance, making)
    return _is_overridden(method_name, instance, parent)


def _load_with_adapters(
    model: LightningModule, making: _Making, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any
) -> Any:
    given = making.given
    if state_dict is not given["state_dict"]:  # a hook of the module loads something else
        return type(model).load_state_dict(model, state_dict, *args, **kwargs)
    del vars(model)["load_state_dict"]
    strict, shared = kwargs.get("strict", True), bool(ModelView(model).slots)
    follow(given, making.read)
    try:
        files.inject_from(given, model)
        files.apply(given, ModelView(model), strict)
    except BaseException:
        # A network that the caller has given it is to be what it was.
        if not shared and registries(ModelView(model)):
            eject(model)
        raise
    if not strict and files.holds_everything(given, ModelView(model)):
        _warn_of_keys(model, given["state_dict"])
    return _NoKeys()


def _warn_of_keys(module: LightningModule, state_dict: Mapping[str, Any]) -> None:
    """Say what of a whole state was left out, and what had none, as Lightning does."""
    own, given = ({clean_name(name): None for name in state} for state in (module.state_dict(), state_dict))
    for where, names in (
        ("in the module but not in the checkpoint", [name for name in own if name not in given]),
        ("in the checkpoint but not in the module", [name for name in given if name not in own]),
    ):
        if names:
            rank_zero_warn(f"Found keys that are {where}: {listed(names)}.")


def load_start(module: LightningModule, path: str | os.PathLike[str]) -> None:
    """Inject the adapters of a directory or a checkpoint into a module without any, and load their values.

    Args:
        module: The module.
        path: An adapter directory, of this package or of HF PEFT, or a ``.ckpt`` file of ``PEFTStrategy``.

    Raises:
        PEFTError: It is neither, or does not fit the module, which is as it was before.
    """
    if not os.path.exists(path):
        raise PEFTError(f"init_adapter={os.fspath(path)!r} does not exist: give an adapter directory or a .ckpt file.")
    if os.path.isdir(path):
        load_adapter(module, path)
        return
    checkpoint = _load_checked(path, map_location="cpu", weights_only=True)
    try:
        files.inject_from(checkpoint, module)
        files.apply(checkpoint, ModelView(module), True)
    except BaseException:
        if registries(ModelView(module)):
            eject(module)
        raise


def _read_file(io: TorchCheckpointIO, path: Any, *args: Any, **kwargs: Any) -> Any:
    if directories.is_directory(path):
        raise PEFTError(
            f"{path} is a directory that AdapterCheckpoint wrote, and this Trainer's strategy knows no adapters. Give "
            "it the strategy that the run had: Trainer(strategy=PEFTStrategy(...))."
        )
    return _read(io, path, *args, **kwargs)


def install() -> None:
    """Make ``load_from_checkpoint`` read checkpoints with adapters, and say what other strategies cannot read."""
    TorchCheckpointIO.load_checkpoint = _read_file  # type: ignore[method-assign, assignment]
    saving.pl_load = _load_file_or_directory  # type: ignore[assignment]
    saving._load_state = _load_state_with_adapters  # type: ignore[assignment]
    saving.is_overridden = _is_overridden_once_made  # type: ignore[assignment]
    LightningModule.load_state_dict = _load_state_dict  # type: ignore[method-assign, assignment]

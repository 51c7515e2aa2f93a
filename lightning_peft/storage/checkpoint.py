"""What a Lightning checkpoint with adapter state holds, and how a model takes it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_peft.core.adapter import CHILD, clean_name
from lightning_peft.core.method import method_from_config
from lightning_peft.core.registry import changed, differs, note_moved, required, restore_changed, trains_everything
from lightning_peft.core.schema import fits
from lightning_peft.core.view import ModelView, own_state
from lightning_peft.errors import PEFTError, StateError
from lightning_peft.formats.configuration import check_injection
from lightning_peft.operations.inject import activate as activate_in
from lightning_peft.operations.inject import inject
from lightning_peft.operations.rest import freeze_rest
from lightning_peft.operations.shards import in_pieces
from lightning_peft.storage import fingerprint
from lightning_peft.storage.base_weights import fill
from lightning_peft.storage.state import (
    adapter_parameters_and_whole,
    check_metadata,
    load_adapter_state_dict,
    metadata,
    saved_tensors,
)
from lightning_peft.structure.extra_state import by_name, extra_state, load_extra_state

KEY = "lightning_peft"
"""Under it a checkpoint keeps :func:`lightning_peft.storage.state.metadata`."""

EXTRA = "extra_state"
"""Under it, in there, what modules write into a state that is neither parameter nor buffer."""

_INJECTION_KEYS = {"adapters", "active", "train_also", "base"}


def finish(checkpoint: dict[str, Any], model: ModelView, full: bool) -> None:
    """Add what tells this checkpoint's adapters apart, and take out frozen weights unless ``full``.

    What a hook has put in that is none of the model's tensors stays: it is for another hook to take out.

    Raises:
        PEFTError: An adapter tensor is missing: a hook changed ``checkpoint["state_dict"]``.
    """
    extra = extra_state(model)
    of_extra = by_name(extra)
    checkpoint[KEY] = {**metadata(model), "full": full, EXTRA: {name: {**own} for name, own in extra.items()}}
    state = {clean_name(name): tensor for name, tensor in checkpoint.setdefault("state_dict", {}).items()}
    trained = adapter_parameters_and_whole(model).keys()
    if missing := sorted(trained - state.keys()):
        raise PEFTError(
            f"The checkpoint lacks the adapter tensor {missing[0]!r}: on_save_checkpoint of the module or a callback "
            "took it out. Drop that hook: only adapter state is saved anyway."
        )
    if trains_everything(model):
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **of_extra}
    elif not full:
        # Hooks that take frozen weights out take with them what has changed of the rest.
        state = {**{name: tensor.detach() for name, tensor, _ in changed(model)}, **state}
        saved = {name: state.pop(name) for name in saved_tensors(model)}
        others = {name: value for name, value in state.items() if name not in of_extra}
        checkpoint["state_dict"] = {**saved, **_of_hooks(others, model)}


def _of_hooks(state: Mapping[str, Any], model: ModelView) -> dict[str, Any]:
    """Return what of ``state`` is none of the tensors of ``model``, by whatever name."""
    others = {name: value for name, value in state.items() if not _in_base(model, name)}
    own = {memory for tensor in model.tensors.values() if (memory := _memory(tensor))} if others else set()
    return {name: value for name, value in others.items() if _memory(value) not in own}


def _memory(value: Any) -> int | None:
    """Return where a tensor is that has memory of its own."""
    return value.data_ptr() if type(value) in (Tensor, nn.Parameter) else None


def trained(checkpoint: Mapping[str, Any], model: ModelView) -> dict[str, Tensor]:
    """Return by name the tensors of ``checkpoint`` that training makes: what is trained, and optimizers' states of it.

    Of those that have the size of a parameter: a single number may be infinite before the first step.
    """
    state = {clean_name(name): tensor for name, tensor in checkpoint["state_dict"].items()}
    found = {name: state[name] for name in adapter_parameters_and_whole(model)}
    for saved in checkpoint.get("optimizer_states", ()):
        for name, entry in saved.get("state", {}).items():
            values = {key: v for key, v in entry.items() if isinstance(v, Tensor)} if isinstance(entry, Mapping) else {}
            found.update({f"{key} of {name}": value for key, value in values.items() if value.dim()})
    return found


def apply(checkpoint: Mapping[str, Any], model: ModelView, strict: bool = True) -> None:
    """Load the model part of a checkpoint into ``model``, which has the same adapters and is not merged.

    Args:
        checkpoint: As it was read.
        model: The model.
        strict: Whether frozen weights, if the checkpoint has them, are to be exactly those of ``model``; where
            everything is trained, the whole state.

    Raises:
        PEFTError: It holds no adapters, other ones, or those of another base model.
    """
    source = "The checkpoint"
    saved = checkpoint_metadata(checkpoint)
    state = {clean_name(name): tensor for name, tensor in checkpoint["state_dict"].items()}
    beyond = saved.get(EXTRA, {})
    whole = trains_everything(model) and not _is_in_pieces(model)
    # The base counts where it is not in the file, and of everything nothing is to be elsewhere.
    check_metadata(model, saved, source, held={*state, *(model.tensors if whole else ())})
    if whole:
        _apply_everything({**state, **by_name(beyond)}, model, source, strict)
        return
    names = adapter_parameters_and_whole(model).keys()
    # What has changed of the base, all of it in a full checkpoint, and what on_load_checkpoint has put in.
    base = {n: t for n, t in state.items() if n not in names and (saved.get("full") or _in_base(model, n))}
    adapters = {n: t for n, t in state.items() if n not in base and (strict or n in names or CHILD in n.split("."))}
    load_adapter_state_dict(model, adapters, source)
    if unknown := restore_changed(model, but_for=base.keys()):
        warnings.warn(
            f"{source} was written before {unknown[0]!r} and {len(unknown) - 1} other frozen tensors changed, of which "
            "no copies were kept: they stay as they are now. Load the checkpoint into a new module.",
            stacklevel=2,
        )
    _refuse_tied(base, model, source)
    if base or saved.get("full"):
        missing, extra = _apply_base(base, model, source)
        if strict and saved.get("full") and (missing or extra):
            raise PEFTError(f"{source} does not fit the base model. Missing: {missing[:5]}. Superfluous: {extra[:5]}.")
    for prefix, _, registry in required(model):
        registry.moved = set(saved["injections"].get(prefix, {}).get("moved", ()))
    note_moved(model, unknown)
    load_extra_state(model, beyond, source)


def holds_everything(checkpoint: Mapping[str, Any], model: ModelView) -> bool:
    """Whether ``checkpoint`` is to have every weight of ``model``, frozen ones too."""
    return bool(checkpoint_metadata(checkpoint).get("full")) or trains_everything(model)


def _in_base(model: ModelView, name: str) -> bool:
    """Whether a module of ``model`` itself has a tensor called ``name``."""
    owner, _, leaf = name.rpartition(".")
    module = model.modules.get(model.aliases.get(owner, owner))
    return module is not None and (leaf in module._parameters or leaf in module._buffers or leaf in own_state(module))


def _refuse_tied(base: Mapping[str, Any], model: ModelView, source: str) -> None:
    """Check that ``base`` has no value for what is one weight with another here and was not where it was written.

    Raises:
        PEFTError: It has; the other would get that value too.
    """
    first = {id(parameter): name for name, parameter in model.parameters.items()}
    for name in base.keys() - first.keys():
        weight = model.parameter(name)
        other = first.get(id(weight), name)
        if weight is not None and other not in {name, *base} and differs(weight, base[name]):
            raise PEFTError(
                f"{source} has {name!r} by itself, which is one weight with {other!r} here: a run has untied them. "
                "Untie them where the module is made, in __init__ or configure_model."
            )


def _is_in_pieces(model: ModelView) -> bool:
    return any(in_pieces(module) for _, module in model.walked)


def _apply_everything(state: Mapping[str, Tensor], model: ModelView, source: str, strict: bool) -> None:
    """Load ``state`` as Lightning does, by the model's own ``load_state_dict``."""
    own = model.module.state_dict(keep_vars=True)
    here = {id(tensor): name for name, tensor in model.tensors.items()}
    # A state_dict of its own may give other names, which its load_state_dict takes.
    names_of_torch = {here.get(id(tensor), name): name for name, tensor in own.items()}
    names_of_torch |= {clean_name(name): name for name in own}
    try:
        model.module.load_state_dict({names_of_torch.get(n, n): tensor for n, tensor in state.items()}, strict=strict)
    except RuntimeError as error:
        raise StateError(f"{source} does not fit this {model.kind}: {error}") from error


def _apply_base(base: Mapping[str, Tensor], model: ModelView, source: str) -> tuple[list[str], list[str]]:
    """Load ``base`` into the base part of ``model``; return what that has beyond it, and what it has beyond that."""
    if _is_in_pieces(model):
        fill(model.module, base, source)
        return [], []
    names = adapter_parameters_and_whole(model).keys()
    present = model.module.state_dict()
    names_of_torch = {clean_name(name): name for name in present}
    # With the adapters, as they are: a state without would be a plain model's.
    adapters = {name: tensor for name, tensor in present.items() if CHILD in name.split(".")}
    state = {**adapters, **{names_of_torch.get(name, name): tensor for name, tensor in base.items()}}
    try:
        missing, extra = model.module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise PEFTError(f"{source} does not fit the base model: {error}") from error
    return [name for name in missing if clean_name(name) not in names], extra


def refuse_other_base(checkpoint: Mapping[str, Any], model: ModelView) -> None:
    """Check that ``checkpoint`` fits the base that is ``model``, which has no adapters yet.

    Raises:
        PEFTError: It does not.
    """
    held = {clean_name(name) for name in checkpoint["state_dict"]}
    for prefix, injection in checkpoint_metadata(checkpoint)["injections"].items():
        fingerprint.refuse_other_base(model, injection["base"], "The checkpoint", prefix, held)


def inject_from(checkpoint: Mapping[str, Any], model: nn.Module) -> None:
    """Inject into ``model`` the adapters that ``checkpoint`` is about.

    Raises:
        PEFTError: It holds no adapters, or the model has not the modules that they adapt.
    """
    injections = checkpoint_metadata(checkpoint)["injections"]
    for prefix, injection in injections.items():
        # What finds modules by itself is to find what it found where the checkpoint was written.
        for name in injection.get("frozen", ()):
            ModelView(model.get_submodule(prefix)).part(name).module.requires_grad_(False)
    # Parts first: what is around one may have put an adapter beside its own.
    for prefix, injection in sorted(injections.items(), reverse=True):
        root = model.get_submodule(prefix)
        for name, configs in injection["adapters"].items():
            methods = [method_from_config(config) for config in configs]
            inject(root, methods, name=name, train_also=injection["train_also"])
        if not injection["adapters"]:
            freeze_rest(root, injection["train_also"])
    activate(checkpoint, ModelView(model))


def has_parts(checkpoint: Mapping[str, Any]) -> bool:
    """Whether adapters were injected into parts of the model that ``checkpoint`` is about, by themselves."""
    injections = checkpoint_metadata(checkpoint)["injections"]
    return any(prefix and injection["adapters"] for prefix, injection in injections.items())


def activate(checkpoint: Mapping[str, Any], model: ModelView) -> None:
    """Have the adapters of ``model`` run that ran when ``checkpoint`` was written."""
    for prefix, injection in checkpoint_metadata(checkpoint)["injections"].items():
        if injection["active"] in injection["adapters"]:  # else it is in parts of this one, or around it
            activate_in(model, [prefix], injection["active"])


def check_entries(checkpoint: Mapping[str, Any]) -> None:
    """Check that a checkpoint that was read has what is looked into first.

    Raises:
        PEFTError: Its state, or what it says of adapters, is no mapping.
    """
    for key in ("state_dict", KEY):
        if key not in checkpoint or not isinstance(checkpoint[key], Mapping):
            raise PEFTError(f"The checkpoint's {key!r} entry is damaged. Take another checkpoint.")


def checkpoint_metadata(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what ``checkpoint`` says of its adapters.

    Raises:
        PEFTError: Nothing.
    """
    saved = checkpoint.get(KEY)
    if not isinstance(saved, Mapping):
        refuse_hf_tensors(checkpoint)
        raise PEFTError(
            "The checkpoint was not written by PEFTStrategy: it holds no adapters. To fine-tune from its weights, load "
            "them into the LightningModule before fit and leave ckpt_path out; to continue that run, use the strategy "
            "that wrote it."
        )
    injections, extra = saved.get("injections", ()), saved.get(EXTRA, {})
    if not (_is_nested(injections) and _is_nested(extra) and _is_versioned(saved)) or not all(
        injection.keys() >= _INJECTION_KEYS for injection in injections.values()
    ):
        raise PEFTError(f"The checkpoint's {KEY!r} entry is damaged. Take another checkpoint.")
    for prefix, injection in injections.items():
        check_injection(injection, f"The checkpoint's entry of {f'the part {prefix!r}' if prefix else 'the model'}")
    return saved


def _is_versioned(saved: Mapping[str, Any]) -> bool:
    return fits(saved.get("version"), int | None) and fits(saved.get("full", False), bool)


def _is_nested(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(inner, Mapping) for inner in value.values())


def refuse_hf_tensors(checkpoint: Mapping[str, Any]) -> None:
    """Raise :class:`PEFTError` if ``checkpoint`` is that of a module that HF PEFT's ``get_peft_model`` has adapted."""
    names = [name for name in checkpoint.get("state_dict", ()) if ".base_layer." in name]
    if names:
        raise PEFTError(
            f"The checkpoint has HF PEFT's tensors ({names[0]!r}, …): get_peft_model had adapted its module. Load it "
            "into that module once more, write the adapter with save_pretrained(path), and read it with "
            "load_adapter(module, path) into one that get_peft_model has not adapted. Training begins anew from there."
        )

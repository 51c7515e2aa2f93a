"""Adapters and how they hang on a model: a child module, called from its host's own forward hook.

The host keeps its class, its object, its parameters and their names. This is the only file that knows hooks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.hooks import RemovableHandle

from lightning_peft.core.calls import on_rows, on_rows_before
from lightning_peft.core.stand_in import StandIns
from lightning_peft.errors import PEFTError
from lightning_peft.tensors.shadow import Turn, read

CHILD = "peft"
"""Name under which a slot becomes a child of its host: ``q_proj.peft.default.lora_A``."""

# What wrappers put into module names. They are not part of what the user's model calls its modules.
_WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Asked of every module and tensor of a model, where a loop over them takes twice as long.
_WRAPPED = re.compile("|".join(_WRAPPER_SEGMENTS))

_NARROW = (torch.float16, torch.bfloat16)

_NOT_GIVEN = object()


class Adapter(nn.Module):
    """Base of all adapter modules.

    Subclasses hold bare parameters (no ``nn.Linear`` inside, no parameter name that ends in ``weight``: both are
    taken for the base's by quantising plugins) and are always called through ``adapter(...)``, so that hooks of
    sharding wrappers fire. What is random but not trained is a buffer. Tensors that several adapters share stand in
    one ``nn.Module``, made once and assigned to an attribute of each of them.
    """

    mergeable: bool = False
    """Whether :meth:`fold` gives a weight with the same effect as the adapter."""
    adds_bias: bool = False
    """Whether :meth:`fold` gives a bias to a host without one."""
    changes_input: bool = False
    """Whether it can be merged and the host is called with something else for it: so nobody may come between them."""
    by_row: bool = True
    """Whether it acts on each row of a batch by itself, and of the arguments looks at the hidden state alone."""
    folds_by_row: bool = False
    """Whether :meth:`fold` works on some rows of a linear layer's weight as on all, and leaves the bias alone. What
    :attr:`axes` has along ``"out"`` is cut to them, and :attr:`rows_from` says which they are."""
    rows_from: int = 0
    """Which row of the host's weight is the first that :meth:`fold` is given."""
    follows_ties: bool = False
    """Whether all modules with the host's weight have such an adapter, of the same effect: merging keeps the tie."""
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {}
    """Which dimension of a tensor runs over the host's ``"in"`` or ``"out"`` features, for hosts that are split.

    It names all parameters, and the buffers that are computed with; those of a module in it as ``"module.buffer"``.
    """
    of_heads: ClassVar[bool] = False
    """Whether it has a part for each head of attention, its host."""
    replaces: tuple[str, ...] = ()
    """Names, in the host, of weights that it reads itself instead of calling a module: see :meth:`replace`."""

    def before(
        self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the host should be called with instead; runs only if a subclass defines it."""
        return args, kwargs

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return what the host should return instead of ``output``; as defined here, ``output``.

        Args:
            base: The adapted module.
            args: Positional arguments of its call, as :meth:`before` returned them.
            kwargs: Keyword arguments of its call, likewise.
            output: What its own forward returned.
        """
        return output

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight ``[out, in]`` and bias ``[out]`` that make the adapter superfluous.

        A bias where there was none becomes a parameter of the host.

        Raises:
            PEFTError: The adapter is no change of weights.
        """
        raise PEFTError(f"{type(self).__name__} cannot be merged into weights: it is not a change of weights.")

    def replace(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the host should read instead of the weights that :attr:`replaces` names.

        It runs before the host does, and the host reads the new tensors until it returns. Merging, it takes the place
        of :meth:`fold`.

        Args:
            weights: These weights, by name; whole, as stored, and in at least float32 when merging.
        """
        raise TypeError(f"{type(self).__name__} names weights to replace but does not define replace")

    def to_file(self, key: str, tensor: Tensor) -> Tensor:
        """Return what HF PEFT's file holds for this adapter's tensor ``key``; as defined here, ``tensor`` itself."""
        return tensor

    def from_file(self, key: str, tensor: Tensor) -> Tensor:
        """Undo :meth:`to_file`."""
        return tensor

    def reset_parameters(self) -> None:
        """Set the initial values, the same on every call and on every rank."""
        raise TypeError(f"{type(self).__name__} does not define reset_parameters")

    def _apply(self, fn: Any, recurse: bool = True) -> Adapter:
        # `module.to(torch.bfloat16)` reaches the adapters at every `setup` under `precision="bf16-true"`. They stay
        # float32: an optimizer step of 1e-4 is lost in bfloat16, and the values trained so far would be rounded.
        def keep_precision(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            if moved.dtype in _NARROW and tensor.dtype not in _NARROW and tensor.is_floating_point():
                return tensor.to(device=moved.device)
            return moved

        super()._apply(keep_precision, recurse)
        return self


class Slot(nn.ModuleDict):
    """The adapters of one host by name, of which one is active."""

    running: Adapter | None
    """The adapter that runs, but for contexts that have something else run."""
    of_state: tuple[RemovableHandle, ...] = ()
    """The hooks by which :mod:`lightning_peft.operations.by_hand` watches states of the host being made and loaded."""
    _handle: RemovableHandle | None
    _handle_before: RemovableHandle | None
    _handles_replace: tuple[RemovableHandle, ...]

    def __init__(self, root: str) -> None:
        super().__init__()
        self.root = root
        """Name of the class of the module into which the adapters were injected."""
        self.active = ""
        self.run(None)
        self.stand_ins, self._turn = StandIns(), Turn()
        self._handle, self._handle_before, self._handles_replace = None, None, ()
        self.merged: dict[str, Any] | None = None
        """While merged: what :mod:`lightning_peft.operations.merge` needs to restore the weights."""

    def hook(self, host: nn.Module) -> None:
        """Have ``host`` call the active adapter, before it runs too, or read what that replaces, if that is wanted."""
        # First of all hooks: beside a layer that tensor parallelism has split, the next one gathers the output.
        if self._handle is None:
            self._handle = host.register_forward_hook(self._run, with_kwargs=True, prepend=True)
        adapters = [adapter for adapter in self.values() if isinstance(adapter, Adapter)]
        if self._handle_before is None and any(type(adapter).before is not Adapter.before for adapter in adapters):
            self._handle_before = host.register_forward_pre_hook(self._run_before, with_kwargs=True)
        if not self._handles_replace and any(adapter.replaces for adapter in adapters):
            # One at a time: what is registered when an interrupt comes is known, and can be removed.
            self._handles_replace = (host.register_forward_pre_hook(self._replace),)
            # Also if the host fails, or stops early as in recomputing for activation checkpointing.
            self._handles_replace += (host.register_forward_hook(self._put_back, always_call=True),)

    def _present(self) -> Adapter | None:
        """Return what the host is to call for its caller."""
        if self.merged is not None:
            return None
        return self.stand_ins.chosen(self.running) if self.stand_ins.any else self.running

    def _run(self, base: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = _NOT_GIVEN) -> Any:
        if output is _NOT_GIVEN:
            return self._refuse_copied()
        adapter = self._present()
        if adapter is None:
            return output
        if isinstance(output, Tensor) and output.is_nested:
            return on_rows(partial(adapter, base), args, kwargs, output)
        return adapter(base, args, kwargs, output)

    def _run_before(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs is None:
            return self._refuse_copied()
        adapter = self._present()
        if adapter is None:
            return None
        if args and isinstance(args[0], Tensor) and args[0].is_nested:
            return on_rows_before(partial(adapter.before, base), args, kwargs)
        return adapter.before(base, args, kwargs)

    def _replace(self, base: nn.Module, args: tuple[Any, ...]) -> None:
        adapter = self._present()
        if adapter is not None and adapter.replaces:
            self._turn.begin()
            self._turn.shadow(base, adapter.replace({name: read(base, name) for name in adapter.replaces}))

    def _put_back(self, base: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._turn.end()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # One that an older version pickled has neither.
        super().__setstate__({**state, "stand_ins": StandIns(), "_turn": Turn()})

    def _refuse_copied(self) -> None:
        """Check that nothing is lost where hooks were registered once more, without keyword arguments.

        torch's quantisation does so with all hooks of a layer, on what it puts in the layer's place.

        Raises:
            PEFTError: The adapters are not merged.
        """
        if self.merged is None:
            raise PEFTError(
                "A layer with an adapter was replaced by another, as torch's quantize_dynamic does it, which has none. "
                "Merge the adapters into the weights first: merge(model), or merge(model, unload=True)."
            )

    def __prepare_scriptable__(self) -> nn.Module:
        raise PEFTError(
            "TorchScript is compiled from the source of modules, where adapters are not. Call merge(model, "
            "unload=True) first, which leaves a plain model; or merge(model) and torch.jit.trace(model, example)."
        )

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise PEFTError(
            "nn.DataParallel runs replicas of a model in threads, and their hooks call the adapters of the model "
            "itself, on its own device. Take one process for each device: strategy=PEFTStrategy(…, base='ddp')."
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return every parameter and persistent buffer of the adapters, by name."""
        return {f"{name}.{key}": t for name, a in self.items() for key, t in a.state_dict(keep_vars=True).items()}

    @property
    def active_adapter(self) -> Adapter | None:
        """The adapter called :attr:`active`, if this host has one of that name."""
        adapter = self._modules.get(self.active)
        return adapter if isinstance(adapter, Adapter) else None

    def activate(self, name: str) -> None:
        """Have the adapter ``name`` run, if this host has it, and the one that did no longer.

        Both keep their ``requires_grad``: a loss may have gone through several adapters when it is differentiated.
        """
        self.active = name
        self.run(self.active_adapter)

    def run(self, adapter: Adapter | None) -> None:
        """Have the host call ``adapter``."""
        # Looked up by name, or registered as a child, it would make torch.compile compile anew for every adapter.
        object.__setattr__(self, "running", adapter)

    def remove_hook(self) -> None:
        """Take the forward hooks off the host."""
        for handle in (self._handle, self._handle_before, *self._handles_replace):
            if handle is not None:
                handle.remove()
        self._handle, self._handle_before, self._handles_replace = None, None, ()

    def remove_hooks_of_state(self) -> None:
        """Take :attr:`of_state` off the host."""
        for handle in self.of_state:
            handle.remove()
        self.of_state = ()


def is_overtaken(host: nn.Module) -> bool:
    """Whether a hook of others comes between what ``host`` computes and its adapter, and so would not see a merge.

    So it is where a forward hook was registered later with ``prepend=True``, or for all modules, or a pre-hook behind
    that of an adapter that changes the input; or where all were deleted.
    """
    slot = host._modules.get(CHILD)
    if not isinstance(slot, Slot) or slot.merged is not None:
        return False
    behind = [*_global_forward_hooks.values(), *host._forward_hooks.values()]
    if not behind or not _belongs(behind[0], slot):
        return True
    if (adapter := slot.active_adapter) is None or not adapter.changes_input:
        return False
    # Those of DeepSpeed's, which fetch weights, are registered last of all.
    ahead = [hook for hook in host._forward_pre_hooks.values() if not _is_of_deepspeed(hook)]
    return not ahead or not _belongs(ahead[-1], slot)


def _belongs(hook: Any, slot: Slot) -> bool:
    return getattr(hook, "__self__", None) is slot


def _is_of_deepspeed(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("deepspeed.")


def attach(host: nn.Module, name: str, adapter: Adapter, active: str, root: str) -> None:
    """Hang ``adapter`` on ``host``, a part of a ``root``, under ``name``, and have the one called ``active`` run."""
    slot = host._modules.get(CHILD)
    if not isinstance(slot, Slot):
        # First of all it is where it can be found, and taken off again.
        slot = Slot(root)
        host.add_module(CHILD, slot)
    slot[name] = adapter
    # A model in eval mode stays in it: dropout and what else depends on the mode follow the host.
    slot.train(host.training)
    slot.hook(host)
    slot.activate(active)


def detach(host: nn.Module, name: str | None = None) -> None:
    """Take every adapter off ``host``, or the one called ``name`` and what no other needs."""
    slot = host._modules[CHILD]
    assert isinstance(slot, Slot)
    slot._modules.pop(name, None)  # type: ignore[arg-type]
    if name is not None and len(slot):
        slot.remove_hook()
        slot.hook(host)
        slot.activate(slot.active)
        return
    slot.remove_hook()
    slot.remove_hooks_of_state()
    delattr(host, CHILD)


def restore_hooks(slots: Iterable[tuple[str, nn.Module, Slot]]) -> None:
    """Hook every host again, after someone deleted all forward hooks."""
    for _, host, slot in slots:
        slot.remove_hook()
        slot.hook(host)


def clean_name(name: str) -> str:
    """Drop what wrappers (``torch.compile``, FSDP, activation checkpointing) put into a module's name."""
    if _WRAPPED.search(name) is None:
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_SEGMENTS)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module behind ``torch.compile``."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner

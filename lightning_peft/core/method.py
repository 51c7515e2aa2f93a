"""What a method is, and the registry of all methods by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.schema import check_values, hints_of
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError, near, refuse_arguments

T = TypeVar("T", bound="PEFTMethod")

_METHODS: dict[str, type[PEFTMethod]] = {}

_OF_HF = {
    **{"lora_alpha": "alpha", "lora_dropout": "dropout", "layers_to_transform": "layers"},
    **{"oft_block_size": "block_size", "miss_dropout": "dropout"},
}
"""HF PEFT's names of hyper-parameters that have others here."""
_ELSEWHERE = {
    **{theirs: f"{ours}={{}}" for theirs, ours in {**_OF_HF, "rank": "r", "lora_r": "r"}.items()},
    "init_lora_weights": "init='gaussian', 'pissa' or 'olora'",
    "use_dora": "DoRA(...)",
    "modules_to_save": "train_also={}, of PEFTStrategy or inject",
    "bias": "[LoRA(...), BitFit()], which trains biases too",
    "task_type": "nothing: the task is the module's",
}
"""What to write for names of hyper-parameters that other tools have."""


class PEFTMethod:
    """Base of all methods: a frozen keyword-only dataclass of hyper-parameters.

    A subclass with a ``name`` registers itself. It defines :meth:`select` and :meth:`adapter` (it makes adapters),
    :meth:`trained` (it trains parameters of the base), or all three.
    """

    name: ClassVar[str] = ""
    free: ClassVar[frozenset[str]] = frozenset({"target_modules", "exclude_modules", "layers", "dropout", "init"})
    """Hyper-parameters that may differ between a checkpoint and the model that it is loaded into: they change neither
    what the adapters compute from the same tensors nor, but for the targets that the tensors' names show, which
    there are."""
    learnt: ClassVar[frozenset[str]] = frozenset()
    """Hyper-parameters that training sets: a method that gives none asks for none."""
    mergeable: ClassVar[bool] = True
    """Whether merging leaves the plain model; for the table in the README, as the next two."""
    hosts: ClassVar[str] = ""
    """What can be adapted."""
    count: ClassVar[str] = ""
    """The number of trained parameters as a formula, with the signs that the README explains."""
    everything: ClassVar[bool] = False
    """Whether the model is trained as it trains itself: nothing is frozen that is not frozen already, all is saved."""
    needs_total_steps: ClassVar[bool] = False
    """Whether :meth:`after_step` cannot do without the number of steps of the run."""

    def __new__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        """Check the names of hyper-parameters, before Python does in words of its own."""
        refuse_arguments(cls, args, kwargs, _ELSEWHERE)
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("name"):
            _METHODS[cls.name] = cls
            # Methods are hyper-parameters of users' modules, and are to be read back with `weights_only=True`.
            torch.serialization.add_safe_globals([cls])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over hyper-parameters that were pickled, checked as those of a new method are."""
        vars(self).update(vars(method_from_config({**state, "method": self.name})))

    @property
    def reads_weights(self) -> bool:
        """Whether adapters start from values of the base's weights, which have to be there when they are made."""
        return False

    def select(self, model: ModelView) -> dict[str, nn.Module]:
        """Return the modules to adapt, by name; none, if the method makes no adapters.

        Raises:
            PEFTError: A pattern matches nothing, or a matched module cannot be adapted.
        """
        return {}

    def trained(self, model: ModelView) -> Iterable[str]:
        """Return the names of the base's parameters that are trained; none, if the method trains adapters alone.

        Raises:
            PEFTError: The model has no such parameters.
        """
        return ()

    def adapters(self, model: ModelView, hosts: Mapping[str, nn.Module], seed: int) -> dict[str, Adapter]:
        """Make the adapters of ``hosts``, by name.

        Methods define this instead of :meth:`adapter` if their adapters share something, or depend on the place of the
        module in the model.

        Args:
            model: What :meth:`select` was given.
            hosts: What it returned, but for modules that are trained whole.
            seed: Of the initial values.

        Raises:
            PEFTError: The hyper-parameters do not fit a module.
        """
        return {name: self.adapter(name, module, seed) for name, module in hosts.items()}

    def adapter(self, name: str, module: nn.Module, seed: int) -> Adapter:
        """Make the adapter of one module; its initial values depend on ``(seed, name)`` alone.

        Raises:
            PEFTError: The hyper-parameters do not fit the module.
        """
        raise TypeError(f"{type(self).__name__} selects modules but makes no adapters")

    def within(self, adapters: Mapping[str, Adapter]) -> PEFTMethod:
        """Return this method as one for a part of the model: what depends on modules by their names there.

        Args:
            adapters: What the method made in that part, by the host's name in it.
        """
        return self

    def lr_ratio(self, parameter: str) -> float:
        """Return what the learning rate of an adapter's parameter is multiplied by.

        Args:
            parameter: Its name in the adapter, such as ``lora_B``.
        """
        return 1.0

    def check_steps(self, total_steps: int) -> None:
        """Check that the method's schedule fits a run of ``total_steps`` optimizer steps.

        Raises:
            PEFTError: It does not.
        """

    def before_step(self, adapters: Mapping[str, Adapter], scale: float) -> None:
        """Add to gradients before an optimizer step, and before they are clipped. Called by the strategy.

        Args:
            adapters: This method's part of an adapter that took part in the step, by the name of the host.
            scale: What gradients are multiplied by: not 1 under a gradient scaler, which divides them by it later.
        """

    def after_step(self, adapters: Mapping[str, Adapter], step: int, total_steps: int | None) -> None:
        """Change adapters after an optimizer step; gradients are still there. Called by the strategy.

        Args:
            adapters: This method's part of an adapter that took part in the step, by the name of the host.
            step: Number of steps taken, from 1.
            total_steps: Number of steps of the run, if it is known.
        """

    def config(self) -> dict[str, Any]:
        """Return the hyper-parameters as plain JSON types."""
        assert dataclasses.is_dataclass(self)
        return {"method": self.name, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        return str(self.config())


def registered_methods() -> dict[str, type[PEFTMethod]]:
    """Return every method class by its registered name."""
    return dict(sorted(_METHODS.items()))


def methods_of(given: PEFTMethod | str | Sequence[PEFTMethod | str]) -> tuple[PEFTMethod, ...]:
    """Return what a user gave as a method, its name, or a list of both, as methods.

    Raises:
        PEFTError: There is nothing, something else, or an unknown name.
    """
    entries = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not entries:
        raise PEFTError("An empty list of methods was given; at least one was expected, for example LoRA(r=8).")
    return tuple(entry if isinstance(entry, PEFTMethod) else _method_of(entry) for entry in entries)


def _method_of(given: Any) -> PEFTMethod:
    if isinstance(given, str):
        return method_from_name(given)
    if isinstance(given, type) and issubclass(given, PEFTMethod):
        raise PEFTError(
            f"The class {given.__name__} was given as a method; an object was expected: {given.__name__}()."
        )
    if hasattr(given, "peft_config"):
        raise PEFTError(
            f"A {type(given).__name__}, which is a model of HF PEFT, was given as a method. Give PEFTStrategy the "
            "configuration, such as peft.LoraConfig(...), and the LightningModule the model as it was before."
        )
    if hasattr(given, "peft_type") or (isinstance(given, Mapping) and "peft_type" in given):
        raise PEFTError(
            "A configuration of HF PEFT was given as a method. PEFTStrategy takes such an object, like "
            "peft.LoraConfig(...), as it is; elsewhere lightning_peft.from_peft_config(config) makes methods of it."
        )
    raise PEFTError(f"{given!r} was given as a method; a PEFTMethod such as LoRA(r=8), or a name was expected.")


def method_from_name(name: str) -> PEFTMethod:
    """Return the method registered as ``name`` with its default hyper-parameters.

    Raises:
        PEFTError: There is no such method; the message lists those that exist.
    """
    if name not in _METHODS:
        raise PEFTError(f"Unknown method {name!r}. {near(name, _METHODS)}Methods: {', '.join(sorted(_METHODS))}.")
    return _METHODS[name]()


def method_from_config(config: dict[str, Any]) -> PEFTMethod:
    """Return the method that :meth:`PEFTMethod.config` described.

    Raises:
        PEFTError: The method is unknown, or a key is none of its hyper-parameters.
    """
    fields = dict(config)
    name = fields.pop("method", None)
    if not isinstance(name, str) or name not in _METHODS:
        raise PEFTError(f"Unknown method {name!r}. Methods: {', '.join(sorted(_METHODS))}.")
    check_values(fields, hints_of(_METHODS[name]), f"The configuration of method {name!r}")
    try:
        return _METHODS[name](**fields)
    except PEFTError as error:
        raise PEFTError(f"The configuration of method {name!r} does not fit: {error}") from error

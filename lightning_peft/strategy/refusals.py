"""What a run is refused for: setups in which adapters would be lost, mixed or not trained, without a word."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.registry import added, registries, trains_everything
from lightning_peft.core.view import ModelView, seen_parameters
from lightning_peft.errors import PEFTError, listed
from lightning_peft.operations.prepare import whole_names
from lightning_peft.storage.state import adapter_parameters_and_whole
from lightning_peft.strategy.optimizers.optim import held_parameters
from lightning_peft.tensors.seeding import parameters_left_empty
from lightning_peft.tensors.sharding import full_shape


def refuse_unsaved(optimizers: Iterable[Optimizer], model: ModelView, known: Mapping[int, str]) -> None:
    """Check that checkpoints have everything that ``optimizers`` train of ``model``.

    Args:
        optimizers: The optimizers of the run.
        model: The module with adapters.
        known: The names of the parameters that they held at ``setup``, by id.

    Raises:
        PEFTError: They hold a weight of the base that requires a gradient, or a parameter that the module has no more.
    """
    if trains_everything(model):
        return
    saved = {id(tensor) for tensor in adapter_parameters_and_whole(model).values()}
    held = held_parameters(optimizers)
    if not (unsaved := [p for p in held if p.requires_grad and id(p) not in saved]):
        return
    base = {id(parameter): name for name, parameter in seen_parameters(model).items()}
    for parameter in unsaved:
        if name := base.get(id(parameter)):
            if name in added(model):
                raise PEFTError(
                    f"An optimizer holds {name!r}, which the module has got since the adapters were injected: no "
                    "checkpoint would have what it learns. Make it in __init__, configure_model or setup, and name it "
                    "or its module in train_also."
                )
            owner = name.rpartition(".")[0]
            alone = model.part(owner).modules.keys() > {""}
            raise PEFTError(
                f"{name!r} requires a gradient and an optimizer holds it, but it is no adapter's: no checkpoint would "
                "have what it learns. Something (configure_optimizers, a hook, a callback) has unfrozen it since the "
                f"adapters were injected. To train it, name {'it' if alone else 'its module'}: "
                f"train_also=[{(name if alone else owner)!r}]; or leave it frozen."
            )
        if name := known.get(id(parameter)):
            raise PEFTError(
                f"An optimizer trains {name!r}, which the module has no more: it, or the module around it, was "
                "replaced after the adapters were injected. Replace it in __init__, configure_model or setup."
            )


def refuse_freezing(trainer: pl.Trainer, model: ModelView, watched: bool) -> None:
    """Check that no callback changes weights that are frozen, of which checkpoints would not have the change.

    Args:
        trainer: The trainer.
        model: The module with adapters.
        watched: Whether changes of frozen weights are noticed.

    Raises:
        PEFTError: One does.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning | ModelPruning) and not (trains_everything(model) and watched):
            raise PEFTError(
                f"{type(callback).__name__} changes weights of the base, which are frozen here and in no checkpoint. "
                "Leave it out of the callbacks, and name what is to be trained whole in train_also; or train with "
                "FullFinetuning on one device or DDP."
            )


def refuse_other_methods(view: ModelView, given: Sequence[PEFTMethod], asked: Sequence[bool]) -> None:
    """Check that each adapter that is in a model already is of the methods ``given`` to the strategy, by their values.

    Args:
        view: The model.
        given: The methods.
        asked: For each, whether the user gave its hyper-parameters, and not its name alone.

    Raises:
        PEFTError: One is of others; what differs is named.
    """
    present = [(p, n, registry.hosts[n], m) for p, _, registry in registries(view) for n, m in registry.methods.items()]
    for prefix, name, hosts, methods in present:
        theirs, ours = ([type(method) for method in found] for found in (methods, given))
        if theirs != ours:
            names = [" + ".join(method.__name__ for method in found) for found in (theirs, ours)]
            raise PEFTError(
                f"The model already has adapters of method {names[0]}, the strategy was given {names[1]}. Give "
                "both the same method, or call eject(model) first."
            )
        for position, (there, wanted) in enumerate(zip(methods, given, strict=True)):
            if asked[position] and there != wanted:
                own = {f"{prefix}.{host}".lstrip(".") for host, number in hosts.items() if number == position}
                _refuse_other_values(view, prefix, name, own, there, wanted)


def _refuse_other_values(
    view: ModelView, prefix: str, name: str, hosts: set[str], there: PEFTMethod, given: PEFTMethod
) -> None:
    """Check that ``there``, which has adapted ``hosts``, has the values of ``given``; warn of those without effect."""
    differing = {key for key, value in given.config().items() if there.config()[key] != value} - {"init"}
    targets = {"target_modules", "exclude_modules", "layers"} & differing
    if targets and _selected(view, prefix, given) == hosts:
        differing -= targets
    # A file gives by name the ranks that a preset found.
    if differing == {"rank_pattern"} and _has_shapes_of(view, name, hosts, given):
        return
    both = ", ".join(f"{k}={given.config()[k]!r} (there {there.config()[k]!r})" for k in sorted(differing))
    kind = type(there).__name__
    learnt = {key for key in given.learnt if not given.config()[key]}
    if differing - (there.free - {"rank_pattern"}) - learnt:
        raise PEFTError(
            f"The model already has {kind} adapters, on which the strategy's {both} would have no effect. Give it the "
            "hyper-parameters that are there; or call eject(model) first; or, to start from an adapter in a file, call "
            "inject(model, method) with the strategy's method before load_adapter."
        )
    if differing:
        rank_zero_warn(f"The model already has {kind} adapters, on which the strategy's {both} have no effect.")


def _has_shapes_of(view: ModelView, name: str, hosts: set[str], method: PEFTMethod) -> bool:
    """Whether ``method`` would make adapters of the shapes that those called ``name`` on ``hosts`` have."""
    present = {host: (module, slot[name]) for host, module, slot in view.slots if host in hosts}
    with parameters_left_empty():
        made = method.adapters(view, {host: module for host, (module, _) in present.items()}, seed=0)
    return all(
        [tensor.shape for tensor in made[host].state_dict().values()]
        == [full_shape(tensor) for tensor in adapter.state_dict(keep_vars=True).values()]
        for host, (_, adapter) in present.items()
    )


def _selected(view: ModelView, prefix: str, method: PEFTMethod) -> set[str]:
    """Return the names of what ``method`` would adapt in the part ``prefix``; none, if it fits not."""
    try:
        return {name for name in method.select(view) if not prefix or f"{name}.".startswith(f"{prefix}.")}
    except PEFTError:
        return set()


def refuse_late_train_also(view: ModelView, train_also: Sequence[str]) -> None:
    """Check that what ``train_also`` names is trained whole in a model that has adapters already.

    Raises:
        PEFTError: It is not.
    """
    trained = {f"{p}.{name}".lstrip(".") for p, _, registry in registries(view) for name in registry.train_also}
    late = [n for n in whole_names(view, train_also) if not any(f"{n}.".startswith(f"{t}.") for t in trained)]
    if late:
        raise PEFTError(
            f"The model already has adapters, so train_also={late!r} would have no effect. Pass it to "
            "inject, or leave the injection to the strategy."
        )


def refuse_reading_late_weights(methods: Sequence[PEFTMethod]) -> None:
    """Check that no method starts from weights that are loaded after the injection.

    Raises:
        PEFTError: One does.
    """
    if reading := [method for method in methods if method.reads_weights]:
        raise PEFTError(
            f"{type(reading[0]).__name__} starts from the model's weights, but base_weights are loaded after the "
            "injection. Load them in configure_model with load_base_weights, or start at random."
        )


def refuse_without_values(empty: Collection[str], base_name: str) -> None:
    """Check that the parameters of a module have values, where no base strategy gives them any.

    Raises:
        PEFTError: Some have none (``empty``, their names).
    """
    if empty:
        raise PEFTError(
            f"{listed(map(repr, sorted(empty)))} have no values: the module was built on the meta device, and base="
            f"{base_name!r} moves a module as it is. Build it with its weights (trainer.init_module() without "
            "empty_init, from_pretrained), or take a base that fills it: ModelParallelStrategy or 'fsdp' with "
            "base_weights=DIRECTORY."
        )


def refuse_different_ranks(strategy: Strategy, view: ModelView) -> None:
    """Check that every process trains the same adapters: a collective over different ones would hang or mix them.

    Raises:
        PEFTError: One does not; raised on every process.
    """
    shapes = {name: list(full_shape(p)) for name, p in adapter_parameters_and_whole(view).items()}
    first = strategy.broadcast(shapes)
    differing = sorted(n for n in first.keys() | shapes.keys() if first.get(n) != shapes.get(n))
    count = strategy.reduce(torch.tensor(float(bool(differing)), device=strategy.root_device), reduce_op="sum")
    if count:
        name = next(iter(differing), None)
        where = f"here {name!r} is {shapes.get(name)}, on rank 0 {first.get(name)}" if name else "see the other ranks"
        raise PEFTError(
            f"{int(count)} processes have other adapters than rank 0: {where}. Build the same model on each."
        )


def tell_of_own_statistics(model: ModelView) -> None:
    """Warn of batch norms whose running statistics every process keeps for itself; DDP alone makes them equal."""
    found = [
        name
        for name, module in model.modules.items()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and not isinstance(module, nn.SyncBatchNorm)
        and module.track_running_stats
        and module.training
    ]
    if found:
        rank_zero_warn(
            f"{listed(found)}: each process keeps running statistics of its own on this base strategy, and checkpoints "
            "have those of process 0. Call torch.nn.SyncBatchNorm.convert_sync_batchnorm on the model in __init__ (it "
            "needs GPUs), take base='ddp', or put these modules into eval mode."
        )


def refuse_untrained(model: ModelView, held: Collection[int]) -> None:
    """Check that optimizers, which hold the parameters with the ids ``held``, train the adapters that run.

    Raises:
        PEFTError: They do not.
    """
    for host, _, slot in model.slots:
        adapter = slot.active_adapter
        if adapter is not None and any(p.requires_grad and id(p) not in held for p in adapter.parameters()):
            raise PEFTError(
                f"The adapter {slot.active!r} runs in {host!r}, but no optimizer holds it, so it is not trained. It "
                "was injected or loaded, or its module was copied, when the optimizers had been made: do that before "
                "fit, or in configure_model; or freeze the copy, requires_grad_(False)."
            )


def refuse_full_merged(view: ModelView) -> None:
    """Check that weights that the base strategy writes by itself are what they are without adapters.

    Raises:
        PEFTError: Adapters are merged into them.
    """
    if any(slot.merged is not None for _, _, slot in view.slots):
        raise PEFTError(
            "checkpoint='full' was asked for while adapters are merged into weights that the base strategy gathers or "
            "writes by itself, so that they cannot be written as they are without. Call unmerge(module) first, or save "
            "adapters only."
        )


def refuse_unserved(strategy: Strategy, module: nn.Module, base_name: str, is_set_up: bool) -> None:
    """Check that the base strategy went the way of Lightning's own.

    Raises:
        PEFTError: It is a strategy of the user's that leaves out a call.
    """
    held = {id(parameter) for parameter in held_parameters(strategy.optimizers)}
    frozen = any(id(p) in held and not p.requires_grad for p in module.parameters())
    for missing, call in (
        (not is_set_up, "self.precision_plugin.convert_module(self.model)"),
        (frozen and not trains_everything(ModelView(module)), "self.setup_optimizers(trainer)"),
    ):
        if missing:
            raise PEFTError(
                f"The base strategy {base_name} does not call {call} in setup, where adapters are injected "
                "and optimizers restricted. Call it there, or call super().setup(trainer)."
            )

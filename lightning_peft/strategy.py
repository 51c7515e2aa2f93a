"""PEFTStrategy: one flag that turns a Lightning run into a parameter-efficient one.

The class is also the first base of a class made for each Lightning strategy (``PEFTDDPStrategy`` and so on), so that
Lightning's own ``isinstance`` checks keep their meaning. The methods stand in the order in which a run calls them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_peft import checkpoint as files
from lightning_peft.adapter import adapter_parameters
from lightning_peft.bases import PREFIX, base_names, strategy_from_name
from lightning_peft.bases.auto import choose_strategy
from lightning_peft.bases.spawn import PEFTMultiProcessingLauncher
from lightning_peft.errors import PEFTError
from lightning_peft.inject import inject
from lightning_peft.merge import is_merged, merge, unmerge
from lightning_peft.method import PEFTMethod, method_from_name, registered_methods
from lightning_peft.optim import restrict_to_trainable, state_by_name, state_by_position
from lightning_peft.registry import registries
from lightning_peft.select import transformers_models
from lightning_peft.state import adapter_state_dict

# Beyond it a merge is reported as a warning. bfloat16 weights lose 3 to 20 % of a typical adapter.
_MERGE_LOSS_WARNING = 0.01


class PEFTStrategy(Strategy):
    """Fine-tune adapters instead of the model, on top of any Lightning strategy.

    At ``setup`` the adapters are injected; optimizers are restricted to what is trained; every checkpoint holds adapter
    state only; after training the adapters are merged into the weights.

    Args:
        method: What to train: a method such as ``LoRA(r=8)``, its registered name, or a list with one of them.
        base: The strategy underneath: ``"auto"``, a registered name such as ``"ddp"``, or a configured strategy.
        merge_on_train_end: Merge the adapters into the weights when training has ended. The adapters and a copy of the
            adapted weights in host memory are kept, so that ``unmerge``, ``test(ckpt_path="best")`` and another ``fit``
            work.
        checkpoint: ``"adapter"`` writes adapter state only, ``"full"`` the frozen weights as well.
        train_also: Patterns of modules to train whole and to save with the adapter, such as a classification head.
        train_mode: Put transformers models, which arrive in eval mode, into train mode when fit starts: in eval mode
            their dropout is off and gradient checkpointing does nothing.
    """

    def __new__(
        cls,
        method: PEFTMethod | str | list[PEFTMethod | str] = "lora",
        base: Strategy | str = "auto",
        *,
        merge_on_train_end: bool = True,
        checkpoint: Literal["adapter", "full"] = "adapter",
        train_also: list[str] | str | None = None,
        train_mode: bool = True,
    ) -> PEFTStrategy:
        """Make an instance of the class for ``base``. The signature is ``__init__``'s: jsonargparse reads this one."""
        if base == "auto":
            placeholder = object.__new__(PEFTStrategy)
            Strategy.__init__(placeholder)
            # What the Trainer's connector sets if it is there; `_configure_launcher` hands it on.
            placeholder.__dict__.update(cluster_environment=None, parallel_devices=None, num_nodes=1, _layer_sync=None)
            return placeholder
        strategy = strategy_from_name(base) if isinstance(base, str) else base
        if not isinstance(strategy, Strategy) or isinstance(strategy, PEFTStrategy):
            raise PEFTError(
                f"base={base!r} was given; it is 'auto', the name of a Lightning strategy or a configured one other than "
                f"PEFTStrategy. Names: {', '.join(base_names())}."
            )
        self = object.__new__(_class_for(type(strategy)))
        self.__dict__.update(copy.copy(strategy).__dict__)
        return self

    def __init__(
        self,
        method: PEFTMethod | str | list[PEFTMethod | str] = "lora",
        base: Strategy | str = "auto",
        *,
        merge_on_train_end: bool = True,
        checkpoint: Literal["adapter", "full"] = "adapter",
        train_also: list[str] | str | None = None,
        train_mode: bool = True,
    ) -> None:
        # `__new__` has taken over the state of `base`: its own __init__ must not run again.
        self.method = _one_method(method)
        if checkpoint not in ("adapter", "full"):
            raise PEFTError(f"checkpoint={checkpoint!r} was given; it is 'adapter' or 'full'.")
        self._full_checkpoints = checkpoint == "full"
        self._merge_on_train_end = merge_on_train_end
        self._train_also = [train_also] if isinstance(train_also, str) else list(train_also or ())
        self._train_mode = train_mode
        self._is_set_up = False
        self._held_back: tuple[Mapping[str, Any], bool] | None = None
        self._stepped: set[int] = set()

    def __reduce__(self) -> Any:
        # The class is made at run time, so pickle cannot find it by name; spawned workers get it from its base.
        return _rebuild, (_base_of(type(self)),), self.__getstate__()

    def _configure_launcher(self) -> None:
        # The last call of the Trainer's connector, and the first moment at which "auto" can be decided.
        if type(self) is PEFTStrategy:
            self._become(choose_strategy(self.accelerator, self.parallel_devices, self.num_nodes))
        super()._configure_launcher()
        if isinstance(self._launcher, _MultiProcessingLauncher):
            self._launcher = PEFTMultiProcessingLauncher(self, self._launcher._start_method)  # type: ignore[arg-type]

    def _become(self, strategy: Strategy) -> None:
        """Turn this placeholder into an instance of the class for ``strategy``; the Trainer keeps the object."""
        known = dict(self.__dict__)
        self.__class__ = _class_for(type(strategy))  # type: ignore[assignment]
        self.__dict__.update(strategy.__dict__)
        for key in ("accelerator", "precision_plugin", "cluster_environment", "parallel_devices", "num_nodes"):
            value = known.get(f"_{key}", known.get(key))
            if hasattr(type(strategy), key) or key in strategy.__dict__ or f"_{key}" in strategy.__dict__:
                setattr(self, key, value)
        self.__dict__["_checkpoint_io"] = known["_checkpoint_io"]

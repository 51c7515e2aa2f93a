"""DeepSpeed: optimizer state of adapters (stage 1), their gradients (2) and all parameters (3) cut up over processes.

Under ``bf16`` and ``fp16`` DeepSpeed casts every parameter, whatever its dtype, and trains a float32 copy of those in
the optimizer. Its buckets for gradients and weights hold one dtype each, so adapters are not kept out of that: they run
in half precision, the copy is what is saved, and they get its values when training has ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.core.adapter import clean_name, restore_hooks
from lightning_peft.core.registry import registries, several_adapters
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.files.remote import is_remote
from lightning_peft.formats.deepspeed import TAG, is_deepspeed, read_deepspeed, require_layout, with_state, write_layout
from lightning_peft.operations.by_hand import watch
from lightning_peft.operations.mergeable import refuse_ties
from lightning_peft.storage import checkpoint_directory as directories
from lightning_peft.storage.base_weights import materialise
from lightning_peft.storage.fingerprint import record_base
from lightning_peft.storage.state import adapter_parameters_and_whole, saved_tensors
from lightning_peft.strategy import refusals
from lightning_peft.strategy.bases.engine_files import save_engine
from lightning_peft.strategy.bases.plain import PlainState
from lightning_peft.strategy.bases.zero import ZeroState, refuse_leaves
from lightning_peft.strategy.lifecycle import Lifecycle
from lightning_peft.strategy.optimizers.averages import BY_HAND
from lightning_peft.strategy.optimizers.finite import STOP
from lightning_peft.strategy.optimizers.schedule import changes_gradients
from lightning_peft.tensors.sharding import gathered, kept_part, whole

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class OnDeepSpeed(Lifecycle, PlainState, DeepSpeedStrategy):
    """What ``PEFTStrategy`` does differently on ``DeepSpeedStrategy``."""

    _has_whole_weights = False
    _leaves_frozen = False
    _instead = ""
    config: dict[str, Any]
    _engine: Any = None
    """DeepSpeed's engine of this run, or of the last one."""
    _trained: ZeroState | None = None
    """What the engine's optimizer holds, if it has one."""
    _resumed: Path | None = None
    _went_back = False
    """Whether this run has differentiated a loss by way of this strategy."""

    @property
    def _stage(self) -> int:
        return int((self.config.get("zero_optimization") or {}).get("stage", 0))

    def setup(self, trainer: Any) -> None:
        """Set up, without what the last run left on the module."""
        if not self._stage:
            raise PEFTError("DeepSpeed was given without ZeRO. Choose stage 1, 2 or 3, or base='ddp'.")
        if self._full_checkpoints and self.zero_stage_3:
            raise PEFTError(
                "checkpoint='full' was given on ZeRO-3, where every process holds a piece of the frozen weights, which "
                "do not change. Use checkpoint='adapter', or stage 2."
            )
        if self._on_nonfinite != STOP:
            raise PEFTError(
                f"on_nonfinite={self._on_nonfinite!r} was given on DeepSpeed, which has the gradients of a step in "
                "buffers of its own, where they cannot be left out. Use on_nonfinite='stop', or another base."
            )
        if changes_gradients(self.methods):
            raise PEFTError(
                f"{' + '.join(type(method).__name__ for method in self.methods)} reads and changes gradients around "
                "each step, which DeepSpeed keeps to itself. Use another base, for example base='fsdp'."
            )
        if self._engine is not None:
            # Its hooks would gather and drop parameters a second time.
            self._engine.destroy()
        self._engine = self._trained = None
        self._went_back = False
        self.optimizers, self.lr_scheduler_configs = [], []
        super().setup(trainer)

    def _inject(self) -> None:
        """Inject, also into a model that was built in pieces."""
        new = not registries(ModelView(self._module))
        super()._inject()
        view = ModelView(self._module)
        for prefix, _, registry in registries(view) if new else ():
            base = view.part(prefix).parameters
            registry.whole.update({name: whole(base[name]).clone() for name in registry.whole})

    def _place_adapters(self) -> None:
        super()._place_adapters()
        _refuse_several(ModelView(self._module))
        for _, _, slot in ModelView(self._module).slots:
            # DeepSpeed moves the module, but not one that was built in pieces.
            materialise(slot, self.root_device)
        record_base(ModelView(self._module))
        if self.zero_stage_3 and self._merge_on_train_end:
            refuse_ties(ModelView(self._module))
            offload = (self.config["zero_optimization"].get("offload_param") or {}).get("device")
            if offload == "nvme":
                raise PEFTError(
                    "Weights that are offloaded to NVMe cannot be merged into. Pass merge_on_train_end=False, and "
                    "merge the saved adapter into the base model afterwards."
                )

    def setup_optimizers(self, trainer: Any) -> None:
        """Do nothing: DeepSpeed's engine has to come first."""

    def _init_optimizers(self) -> Any:
        optimizer, schedule = super()._init_optimizers()
        self._restrict([optimizer], [schedule.scheduler] if schedule else [])
        if empty := [i for i, group in enumerate(optimizer.param_groups) if not group["params"]]:
            raise PEFTError(
                f"Param group {empty[0]} from configure_optimizers holds frozen parameters only. DeepSpeed takes it "
                "out, and the scheduler would then set other groups' learning rates. Leave the group out there, or "
                "use a scheduler of torch.optim.lr_scheduler."
            )
        return optimizer, schedule

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Optimizer | None, *args: Any) -> Any:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        held = [] if optimizer is None else [group["params"] for group in optimizer.param_groups]
        groups = [[p for p in params if p.requires_grad] for params in held] or [trained]
        values = self._values()
        for parameter in ModelView(model).adapter_parameters.values():
            # DeepSpeed does it, but not in a module that was built, or left by the last run, in pieces.
            _cast(parameter, self._dtype)
        result = super()._setup_model_and_optimizer(model, optimizer, *args)
        self._engine = result[0]
        self._engine.set_gradient_accumulation_boundary(True)
        if self.zero_stage_3:
            refuse_leaves(ModelView(model))
        self._trained = ZeroState(self._engine, groups, self._module)
        self._write(values)
        return result

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        values = self._values()
        super()._initialize_deepspeed_inference(model)
        self._engine = self.model
        # Lightning has deleted all hooks of all modules.
        view = ModelView(model)
        restore_hooks(view.slots)
        for prefix, root, registry in registries(view):
            watch(root, registry, [host for _, host, _ in view.part(prefix).slots])
        self._set_adapters(values)

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Whether batches are counted here. DeepSpeed would count them beyond the end of an epoch."""
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Have DeepSpeed add up gradients inside, instead of stepping by them."""
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Differentiate a loss that Lightning has divided by the number of batches, as DeepSpeed would once more."""
        return super().backward(closure_loss, optimizer, *args, **{"scale_wrt_gas": False, **kwargs})

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Note it: what differentiates by itself leaves the engine nothing to step by."""
        self._went_back = True
        super().pre_backward(closure_loss)

    def _gradients(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return nothing in float16, where DeepSpeed scales losses and leaves out what that has made overflow."""
        return {} if self._trained is None or self._dtype == torch.float16 else self._trained.bad_gradients()

    def _refuse_unaveraged(self, optimizer: Optimizer) -> None:
        if not self._went_back:
            raise PEFTError(f"DeepSpeed's engine has no gradients to step by. {BY_HAND}")

    @property
    def _dtype(self) -> torch.dtype:
        enabled = [dtype for key, dtype in _HALVES.items() if (self.config.get(key) or {}).get("enabled")]
        return enabled[0] if enabled else torch.float32

    def _values(self) -> dict[str, Tensor]:
        """Return everything that is saved, whole and as exact as it is known; a collective call."""
        trained = self._trained
        return {
            name: trained.read(parameter)
            if trained is not None and isinstance(parameter, nn.Parameter) and parameter.requires_grad
            else whole(parameter)
            for name, parameter in saved_tensors(ModelView(self._module)).items()
        }

    def _write(self, values: Mapping[str, Tensor]) -> None:
        """Set the float32 copies of what is trained."""
        assert self._trained is not None
        for name, parameter in adapter_parameters_and_whole(ModelView(self._module)).items():
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
                self._trained.write(parameter, values[name])

    def _set_adapters(self, values: Mapping[str, Tensor]) -> None:
        """Give adapters that DeepSpeed has cast their exact values, in the dtype of these."""
        for name, parameter in ModelView(self._module).adapter_parameters.items():
            if parameter.dtype != values[name].dtype:
                _cast(parameter, values[name].dtype)
                with gathered([parameter]):
                    parameter.data.copy_(values[name])

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of DeepSpeed's, or one that another base strategy reads too."""
        self._resumed = None
        if not directories.is_directory(checkpoint_path) or not is_deepspeed(path := Path(checkpoint_path)):
            return super().load_checkpoint(checkpoint_path, weights_only)
        if weights_only:
            raise PEFTError(
                f"weights_only=True was given for {path}, whose files DeepSpeed itself unpickles. Leave it out, if you "
                "trust whoever wrote them, or resume from a checkpoint of AdapterCheckpoint."
            )
        if self._module.trainer.state.fn == TrainerFn.FITTING:
            require_layout(path, self._stage, self.world_size)
            self._resumed = path
        return read_deepspeed(path, weights_only)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizer's state, and the float32 copies of what is trained."""
        assert self._trained is not None
        if self._resumed is not None:
            require_layout(self._resumed, self._stage, self.world_size, self._trained.names())
            self._engine.load_checkpoint(
                str(self._resumed), tag=TAG, load_module_strict=False, load_lr_scheduler_states=False
            )
            # Stages 1 and 2 would go on with the limit of the run that wrote it.
            self._engine.optimizer.clip_grad = self._engine.gradient_clipping()
            return
        saved = checkpoint["optimizer_states"]
        if len(saved) != 1:
            raise PEFTError(f"The checkpoint has the states of {len(saved)} optimizers; DeepSpeed has one.")
        self._trained.load_state_dict(saved[0])
        self._write({clean_name(name): value for name, value in checkpoint["state_dict"].items()})

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's state by parameter name, whole."""
        assert self._trained is not None
        return self._trained.state_dict()

    def _accumulated(self) -> dict[str, Tensor]:
        """Return nothing, and say so within an accumulation: DeepSpeed has the gradients in its buffers."""
        if self._waiting:
            rank_zero_warn(
                "The checkpoint is written in the middle of an accumulation, whose gradients DeepSpeed keeps to "
                "itself: a run that is resumed from it goes on without them. Save after a step, for example by the "
                "callback's every_n_train_steps."
            )
        return {}

    def _warn_without_gradient(self, optimizer: Optimizer) -> None:
        """Do nothing: DeepSpeed has moved all gradients into its buffers, and none is left to be missed."""

    def _adapter_state(self, view: ModelView) -> dict[str, Any]:
        return self._values()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what is saved of the module, whole."""
        if self._is_plain and self.zero_stage_3:
            raise PEFTError(
                "ZeRO-3 has the weights in pieces on several processes, so the module that merge_on_train_end='unload' "
                "left cannot be saved. Merge a checkpoint of the run into the base model in one process."
            )
        return super().lightning_module_state_dict()

    def _write_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None) -> None:
        """Write DeepSpeed's directory, beside its place until it is whole; a single file, if there is no optimizer."""
        if self._trained is None:
            return self._together(lambda: Strategy.save_checkpoint(self, checkpoint, filepath, storage_options))
        if is_remote(filepath):
            raise PEFTError(f"{filepath}: DeepSpeed writes to local paths.")
        if self._full_checkpoints:
            refusals.refuse_full_merged(ModelView(self._module))
        if self.is_global_zero:
            checkpoint = with_state(checkpoint, saved_tensors(ModelView(self._module)))
        self._write_pieces(filepath, checkpoint, partial(self._write_engine, checkpoint, self._trained.names()))

    def _write_engine(self, checkpoint: dict[str, Any], names: list[list[str]], directory: Path) -> None:
        """Write this process's part of DeepSpeed's directory."""
        save_engine(self.deepspeed_engine, directory, checkpoint, frozen=self._full_checkpoints)
        if self.is_global_zero:
            write_layout(directory, self._stage, self.world_size, names)

    def on_train_end(self) -> None:
        """Merge the exact adapters."""
        if self._is_real_run():
            self._set_adapters(self._values())
        super().on_train_end()
        if self._is_plain:
            self._trained = None


def _refuse_several(model: ModelView) -> None:
    """Check that one adapter is trained: what is in a flat tensor is stepped in every step, by momentum and decay."""
    if several := several_adapters(model):
        trained = sorted({name for _, _, slot in model.slots for name in slot if _is_trained(slot[name])})
        if len(trained) > 1:
            raise PEFTError(
                f"The model has several adapters, {', '.join(several)}. DeepSpeed steps all that is trained as one "
                "flat tensor, so an adapter that a step does not use would be changed by it as well. Use another "
                f"base, or train one: p.requires_grad_(False) for the parameters of the others, such as "
                f"'….peft.{trained[-1]}.…'."
            )


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _cast(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Change the dtype of ``parameter`` in place, and that of its piece under ZeRO-3."""
    if hasattr(parameter, "ds_tensor"):
        piece = kept_part(parameter)
        parameter.ds_tensor.data = piece.to(dtype)
    parameter.data = parameter.data.to(dtype)

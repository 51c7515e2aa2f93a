"""ZeRO's optimizer, seen by parameter: it steps flat tensors, of which each process has a share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.strategy.optimizers.optim import parameter_names, state_by_name, state_by_position
from lightning_peft.tensors.sharding import full_shape, zero_part


class ZeroState:
    """Reads and writes float32 copies of trained parameters, and optimizer state, by parameter and whole.

    Every method is to be called by all processes.

    Args:
        engine: DeepSpeed's engine.
        groups: The trained parameters by param group, as they were before DeepSpeed put flat tensors in their place.
        module: The module that they belong to.
    """

    def __init__(self, engine: Any, groups: Sequence[Sequence[nn.Parameter]], module: nn.Module) -> None:
        self._engine, self._groups, self._module = engine, groups, module
        self._device = engine.device
        self._parameters = [parameter for group in groups for parameter in group]
        self._in_pieces = engine.zero_optimization_stage() == 3

    @property
    def _optimizer(self) -> Optimizer:
        optimizer: Optimizer = self._engine.optimizer.optimizer
        return optimizer

    def names(self) -> list[list[str]]:
        """Return the names of the trained parameters by param group."""
        names = iter(parameter_names(self._by_parameter(), self._module))
        return [[next(names) for _ in group] for group in self._groups]

    def read(self, parameter: nn.Parameter) -> Tensor:
        """Return the float32 copy of ``parameter``, which is what the optimizer steps."""
        from deepspeed.utils import safe_get_full_fp32_param

        value: Tensor = safe_get_full_fp32_param(parameter)
        return value

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the float32 copy of ``parameter``."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self._in_pieces:
            # DeepSpeed cuts up a whole value as if all processes' pieces were full.
            safe_set_local_fp32_param(parameter, zero_part(parameter, value.to(self._device)))
        else:
            safe_set_full_fp32_param(parameter, value.to(self._device))

    def bad_gradients(self) -> dict[str, Tensor]:
        """Return the gradients of a step by parameter name, if one of them holds NaN or infinity."""
        from deepspeed.utils import safe_get_full_grad

        # With float32 gradients of bfloat16 weights stage 1 has an optimizer of another kind, which does not tell.
        if not getattr(self._engine.optimizer, "has_overflow", lambda: True)():
            return {}
        names = [name for group in self.names() for name in group]
        gradients = {name: safe_get_full_grad(p) for name, p in zip(names, self._parameters, strict=True)}
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state by parameter name."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        # All flat tensors have the same kinds of state and have made the same number of steps. Its counter is copied:
        # optimizers count in place, so one that parameters share would run ahead.
        of_flat = ((key, entry) for key, entry in self._optimizer.state.items() if isinstance(key, Tensor))
        flat, entry = next(of_flat, (None, {}))
        state: dict[Any, Any] = {k: deepcopy(v) for k, v in self._optimizer.state.items() if not isinstance(k, Tensor)}
        state |= {
            position: {
                key: safe_get_full_optimizer_state(parameter, key) if _is_per_element(value, flat) else deepcopy(value)
                for key, value in entry.items()
            }
            for position, parameter in enumerate(self._parameters)
        }
        view, numbers = self._by_parameter(), iter(range(len(self._parameters)))
        groups = [{**group, "params": [next(numbers) for _ in group["params"]]} for group in view.param_groups]
        return state_by_name(view, {"state": state, "param_groups": groups}, self._module)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Set the optimizer's state to ``saved``, which any base strategy's optimizer may have had.

        Raises:
            PEFTError: The groups hold other parameters than they did, or there is no state to go on from.
        """
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        state = state_by_position(self._by_parameter(), saved, self._module)
        for group, old in zip(self._optimizer.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in old.items() if key not in ("params", "param_names")})
        numbers = range(len(self._parameters))
        self._optimizer.state.update({key: entry for key, entry in state["state"].items() if key not in numbers})
        entries = {self._parameters[number]: state["state"][number] for number in numbers if number in state["state"]}
        if not entries:
            return
        parameter, first = next(iter(entries.items()))
        keys = [key for key, value in first.items() if _is_per_element(value, parameter)]
        rest = [key for key in first if key not in keys]
        for flat in self._flat_tensors():
            # A parameter that took no part has no state elsewhere. Here it shares tensors with others: zeros.
            state_of_flat = {key: torch.zeros_like(flat) for key in keys}
            self._optimizer.state[flat] = state_of_flat | {key: self._counter(first[key]) for key in rest}
        self._link()
        for parameter, entry in entries.items():
            for key in keys:
                value = entry[key].to(self._device)
                if self._in_pieces:
                    safe_set_local_optimizer_state(parameter, zero_part(parameter, value), key)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)

    def _link(self) -> None:
        """Tell parameters where their state lies.

        DeepSpeed does it in its first step, when the first param group has made one: too early for the other groups.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if not self._in_pieces:
            for own, flat in zip(self._groups, self._flat_tensors(), strict=True):
                lazy_init_hp_params_optimizer_state(own, flat, self._optimizer.state)

    def _by_parameter(self) -> Optimizer:
        """Return an optimizer with the settings of the engine's, and the parameters themselves."""
        settings = self._optimizer.param_groups
        return Optimizer([{**g, "params": list(own)} for g, own in zip(settings, self._groups, strict=True)], {})

    def _flat_tensors(self) -> Iterator[Any]:
        """Yield what the optimizer steps: this process's share of each group, under ZeRO-3 in one tensor or more."""
        if self._in_pieces:
            yield from self._engine.optimizer.fp32_partitioned_groups_flat
        else:
            yield from (flat for group in self._optimizer.param_groups for flat in group["params"])

    def _counter(self, value: Any) -> Any:
        # torch's optimizers count steps in tensors, one for each parameter; DeepSpeed's in numbers.
        if type(self._optimizer).__module__.startswith("deepspeed") and isinstance(value, Tensor):
            return int(value)
        return deepcopy(value)


def refuse_leaves(model: ModelView) -> None:
    """Check that ZeRO-3 will wait for the gradients of adapters on experts.

    Raises:
        PEFTError: It takes a mixture of experts for one module, whose gradients it collects as soon as the gradient of
            its input is there; those of adapters on weights that it reads come later.
    """
    from deepspeed.utils import z3_leaf_parameter

    for name, _, slot in model.slots:
        adapter = slot.active_adapter
        if adapter is not None and adapter.replaces and any(map(z3_leaf_parameter, adapter.parameters())):
            raise PEFTError(
                f"{name!r} holds experts in a mixture that ZeRO-3 treats as one module, and adapters on them would be "
                "trained too late for it. Use stage 1 or 2, base='fsdp' or ModelParallelStrategy, or adapt other "
                "modules."
            )


def _is_per_element(value: Any, parameter: Tensor | None) -> bool:
    return parameter is not None and isinstance(value, Tensor) and value.shape == full_shape(parameter)

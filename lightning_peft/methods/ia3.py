"""(IA)³: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning (Liu et al., 2022).

arXiv:2205.05638, section 3.3: learned vectors rescale keys, values, and the activations inside the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import input_of, with_input
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.structure.blocks import find_blocks
from lightning_peft.targets.patterns import as_list, match_names, require_matches
from lightning_peft.targets.select import select
from lightning_peft.tensors.weights import features, is_linear, tensor_options

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


class Rescale(Adapter):
    """l ⊙ (W0 x + b); l ``[out, 1]``."""

    mergeable = True
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {"ia3_l": ("out", None)}

    def __init__(self, size: tuple[int, ...], host: nn.Module) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(size, **tensor_options(host)))
        # A bias is rescaled too.
        self.folds_by_row = host._parameters.get("bias") is None

    def reset_parameters(self) -> None:
        """Set the vector to one."""
        nn.init.ones_(self.ia3_l)

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Rescale ``output`` ``[..., out]``."""
        return (output * self.ia3_l.flatten()).to(output.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return rescaled rows."""
        scale = self.ia3_l.detach().to(weight.dtype)
        return weight * scale, None if bias is None else bias * scale.flatten().to(bias.dtype)


class RescaleInput(Rescale):
    """W0 (l ⊙ x) + b; l ``[1, in]``."""

    changes_input = True
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {"ia3_l": (None, "in")}

    def __init__(self, size: tuple[int, int], host: nn.Module) -> None:
        super().__init__(size, host)
        self.folds_by_row = True

    def before(
        self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Rescale the input ``[..., in]``."""
        x = input_of(args, kwargs)
        return with_input(args, kwargs, (x * self.ia3_l.flatten()).to(x.dtype))

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Return ``output``."""
        return output

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return rescaled columns."""
        return weight * self.ia3_l.detach().to(weight.dtype), bias


class RescaleConv(Rescale):
    """l ⊙ (W0 * x + b) for a convolution; l ``[1, out, 1, ...]``."""

    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {}

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Rescale the channels of ``output`` ``[batch, out, ...]``."""
        return (output * self.ia3_l[0]).to(output.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return rescaled rows of a weight ``[out, in · kernel]``."""
        scale = self.ia3_l.detach().flatten()
        return weight * scale[:, None].to(weight.dtype), None if bias is None else bias * scale.to(bias.dtype)


class RescaleConvInput(Adapter):
    """W0 * (l ⊙ x) + b for a convolution; l ``[1, in, 1, ...]``.

    A vector of the output's side may have the same shape: so that neither is taken for the other they have two names.
    """

    mergeable = True
    changes_input = True

    def __init__(self, size: tuple[int, ...], host: nn.Module) -> None:
        super().__init__()
        assert isinstance(host, _CONVOLUTIONS)
        self.ia3_l_input = nn.Parameter(torch.ones(size, **tensor_options(host)))
        self._groups = host.groups

    def reset_parameters(self) -> None:
        """Set the vector to one."""
        nn.init.ones_(self.ia3_l_input)

    def before(
        self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Rescale the channels of the input ``[batch, in, ...]``."""
        x = input_of(args, kwargs)
        return with_input(args, kwargs, (x * self.ia3_l_input[0]).to(x.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return a weight ``[out, in / groups · kernel]`` with rescaled columns, in each group its own channels'."""
        of_groups = self.ia3_l_input.detach().to(weight.dtype).view(self._groups, -1)
        rows = of_groups.repeat_interleave(len(weight) // self._groups, dim=0)
        return weight * rows.repeat_interleave(weight.shape[1] // rows.shape[1], dim=1), bias


@dataclass(frozen=True, kw_only=True)
class IA3(PEFTMethod):
    """Rescale keys, values and the MLP's activations by learned vectors.

    Args:
        target_modules: Linear layers, or convolutions in two and three dimensions, to rescale, by pattern. By default
            the key and value projections (where they are fused with the query's, that layer as a whole, as in HF PEFT)
            and the last linear layer of the MLP.
        feedforward_modules: Those of ``target_modules`` whose input is rescaled instead of the output. By default the
            last linear layer of the MLP; with ``target_modules`` given, none.
        exclude_modules: Patterns of modules to leave out, with ``target_modules``.
        layers: Layers to adapt: indices, or a slice such as ``"8:16"`` or ``"-4:"``.
    """

    name: ClassVar[str] = "ia3"
    hosts: ClassVar[str] = "linear layers, Conv1D, convolutions"
    count: ClassVar[str] = "Σ out (or in)"
    # The shape of a vector, or its name, shows which side it rescales.
    free: ClassVar[frozenset[str]] = PEFTMethod.free | {"feedforward_modules"}

    target_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers: list[int] | str | None = None

    def __post_init__(self) -> None:
        if self.feedforward_modules is not None and self.target_modules is None:
            raise PEFTError(
                "IA3: feedforward_modules was given without target_modules; it names those of them whose input is "
                "rescaled. Give both, or neither."
            )

    def select(self, model: ModelView) -> dict[str, nn.Module]:
        """Return the layers to rescale."""
        if self.target_modules is None:
            outputs, inputs = self._found(model)
            return {name: model.modules[name] for name in [*outputs, *inputs]}
        hosts = select(
            model, self.target_modules, adaptable=_is_rescaled, exclude=self.exclude_modules, layers=self.layers
        )
        require_matches(as_list(self.feedforward_modules or ()), hosts, "feedforward_modules")
        return hosts

    def adapters(self, model: ModelView, hosts: Mapping[str, nn.Module], seed: int) -> dict[str, Adapter]:
        """Make the vectors, all one at first."""
        inputs = self.inputs(model, hosts)
        made: dict[str, Adapter] = {}
        for name, module in hosts.items():
            if isinstance(module, _CONVOLUTIONS):
                ones = (1,) * len(module.kernel_size)
                if name in inputs:
                    made[name] = RescaleConvInput((1, module.in_channels, *ones), module)
                else:
                    made[name] = RescaleConv((1, module.out_channels, *ones), module)
                continue
            d_in, d_out = features(module)
            made[name] = RescaleInput((1, d_in), module) if name in inputs else Rescale((d_out, 1), module)
        return made

    def within(self, adapters: Mapping[str, Adapter]) -> IA3:
        """Return the method with the names of its modules instead of patterns."""
        inputs = [host for host, adapter in adapters.items() if isinstance(adapter, RescaleInput | RescaleConvInput)]
        modules = {"target_modules": list(adapters), "feedforward_modules": inputs}
        return replace(self, **modules, exclude_modules=None, layers=None)

    def inputs(self, model: ModelView, hosts: Mapping[str, nn.Module]) -> set[str]:
        """Return those of ``hosts`` whose input is rescaled."""
        if self.target_modules is None:
            return set(self._found(model)[1])
        patterns = as_list(self.feedforward_modules or ())
        return set().union(*(match_names(pattern, hosts) for pattern in patterns))

    def _found(self, model: ModelView) -> tuple[list[str], list[str]]:
        """Return the modules whose output and those whose input is rescaled."""
        outputs, inputs = [], []
        for block in find_blocks(model, layers=self.layers):
            if block.kind == "mlp" and block.inputs:
                inputs.append(block.last)
            elif block.roles:
                roles = [role for role in ("k", "v", "kv") if role in block.roles] or ["qkv"]
                outputs += [block.roles[role] for role in roles]
            else:
                raise PEFTError(
                    f"IA3: {block.last!r} ({type(model.modules[block.last]).__name__}) has no linear layers of "
                    "its own that are called. Name linear layers in target_modules."
                )
        return outputs, inputs


def _is_rescaled(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, _CONVOLUTIONS)

"""The low-rank change of weights that a module reads itself: ``nn.MultiheadAttention``, experts in one 3-D parameter.

No module is called with what these weights are multiplied by, so there is nothing to add a low-rank term to: the module
reads W0 + scale · B A instead. What that costs is memory for the sum, and precision in a dtype below float32, where it
is rounded as by a merge. HF PEFT does the same, but that its releases up to 0.21 add the change of attention's output
projection twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.errors import PEFTError
from lightning_peft.tensors.seeding import fill
from lightning_peft.tensors.sharding import full_shape

Shapes = tuple[tuple[int, int], tuple[int, int]]


class Factors(nn.Module):
    """A ``[r, in]`` and B ``[out, r]`` of a weight; A ``[experts · r, in]`` and B ``[out, r · experts]`` of experts.

    As in HF PEFT's files, the experts follow one another in A, and alternate in B.
    """

    def __init__(self, host: nn.Module, weight: str, r: int, scale: float, init: str) -> None:
        super().__init__()
        parameter = host.get_parameter(weight)
        wide = parameter.dtype in (torch.float32, torch.float64)
        options: dict[str, Any] = {
            "dtype": parameter.dtype if wide else torch.float32,
            "device": parameter.device,
        }
        shape_A, shape_B = factor_shapes(host, weight, r)
        self.lora_A = nn.Parameter(torch.empty(shape_A, **options))
        self.lora_B = nn.Parameter(torch.empty(shape_B, **options))
        self.r, self.scale, self.init = r, scale, init
        self.in_first = len(full_shape(parameter)) == 3 and is_in_first(host)

    def reset_parameters(self, seed: int, name: str) -> None:
        """Draw A as beside a linear layer and set B to zero."""
        with torch.no_grad():
            self.lora_B.zero_()
        fill(self.lora_A, seed, name, self._draw)

    def _draw(self, values: Tensor, generator: torch.Generator) -> None:
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        else:
            nn.init.normal_(values, std=1 / self.r, generator=generator)

    def forward(self, weight: Tensor) -> Tensor:
        """Return W0 + scale · B A for a weight ``[out, in]`` or one of several experts."""
        a, b = self.lora_A.to(weight.dtype), self.lora_B.to(weight.dtype)
        if weight.dim() == 2:
            return torch.add(weight, b @ a, alpha=self.scale)
        experts = len(weight)
        a = a.view(experts, self.r, -1)  # [experts, r, in]
        b = b.view(-1, self.r, experts).permute(2, 0, 1)  # [experts, out, r]
        return torch.add(weight, a.mT @ b.mT if self.in_first else b @ a, alpha=self.scale)


class OwnWeightsLoRAAdapter(Adapter):
    """The host reads W0 + scale · B A (equation 3 of the LoRA paper) instead of each of some weights of its own."""

    mergeable = True
    by_row = False

    def __init__(
        self, host: nn.Module, ranks: Mapping[str, int], scales: Mapping[str, float], init: str, seed: int, name: str
    ) -> None:
        super().__init__()
        self.replaces = tuple(ranks)
        self._is_one = isinstance(host, nn.MultiheadAttention)
        self.factors = nn.ModuleDict(
            {key_of(weight): Factors(host, weight, r, scales[weight], init) for weight, r in ranks.items()}
        )
        self._seed, self._name = seed, name
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every A and set every B to zero."""
        for key, factors in self._items():
            factors.reset_parameters(self._seed, f"{self._name}.{key}")

    def freeze_A(self) -> None:
        """Make every A a buffer: not trained, but saved."""
        for _, factors in self._items():
            frozen = factors.lora_A.detach()
            del factors.lora_A
            factors.register_buffer("lora_A", frozen)

    def replace(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the changed weights."""
        factors = dict(self._items())
        return {name: factors[key_of(name)](weight) for name, weight in weights.items()}

    def changed(self, host: str) -> list[tuple[str, Factors]]:
        """Return the factors with what ``target_modules`` calls their weight: of attention, all of it by one name."""
        names = [host if self._is_one else f"{host}.{weight}".lstrip(".") for weight in self.replaces]
        return [(name, factors) for name, (_, factors) in zip(names, self._items(), strict=True)]

    def extra_repr(self) -> str:
        """Show what parameters do not."""
        return ", ".join(f"{key}: scale={factors.scale:g}" for key, factors in self._items())

    def _items(self) -> list[tuple[str, Factors]]:
        return [(key, factors) for key, factors in self.factors.items() if isinstance(factors, Factors)]


def key_of(weight: str) -> str:
    """Return what the factors of a weight are called in the adapter: ``in_proj``, ``out_proj``, ``gate_up_proj``."""
    return weight.removesuffix("_weight").removesuffix(".weight").replace(".", "_")


def attention_weights(module: nn.MultiheadAttention) -> tuple[str, ...]:
    """Return the names of the projections' weights, of which those of the input may be one."""
    separate = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return (*(("in_proj_weight",) if module.in_proj_weight is not None else separate), "out_proj.weight")


def own_weights(module: nn.Module) -> list[str]:
    """Return the names of parameters of ``module``, of no kind that torch has, that hold experts or route to them."""
    if type(module).__module__.startswith("torch.nn."):
        return []
    shapes = {name: full_shape(p) for name, p in module._parameters.items() if p is not None}
    return [
        n for n, shape in shapes.items() if (len(shape) > 2 and shape[0] > 1) or (len(shape) == 2 and n == "weight")
    ]


def is_in_first(host: nn.Module) -> bool:
    """Whether the experts of ``host`` are stored ``[experts, in, out]``: transformers marks such modules."""
    return bool(getattr(host, "is_transposed", False))


def weight_obstacle(host: nn.Module, weight: str) -> str | None:
    """Return why a weight cannot be adapted, if it is neither a matrix nor several experts' matrices, or is packed."""
    parameter = host.get_parameter(weight)
    shape = full_shape(parameter)
    if len(shape) in (2, 3) and parameter.is_floating_point() and parameter.dtype.itemsize >= 2:
        return None
    return (
        f"{weight!r} of a {type(host).__name__} is {list(shape)} of {parameter.dtype}; a weight [out, in] or [experts, "
        "out, in] of floating-point numbers in at least 16 bits was expected"
    )


def factor_shapes(host: nn.Module, weight: str, r: int) -> Shapes:
    """Return the shapes of A and B.

    Raises:
        PEFTError: The weight is neither a matrix nor several experts' matrices, or is packed.
    """
    if (reason := weight_obstacle(host, weight)) is not None:
        raise PEFTError(f"LoRA: {reason}. Leave it out.")
    shape = full_shape(host.get_parameter(weight))
    experts = shape[0] if len(shape) == 3 else 1
    d_out, d_in = (shape[-1], shape[-2]) if len(shape) == 3 and is_in_first(host) else (shape[-2], shape[-1])
    return (experts * r, d_in), (d_out, r * experts)

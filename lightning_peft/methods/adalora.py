"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (Zhang et al., 2023), arXiv:2303.10512."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.adapters.low_rank.making import fitting_rank, lowered_ranks
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import add_scaled, input_of
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.targets.naming import exceptions, only_here
from lightning_peft.targets.patterns import first_match, found_by_preset, require_matches
from lightning_peft.targets.select import select
from lightning_peft.tensors.seeding import fill
from lightning_peft.tensors.sharding import full_shape, like, whole, write
from lightning_peft.tensors.weights import features, is_linear, tensor_options

_PARTS = ("lora_A", "lora_E", "lora_B")


class AdaLoRAAdapter(Adapter):
    """h = W0 x + scale · B (E ⊙ A) x (equation 3); singular values E ``[r, 1]``, vectors A ``[r, in]``, B ``[out, r]``.

    Buffers hold what the budget is allocated by: for each parameter the averages of its entries' sensitivity (equation
    9) and of its uncertainty (equation 10), and which singular values were kept in the end.
    """

    mergeable = True
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
        **{"lora_A": (None, "in"), "lora_E": (None, None), "lora_B": ("out", None)},
    }
    kept: Tensor

    def __init__(self, host: nn.Module, r: int, scale: float, dropout: float, seed: int, name: str) -> None:
        super().__init__()
        (d_in, d_out), options = features(host), tensor_options(host)
        self.lora_A = nn.Parameter(torch.empty(r, d_in, **options))
        self.lora_E = nn.Parameter(torch.empty(r, 1, **options))
        self.lora_B = nn.Parameter(torch.empty(d_out, r, **options))
        for part, parameter in list(self.named_parameters()):
            for average in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{average}_{part}", torch.empty_like(parameter, requires_grad=False))
        self.register_buffer("kept", torch.empty(r, 1, **options))
        self.scale, self.dropout, self._seed, self._name = scale, dropout, seed, name
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the singular values to zero and draw the vectors from N(0, 0.02²), as the paper's code does."""
        nn.init.zeros_(self.lora_E)
        for part in ("lora_A", "lora_B"):
            fill(self.get_parameter(part), self._seed, f"{self._name}.{part}", _draw)
        self.forget()
        nn.init.ones_(self.kept)

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add the low-rank term to ``output`` ``[..., out]``."""
        x = functional.dropout(input_of(args, kwargs), self.dropout, self.training)
        hidden = functional.linear(x, (self.lora_A * self.lora_E).to(x.dtype))  # [..., r]
        delta = functional.linear(hidden, self.lora_B.to(hidden.dtype))
        return add_scaled(output, delta, self.scale).to(output.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W0 + scale · B (E ⊙ A)."""
        product = self.lora_B.detach() @ (self.lora_A * self.lora_E).detach()
        return torch.add(weight, product.to(weight.dtype), alpha=self.scale), bias

    def regularise(self, factor: float) -> None:
        """Add ``factor`` times the gradient of ‖A Aᵀ - I‖ + ‖Bᵀ B - I‖ (equation 4, of HF PEFT unsquared)."""
        for part in ("lora_A", "lora_B"):
            parameter = self.get_parameter(part)
            if parameter.grad is not None:
                rows = whole(parameter) if part == "lora_A" else whole(parameter).T
                excess = rows @ rows.T
                excess.diagonal().sub_(1)
                norm = torch.linalg.matrix_norm(excess).clamp(min=torch.finfo(excess.dtype).tiny)
                gradient = 2 * factor / norm * (excess @ rows)
                parameter.grad += like(parameter, gradient if part == "lora_A" else gradient.T)

    def observe(self, beta1: float, beta2: float) -> None:
        """Take the gradients of this step into the averages of sensitivity and uncertainty (equations 8 to 10)."""
        for part in _PARTS:
            parameter = self.get_parameter(part)
            sensitivity, uncertainty = (self.get_buffer(f"{a}_{part}") for a in ("sensitivity", "uncertainty"))
            # A scaler leaves a step with infinite gradients out: they tell nothing.
            gradient = 0.0 if parameter.grad is None else whole(parameter.grad).nan_to_num(0.0, 0.0, 0.0)
            now = (whole(parameter) * gradient).abs()
            sensitivity.copy_(beta1 * sensitivity + (1 - beta1) * now)
            uncertainty.copy_(beta2 * uncertainty + (1 - beta2) * (now - sensitivity).abs())

    def scores(self) -> Tensor:
        """Return the importance of each triplet, ``[r]`` (equation 7)."""
        a, e, b = (self.get_buffer(f"sensitivity_{p}") * self.get_buffer(f"uncertainty_{p}") for p in _PARTS)
        return e[:, 0] + torch.stack([a.mean(dim=1), b.mean(dim=0)], dim=1).sum(dim=1)

    def mask(self, kept: Tensor) -> None:
        """Set the singular values that are not ``kept`` ``[r, 1]`` to zero."""
        write(self.lora_E, whole(self.lora_E).masked_fill(kept == 0, 0.0))

    def forget(self) -> None:
        """Begin the averages anew."""
        for part in _PARTS:
            for average in ("sensitivity", "uncertainty"):
                nn.init.zeros_(self.get_buffer(f"{average}_{part}"))


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(PEFTMethod):
    """Low-rank updates whose ranks are allocated while they are trained, by how much they matter to the loss.

    From step ``tinit`` on, the sum of the ranks falls from ``init_r`` a module to ``target_r`` along a cubic curve,
    where it arrives ``tfinal`` steps before the end of the run. The strategy does that, on every base but DeepSpeed.

    Args:
        init_r: Rank of every update at the start.
        target_r: Average rank at the end.
        tinit: Steps before the first rank is taken away.
        tfinal: Steps after the last one, in which the ranks stay as they are.
        deltaT: Steps from one allocation to the next.
        beta1: Decay of the average of the sensitivities.
        beta2: Decay of the average of their uncertainties.
        orth_reg_weight: Weight in the loss of what keeps the singular vectors orthogonal: the mean of
            ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖ over the modules. Its gradient is added once a step, before the Trainer clips, as
            if it were part of the loss.
        alpha: The updates are multiplied by ``alpha / (init_r + 1e-5)``, whatever rank is left.
        dropout: Probability with which an element of the adapter's input is zeroed during training.
        target_modules: What to adapt: ``all-linear`` (every linear layer but a language model's head), ``attention``,
            ``mlp``, or names, globs and regular expressions (``re:.*proj``).
        exclude_modules: Patterns of modules to leave out, with what is in them.
        layers: Blocks to adapt: indices, or a slice such as ``"8:16"`` or ``"-4:"``.
        rank_pattern: Lower ranks at the start for some modules, by pattern. HF PEFT's files of allocated updates hold
            only what is left of them.
    """

    name: ClassVar[str] = "adalora"
    hosts: ClassVar[str] = "linear layers, Conv1D"
    count: ClassVar[str] = "Σ r (in + out + 1)"
    free: ClassVar[frozenset[str]] = PEFTMethod.free | {
        *("rank_pattern", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
    }
    learnt: ClassVar[frozenset[str]] = frozenset({"rank_pattern"})
    needs_total_steps: ClassVar[bool] = True

    init_r: int = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    alpha: float = 16
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    layers: list[int] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = {"init_r": 1, "target_r": 1, "tinit": 0, "tfinal": 0, "deltaT": 1}
        numbers = {key: (getattr(self, key), minimum) for key, minimum in least.items()}
        for what, (n, minimum) in {**numbers, **{k: (r, 0) for k, r in self.rank_pattern.items()}}.items():
            if not isinstance(n, int) or isinstance(n, bool) or n < minimum:
                raise PEFTError(f"AdaLoRA: {what}={n!r} was given; it is a whole number of at least {minimum}.")
        for what, r in {"target_r": self.target_r, **self.rank_pattern}.items():
            if r > self.init_r:
                raise PEFTError(f"AdaLoRA: {what}={r} was given; ranks fall from init_r={self.init_r}. Raise init_r.")
        for what in ("beta1", "beta2"):
            if not 0 < (beta := getattr(self, what)) < 1:
                raise PEFTError(f"AdaLoRA: {what}={beta!r} was given; it is a decay between 0 and 1.")
        if not (math.isfinite(self.orth_reg_weight) and self.orth_reg_weight >= 0):
            raise PEFTError(
                f"AdaLoRA: orth_reg_weight={self.orth_reg_weight!r} was given; it is a number of at least 0."
            )
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise PEFTError(f"AdaLoRA: alpha={self.alpha!r} was given; alpha is a positive number.")
        if not 0 <= self.dropout < 1:
            raise PEFTError(f"AdaLoRA: dropout={self.dropout!r} was given; it is a probability in [0, 1).")

    def select(self, model: ModelView) -> dict[str, nn.Module]:
        """Return the linear layers that ``target_modules`` names."""
        hosts = select(
            model, self.target_modules, adaptable=is_linear, exclude=self.exclude_modules, layers=self.layers
        )
        require_matches(self.rank_pattern, hosts, "rank_pattern")
        return hosts

    def within(self, adapters: Mapping[str, Adapter]) -> AdaLoRA:
        """Return the method with the ranks of its modules by their names."""
        ranks = {host: full_shape(adapter.get_parameter("lora_E"))[0] for host, adapter in adapters.items()}
        return replace(self, rank_pattern=exceptions(ranks, self.init_r, only_here))

    def rank(self, name: str) -> int:
        """Return the rank with which the module ``name`` starts, if it takes that."""
        return first_match(self.rank_pattern, name, self.init_r)

    def adapters(self, model: ModelView, hosts: Mapping[str, nn.Module], seed: int) -> dict[str, Adapter]:
        """Make the adapters, and say where they start with less than was asked for."""
        made = super().adapters(model, hosts, seed)
        ranks = {host: full_shape(adapter.get_parameter("lora_E"))[0] for host, adapter in made.items()}
        if lower := {host: r for host, r in ranks.items() if r < self.rank(host)}:
            model.remark(lowered_ranks("AdaLoRA", f"init_r={max(map(self.rank, lower))}", lower))
        return made

    def adapter(self, name: str, module: nn.Module, seed: int) -> AdaLoRAAdapter:
        """Make the adapter of the linear layer ``module``."""
        asked_for = first_match(self.rank_pattern, name, 0) or not found_by_preset(self.target_modules, name)
        r = fitting_rank("AdaLoRA", "init_r", self.rank(name), name, features(module), lower=not asked_for)
        return AdaLoRAAdapter(module, r, self.alpha / (self.init_r + 1e-5), self.dropout, seed, name)

    def check_steps(self, total_steps: int) -> None:
        """Check that there is a step between ``tinit`` and ``tfinal``."""
        if self.tinit + self.tfinal >= total_steps:
            raise PEFTError(
                f"AdaLoRA: tinit={self.tinit} and tfinal={self.tfinal} were given for a run of {total_steps} steps, "
                "which leaves none in which ranks are taken away. Take fewer of them, or more max_steps."
            )

    def budget(self, start: int, count: int, step: int, total_steps: int) -> int:
        """Return the sum of the ranks of ``count`` modules after ``step`` (equation 12), with ``start`` at first."""
        target = min(self.target_r * count, start)
        if step == total_steps - self.tfinal:
            return target
        left = 1 - (step - self.tinit) / (total_steps - self.tfinal - self.tinit)
        return int((start - target) * left**3 + target)

    def before_step(self, adapters: Mapping[str, Adapter], scale: float) -> None:
        """Add the gradient of the orthogonality term."""
        for adapter in cast(Mapping[str, AdaLoRAAdapter], adapters).values():
            adapter.regularise(scale * self.orth_reg_weight / (2 * len(adapters)))

    def after_step(self, adapters: Mapping[str, Adapter], step: int, total_steps: int | None) -> None:
        """Take in this step's gradients, and take ranks away if it is time."""
        assert total_steps is not None
        found, last = list(cast(Mapping[str, AdaLoRAAdapter], adapters).values()), total_steps - self.tfinal
        if step < last:
            for adapter in found:
                adapter.observe(self.beta1, self.beta2)
        if step == last or (self.tinit < step < last and step % self.deltaT == 0):
            self._allocate(found, step, total_steps)
        elif step > last:
            for adapter in found:
                adapter.mask(adapter.kept)

    def _allocate(self, adapters: list[AdaLoRAAdapter], step: int, total_steps: int) -> None:
        """Set the singular values of the least important triplets of all modules to zero."""
        scores = [adapter.scores() for adapter in adapters]
        together = torch.cat(scores)
        budget = self.budget(len(together), len(adapters), step, total_steps)
        if budget < len(together):
            threshold = together.kthvalue(len(together) - budget).values
            for adapter, score in zip(adapters, scores, strict=True):
                adapter.kept.copy_((score > threshold)[:, None])
                adapter.mask(adapter.kept)
        if step == total_steps - self.tfinal:
            for adapter in adapters:
                adapter.forget()


def _draw(values: Tensor, generator: torch.Generator) -> None:
    nn.init.normal_(values, std=0.02, generator=generator)

"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), arXiv:2106.09685, section 4.1.

rsLoRA's scale: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA (Kalajdzievski, 2023),
arXiv:2312.03732, section 3. Another learning rate for B: LoRA+ (Hayou et al., 2024), arXiv:2402.12354, section 4.
A frozen A: LoRA-FA (Zhang et al., 2023), arXiv:2308.03303, section 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from lightning_peft.errors import PEFTError
from lightning_peft.low_rank.conv import ConvLoRAAdapter
from lightning_peft.low_rank.embedding import EmbeddingLoRAAdapter
from lightning_peft.low_rank.linear import Init, LoRAAdapter
from lightning_peft.method import PEFTMethod
from lightning_peft.select import first_match, require_matches, select


@dataclass(frozen=True, kw_only=True)
class LoRA(PEFTMethod):
    """Low-rank updates of linear layers, embeddings and convolutions.

    Args:
        r: Rank of the update.
        alpha: The update is multiplied by ``alpha / r``.
        dropout: Probability with which an element of the adapter's input is zeroed during training.
        target_modules: What to adapt: ``all-linear`` (every linear layer but the output head), ``attention``,
            ``mlp``, or names, globs (``layers.*.q_proj``) and regular expressions (``re:.*proj``).
        exclude_modules: Patterns of modules to leave out.
        layers: Blocks to adapt: indices, or a slice such as ``"8:16"`` or ``"-4:"``.
        rank_pattern: Other ranks for some modules, by pattern.
        alpha_pattern: Other alphas for some modules, by pattern.
        use_rslora: Multiply by ``alpha / sqrt(r)`` instead.
        loraplus_lr_ratio: The learning rate of B is the optimizer's, multiplied by this (LoRA+).
        freeze_A: Train B alone, which keeps ``[..., r]`` of each input for the backward pass instead of all (LoRA-FA).
        init: How A is drawn: ``kaiming`` as in the paper's code, or ``gaussian`` as in its text. B is zero.
    """

    name: ClassVar[str] = "lora"
    hosts: ClassVar[str] = "linear layers, Conv1D, embeddings, convolutions"
    count: ClassVar[str] = "Σ r (in + out)"
    free: ClassVar[frozenset[str]] = PEFTMethod.free | {"loraplus_lr_ratio", "freeze_A"}
    kinds: ClassVar[tuple[type[LoRAAdapter], ...]] = (LoRAAdapter, EmbeddingLoRAAdapter, ConvLoRAAdapter)
    """The adapters that it makes, one for each kind of module."""

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    layers: list[int] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    loraplus_lr_ratio: float = 1.0
    freeze_A: bool = False
    init: Init = "kaiming"

    def __post_init__(self) -> None:
        me = type(self).__name__
        for key in ("target_modules", "exclude_modules", "layers"):
            if isinstance(value := getattr(self, key), tuple | set | frozenset):
                object.__setattr__(self, key, sorted(value))
        for what, r in {"r": self.r, **self.rank_pattern}.items():
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise PEFTError(f"{me}: rank {what}={r!r} was given; a rank is a whole number of at least 1.")
        for what, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not (isinstance(alpha, int | float) and math.isfinite(alpha) and alpha > 0):
                raise PEFTError(f"{me}: {what}={alpha!r} was given; alpha is a positive number.")
        if not 0 <= self.dropout < 1:
            raise PEFTError(f"{me}: dropout={self.dropout!r} was given; it is a probability in [0, 1).")
        ratio = self.loraplus_lr_ratio
        if not (isinstance(ratio, int | float) and math.isfinite(ratio) and ratio > 0):
            raise PEFTError(f"{me}: loraplus_lr_ratio={ratio!r} was given; it is a positive number.")
        if self.init not in ("kaiming", "gaussian"):
            raise PEFTError(f"{me}: init={self.init!r} was given; it is 'kaiming' or 'gaussian'.")

    def select(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules that ``target_modules`` names."""
        hosts = select(
            model, self.target_modules, adaptable=self._adaptable, exclude=self.exclude_modules, layers=self.layers
        )
        require_matches(self.rank_pattern, hosts, "rank_pattern")
        require_matches(self.alpha_pattern, hosts, "alpha_pattern")
        return hosts

    def rank_and_alpha(self, name: str) -> tuple[int, float]:
        """Return the rank and alpha of the module ``name``."""
        return first_match(self.rank_pattern, name, self.r), first_match(self.alpha_pattern, name, self.alpha)

    def lr_ratio(self, parameter: str) -> float:
        """Return LoRA+'s ratio for B."""
        return self.loraplus_lr_ratio if parameter == "lora_B" else 1.0

    def adapter(self, name: str, module: nn.Module, seed: int) -> LoRAAdapter:
        """Make the adapter of ``module``."""
        me, (r, alpha) = type(self).__name__, self.rank_and_alpha(name)
        kind = next(kind for kind in self.kinds if kind.serves(module))
        shapes = kind.shapes(module, r)
        d_in, d_out = math.prod(shapes["lora_A"][1:]), shapes["lora_B"][0]
        if r > min(d_in, d_out):
            raise PEFTError(
                f"{me}: r={r} was given, but {name!r} is {d_in} → {d_out}: the rank of an update of it is at most "
                f"{min(d_in, d_out)}. Take a smaller r, set rank_pattern={{{name!r}: …}}, or exclude the module."
            )
        if refusal := kind.refusal(module, r, self.dropout, self.freeze_A):
            raise PEFTError(f"{me}: {name!r} cannot be adapted: {refusal}. Exclude it.")
        scale = alpha / math.sqrt(r) if self.use_rslora else alpha / r
        adapter = kind(module, r, scale, self.dropout, self.init, seed, name)
        if self.freeze_A:
            adapter.freeze_A()
        return adapter

    def _adaptable(self, module: nn.Module) -> bool:
        return any(kind.serves(module) for kind in self.kinds)

"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), arXiv:2106.09685, section 4.1.

rsLoRA's scale: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA (Kalajdzievski, 2023),
arXiv:2312.03732, section 3. Another learning rate for B: LoRA+ (Hayou et al., 2024), arXiv:2402.12354, section 4.
A frozen A: LoRA-FA (Zhang et al., 2023), arXiv:2308.03303, section 3.1. Starts in the weight: `low_rank/principal.py`.
Active from some tokens on: aLoRA, `virtual_tokens/invocation.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_peft.adapters.low_rank.conv import ConvLoRAAdapter
from lightning_peft.adapters.low_rank.embedding import EmbeddingLoRAAdapter
from lightning_peft.adapters.low_rank.linear import ActivatedLoRAAdapter, BiasedLoRAAdapter, LoRAAdapter
from lightning_peft.adapters.low_rank.making import Maker, ranks_and_scales, share_inputs
from lightning_peft.adapters.low_rank.own_weights import attention_weights, own_weights
from lightning_peft.adapters.low_rank.principal import PrincipalAdapter, is_principal
from lightning_peft.adapters.virtual_tokens.invocation import Invocation
from lightning_peft.adapters.virtual_tokens.virtual_tokens import find_decoder
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.structure.blocks import shared_inputs
from lightning_peft.structure.fused_parts import is_fused, part_rows
from lightning_peft.targets.naming import exceptions, only_here
from lightning_peft.targets.patterns import first_match, found_by_preset, matches, require_matches
from lightning_peft.targets.select import select
from lightning_peft.tensors.weights import is_linear

_ACTIVATED = "LoRA with alora_invocation_tokens"


@dataclass(frozen=True, kw_only=True)
class LoRA(PEFTMethod):
    """Low-rank updates of linear layers, embeddings, convolutions, attention and experts.

    Args:
        r: Rank of the update.
        alpha: The update is multiplied by ``alpha / r``.
        dropout: Probability with which an element of the adapter's input is zeroed during training.
        target_modules: What to adapt: ``all-linear`` (every linear layer but a language model's head), ``attention``,
            ``mlp``, or names, globs (``layers.*.q_proj``) and regular expressions (``re:.*proj``). Experts in one 3-D
            parameter are linear layers too, each with the rank ``r``; by name they are that parameter
            (``experts.down_proj``). What chooses among experts is adapted by name alone.
        exclude_modules: Patterns of modules to leave out, with what is in them.
        layers: Blocks to adapt: indices, or a slice such as ``"8:16"`` or ``"-4:"``.
        rank_pattern: Other ranks for some modules, by pattern.
        alpha_pattern: Other alphas for some modules, by pattern.
        use_rslora: Multiply by ``alpha / sqrt(r)`` instead.
        loraplus_lr_ratio: The learning rate of B is the optimizer's, multiplied by this (LoRA+).
        freeze_A: Train B alone, which keeps ``[..., r]`` of each input for the backward pass instead of all (LoRA-FA).
        init: How A is drawn: ``kaiming`` as in the paper's code, or ``gaussian`` as in its text. B is zero. Or where A
            and B start in the weight: ``pissa``, at its largest singular values (``pissa_niter_16``: found faster, by
            as many iterations), or ``olora``, at its QR decomposition.
        lora_bias: Give B a bias: W0 x + s · (B A x + b). Linear layers alone are adapted then.
        fused_parts: Of layers that compute query, key and value in one, adapt these parts alone, each with an A of its
            own: some of ``q``, ``k``, ``v``, as the paper's GPT-2 code does.
        alora_invocation_tokens: Ids of tokens that activate the adapters (aLoRA): they change linear layers of a
            decoder from the last place on where a row has these in a sequence, and nothing in rows that have it not. So
            what a cache holds of the text before is the base's. They are never merged.
    """

    name: ClassVar[str] = "lora"
    hosts: ClassVar[str] = "linear layers, Conv1D, embeddings, convolutions, MultiheadAttention, experts"
    count: ClassVar[str] = "Σ r (in + out)"
    # The shapes of the tensors show the ranks.
    free: ClassVar[frozenset[str]] = PEFTMethod.free | {"rank_pattern", "loraplus_lr_ratio", "freeze_A"}
    kinds: ClassVar[tuple[type[LoRAAdapter], ...]] = (LoRAAdapter, EmbeddingLoRAAdapter, ConvLoRAAdapter)
    """The adapters that stand beside modules, one for each kind of module."""
    changes_weights: ClassVar[bool] = True
    """Whether weights that modules read themselves can be adapted."""
    adapts_parts: ClassVar[bool] = True
    """Whether ``fused_parts`` is possible."""

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
    init: str = "kaiming"
    lora_bias: bool = False
    fused_parts: list[str] | None = None
    alora_invocation_tokens: list[int] | None = None

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
        self._check_parts()
        from_weight = ", 'pissa', 'pissa_niter_N' or 'olora'" if self.kinds is LoRA.kinds else ""
        if self.init not in ("kaiming", "gaussian") and not (from_weight and is_principal(str(self.init))):
            raise PEFTError(f"{me}: init={self.init!r} was given; it is 'kaiming', 'gaussian'{from_weight}.")

        if self.lora_bias and (self.kinds is not LoRA.kinds or is_principal(self.init) or self.fused_parts):
            raise PEFTError(
                f"{me}: lora_bias=True was given; that goes with LoRA on whole layers, which starts at zero. Leave it "
                "out, or train the layers' own biases beside it: [..., BitFit()]."
            )
        self._check_invocation()

    def _check_parts(self) -> None:
        if self.fused_parts is None:
            return
        me, parts = type(self).__name__, [part for part in "qkv" if part in self.fused_parts]
        if not parts or sorted(self.fused_parts) != sorted(parts):
            raise PEFTError(f"{me}: fused_parts={self.fused_parts!r} was given; a list of 'q', 'k', 'v' was expected.")
        if not self.adapts_parts:
            raise PEFTError(f"{me}: fused_parts was given; {me} adapts whole layers. Use LoRA, or leave it out.")
        if is_principal(self.init):
            raise PEFTError(f"{me}: init={self.init!r} starts from whole layers; it does not go with fused_parts.")
        object.__setattr__(self, "fused_parts", parts)

    def _check_invocation(self) -> None:
        if (tokens := self.alora_invocation_tokens) is None:
            return
        me, values = type(self).__name__, list(tokens) if isinstance(tokens, list | tuple) else []
        if not values or any(not isinstance(token, int) or isinstance(token, bool) or token < 0 for token in values):
            raise PEFTError(
                f"{me}: alora_invocation_tokens={tokens!r} was given; a list of ids of tokens was expected, at least "
                "one, as a tokenizer gives them without special tokens: tokenizer.encode(text, "
                "add_special_tokens=False)."
            )
        others = {"lora_bias": self.lora_bias, "fused_parts": self.fused_parts}
        given = [f"{key}={value!r}" for key, value in others.items() if value]
        given += [f"init={self.init!r}"] if is_principal(self.init) else []
        if self.kinds is not LoRA.kinds or given:
            raise PEFTError(
                f"{me}: alora_invocation_tokens goes with LoRA on whole layers that starts at zero, and not with "
                f"{given[0] if given else me}. Leave one of them out."
            )
        object.__setattr__(self, "alora_invocation_tokens", values)

    @property
    def reads_weights(self) -> bool:
        """Whether A and B start in the weight."""
        return is_principal(self.init)

    def select(self, model: ModelView) -> dict[str, nn.Module]:
        """Return the modules that ``target_modules`` names, those whose weights it names, and what is given texts."""
        modules = model.modules
        around = [] if self.alora_invocation_tokens is None else [_decoder(model, self.alora_invocation_tokens)]
        return {host: modules[host] for host in [*around, *self.targets(model)]}

    def targets(self, model: ModelView) -> dict[str, dict[str, str]]:
        """Return the adapted modules by name, each with the weights that are changed where they are read.

        These are the weights of ``nn.MultiheadAttention``, and parameters that ``target_modules`` names: each with the
        name by which it was chosen. Beside other modules stands a low-rank term: they have none.

        Raises:
            PEFTError: As :meth:`select`.
        """
        maker = self._maker(seed=0)
        names = select(
            model,
            self.target_modules,
            adaptable=self._adaptable,
            obstacle=maker.obstacle,
            weights=own_weights if self._changes_weights else None,
            written=maker.written,
            exclude=self.exclude_modules,
            layers=self.layers,
        )
        require_matches(self.rank_pattern, names, "rank_pattern")
        require_matches(self.alpha_pattern, names, "alpha_pattern")
        modules = model.modules
        found: dict[str, dict[str, str]] = {}
        for name in names:
            module = modules.get(name)
            if module is None:
                host, _, weight = name.rpartition(".")
                found.setdefault(host, {})[weight] = name
            else:
                attention = attention_weights(module) if isinstance(module, nn.MultiheadAttention) else ()
                found[name] = dict.fromkeys(attention, name)
        return found

    def targets_of(self, model: ModelView, hosts: Mapping[str, nn.Module]) -> dict[str, dict[str, str]]:
        """Return those of :meth:`targets` that are ``hosts``; patterns are left alone where all terms stand beside."""
        if self.alora_invocation_tokens is not None:
            hosts = {host: module for host, module in hosts.items() if is_linear(module)}
        if all(any(kind.serves(module) for kind in self.adapter_kinds) for module in hosts.values()):
            return {host: {} for host in hosts}
        targets = self.targets(model)
        return {host: targets[host] for host in hosts}

    def within(self, adapters: Mapping[str, Adapter]) -> LoRA:
        """Return the method with the ranks, the alphas and the names of its modules instead of patterns."""
        pairs = [pair for host, adapter in _changing(adapters).items() for pair in ranks_and_scales(host, adapter)]
        ranks = {name: r for name, r, _ in pairs}
        alphas = {name: self._alpha_of(r, scale) for name, r, scale in pairs}
        return replace(
            self,
            target_modules=list(ranks),
            exclude_modules=None,
            layers=None,
            rank_pattern=exceptions(ranks, self.r, only_here),
            alpha_pattern=exceptions(alphas, self.alpha, only_here),
        )

    def _alpha_of(self, r: int, scale: float) -> float:
        given = (self.alpha, *self.alpha_pattern.values())
        return next((alpha for alpha in given if self._scale(r, alpha) == scale), scale / self._scale(r, 1))

    def rank_and_alpha(self, name: str) -> tuple[int, float]:
        """Return the rank and alpha of the module ``name``."""
        return first_match(self.rank_pattern, name, self.r), first_match(self.alpha_pattern, name, self.alpha)

    def lr_ratio(self, parameter: str) -> float:
        """Return LoRA+'s ratio for B."""
        return self.loraplus_lr_ratio if parameter.rpartition(".")[2] == "lora_B" else 1.0

    def adapters(self, model: ModelView, hosts: Mapping[str, nn.Module], seed: int) -> dict[str, Adapter]:
        """Make the adapters of ``hosts``; those of layers with one input share its product with their A."""
        targets, fused, maker = self.targets_of(model, hosts), self.parts(model, hosts), self._maker(seed)
        made: dict[str, Adapter] = {}
        for host, module in hosts.items():
            if host not in targets:
                continue
            if targets[host]:
                made[host] = maker.of_weights(host, module, targets[host])
            elif host in fused:
                made[host] = maker.of_parts(host, module, fused[host])
            else:
                made[host] = self.adapter(host, module, seed)
        share_inputs(shared_inputs(model), made)
        for remark in maker.remarks(made):
            model.remark(remark)
        return made if self.alora_invocation_tokens is None else self._activated(model, hosts, made)

    def _activated(
        self, model: ModelView, hosts: Mapping[str, nn.Module], made: Mapping[str, Adapter]
    ) -> dict[str, Adapter]:
        """Return the adapters, which are told by another on the decoder where they are active."""
        tokens = tuple(self.alora_invocation_tokens or ())
        decoder = _decoder(model, tokens)
        if decoder not in hosts:
            raise PEFTError(f"{_ACTIVATED}: train_also trains {decoder!r} whole, in which it adapts layers.")
        invocation = Invocation(tokens)
        for adapter in made.values():
            assert isinstance(adapter, ActivatedLoRAAdapter)
            adapter.active = invocation.active
        return {decoder: invocation, **made}

    def parts(self, model: ModelView, hosts: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Return the hosts of which parts are adapted, each with the rows of its ``fused_parts``.

        Raises:
            PEFTError: The rows of one are not known, or there is none.
        """
        if self.fused_parts is None:
            return {}
        modules = model.modules
        rows = {host: part_rows(model, host) for host in hosts if is_fused(host, modules[host])}
        if not rows:
            raise PEFTError(
                f"{type(self).__name__}: fused_parts={self.fused_parts!r} was given, but no adapted layer computes "
                "query, key and value in one. Leave it out, and name the projections in target_modules."
            )
        return {host: {part: of[part] for part in self.fused_parts} for host, of in rows.items()}

    def adapter(self, name: str, module: nn.Module, seed: int) -> LoRAAdapter:
        """Make the adapter that stands beside ``module``."""
        return self._maker(seed).beside(name, module)

    def _maker(self, seed: int) -> Maker:
        return Maker(
            method=type(self).__name__,
            kinds=self.adapter_kinds,
            rank=lambda name: self.rank_and_alpha(name)[0],
            scale=lambda name, r: self._scale(r, self.rank_and_alpha(name)[1]),
            named=self._named,
            dropout=self.dropout,
            init=self.init,
            freeze_A=self.freeze_A,
            seed=seed,
        )

    def _named(self, name: str) -> bool:
        by_rank = any(matches(pattern, name) for pattern in self.rank_pattern)
        return by_rank or not found_by_preset(self.target_modules, name)

    def _scale(self, r: int, alpha: float) -> float:
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def _adaptable(self, module: nn.Module) -> bool:
        changed = self._changes_weights and isinstance(module, nn.MultiheadAttention)
        return changed or any(kind.serves(module) for kind in self.adapter_kinds)

    @property
    def adapter_kinds(self) -> tuple[type[LoRAAdapter], ...]:
        """Those of :attr:`kinds` that are made, or what takes their place."""
        if self.alora_invocation_tokens is not None:
            return (ActivatedLoRAAdapter,)
        if self.lora_bias:
            return (BiasedLoRAAdapter,)
        return (PrincipalAdapter,) if is_principal(self.init) else self.kinds

    @property
    def _changes_weights(self) -> bool:
        return self.changes_weights and self.adapter_kinds is self.kinds


def _changing(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    return {host: adapter for host, adapter in adapters.items() if not isinstance(adapter, Invocation)}


def _decoder(model: ModelView, tokens: Iterable[int]) -> str:
    """Return the name of the decoder of a language model, as whose texts HF PEFT too looks for a sequence.

    Raises:
        PEFTError: The model is another one, or has not these tokens.
    """
    decoder = find_decoder(model, _ACTIVATED)
    around: Any = model.modules[decoder.around]
    if around is decoder.module or around.get_output_embeddings() is None:
        raise PEFTError(f"{_ACTIVATED} works on causal language models; a {type(around).__name__} was given. Use LoRA.")
    known = getattr(around.get_input_embeddings(), "num_embeddings", None)
    if known is not None and (unknown := [token for token in tokens if token >= known]):
        raise PEFTError(
            f"LoRA: alora_invocation_tokens has {unknown[0]}, and the model knows the tokens 0 to {known - 1}: no text "
            "would activate the adapters. Give ids of the model's own tokenizer."
        )
    return decoder.name

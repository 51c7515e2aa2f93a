"""LoRA in HF PEFT's format."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import regex
from torch import nn

from lightning_peft.adapters.low_rank.own_weights import factor_shapes, key_of
from lightning_peft.adapters.low_rank.principal import is_principal
from lightning_peft.core.adapter import CHILD
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.formats.configuration import refuse_many_patterns
from lightning_peft.formats.counterpart import PREFIX, UNSAID, Counterpart, Shapes, require_numbers, targets_for_hf
from lightning_peft.formats.keys import refuse_values
from lightning_peft.formats.own_weights import ENDINGS, parameter_targets, tensors_of, weights_in
from lightning_peft.methods.lora import LoRA
from lightning_peft.targets.naming import exceptions, only_here, targets_from
from lightning_peft.targets.patterns import as_list, endings, fullmatch
from lightning_peft.tensors.weights import is_conv1d

_LINEAR = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}
_BIAS = {"lora_B.bias": "lora_B_bias"}
_EMBEDDING = {"lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}

KEYS = frozenset(
    {
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias"),
        *("bias", "trainable_token_indices", "target_parameters", "ensure_weight_tying"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core"),
        "merge_weights",
    }
)
_INVOCATION = "alora_invocation_tokens"
PLAIN: dict[str, tuple[Any, ...]] = {
    # The base is as it was under all of these.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
    "enable_lora": (None,),
    **dict.fromkeys(
        (
            *("layer_replication", "use_qalora"),
            *("use_bdlora", _INVOCATION, "arrow_config", "kasa_config", "velora_config"),
            *("monteclora_config", "megatron_config"),
        ),
        (False, None, {}, []),
    ),
}
# Keys of biases and rows of embeddings, which servers do not take, likewise.
_ALONE: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False, None),
    "trainable_token_indices": (None, {}, []),
}


_CHANGING = ("corda", "lora_ga", "loftq")


def changes_base(init: Any) -> bool:
    """Whether HF PEFT changes the base's weights where adapters start so: their file is nothing without that change."""
    return is_principal(str(init)) or init in _CHANGING


@dataclass(frozen=True)
class LowRank:
    """One module's LoRA in a file: its change of the weight is ``scale`` · B A."""

    a: str
    """Name of A ``[r, in]`` in the file."""
    b: str
    """Name of B ``[out, r]`` in the file."""
    r: int
    scale: float


class LoRAInHF(Counterpart):
    """``LORA`` without DoRA, biases and the like."""

    use_dora: ClassVar[bool] = False
    convolutions: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    method: ClassVar[type[LoRA]] = LoRA
    peft_type = "LORA"
    keys = KEYS | {_INVOCATION}
    plain: ClassVar[Mapping[str, tuple[Any, ...]]] = {key: PLAIN[key] for key in PLAIN if key != _INVOCATION}
    parameters: ClassVar[Mapping[str, str]] = {**ENDINGS, **_EMBEDDING, **_BIAS}

    def writes(self, method: PEFTMethod) -> bool:
        """Whether ``method`` starts from zero."""
        return isinstance(method, LoRA) and not is_principal(method.init)

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Tell LoRA and DoRA apart."""
        plain = self.use_dora or not changes_base(config.get("init_lora_weights"))
        return bool(config.get("use_dora", False)) == self.use_dora and UNSAID not in config and plain

    def parameters_of(self, module: nn.Module, method: Any) -> Mapping[str, str]:
        """Return other names for embeddings."""
        if isinstance(module, nn.Embedding):
            return _EMBEDDING
        return _LINEAR | _BIAS if method is not None and method.lora_bias else _LINEAR

    def names(self, root: ModelView, method: LoRA, hosts: Iterable[str], chosen: Iterable[str]) -> dict[str, str]:
        """Return the name in the model of every tensor, by its name in the file."""
        modules = root.modules
        targets = method.targets_of(root, {host: modules[host] for host in hosts})
        return {
            f"{PREFIX}{host}.{suffix}": f"{host}.{CHILD}.{parameter}"
            for host, weights in targets.items()
            for suffix, parameter in self._tensors_of(modules[host], method, weights).items()
        }

    def config(self, root: ModelView, method: LoRA, hosts: Iterable[str], chosen: Iterable[str]) -> dict[str, Any]:
        """Return the most common rank and alpha, and the others as patterns."""
        modules = root.modules
        targets = method.targets_of(root, {host: modules[host] for host in hosts})
        names = dict.fromkeys(name for host in targets for name in targets[host].values() or [host])
        fused = method.parts(root, targets)
        pairs = {name: method.rank_and_alpha(name) for name in names}
        for host in fused:  # to other readers one LoRA with the ranks of its parts together
            (r, alpha), count = pairs[host], len(fused[host])
            pairs[host] = r * count, alpha * (math.sqrt(count) if method.use_rslora else count)
        r = Counter(rank for rank, _ in pairs.values()).most_common(1)[0][0]
        alpha = Counter(alpha for _, alpha in pairs.values()).most_common(1)[0][0]
        whole = [name for name in names if name in modules]
        return {
            "r": r,
            "lora_alpha": alpha,
            # HF PEFT drops nothing in front of weights that a module reads itself, and refuses to be asked.
            "lora_dropout": 0.0 if any(targets.values()) else method.dropout,
            "target_modules": targets_for_hf(whole, root) if whole else [],
            "target_parameters": parameter_targets(names.keys() - set(whole), root) or None,
            "rank_pattern": exceptions({name: rank for name, (rank, _) in pairs.items()}, r, _only_here),
            "alpha_pattern": exceptions({name: value for name, (_, value) in pairs.items()}, alpha, _only_here),
            "use_rslora": method.use_rslora,
            "use_dora": self.use_dora,
            "bias": "none",
            "lora_bias": method.lora_bias,
            "fan_in_fan_out": bool(whole) and all(is_conv1d(modules[host]) for host in whole),
            "init_lora_weights": "gaussian" if method.init == "gaussian" else True,
            # Only of its causal language models does HF PEFT look at the text.
            **({_INVOCATION: tokens, "task_type": "CAUSAL_LM"} if (tokens := method.alora_invocation_tokens) else {}),
        }

    def read(self, root: ModelView, config: Mapping[str, Any], shapes: Shapes, source: str) -> PEFTMethod:
        """Return the LoRA; refuse what is not plain."""
        require_numbers(config, ("r", "lora_alpha"), source)
        said = self.method(
            lora_bias=bool(config.get("lora_bias", False)), alora_invocation_tokens=config.get(_INVOCATION) or None
        )
        targets = self._targets(root, said, config, shapes, source)
        modules, ranks, alphas = root.modules, {}, {}
        named = {name: None for host, weights in targets.items() for name in weights.values() or [host]}
        for key in ("rank_pattern", "alpha_pattern"):
            refuse_many_patterns(config.get(key) or {}, named, source)
        for host, weights in targets.items():
            for name in dict.fromkeys(weights.values() or [host]):
                ranks[name] = number_for(config, "rank_pattern", "r", name, source)
                alphas[name] = number_for(config, "alpha_pattern", "lora_alpha", name, source)
            self._check_shapes(said, host, modules[host], weights, ranks, shapes, source)
        whole = [name for name in ranks if name in modules]
        inside = parameter_targets(ranks.keys() - set(whole), root)
        among = targets_from(whole, root) if whole else []
        return replace(
            said,
            r=config["r"],
            alpha=config["lora_alpha"],
            dropout=0.0 if any(targets.values()) else config.get("lora_dropout", 0.0),
            target_modules=[*as_list(among), *inside] if inside else among,
            rank_pattern=exceptions(ranks, config["r"], only_here),
            alpha_pattern=exceptions(alphas, config["lora_alpha"], only_here),
            use_rslora=bool(config.get("use_rslora", False)),
        )

    def _tensors_of(self, module: nn.Module, method: Any, weights: Mapping[str, str]) -> Mapping[str, str]:
        return tensors_of(module, weights) if weights else self.parameters_of(module, method)

    def _targets(
        self, root: ModelView, said: LoRA, config: Mapping[str, Any], shapes: Shapes, source: str
    ) -> dict[str, dict[str, str]]:
        """Return the adapted modules, each with those of its weights that are changed where they are read."""
        found = self.grouped(shapes, source)
        modules = self.modules(root, found, source)
        self.refuse_convolutions(modules, found, source)
        listed = [str(name) for name in config.get("target_parameters") or ()]
        targets = {}
        for host, parts in found.items():
            module = modules[host]
            targets[host] = weights_in(host, module, listed) if self.method.changes_weights else {}
            if not targets[host] and not any(kind.serves(module) for kind in said.adapter_kinds):
                raise PEFTError(
                    f"{source} adapts {host!r}, which is a {type(module).__name__} here. Load its own base model."
                )
            if parts != set(expected := self._tensors_of(module, said, targets[host])):
                raise PEFTError(
                    f"{source}: {host!r} has {', '.join(sorted(parts))} alone; {', '.join(expected)} were expected. "
                    "It is damaged."
                )
        return dict(sorted(targets.items()))

    def _check_shapes(
        self,
        said: LoRA,
        host: str,
        module: nn.Module,
        weights: Mapping[str, str],
        ranks: Mapping[str, int],
        shapes: Shapes,
        source: str,
    ) -> None:
        for suffix, parameter in self._tensors_of(module, said, weights).items():
            if weights:
                weight = next(w for w in weights if parameter.startswith(f"factors.{key_of(w)}."))
                r = ranks[weights[weight]]
                expected: tuple[int, ...] = factor_shapes(module, weight, r)[parameter.endswith("B")]
            else:
                r = ranks[host]
                expected = next(kind for kind in said.adapter_kinds if kind.serves(module)).shapes(module, r)[parameter]
            given = shapes.get(f"{PREFIX}{host}.{suffix}")
            if given != expected:
                raise PEFTError(
                    f"{source}: {host}.{suffix} has the shape {given}; rank {r} of its configuration and this model's "
                    f"{type(module).__name__} make {expected}. It belongs to another base model, or is damaged."
                )


def read_low_rank(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: str
) -> tuple[dict[str, LowRank], list[str]]:
    """Read configuration and tensor names without the model that they are for.

    Returns:
        The low-rank change of every adapted module by its name, and the names of all other tensors.

    Raises:
        PEFTError: The file is no plain LoRA, or configuration and tensors contradict each other.
    """
    reader = LoRAInHF()
    if config.get("peft_type") != reader.peft_type:
        raise PEFTError(f"{source} is an adapter of type {config.get('peft_type')!r}; {reader.peft_type} can be read.")
    if config.get("use_dora"):
        raise PEFTError(f"{source} uses use_dora={config['use_dora']!r}, which is not plain LoRA.")
    refuse_values(config, PLAIN | _ALONE, "a LoRA for servers", source)
    require_numbers(config, ("r", "lora_alpha"), source)
    grouped = reader.grouped(shapes, source)
    found = {}
    for host, kinds in sorted(grouped.items()):
        if not kinds <= {*_LINEAR, *_EMBEDDING} or config.get("target_parameters"):
            raise PEFTError(
                f"{source} adapts weights that {host!r} reads itself: servers take linear layers only. Of experts, "
                "`lightning-peft export --experts mixtral` (or qwen) makes such layers."
            )
        if kinds not in ({*_LINEAR}, {*_EMBEDDING}):
            raise PEFTError(f"{source}: {host!r} has {', '.join(sorted(kinds))} alone; A and B were expected.")
        r, alpha = rank_and_alpha(config, host, source)
        a, b = (f"{PREFIX}{host}.{kind}" for kind in (_LINEAR if kinds == {*_LINEAR} else _EMBEDDING))
        if len(shapes[a]) > 2:
            raise PEFTError(f"{source} adapts {host!r}, a convolution: servers for LoRA take linear layers only.")
        if len(shapes[a]) != 2 or len(shapes[b]) != 2 or not shapes[a][0] == shapes[b][1] == r or r < 1:
            raise PEFTError(
                f"{source}: A and B of {host!r} have the shapes {shapes[a]} and {shapes[b]}; the rank {r} of "
                f"the configuration makes ({r}, in) and (out, {r}). The directory is damaged; take another copy."
            )
        found[host] = LowRank(a, b, r, scale_of(config, r, alpha))
    return found, [name for name in shapes if not reader.owns(name)]


def rank_and_alpha(config: Mapping[str, Any], host: str, source: str) -> tuple[int, float]:
    """Return what a configuration says of the module ``host``.

    Raises:
        PEFTError: It gives no numbers.
    """
    r = number_for(config, "rank_pattern", "r", host, source)
    alpha = number_for(config, "alpha_pattern", "lora_alpha", host, source)
    if not isinstance(r, int) or r < 1:
        raise PEFTError(f"{source}: the configuration gives {host!r} the rank {r!r}; a whole number was expected.")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise PEFTError(f"{source}: the configuration gives {host!r} the alpha {alpha!r}; a number was expected.")
    return r, alpha


def scale_of(config: Mapping[str, Any], r: int, alpha: float) -> float:
    """Return what B A is multiplied by."""
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def _only_here(name: str) -> str:
    """Return a pattern as HF PEFT reads it for the module ``name`` and none whose name ends in it."""
    return f"^{regex.escape(name)}"


def number_for(config: Mapping[str, Any], patterns: str, default: str, host: str, source: str) -> Any:
    """Return what ``patterns`` say of ``host``, the first that matches, or ``default``, in HF PEFT's configuration."""
    table = config.get(patterns) or {}
    if not isinstance(table, dict):
        raise PEFTError(f"{source}: its configuration has {patterns}={table!r}; an object was expected.")
    named = set(endings(host))
    for key, value in table.items():  # as to HF PEFT, the first that matches, and not the longest
        if key in named or (not _is_name(key) and fullmatch(_anywhere(key), host)):
            return value
    return next((value for key, value in table.items() if fullmatch(_anywhere(key), host)), config[default])


@cache
def _is_name(key: str) -> bool:
    """Whether a pattern may be looked up: expressions are tried one by one, of which a file may have few."""
    return key.replace(".", "").replace("_", "").isalnum()


def _anywhere(expression: str) -> str:
    return rf"(?:.*\.)?(?:{expression})"

"""HF PEFT's names: configuration keys and tensor names of LoRA, both ways. Nothing else knows them.

The format is HF PEFT 0.21's (``adapter_config.json``, ``adapter_model.safetensors``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import regex
from torch import nn

from lightning_peft.adapter import CHILD
from lightning_peft.errors import PEFTError
from lightning_peft.methods.lora import LoRA
from lightning_peft.select import fullmatch, named_modules
from lightning_peft.weights import features, is_conv1d, is_linear

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_PARAMETERS = ("lora_A", "lora_B")

# Keys that change what the tensors mean, with the values that leave them plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    **dict.fromkeys(
        (
            *("use_dora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices"),
            *("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config"),
            *("monteclora_config", "megatron_config"),
        ),
        (False, None, {}, []),
    ),
}


@dataclass(frozen=True)
class Content:
    """What an adapter directory in HF PEFT's format says, in this package's terms."""

    method: LoRA
    train_also: tuple[str, ...]
    names: dict[str, str]
    """Name in the model (relative to its root) by name in the file."""
    copies: dict[str, str]
    """Copies of base parameters, which HF PEFT writes for adapted embeddings: names as in ``names``."""


@dataclass(frozen=True)
class LowRank:
    """One module's LoRA in a file: its change of the weight is ``scale`` · B A."""

    a: str
    """Name of A ``[r, in]`` in the file."""
    b: str
    """Name of B ``[out, r]`` in the file."""
    r: int
    scale: float


def config_of(
    root: nn.Module, method: LoRA, pairs: Mapping[str, tuple[int, float]], train_also: Iterable[str]
) -> dict[str, Any]:
    """Return ``adapter_config.json`` for ``method`` on modules of ``root``.

    Args:
        root: The model as HF PEFT will be given it.
        method: Settings that are the same for all modules.
        pairs: Rank and alpha by module name.
        train_also: Names of modules trained whole.
    """
    modules = named_modules(root)
    hosts = list(pairs)
    r = Counter(rank for rank, _ in pairs.values()).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in pairs.values()).most_common(1)[0][0]
    name_or_path = getattr(getattr(root, "config", None), "_name_or_path", None)
    return {
        "peft_type": "LORA",
        "task_type": _task_type(root),
        "base_model_name_or_path": name_or_path or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": method.dropout,
        "target_modules": suffixes(hosts, modules) or "|".join(map(regex.escape, hosts)),
        "rank_pattern": {host: rank for host, (rank, _) in pairs.items() if rank != r},
        "alpha_pattern": {host: value for host, (_, value) in pairs.items() if value != alpha},
        "use_rslora": method.use_rslora,
        "modules_to_save": list(train_also) or None,
        "bias": "none",
        "fan_in_fan_out": all(is_conv1d(modules[host]) for host in hosts),
        "init_lora_weights": "gaussian" if method.init == "gaussian" else True,
    }


def tensor_names(root: nn.Module, adapter: str, hosts: Iterable[str], whole: Iterable[str]) -> dict[str, str]:
    """Return the name in the model by the name in the file; ``whole`` are names of parameters trained whole."""
    modules = named_modules(root)
    names = {}
    for host in hosts:
        kinds = _EMBEDDING if isinstance(modules[host], nn.Embedding) else _LINEAR
        for kind, parameter in zip(kinds, _PARAMETERS, strict=True):
            names[f"{_PREFIX}{host}.{kind}"] = f"{host}.{CHILD}.{adapter}.{parameter}"
    names.update({f"{_PREFIX}{parameter}": parameter for parameter in whole})
    return names


def read_content(
    root: nn.Module, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], adapter: str, source: str
) -> Content:
    """Read a configuration and the tensors' names and shapes as an adapter of ``root``.

    Raises:
        PEFTError: The file is no plain LoRA, its names fit no module of ``root``, or configuration and tensors
            contradict each other.
    """
    _refuse_unknown(config, source)
    modules = named_modules(root)
    hosts, rest = _hosts(shapes, source)
    if missing := sorted(hosts - modules.keys()):
        raise PEFTError(
            f"{source} adapts {missing[0]!r} and {len(missing) - 1} more modules that this {type(root).__name__} does "
            "not have. Load the base model that the adapter was trained on."
        )
    ranks, alphas = {}, {}
    for host in sorted(hosts):
        ranks[host] = _pattern(config, "rank_pattern", "r", host, source)
        alphas[host] = _pattern(config, "alpha_pattern", "lora_alpha", host, source)
        _check_shapes(host, modules[host], ranks[host], shapes, source)
    train_also, copies = _whole(root, config, rest, source)
    method = LoRA(
        r=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        target_modules=suffixes(hosts, modules) or "re:" + "|".join(map(regex.escape, sorted(hosts))),
        rank_pattern={host: rank for host, rank in ranks.items() if rank != config["r"]},
        alpha_pattern={host: alpha for host, alpha in alphas.items() if alpha != config["lora_alpha"]},
        use_rslora=bool(config.get("use_rslora", False)),
    )
    whole = [name.removeprefix(_PREFIX) for name in rest if name not in copies]
    return Content(method, train_also, tensor_names(root, adapter, hosts, whole), copies)


def read_low_rank(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: str
) -> tuple[dict[str, LowRank], list[str]]:
    """Read configuration and tensor names without the model that they are for.

    Returns:
        The low-rank change of every adapted module by its name, and the names of all other tensors.

    Raises:
        PEFTError: The file is no plain LoRA, or configuration and tensors contradict each other.
    """
    _refuse_unknown(config, source)
    hosts, rest = _hosts(shapes, source)
    found = {}
    for host in sorted(hosts):
        r = _pattern(config, "rank_pattern", "r", host, source)
        alpha = _pattern(config, "alpha_pattern", "lora_alpha", host, source)
        kinds = _EMBEDDING if f"{_PREFIX}{host}.{_EMBEDDING[0]}" in shapes else _LINEAR
        a, b = (f"{_PREFIX}{host}.{kind}" for kind in kinds)
        if len(shapes[a]) != 2 or len(shapes[b]) != 2 or not shapes[a][0] == shapes[b][1] == r or r < 1:
            raise PEFTError(
                f"{source}: A and B of {host!r} have the shapes {shapes[a]} and {shapes[b]}; the rank {r} of "
                f"{CONFIG_FILE} makes ({r}, in) and (out, {r}). The directory is damaged; take another copy."
            )
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise PEFTError(f"{source}: {CONFIG_FILE} gives {host!r} the alpha {alpha!r}; a number was expected.")
        found[host] = LowRank(a, b, r, alpha / (math.sqrt(r) if config.get("use_rslora") else r))
    return found, rest


def suffixes(hosts: Iterable[str], modules: Iterable[str]) -> list[str] | None:
    """Return the shortest list of name endings that names exactly ``hosts`` among ``modules``.

    Last segments if they do, else whole names, else ``None``. Readers that match by the last segment only (vLLM)
    need the first form.
    """
    hosts, modules = set(hosts), list(modules)
    for endings in ({host.rsplit(".", 1)[-1] for host in hosts}, hosts):
        named = {name for name in modules if name in endings or _ends_in(name, endings)}
        if named == hosts:
            return sorted(endings)
    return None


def _ends_in(name: str, endings: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[start:]) in endings for start in range(1, len(parts)))


def _task_type(root: nn.Module) -> str | None:
    # The other task types make HF PEFT train classifier modules by name; these two only name an Auto class.
    name = type(root).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if getattr(getattr(root, "config", None), "is_encoder_decoder", False) else None


def _refuse_unknown(config: Mapping[str, Any], source: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise PEFTError(f"{source} is an adapter of type {kind!r}; LORA can be read.")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise PEFTError(f"{source}: {CONFIG_FILE} has {key}={config.get(key)!r}; a number was expected.")
    for key, plain in _PLAIN.items():
        if key in config and config[key] not in plain:
            raise PEFTError(f"{source} uses {key}={config[key]!r}, which is not plain LoRA and cannot be read.")


def _hosts(shapes: Mapping[str, tuple[int, ...]], source: str) -> tuple[set[str], list[str]]:
    """Split tensor names into the adapted modules and the names of tensors trained whole."""
    found: dict[str, set[str]] = {}
    rest = []
    for name in shapes:
        if not name.startswith(_PREFIX):
            raise PEFTError(f"{source}: the tensor {name!r} does not start with {_PREFIX!r}; it is no HF PEFT file.")
        kind = next((k for k in (*_LINEAR, *_EMBEDDING) if name.endswith(f".{k}")), None)
        if kind is None:
            rest.append(name)
        else:
            found.setdefault(name[len(_PREFIX) : -len(kind) - 1], set()).add(kind)
    for host, kinds in found.items():
        if kinds not in ({*_LINEAR}, {*_EMBEDDING}):
            raise PEFTError(f"{source}: {host!r} has {', '.join(sorted(kinds))} alone; A and B were expected.")
    if not found:
        raise PEFTError(f"{source} holds no LoRA tensors.")
    return set(found), rest


def _check_shapes(host: str, module: nn.Module, r: int, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    if not (is_linear(module) or isinstance(module, nn.Embedding)):
        raise PEFTError(f"{source} adapts {host!r}, which is a {type(module).__name__} here. Load its own base model.")
    d_in, d_out = features(module)
    kinds = _EMBEDDING if isinstance(module, nn.Embedding) else _LINEAR
    for kind, expected in zip(kinds, ((r, d_in), (d_out, r)), strict=True):
        given = shapes.get(f"{_PREFIX}{host}.{kind}")
        if given != expected:
            raise PEFTError(
                f"{source}: {host}.{kind} has the shape {given}; rank {r} of {CONFIG_FILE} and this model's "
                f"{d_in} → {d_out} layer make {expected}. It belongs to another base model, or is damaged."
            )


def _pattern(config: Mapping[str, Any], patterns: str, default: str, host: str, source: str) -> Any:
    table = config.get(patterns) or {}
    if not isinstance(table, dict):
        raise PEFTError(f"{source}: {CONFIG_FILE} has {patterns}={table!r}; an object was expected.")
    if host in table:
        return table[host]
    return next((value for key, value in table.items() if fullmatch(rf"(?:.*\.)?(?:{key})", host)), config[default])


def _whole(
    root: nn.Module, config: Mapping[str, Any], rest: Iterable[str], source: str
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the modules trained whole, from ``modules_to_save`` and the tensors, and the copies of base parameters."""
    listed = [str(ending) for ending in config.get("modules_to_save") or ()]
    parameters = dict(root.named_parameters())
    wanted, copies = set(), {}
    for in_file in rest:
        name = in_file.removeprefix(_PREFIX)
        base = name.replace(".base_layer.", ".")
        module = name.rpartition(".")[0]
        if any(part.endswith(ending) for part in _ancestors(module) for ending in listed):
            wanted.add(name)
        elif base in parameters:
            copies[in_file] = base
        else:
            raise PEFTError(f"{source}: the tensor {in_file!r} belongs to no module of this {type(root).__name__}.")
    found = [
        name
        for name, module in named_modules(root).items()
        if any(name.endswith(ending) for ending in listed)
        and (keys := {f"{name}.{key}" for key, _ in module.named_parameters()})
        and keys <= wanted
    ]
    return tuple(found), copies


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]

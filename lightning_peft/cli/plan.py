"""The command ``lightning-peft plan``: what the configuration of a run says about memory, without loading a weight."""

from __future__ import annotations

import pydoc
from collections.abc import Mapping
from dataclasses import asdict
from json import dumps
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import instantiate_class
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_peft.errors import PEFTError
from lightning_peft.operations.inject import inject
from lightning_peft.planning.layout import Layout, Precision
from lightning_peft.planning.memory import Memory
from lightning_peft.planning.report import GIB, Batch, Report, report
from lightning_peft.strategy import PEFTStrategy
from lightning_peft.strategy.bases.names import base_names
from lightning_peft.strategy.untrained import own_train_also
from lightning_peft.tasks.classifier import Classifier
from lightning_peft.tasks.language_model import LanguageModel
from lightning_peft.tasks.pretrained import meta_model

_TASKS = (LanguageModel, Classifier)
_PRECISIONS = {None: "32-true", "64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}

_Setting = Mapping[str, Any]


def show_plan(
    run: _Setting,
    devices: int | None = None,
    num_nodes: int | None = None,
    gpu_memory: float | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    json: bool = False,
) -> bool:
    """Print the memory that a run needs on each device, and that of other base strategies. No weight is loaded.

    Args:
        run: The configuration that `fit` takes, as plain values.
        devices: Devices in each node. The configuration's, if not given.
        num_nodes: Nodes. The configuration's, if not given.
        gpu_memory: Memory of a device in GiB, to say what fits.
        batch_size: Sequences in the batch of a device. The data's, or else 1, if not given.
        sequence_length: Tokens in a sequence. The data's max_length, or else 1024, if not given.
        json: Print a JSON object with bytes, for programs.

    Returns:
        Whether the run or one of the other bases fits, as far as the memory of a device is known.

    Raises:
        PEFTError: The configuration has no model or one that cannot be built without its weights, or the plan of its
            strategy or precision is not known.
    """
    trainer, data = run["trainer"], (run.get("data") or {}).get("init_args") or {}
    peft, base, options = _strategy(trainer["strategy"])
    layout = _layout(
        base,
        options,
        _device_count(trainer["devices"]) if devices is None else devices,
        trainer["num_nodes"] if num_nodes is None else num_nodes,
    )
    precision = _precision(trainer)
    precision.check(layout)
    module = _module(run.get("model"))
    if peft is not None:
        strategy: Any = PEFTStrategy(_made(peft.get("method", "lora")))  # type: ignore[abstract]
        inject(module, strategy.methods, train_also=own_train_also(module, peft.get("train_also")))
    batch = Batch(
        batch_size or data.get("batch_size") or 1,
        sequence_length or data.get("max_length") or 1024,
        _checkpoints(run["model"]) or any(options.get(f"activation_checkpointing{end}") for end in ("", "_policy")),
    )
    found = report(module, layout, precision, batch, None if gpu_memory is None else gpu_memory * GIB)
    print(dumps(_bytes(found, gpu_memory)) if json else found.text)
    return found.fits


def _bytes(found: Report, gpu_memory: float | None) -> _Setting:
    """Return what a report says of each base, in bytes and in plain values."""

    def plain(memory: Memory) -> _Setting:
        fits = {} if gpu_memory is None else {"fits": memory.fits(gpu_memory * GIB)}
        return {**asdict(memory), "total": memory.total, **fits}

    return {"run": plain(found.run), "bases": {name: plain(memory) for name, memory in found.bases.items()}}


def _strategy(value: Any) -> tuple[_Setting | None, type | None, _Setting]:
    """Return the options of ``PEFTStrategy`` if it is one, and the class (``None`` for "auto") and options of the base.

    A strategy is not made: DeepSpeed's cannot be where DeepSpeed is not installed.
    """
    kind, options = _class_and_options(value)
    if kind is None or not issubclass(kind, PEFTStrategy):
        return None, kind, options
    return options, *_class_and_options(options.get("base", "auto"))


def _class_and_options(value: Any) -> tuple[type | None, _Setting]:
    if value == "auto":
        return None, {}
    if not isinstance(value, str):
        return _class(value), value.get("init_args") or {}
    if value not in StrategyRegistry:
        raise PEFTError(f"Unknown base strategy {value!r}. Base strategies: {', '.join(base_names())}.")
    entry = StrategyRegistry[value]
    return entry["strategy"], entry["init_params"]


def _layout(kind: type | None, options: _Setting, devices: int, num_nodes: int) -> Layout:
    count: dict[str, Any] = {"devices": devices, "num_nodes": num_nodes}
    if kind is None:
        return Layout(kind="single_device" if devices == num_nodes == 1 else "ddp", **count)
    if issubclass(kind, SingleDeviceStrategy):
        return Layout(kind="single_device", **count)
    if issubclass(kind, FSDPStrategy):
        sharding: Any = options.get("sharding_strategy", "FULL_SHARD")
        sharding = getattr(sharding, "name", sharding)
        wrapped, offload = (bool(options.get(key)) for key in ("auto_wrap_policy", "cpu_offload"))
        return Layout(kind="fsdp", sharding=sharding, wrapped=wrapped, offload_parameters=offload, **count)
    if issubclass(kind, ModelParallelStrategy):
        sizes = {key: options.get(key, "auto") for key in ("data_parallel_size", "tensor_parallel_size")}
        return Layout(kind="model_parallel", **sizes, **count)
    if issubclass(kind, DeepSpeedStrategy):
        if options.get("config") is not None:
            raise PEFTError(
                "DeepSpeedStrategy was given config=…, which a plan does not read. Give the strategy's own options "
                "instead (stage, offload_optimizer, offload_parameters, reduce_bucket_size)."
            )
        keys = {"stage": "stage", "offload_optimizer": "offload_optimizer", "offload_parameters": "offload_parameters"}
        keys["reduce_bucket_size"] = "bucket"
        given = {name: options[key] for key, name in keys.items() if options.get(key) is not None}
        return Layout(kind="deepspeed", **given, **count)
    if issubclass(kind, DDPStrategy):  # last: DeepSpeed's is one, too
        return Layout(kind="ddp", **count)
    raise PEFTError(
        f"The base {kind.__name__} was given; a plan can be made for one device, DDP, FSDP, ModelParallel, DeepSpeed, "
        "and what is derived from their strategies."
    )


def _device_count(devices: Any) -> int:
    """Return how many devices Lightning's ``devices`` stands for."""
    if devices in ("auto", -1, "-1"):
        return max(1, torch.cuda.device_count())
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    return len(devices) if isinstance(devices, list) else int(devices)


def _precision(trainer: _Setting) -> Precision:
    given = trainer.get("precision")
    flag = str(_PRECISIONS.get(given if given is None else str(given), given))
    plugins = trainer.get("plugins") or []
    for plugin in plugins if isinstance(plugins, list) else [plugins]:
        if isinstance(plugin, dict) and plugin["class_path"].endswith(".BitsandbytesPrecision"):
            options = plugin.get("init_args") or {}
            return Precision(flag, options["mode"], tuple(options.get("ignore_modules") or ()))
    return Precision(flag)


def _module(model: _Setting | None) -> nn.Module:
    """Return the module without its weights: of a task the transformers model in its place, of others all."""
    if not model:
        raise PEFTError("The configuration has no model: give --model, or a file with a `model:` entry by --config.")
    kind, options = _class(model), dict(model.get("init_args") or {})
    for task in _TASKS:
        if issubclass(kind, task) and "model" in options:
            changes = {key: options[key] for key in ("dtype", "num_labels") if options.get(key) is not None}
            stand_in: nn.Module = type(kind.__name__, (nn.Module,), {"train_also": getattr(kind, "train_also", ())})()
            stand_in.add_module("model", meta_model(options["model"], kind.auto_class, **changes))
            return stand_in
    try:
        with torch.device("meta"):
            module = _made(model)
            if is_overridden("configure_model", module, LightningModule):
                module.configure_model()
    except PEFTError:
        raise
    except Exception as error:  # of the user's own code
        raise PEFTError(
            f"{kind.__name__} cannot be built on torch's meta device, without its weights: {error}. Make the network "
            "from its configuration in __init__ and load the weights elsewhere, or use a task of lightning_peft.tasks."
        ) from error
    if not any(True for _ in module.parameters()):
        raise PEFTError(f"{kind.__name__} has no parameters after __init__ and configure_model: nothing to plan with.")
    assert isinstance(module, nn.Module)
    return module


def _checkpoints(model: _Setting) -> bool:
    """Whether a task is told to compute activations again in the backward pass."""
    return bool((model.get("init_args") or {}).get("gradient_checkpointing"))


def _class(setting: _Setting) -> type:
    kind = pydoc.locate(setting["class_path"])
    assert isinstance(kind, type)
    return kind


def _made(value: Any) -> Any:
    """Make the objects that ``class_path`` entries stand for."""
    if isinstance(value, list):
        return [_made(entry) for entry in value]
    if not isinstance(value, dict) or "class_path" not in value:
        return value
    options = {key: _made(entry) for key, entry in (value.get("init_args") or {}).items()}
    return instantiate_class((), {"class_path": value["class_path"], "init_args": options})

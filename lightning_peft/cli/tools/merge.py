"""The command ``lightning-peft merge``: an adapter in the weights of its base, file by file where that can be."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_peft.cli.tools.inspect import base_name, model_class
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.registry import changed, trained_whole
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.files.contents import MARKER, open_tensors, read_json, write_json
from lightning_peft.files.streaming import Kind, can_stream, stream_tensors
from lightning_peft.files.writing import atomic_directory, require_space
from lightning_peft.operations.fold import can_fold_rows, fold_rows, merged_values, weight_names
from lightning_peft.operations.merge import MergeReport
from lightning_peft.operations.merge import merge as merge_adapters
from lightning_peft.operations.mergeable import can_merge
from lightning_peft.storage.base_weights import map_base_weights, weight_files
from lightning_peft.storage.loading import load_adapter
from lightning_peft.tasks.pretrained import Dtype, load_model, load_tokenizer, meta_model

_INDEX = "model.safetensors.index.json"


def merge(adapter: str, model: str | None = None, out: str = "merged", dtype: Dtype | None = None) -> None:
    """Merge an adapter into its base model and write the result as an ordinary Transformers model.

    Where adapters change nothing but weights, the base is read and written tensor by tensor: in memory there is the
    adapter, one weight, and what some rows of it become.

    Args:
        adapter: The adapter directory.
        model: The base model: a directory, a name on the Hugging Face hub, or package:NAME. The one that the adapter
            names, if not given.
        out: The directory to write. One that this command wrote before is replaced.
        dtype: Of the weights written; the base's own, if not given. In bfloat16, rounding takes a part of a small
            adapter.

    Raises:
        PEFTError: The adapter does not belong to the model, or the directory cannot be written.
    """
    model = model or base_name(Path(adapter))
    kind = model_class(Path(adapter), model)
    with atomic_directory(out) as directory:  # refused before the work, if it cannot be written
        base = mapped(model, kind)
        if base is not None:
            load_adapter(base, adapter)
        if base is not None and _changes_weights_alone(ModelView(base)):
            print(_stream(base, Path(model), directory, None if dtype is None else getattr(torch, dtype)))
        else:
            base = load_model(model, kind, dtype=dtype or _dtype(model, kind))
            require_space(directory, sum(p.numel() * p.element_size() for p in base.parameters()))
            load_adapter(base, adapter)
            print(merge_adapters(base, unload=True))
            base.save_pretrained(directory)
        write_json(directory / MARKER, {"version": 1, "merged": str(adapter)})
        try:
            load_tokenizer(model).save_pretrained(directory)
        except PEFTError:
            print(f"{model} has no tokenizer: the model is written without one.")
    print(f"Wrote {out}. Load it with {type(base).__name__}.from_pretrained({out!r}).")


def _dtype(model: str, kind: Any) -> Dtype:
    """Return the dtype that a model's configuration names."""
    found: Any = meta_model(model, kind).config.dtype
    named: Any = str(found).removeprefix("torch.")
    return named if named in ("float16", "bfloat16") else "float32"  # type: ignore[no-any-return]


def mapped(model: str, kind: Any) -> PreTrainedModel | None:
    """Return the base with the weights of its files, unread, if it is a directory with all of them."""
    directory = Path(model)
    if not (directory / "config.json").is_file() or "quantization_config" in read_json(directory / "config.json"):
        return None
    base = meta_model(model, kind)
    try:
        map_base_weights(base, directory)
    except PEFTError:
        return None  # Names of an older version, or parts that are new: transformers knows what to do.
    return base if all(can_stream(parameter.dtype) for parameter in base.parameters()) else None


def _changes_weights_alone(model: ModelView) -> bool:
    """Whether each adapter changes weights of its own host, and what is trained whole is so under its name alone."""
    shared = model.shared
    if any(id(tensor) in shared for _, tensor, _ in trained_whole(model)) or any(True for _ in changed(model)):
        return False
    for _, host, slot in model.slots:
        adapter = slot.active_adapter
        if adapter is None or not can_merge(host, adapter):
            return False
        if adapter.adds_bias and host._parameters.get("bias") is None:
            return False
        tied = any(id(host.get_parameter(name)) in shared for name in weight_names(adapter))
        if tied and not adapter.follows_ties:
            return False
    return True


@dataclass
class _Stream:
    """The base's tensors as they are to be written."""

    hosts: Mapping[str, tuple[str, nn.Module, Adapter]]
    """By the name of each weight and bias that an adapter may change: its host's name, the host, the adapter."""
    whole: Mapping[str, Tensor]
    """What was trained whole, by name."""
    dtype: torch.dtype | None
    losses: dict[str, float] = field(default_factory=dict)
    """By the name of each host that is merged."""
    changed: dict[str, Tensor] = field(default_factory=dict)
    """What else has changed with a tensor that was asked for, until it is asked for itself."""

    def kinds(self, path: Path) -> dict[str, Kind]:
        """Return dtype and shape of every tensor, in the order of :meth:`tensors`."""
        with open_tensors(path) as file:
            # A bias comes with its weight, which it need not be merged with a second time.
            names = sorted(file.keys(), key=lambda name: name.endswith("bias"))
            found = {name: file.get_tensor(name) for name in names}  # mapped into memory, not read
            return {name: (self._written(tensor.dtype), tuple(tensor.shape)) for name, tensor in found.items()}

    def tensors(self, path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors of a file, with the adapters in them."""
        for name in names:
            # What was read of a file counts as memory for as long as any of it is open.
            with open_tensors(path) as file:
                tensor = file.get_tensor(name)
            yield name, self._merged(name, tensor.to(self._written(tensor.dtype)))

    def _written(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self.dtype is None or not dtype.is_floating_point else self.dtype

    def _merged(self, name: str, tensor: Tensor) -> Tensor:
        if name in self.whole:
            return self.whole[name].to(tensor.dtype)
        if name not in self.hosts or self.hosts[name][0] in self.losses:
            return self.changed.pop(name, tensor)
        host_name, host, adapter = self.hosts[name]
        lead = f"{host_name}." if host_name else ""
        if name == f"{lead}weight" and can_fold_rows(host, adapter):
            self.losses[host_name] = fold_rows(host, adapter, tensor, host_name)
            return tensor
        own = {key: p for key, p in host.named_parameters() if f"{lead}{key}" in self.hosts}
        values = {key: p.to(self._written(p.dtype)) for key, p in own.items() if f"{lead}{key}" != name}
        values[name.removeprefix(lead)] = tensor
        merged, self.losses[host_name] = merged_values(host, adapter, values, host_name)
        self.changed |= {f"{lead}{key}": value for key, value in merged.items() if value is not values[key]}
        return self.changed.pop(name, tensor)


def _stream(base: PreTrainedModel, source: Path, out: Path, dtype: torch.dtype | None) -> MergeReport:
    """Write the files of ``source`` to ``out`` with the adapters of ``base`` in them."""
    hosts = {
        f"{name}.{key}".lstrip("."): (name, host, adapter)
        for name, host, slot in ModelView(base).slots
        if (adapter := slot.active_adapter) is not None
        for key in {*weight_names(adapter), "bias"} & dict(host.named_parameters()).keys()
    }
    whole = {name: tensor.detach() for name, tensor, _ in trained_whole(ModelView(base))}
    stream, size = _Stream(hosts, whole, dtype), 0
    files = weight_files(source)
    require_space(out, sum(file.stat().st_size for file in files))
    for path in files:
        kinds = stream.kinds(path)
        stream_tensors(out / path.name, kinds, stream.tensors(path, kinds))
        size += sum(torch.Size(shape).numel() * kind.itemsize for kind, shape in kinds.values())
    config = read_json(source / "config.json")
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(out / "config.json", config)
    if (source / _INDEX).is_file():
        index = read_json(source / _INDEX)
        write_json(out / _INDEX, {**index, "metadata": {**index.get("metadata", {}), "total_size": size}})
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", out / "generation_config.json")
    return MergeReport.of(len({name for name, _, _ in hosts.values()}), stream.losses)

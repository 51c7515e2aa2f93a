"""The command ``lightning-peft export``: a copy of an adapter that another program reads as it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.cli.tools.inspect import base_name, model_class, refuse_place
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.files.contents import MARKER, read_tensors, write_json, write_tensors
from lightning_peft.files.leftovers import restore_interrupted
from lightning_peft.files.manifest import check_manifest, write_manifest
from lightning_peft.files.writing import atomic_directory
from lightning_peft.formats import own
from lightning_peft.formats.configuration import read_config, read_marker
from lightning_peft.formats.content import CONFIG_FILE, TENSOR_FILE
from lightning_peft.formats.foreign.adapterhub_names import TENSORS as ADAPTERHUB_FILE
from lightning_peft.formats.foreign.adapterhub_writing import files_for_adapterhub, refuse_other_types
from lightning_peft.formats.serving import serving_copy
from lightning_peft.formats.serving.experts import Layout, with_experts_divided
from lightning_peft.formats.serving.readers import Reader, rank_for, reader_named
from lightning_peft.storage.saving import FILES
from lightning_peft.tasks.pretrained import Dtype, meta_model


def export(
    adapter: str,
    out: str = "exported",
    reader: str | None = None,
    rank: int | None = None,
    dtype: Dtype | None = None,
    experts: Layout | None = None,
    model: str | None = None,
) -> None:
    """Copy an adapter for another program, so that it reads what was trained.

    For servers (vllm, sglang, llama.cpp, tensorrt-llm; all of them, if none is named) the copy is a plain LoRA: the
    scale is folded into B and lora_alpha is the rank, so that one that knows neither rsLoRA nor patterns serves what
    was trained. The base model is not needed, but for AdapterHub's package (adapterhub), which reads bottlenecks,
    Compacters and prefixes.

    Args:
        adapter: The adapter directory, of this package or of Hugging Face PEFT.
        out: The directory to write. One that this command wrote before is replaced.
        reader: Who is to read it, written --for: vllm, sglang, llama.cpp, tensorrt-llm, transformers, peft or
            adapterhub.
        rank: Pad with zeros to this rank, one that vLLM can serve: 8, 16, 32, 64, 128, 256, 320 or 512. The
            adapter's largest, or the next that the reader has room for, if not given.
        dtype: Of the tensors written. The adapter's own, if not given.
        experts: Write a LoRA of experts that stand in one parameter as one of a module per expert, which transformers
            4 had and servers know: with Mixtral's names (mixtral: block_sparse_moe, w1, w2, w3), or those of Qwen-MoE
            and most others (qwen: mlp, gate_proj, up_proj, down_proj).
        model: For adapterhub, the base model, of which the names of the layers are looked up: a directory, a name on
            the Hugging Face hub, or package:NAME. The one that the adapter names, if not given.

    Raises:
        PEFTError: There is no such reader, or none that reads the adapter; or the directory cannot be written.
    """
    found = None if reader is None else reader_named(reader)
    source, target = Path(adapter), Path(out)
    marker = _checked(source, target)
    config, tensors = read_config(source), read_tensors(source / TENSOR_FILE)
    if experts is not None:
        config, tensors = with_experts_divided(config, tensors, experts, adapter)
    names = (CONFIG_FILE, TENSOR_FILE)
    if found is not None and found.of_layers:
        refuse_other_types(config, adapter)
        model = model or base_name(source)
        base = ModelView(meta_model(model, model_class(source, model)))
        copied = files_for_adapterhub(config, tensors, base, adapter)
        what, names = f"adapters of {len(copied[1])} tensors", (CONFIG_FILE, ADAPTERHUB_FILE)
    elif found is not None and not found.lora_alone:
        _refuse_unread(found, reader or "", config, adapter)
        copied = config, tensors
        what = f"type {config['peft_type']}"
    else:
        copied = _plain(reader, config, tensors, adapter, rank, dtype)
        what = f"rank {copied[0]['r']}, the scale is in B. Targets: {', '.join(copied[0]['target_modules'])}"
    if dtype is not None:
        copied = copied[0], {name: tensor.to(getattr(torch, dtype)) for name, tensor in copied[1].items()}
    with atomic_directory(target) as directory:
        write_tensors(directory / names[1], copied[1])
        write_json(directory / names[0], copied[0])
        write_json(directory / MARKER, {**marker, "version": 1, "exported": adapter})
        write_manifest(directory, {"exported": adapter})
    print(f"Wrote {out}: {what}.{'' if found is None else ' ' + found.note.format(rank=copied[0].get('r'))}")


def _checked(source: Path, target: Path) -> dict[str, Any]:
    """Return the marker of the adapter in ``source``, after what can be said against copying it to ``target``."""
    restore_interrupted(source)
    check_manifest(source, FILES)
    refuse_place(source, target)
    if (target / MARKER).is_file() and "exported" not in read_marker(target):
        raise PEFTError(f"out={str(target)!r} is no earlier export, perhaps a checkpoint. Choose another directory.")
    marker = read_marker(source)
    if "parts" in marker:
        parts = ", ".join(str(source / str(part)) for part in marker["parts"])
        raise PEFTError(f"{source} holds adapters for several models: {parts}. Export each of them.")
    if beside := sorted(file.name for file in source.glob("*.safetensors") if file.name != TENSOR_FILE):
        raise PEFTError(f"{source} has modules trained whole in {beside[0]}, which a server for LoRA does not read.")
    return marker


def _refuse_unread(reader: Reader, name: str, config: Mapping[str, Any], adapter: str) -> None:
    kind = _kind(config)
    if kind == own.PEFT_TYPE:
        raise PEFTError(
            f"{adapter} is in lightning_peft's own format, for what HF PEFT does not have: {name} reads none of it. If "
            f"it changes weights alone, `lightning-peft convert {adapter} --out lora --energy 0.99` makes a LoRA of it."
        )
    if kind in reader.unread:
        raise PEFTError(f"{adapter} is of type {kind}, which {name} does not read. HF PEFT does: export it --for peft.")


def _kind(config: Mapping[str, Any]) -> Any:
    kinds = {"use_dora": "DoRA", "alora_invocation_tokens": "aLoRA"}
    return next((kind for key, kind in kinds.items() if config.get(key)), config.get("peft_type"))


def _plain(
    name: str | None,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    adapter: str,
    rank: int | None,
    dtype: Dtype | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return configuration and tensors of the copy for a server."""
    if (kind := _kind(config)) == "aLoRA":
        raise PEFTError(
            f"{adapter} is of type aLoRA (alora_invocation_tokens={config['alora_invocation_tokens']!r}): it changes "
            f"layers for some tokens alone; {name or 'servers'} read{'s' if name else ''} LoRA for all of them, and no "
            "merged weights do the same. HF PEFT reads it: export it --for peft."
        )
    if kind != "LORA":
        raise PEFTError(
            f"{adapter} is of type {kind}; {name or 'servers'} read{'s' if name else ''} plain LoRA alone. "
            f"If it changes weights, `lightning-peft convert {adapter} --out lora --energy 0.99` makes the nearest, "
            f"and `lightning-peft merge {adapter} --out merged` a whole model. What computes something of its own, as "
            "bottlenecks, prefixes and prompts do, runs in Python alone: load_adapter reads it."
        )
    if name is not None:
        rank = rank_for(name, config, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, adapter, rank)
    return serving_copy(config, tensors, adapter, rank=rank, dtype=None if dtype is None else getattr(torch, dtype))

"""Adapters in other tools' formats, known by sight: one table, with what to do to have them read here.

Signs and advice stand in these files, at the commits that were read: LitGPT 2685705 `litgpt/scripts/merge_lora.py`,
`convert_lit_checkpoint.py`, `tutorials/convert_lit_models.md`; mlx-lm d78bf58 `mlx_lm/fuse.py`, `mlx_lm/lora.py`;
adapters 88f18eb `src/adapters/utils.py`, `model_mixin.py`; NeMo a9a2b2e `nemo/collections/llm/peft/api.py`; torchtune
bd2a0fc `torchtune/training/checkpointing/_checkpointer.py`; diffusers 9733257 `src/diffusers/loaders/lora_pipeline.py`.
Of kohya's scripts and LLM-Adapters no source was read: kohya's names are what diffusers looks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_peft.errors import PEFTError
from lightning_peft.files.contents import read_json, read_shapes

_CONFIG = "adapter_config.json"
_READ = "`lightning-peft convert DIR --model BASE --out lora` reads it"
_AS_MODEL = "`lightning-peft convert MODEL --model BASE --out lora --energy 0.99` makes a LoRA of the difference"


@dataclass(frozen=True)
class _Tool:
    name: str
    sign: Callable[[Path, Mapping[str, Any]], bool]
    """Whether a directory, with this in its ``adapter_config.json``, or a file is one of the tool's."""
    advice: str


_TOOLS = (
    _Tool(
        "LitGPT",
        lambda path, config: (path / "lit_model.pth.lora").is_file() or path.name == "lit_model.pth.lora",
        f"{_READ}, if the model is laid out as Llama's. Else `litgpt merge_lora DIR` and `litgpt convert_from_litgpt "
        "DIR OUT` write OUT/model.pth; save what BASE_CLASS.from_pretrained(BASE, "
        f"state_dict=torch.load('OUT/model.pth')) loads with save_pretrained(MODEL), and {_AS_MODEL}.",
    ),
    _Tool(
        "LitGPT's adapters",
        lambda path, config: path.name.startswith("lit_model.pth.adapter") or any(path.glob("lit_model.pth.adapter*")),
        "LitGPT alone reads it: its convert_from_litgpt refuses it too.",
    ),
    _Tool(
        "MLX",
        lambda path, config: "lora_parameters" in config or "fine_tune_type" in config or path.name == "adapters.npz",
        f"{_READ}, if it is of linear layers. Else write a model with `mlx_lm.fuse --model BASE --adapter-path DIR "
        "--save-path MODEL`, of a quantised base with "
        f"--dequantize; {_AS_MODEL}.",
    ),
    _Tool(
        "AdapterHub's package adapters",
        lambda path, config: (
            str(config.get("version", "")).startswith("adapters.")
            or (path / "pytorch_adapter.bin").is_file()
            or (path / "adapter.safetensors").is_file()
        ),
        f"{_READ}, if it is a bottleneck or a Compacter. What a LoRA changes is in the weights after "
        "model.merge_adapter(NAME) there.",
    ),
    _Tool(
        "LLM-Adapters' copy of HF PEFT",
        lambda path, config: config.get("peft_type") == "BOTTLENECK",
        "The repository that wrote it reads it; HF PEFT does not. Train a SeriesAdapter or a ParallelAdapter here.",
    ),
    _Tool(
        "NeMo",
        lambda path, config: path.suffix == ".nemo" or ((path / "weights").is_dir() and (path / "context").is_dir()),
        "NeMo writes HF PEFT's format with `nemo.collections.llm.peft.export_lora(DIR, OUT)`, for models that it has "
        "an exporter for.",
    ),
    _Tool(
        "torchtune",
        lambda path, config: any(path.glob("adapter_*.pt")) or (path.name.startswith("adapter_") and _is(path, ".pt")),
        "torchtune writes HF PEFT's format beside it, as adapter_model.safetensors with adapter_config.json, if its "
        "checkpointer is FullModelHFCheckpointer and the model none of Phi, Llama 3.2 Vision and Llama 4: name that "
        "directory.",
    ),
    _Tool(
        "kohya's scripts",
        lambda path, config: _has_tensor(path, (".lora_down.weight", ".lora_up.weight")),
        "It is for a part of an image pipeline: `lightning-peft convert FILE --model PIPELINE/unet --out lora` reads "
        "it, or text_encoder for unet; and diffusers with pipeline.load_lora_weights(DIR, weight_name=FILE).",
    ),
    _Tool(
        "diffusers",
        lambda path, config: (
            (path / "pytorch_lora_weights.safetensors").is_file() or path.name == "pytorch_lora_weights.safetensors"
        ),
        "It is for a part of an image pipeline: `lightning-peft convert DIR --model PIPELINE/unet --out lora` reads "
        "it, or text_encoder for unet; and diffusers with pipeline.load_lora_weights(DIR).",
    ),
)


def refuse_other_tools(path: Path) -> None:
    """Raise :class:`PEFTError` if ``path``, a directory or a file, is an adapter in the format of another tool."""
    if (tool := _tool_of(path)) is not None:
        raise PEFTError(f"{path} is in the format of {tool.name}, which is not HF PEFT's. {tool.advice}")


def name_of_tool(path: Path) -> str | None:
    """Return the name of the other tool in whose format ``path`` is, if it is in one."""
    tool = _tool_of(path)
    return None if tool is None else tool.name


def _tool_of(path: Path) -> _Tool | None:
    config: Mapping[str, Any] = {}
    if (path / _CONFIG).is_file():
        config = read_json(path / _CONFIG)
        if isinstance(config.get("peft_type"), str) and config["peft_type"] != "BOTTLENECK":
            return None
    return next((tool for tool in _TOOLS if path.exists() and tool.sign(path, config)), None)


def _is(path: Path, suffix: str) -> bool:
    return path.suffix == suffix and path.is_file()


def _has_tensor(path: Path, endings: tuple[str, ...]) -> bool:
    """Whether a safetensors file, or the only one of a directory, has a tensor whose name ends so."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1 or not _is(files[0], ".safetensors"):
        return False
    return any(name.endswith(endings) for name in read_shapes(files[0]))

"""The command ``lightning-peft convert``: any change of weights, and other tools' adapters, as a LoRA."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers

from lightning_peft.cli.tools.inspect import base_name, model_class, refuse_place
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.files.contents import read_json
from lightning_peft.formats.content import CONFIG_FILE
from lightning_peft.formats.foreign.reading import OF_IMAGE_MODELS, class_named, tool_of, write_directory
from lightning_peft.operations.to_lora import difference_to_lora, to_lora
from lightning_peft.storage.loading import load_adapter
from lightning_peft.storage.saving import save_adapter
from lightning_peft.tasks.pretrained import load_model


def convert(
    source: str,
    model: str | None = None,
    out: str = "lora",
    rank: int | None = None,
    energy: float | None = None,
    alpha: float | None = None,
) -> None:
    """Turn an adapter of another method, or a fine-tuned model, into the LoRA that is nearest to it.

    Servers serve LoRA alone. Of the change of each weight its largest singular values are kept; how much of it is lost
    is printed. What other tools wrote is taken over as it is, without a rank: LoRA of mlx-lm, LitGPT, kohya's scripts
    and diffusers, bottlenecks, Compacters and prefixes of AdapterHub's package, and HF PEFT's in a Lightning checkpoint
    (.ckpt) of a module that called `get_peft_model` itself.

    Args:
        source: An adapter directory (DoRA, LoHa, LoKr, IA3, VeRA, OFT, …), one of another tool, a .ckpt with tensors of
            HF PEFT's, or the directory of a fine-tuned model.
        model: The base model: a directory, a name on the Hugging Face hub, or package:NAME. The one that the adapter
            names, if not given. Of an image pipeline the folder of the part to adapt, such as PIPELINE/unet.
        out: The directory to write.
        rank: The rank of the LoRA.
        energy: Or which part of the sum of squares of each change to keep, for example 0.99, whatever the rank.
        alpha: HF PEFT's lora_alpha, for a .ckpt, which does not say it.

    Raises:
        PEFTError: The change is none of weights alone, or the directory cannot be written.
    """
    refuse_place(Path(source), Path(out))
    tool = tool_of(Path(source))
    report: object
    if tool is not None:
        base = _with_adapter_of(tool, Path(source), model, alpha)
        asked = rank is not None or energy is not None
        report = to_lora(base, rank=rank, energy=energy) if asked else f"what stood in {source}, as it is."
    elif (Path(source) / CONFIG_FILE).is_file():
        model = model or base_name(Path(source))
        base = load_model(model, model_class(Path(source), model))
        load_adapter(base, source)
        report = to_lora(base, rank=rank, energy=energy)
    elif model is None:
        raise PEFTError(f"{source} is no adapter directory, but perhaps a model: name its base with --model.")
    else:
        kind = _class_of(Path(source))
        base = load_model(model, kind)
        report = difference_to_lora(base, load_model(source, kind), rank=rank, energy=energy)
    save_adapter(base, out)
    print(f"Wrote {out}: {report}")


def _with_adapter_of(tool: str, source: Path, model: str | None, alpha: float | None) -> Any:
    """Return the base with an adapter that another tool has written."""
    if model is None:
        raise PEFTError(f"{source} is in the format of {tool}, which names layers alone: name the base with --model.")
    base = _base_for(tool, source, model)
    with TemporaryDirectory() as directory:
        write_directory(tool, source, ModelView(base), Path(directory), alpha)
        load_adapter(base, directory)
    return base


def _base_for(tool: str, source: Path, model: str) -> Any:
    """Return the base of another tool's adapter."""
    if tool not in OF_IMAGE_MODELS:
        return load_model(model, _class_for(class_named(source)))
    config = read_json(Path(model) / "config.json")
    if "_class_name" not in config:
        return load_model(model, _class_of(Path(model)))
    try:
        import diffusers
    except ImportError as error:
        raise PEFTError(f"{model} is a model of diffusers: pip install diffusers, which is not installed.") from error
    kind: Any = getattr(diffusers, str(config["_class_name"]), None)
    if kind is None or not issubclass(kind, diffusers.ModelMixin):
        raise PEFTError(f"{model} is of class {config['_class_name']!r}, which diffusers does not have.")
    return kind.from_pretrained(model).eval()


def _class_for(name: str | None) -> Any:
    """Return the class of the base that an adapter was trained on, or of a head-less one if that is no class here."""
    if name is None:
        return transformers.AutoModelForCausalLM
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    return transformers.AutoModel


def _class_of(model: Path) -> type[transformers.PreTrainedModel]:
    """Return the transformers class of the model in a directory."""
    names = read_json(model / "config.json").get("architectures")
    found = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    raise PEFTError(f"{model / 'config.json'} names no class of transformers in architectures: {names!r}.")

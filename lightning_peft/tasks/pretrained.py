"""Where a pretrained model comes from: a directory, the Hugging Face hub, or an installed Python package.

Quantised GGUF files are dequantised once and kept as safetensors, because reading a GGUF file takes
half a minute for a small model and reading safetensors a second.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lightning_peft.errors import PEFTError

Dtype = Literal["float32", "bfloat16", "float16"]

PACKAGE_PREFIX = "package:"
EXPECTED = (
    "expected a directory with a model, the name of a model on the Hugging Face hub, or 'package:NAME' for "
    "model files inside the installed Python package NAME"
)


@dataclass(frozen=True)
class Source:
    """A place `from_pretrained` can read: a directory or hub name, and the GGUF file in it if there is one."""

    path: str
    gguf_file: str | None = None


def locate(model: str) -> Source:
    """Find out what a model string means, without loading anything.

    Args:
        model: A local directory (or one `.gguf` file), a name on the Hugging Face hub, or `package:NAME`.

    Raises:
        PEFTError: The string names a package or a path that does not exist or holds no model.
    """
    if model.startswith(PACKAGE_PREFIX):
        return _in_directory(_package_directory(model), model)
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Source(str(path.parent), path.name)
    if path.is_dir():
        return _in_directory(path, model)
    # A hub name is NAME or OWNER/NAME; anything else can only have been meant as a path.
    if not model or path.is_absolute() or model[0] in ".~" or model.count("/") > 1 or path.suffix == ".gguf":
        raise PEFTError(f"model={model!r}: there is no such directory; {EXPECTED}")
    return Source(model)


def _package_directory(model: str) -> Path:
    name = model.removeprefix(PACKAGE_PREFIX)
    # A dotted name would make find_spec import the parent package; model files need no code to run.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise PEFTError(
            f"model={model!r}: no package {name!r} is installed for import; expected the name of the package's "
            f"module (letters, digits, '_'): install it with pip, or give another model"
        )
    return Path(spec.submodule_search_locations[0])


def _in_directory(path: Path, model: str) -> Source:
    if (path / "config.json").is_file():
        return Source(str(path))
    files = sorted(file.name for file in path.glob("*.gguf"))
    if len(files) == 1:
        return Source(str(path), files[0])
    found = f"several GGUF files: {', '.join(files)}; give one of them by its path" if files else "neither"
    raise PEFTError(f"model={model!r}: expected config.json or one .gguf file in {path}, found {found}")


def default_cache_dir() -> Path:
    """The folder for dequantised models when none is given: `lightning_peft` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_peft"


def load_tokenizer(model: str, cache_dir: str | None = None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, padding on the left, with its end-of-text token as padding if it has none.

    Args:
        model: See `locate`.
        cache_dir: Where dequantised GGUF models are kept; `default_cache_dir()` if not given.
    """
    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, model, cache_dir)
    # Answers then end in the last column: generation needs that, and training needs the output head for the
    # last columns only.
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    model: str,
    auto_class: Any = AutoModelForCausalLM,
    *,
    cache_dir: str | None = None,
    dtype: Dtype = "float32",
    **config: Any,
) -> PreTrainedModel:
    """Load a pretrained model; code that comes with a model is never run.

    Args:
        model: See `locate`.
        auto_class: The transformers class that reads it, such as `AutoModelForSequenceClassification`.
        cache_dir: Where dequantised GGUF models are kept; `default_cache_dir()` if not given.
        dtype: Of the weights in memory.
        **config: Changes to the model's configuration, such as `num_labels`.
    """
    loaded: PreTrainedModel = _load(auto_class, model, cache_dir, dtype=getattr(torch, dtype), **config)
    return loaded


def meta_model(
    model: str,
    auto_class: Any = AutoModelForCausalLM,
    *,
    dtype: Dtype = "float32",
    **config: Any,
) -> PreTrainedModel:
    """Make a pretrained model without its weights, on the meta device, from its configuration alone.

    Args:
        model: See `locate`.
        auto_class: The transformers class of the model.
        dtype: Of the weights.
        **config: Changes to the model's configuration.
    """
    source = locate(model)
    where = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    try:
        settings = AutoConfig.from_pretrained(source.path, trust_remote_code=False, **where, **config)
        with torch.device("meta"):
            # A model's own class is called; those that choose one are asked.
            make = getattr(auto_class, "from_config", auto_class)
            made: PreTrainedModel = make(settings).to(getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise PEFTError(f"model={model!r} does not load as {auto_class.__name__}: {error}; {EXPECTED}") from error
    return made


def _load(auto_class: Any, model: str, cache_dir: str | None, **kwargs: Any) -> Any:
    source = locate(model)
    path = source.path
    if source.gguf_file is not None:
        path = str(_dequantised(source, Path(cache_dir) if cache_dir else default_cache_dir()))
    try:
        return auto_class.from_pretrained(path, trust_remote_code=False, **kwargs)
    except (OSError, ValueError) as error:
        raise PEFTError(f"model={model!r} does not load as {auto_class.__name__}: {error}; {EXPECTED}") from error


def _dequantised(source: Source, cache_dir: Path) -> Path:
    """The directory with the safetensors copy of a GGUF file, written first if it is not there."""
    assert source.gguf_file is not None
    file = Path(source.path, source.gguf_file)
    stat = file.stat()
    # A newer transformers may dequantise differently, and a file replaced in place is another model.
    identity = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{transformers.__version__}"
    target = cache_dir / f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if target.is_dir():
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=cache_dir, prefix=f".{target.name}-"))
    except OSError as error:
        raise PEFTError(
            f"cannot write the dequantised model to {cache_dir}: {error}; give another cache_dir"
        ) from error
    try:
        _write_dequantised(source, temporary)
        os.replace(temporary, target)
    except OSError:
        # Another process may have put its copy there first; it is as good as ours.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write_dequantised(source: Source, directory: Path) -> None:
    kwargs = {"gguf_file": source.gguf_file, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, **kwargs)
        model: Any = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32, **kwargs)
    except ImportError as error:
        raise PEFTError(f"reading {source.gguf_file} needs the package gguf: pip install gguf ({error})") from error
    # The weights are plain floats now, but save_pretrained refuses models that still carry these two marks.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)

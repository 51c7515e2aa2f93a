"""Quantised GGUF files are dequantised once and kept as safetensors.

Reading a GGUF file takes half a minute for a small model, and reading safetensors a second.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_peft.errors import PEFTError
from lightning_peft.tasks.pretrained.source import Source


def default_cache_dir() -> Path:
    """The folder for dequantised models when none is given: `lightning_peft` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_peft"


def dequantised(source: Source, cache_dir: Path) -> Path:
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

"""Pretrained models and their tokenizers; code that comes with them is never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lightning_peft.errors import PEFTError
from lightning_peft.tasks.pretrained.gguf import default_cache_dir, dequantised
from lightning_peft.tasks.pretrained.source import EXPECTED, Source, locate

Dtype = Literal["float32", "bfloat16", "float16"]


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
    if (commit := _commit(locate(model))) is not None:
        # Where transformers kept it until release 5; its files do not have it.
        loaded.config._commit_hash = commit
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
    try:
        settings = _settings(model, **config)
        with torch.device("meta"):
            # A model's own class is called; those that choose one are asked.
            make = getattr(auto_class, "from_config", auto_class)
            made: PreTrainedModel = make(settings).to(getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise PEFTError(f"model={model!r} does not load as {auto_class.__name__}: {error}; {EXPECTED}") from error
    return made


def own_class(model: str) -> Any:
    """Return the transformers class that the configuration of a pretrained model names, if it names one.

    Raises:
        PEFTError: There is no such model.
    """
    try:
        settings = _settings(model)
    except (OSError, ValueError) as error:
        raise PEFTError(f"model={model!r} has no configuration that can be read: {error}; {EXPECTED}") from error
    found = getattr(transformers, str((settings.architectures or [None])[0]), None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _settings(model: str, **config: Any) -> Any:
    source = locate(model)
    where = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    return AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=False, **where, **config)


def _load(auto_class: Any, model: str, cache_dir: str | None, **kwargs: Any) -> Any:
    source = locate(model)
    path = source.path
    if source.gguf_file is not None:
        path = str(dequantised(source, Path(cache_dir) if cache_dir else default_cache_dir()))
    try:
        return auto_class.from_pretrained(path, revision=source.revision, trust_remote_code=False, **kwargs)
    except (OSError, ValueError) as error:
        raise PEFTError(f"model={model!r} does not load as {auto_class.__name__}: {error}; {EXPECTED}") from error


def _commit(source: Source) -> str | None:
    """Return the commit of a model that was loaded from the hub, as the cache of its files names it."""
    if Path(source.path).is_dir():
        return None
    found = try_to_load_from_cache(source.path, "config.json", revision=source.revision)
    return Path(found).parent.name if isinstance(found, str) else None

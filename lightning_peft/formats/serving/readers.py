"""Programs that read adapters in HF PEFT's format, and what each reads of it: one table, with where that stands.

Sources were read in stored copies, by commit: none of them is said to be a program's newest state.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_peft.errors import PEFTError
from lightning_peft.formats.counterparts.lora import read_low_rank
from lightning_peft.formats.serving.plain import RANKS


@dataclass(frozen=True)
class Reader:
    """What a program reads."""

    source: str
    """The files that say so, each with the commit of the copy that was read. What is only expected is said to be."""
    lora_alone: bool = True
    """Whether it reads LoRA alone and scales it by ``lora_alpha / r`` or less: it is given a serving copy."""
    ranks: tuple[int, ...] | None = None
    """The ranks that it has room for, if not all."""
    embeddings: bool = True
    """Whether it reads LoRA of embeddings."""
    head: bool = True
    """Whether it reads LoRA of a language model's head."""
    together: tuple[str, ...] = ()
    """Last names of modules that it reads together or not at all."""
    unread: tuple[str, ...] = ()
    """What of HF PEFT's types it does not read, or not rightly, if it reads more than LoRA."""
    of_layers: bool = False
    """Whether it reads bottleneck and Compacter adapters alone, in a format of its own."""
    note: str = ""
    """What to do there."""


READERS = {
    "vllm": Reader(
        source="vLLM: vllm/lora/peft_helper.py at e745baf (modules_to_save, DoRA and a rank above max_lora_rank are "
        "refused, patterns not read); vllm/config/lora.py at 01230b4 (the ranks); vllm/lora/utils.py at 001e63a (names "
        "of layers and embeddings, the latter in models that declare them)",
        ranks=RANKS,
        note="Start vLLM with --enable-lora --max-lora-rank {rank}.",
    ),
    "sglang": Reader(
        source="SGLang: python/sglang/srt/lora/lora_config.py at 0ceb81f (r, lora_alpha, target_modules, use_dora; "
        "patterns for admission alone); python/sglang/srt/lora/lora.py at 002c60a (lora_alpha / r whatever use_rslora "
        "says, k_proj with q_proj and v_proj), and in a later copy without a commit, q_proj with v_proj. Expected, not "
        "read: that LoRA of embeddings is for models of its own choice",
        embeddings=False,
        together=("q_proj", "v_proj"),
        note="Start SGLang with --enable-lora --max-lora-rank {rank}.",
    ),
    "llama.cpp": Reader(
        source="llama.cpp: convert_lora_to_gguf.py at 0b03ada (lora_alpha, and the rank from the tensors; a head that "
        "is tied is an error there)",
        note="Convert it with convert_lora_to_gguf.py --base BASE DIR; an adapted head must not be tied to the "
        "embedding.",
    ),
    "tensorrt-llm": Reader(
        source="TensorRT-LLM: tensorrt_llm/lora_manager.py at 007e181 (r, lora_alpha, use_rslora, the rank of each "
        "module from its tensors, no patterns; what it has of embed_tokens and lm_head is passed over in silence)",
        embeddings=False,
        head=False,
        note="Name the directory in lora_dir, and {rank} as max_lora_rank.",
    ),
    "transformers": Reader(
        source="transformers 5.24, transformers/integrations/peft.py, run by the tests: it calls HF PEFT; it looks for "
        "DoRA's norms under another name than files have, and draws them anew; it looks at no text, so that nothing "
        "activates aLoRA",
        lora_alone=False,
        unread=("DoRA", "aLoRA", "VERA", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"),
        note="Load it with model.load_adapter(PATH).",
    ),
    "peft": Reader(
        source="HF PEFT 0.21.2, run by the tests",
        lora_alone=False,
        note="Load it with PeftModel.from_pretrained(base, PATH).",
    ),
    "adapterhub": Reader(
        source="AdapterHub's package adapters 1.3.0, run to write what the tests compare with: "
        "adapters/configuration/adapter_config.py, adapters/loading.py",
        lora_alone=False,
        of_layers=True,
        note="Load it there with model.load_adapter(PATH, set_active=True, use_safetensors=True).",
    ),
}


_HEADS = ("lm_head", "embed_out")
"""What transformers calls the heads of language models."""


def reader_named(name: str) -> Reader:
    """Return the reader ``name``.

    Raises:
        PEFTError: There is none; the message lists those that there are.
    """
    if name not in READERS:
        near = difflib.get_close_matches(name, READERS, n=1)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        raise PEFTError(f"There is no reader {name!r}.{guess} Readers are {', '.join(READERS)}.")
    return READERS[name]


def rank_for(
    name: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: str, rank: int | None
) -> int | None:
    """Return the rank of a copy of a LoRA for the reader ``name``: ``rank``, or the next that it has room for.

    Raises:
        PEFTError: It does not read the LoRA, which is not for layers alone, lacks some of them, or is too large.
    """
    reader, (pairs, _) = READERS[name], read_low_rank(config, shapes, source)
    whole = f"Write a whole model with `lightning-peft merge {source}` and serve that."
    embeddings = [host for host, pair in pairs.items() if pair.a.endswith("lora_embedding_A")]
    if embeddings and not reader.embeddings:
        raise PEFTError(f"{source} adapts the embedding {embeddings[0]!r}, of which {name} reads nothing. {whole}")
    if not reader.head and (heads := [host for host in pairs if host.rpartition(".")[2] in _HEADS]):
        raise PEFTError(f"{source} adapts the head {heads[0]!r}, which {name} passes over in silence. {whole}")
    for host in pairs:
        around, _, leaf = host.rpartition(".")
        if leaf in reader.together and (lacks := [n for n in reader.together if f"{around}.{n}" not in pairs]):
            raise PEFTError(
                f"{source} adapts {host!r} without {lacks[0]!r} beside it; {name} reads them together. Train both, "
                f"or: {whole}"
            )
    largest = max(pair.r for pair in pairs.values())
    if reader.ranks is None or rank is not None:
        return rank
    if largest > reader.ranks[-1]:
        raise PEFTError(
            f"{source} has rank {largest}; {name} has room for {reader.ranks[-1]}. `lightning-peft convert {source} "
            f"--out lora --rank {reader.ranks[-1]}` takes what is nearest."
        )
    return next(step for step in reader.ranks if step >= largest)

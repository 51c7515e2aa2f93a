"""What does an adapter cost when a model is used: merged, and unmerged while it writes token by token?"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import peft
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks import measure, subjects, variants
from benchmarks.report import Options, Table, answer
from lightning_peft import LoRA, inject, merge


@torch.inference_mode()
def decode(model: nn.Module, prompt: Tensor, tokens: int) -> Tensor:
    """Write greedily, with a cache, one token at a time."""
    cache, ids, written = DynamicCache(config=model.config), prompt, []
    for _ in range(tokens):
        ids = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        written.append(ids)
    return torch.cat(written, 1)


def models(layers: int, device: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return the base, and ours and HF peft's with an adapter, merged and not, by name."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(subjects.smollm2_config(layers)).eval().to(device, dtype)
    mine, theirs, merged = (copy.deepcopy(base) for _ in range(3))
    inject(mine, LoRA(r=8))
    # Without the wrapper around the model, which would be in the way of what is measured: the layers.
    config = peft.LoraConfig(r=8, target_modules=list(subjects.LLAMA_TARGETS))
    theirs = variants.in_float32(peft.inject_adapter_in_model(config, theirs)).eval()
    inject(merged, LoRA(r=8))
    merge(merged, unload=True)
    return {"base": base, variants.OURS: mine, variants.PEFT: theirs, "lightning_peft, merged": merged}


def main(options: Options) -> list[Table]:
    """Time greedy decoding with a cache, batch 1."""
    layers, tokens = (2, 4) if options.quick else (8, 32 if options.device == "cpu" else 16)
    prompt = torch.arange(16, device=options.device)[None]
    found = models(layers, options.device, options.dtype)

    def case(model: nn.Module) -> Mapping[str, float]:
        return {"decode": measure.seconds(lambda: decode(model, prompt, tokens), options.device)}

    rounds = measure.in_turns({name: lambda m=model: case(m) for name, model in found.items()}, options.rounds)
    table = Table(
        "inference", f"Greedy decoding, batch 1, {layers} layers of SmolLM2", ["model", "/ base", "/ HF peft"]
    )
    for name in found:
        against = [measure.ratios(rounds, name, other, "decode") for other in ("base", variants.PEFT)]
        table.rows.append([name, *against])
    same = [type(m) for m in found["lightning_peft, merged"].modules()] == [type(m) for m in found["base"].modules()]
    table.notes.append(f"After the merge every module has {'its original' if same else 'ANOTHER'} class.")
    return [table]


if __name__ == "__main__":
    answer(main)

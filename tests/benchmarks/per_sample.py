"""How fast is a batch of which each row has its own adapter, beside one adapter for all rows?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import peft
import torch
from torch import nn
from transformers import LlamaForCausalLM

import lightning_peft
from benchmarks import measure, subjects, variants
from benchmarks.report import Options, Table, answer

ROWS = 8


def main(options: Options) -> list[Table]:
    """Time forward passes of a batch with eight adapters."""
    columns = ["variant", "throughput / one adapter", "time / HF peft"]
    table = Table("per_sample", f"A batch of {ROWS} rows with {ROWS} adapters", columns)
    layers, tokens = (2, 16) if options.quick else (8, 64)
    names = [f"a{number}" for number in range(ROWS)]
    torch.manual_seed(0)
    base = LlamaForCausalLM(subjects.smollm2_config(layers)).eval().to(options.device, options.dtype)
    ids = torch.randint(0, 1000, (ROWS, tokens), device=options.device)
    mine, theirs = copy.deepcopy(base), copy.deepcopy(base)
    config = peft.LoraConfig(r=8, target_modules=list(subjects.LLAMA_TARGETS))
    theirs = peft.get_peft_model(theirs, config, adapter_name=names[0]).eval()
    for name in names:
        lightning_peft.inject(mine, lightning_peft.LoRA(r=8), name=name)
        if name != names[0]:
            theirs.add_adapter(name, config)
    runs: dict[str, Callable[[], object]] = {
        "one, lightning_peft": lambda: mine(input_ids=ids),
        "one, HF peft": lambda: theirs(input_ids=ids),
        variants.PEFT: lambda: theirs(input_ids=ids, adapter_names=names),
    }
    if hasattr(lightning_peft, "adapter_names"):
        runs[variants.OURS] = lambda: _with_names(mine, ids, names)
    else:
        table.notes.append("lightning_peft is skipped: it has no adapter_names.")

    def timed(run: Callable[[], object]) -> Callable[[], Mapping[str, float]]:
        return lambda: {"forward": measure.seconds(torch.inference_mode()(run), options.device)}

    rounds = measure.in_turns({name: timed(run) for name, run in runs.items()}, 2 * options.rounds)
    for name in runs.keys() & {variants.OURS, variants.PEFT}:
        one = measure.ratios(rounds, f"one, {name}", name, "forward")
        table.rows.append([name, one, measure.ratios(rounds, name, variants.PEFT, "forward")])
    return [table]


def _with_names(model: nn.Module, ids: torch.Tensor, names: list[str]) -> object:
    with lightning_peft.adapter_names(model, names):
        return model(input_ids=ids)


if __name__ == "__main__":
    answer(main)

"""How fast is a batch of which each row has its own adapter, beside one adapter for all rows?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import peft
import torch
from transformers import LlamaForCausalLM

import lightning_peft
from benchmarks import measure, subjects, variants
from benchmarks.report import Options, Table, answer

ROWS = 8
ENTERED = "lightning_peft, entered for each batch"


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

    def forward(run: Callable[[], object]) -> Mapping[str, float]:
        with torch.inference_mode():
            return {"forward": measure.seconds(run, options.device)}

    def within() -> Mapping[str, float]:
        with lightning_peft.adapter_names(mine, names):
            # The first batch stacks the matrices of the adapters.
            forward(lambda: mine(input_ids=ids))
            return forward(lambda: mine(input_ids=ids))

    def entered() -> object:
        with lightning_peft.adapter_names(mine, names):
            return mine(input_ids=ids)

    cases = {
        "one, lightning_peft": lambda: forward(lambda: mine(input_ids=ids)),
        "one, HF peft": lambda: forward(lambda: theirs(input_ids=ids)),
        variants.PEFT: lambda: forward(lambda: theirs(input_ids=ids, adapter_names=names)),
        variants.OURS: within,
        ENTERED: lambda: forward(entered),
    }
    rounds = measure.in_turns(cases, 2 * options.rounds)
    for name in (variants.OURS, ENTERED, variants.PEFT):
        one = f"one, {variants.PEFT if name == variants.PEFT else variants.OURS}"
        throughput = measure.ratios(rounds, one, name, "forward")
        table.rows.append([name, throughput, measure.ratios(rounds, name, variants.PEFT, "forward")])
    return [table]


if __name__ == "__main__":
    answer(main)

"""How many operators does an adapter launch beside its layer? Deterministic; the proxy for GPU kernel launches.

Counted on the meta device, which takes a GPU's way, for an input that is large there. On CPUs dB is computed in another
layout, and copied (float32).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks import measure, subjects, variants
from benchmarks.kept_bytes import targets_of
from benchmarks.report import Options, Table, answer


def per_layer(
    name: str, subject: nn.Module, hidden: Tensor, count: int, dropout: float = 0.0, device: str = "meta"
) -> tuple[float, float]:
    """Return how many operators a variant launches beyond the frozen model's, for each of ``count`` adapted layers."""
    hidden = hidden.detach().to(device).requires_grad_()
    bound, variant = (variants.present(which)[0].build(subject, dropout).to(device) for which in (variants.BOUND, name))
    base, adapted = measure.operators(bound, hidden), measure.operators(variant, hidden)
    forward, backward = ((len(with_) - len(without)) / count for with_, without in zip(adapted, base, strict=True))
    return forward, backward


def cases() -> dict[str, tuple[nn.Module, Tensor, int, float]]:
    """Return subject, input, number of adapted layers and dropout, by name."""
    stack, wide = subjects.Stack(), torch.zeros(8, TOKENS, 64, requires_grad=True)
    narrow = subjects.Stack().to(torch.bfloat16)
    shape = subjects.Shape(subjects.LlamaConfig(**SMALL), 8, TOKENS)
    block = shape.build()
    return {
        "a layer with its own input": (stack, wide, 4, 0.0),
        "with dropout 0.05": (stack, wide, 4, 0.05),
        "float32 adapters, bfloat16 base": (narrow, wide.detach().to(torch.bfloat16).requires_grad_(), 4, 0.0),
        "average in a Llama block": (block, shape.inputs(), len(targets_of(block)), 0.0),
        "the same with dropout 0.05": (block, shape.inputs(), len(targets_of(block)), 0.05),
    }


# On the meta device they cost nothing; of a batch this large on a GPU, kernels take longer than launching them.
TOKENS = 2**14

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}


def main(options: Options) -> list[Table]:
    """Count operators launched."""
    columns = ["case", "variant", "forward", "backward", "together"]
    table = Table("launches", "Operators launched per LoRA layer beyond the layer's own (views left out)", columns)
    for name, (subject, hidden, count, dropout) in cases().items():
        for variant in variants.present():
            if variant.name in (variants.BOUND, variants.FULL):
                continue
            # These peers do not compute in two dtypes.
            if hidden.dtype == torch.bfloat16 and variant.name not in (variants.OURS, variants.PEFT):
                continue
            forward, backward = per_layer(variant.name, subject, hidden, count, dropout)
            table.rows.append([name, variant.name, forward, backward, forward + backward])
    table.notes.append("Counted as on a GPU. On a CPU ours copies dB into another layout besides: one more in float32.")
    table.notes += variants.notes(options.device)
    return [table]


if __name__ == "__main__":
    answer(main)

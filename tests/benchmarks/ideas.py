"""What is left to gain around the adapters: AdamW over many small tensors, and the loss over a large vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaModel

from benchmarks import measure, subjects
from benchmarks.report import MB, Options, Table, answer
from lightning_peft import LoRA, inject
from lightning_peft.tasks.answers.mean_loss import mean_loss

LOOP, FLAT = "foreach=False", "one flat tensor, fused=True"


def optimizers(options: Options) -> Table:
    """Time an AdamW step over LoRA on all linear layers of SmolLM2's 30."""
    sizes = _adapter_sizes()
    kinds: dict[str, tuple[list[torch.Size], dict[str, bool]]] = {
        LOOP: (sizes, {"foreach": False}),
        "foreach=True": (sizes, {"foreach": True}),
        "fused=True": (sizes, {"fused": True}),
        FLAT: ([torch.Size([sum(size.numel() for size in sizes)])], {"fused": True}),
    }
    cases = {name: _stepping(shapes, arguments, options.device) for name, (shapes, arguments) in kinds.items()}
    rounds = measure.in_turns(cases, 4 * options.rounds, warmup=2)
    table = Table("optimizers", f"AdamW over {len(sizes)} adapter tensors", ["AdamW", f"/ {LOOP}"])
    table.rows = [[name, measure.ratios(rounds, name, LOOP, "step")] for name in cases]
    return table


def losses(options: Options) -> Table:
    """Time the output head and the loss of SmolLM2, and what they need at their peak."""
    config = subjects.smollm2_config(1)
    tokens = 64 if options.quick else 512
    on = {"device": options.device, "dtype": options.dtype}
    weight = torch.randn(config.vocab_size, config.hidden_size, **on)
    hidden = torch.randn(tokens, config.hidden_size, requires_grad=True, **on)
    targets = torch.randint(config.vocab_size, (tokens,), device=options.device)

    def chunked() -> Tensor:
        return functional.linear_cross_entropy(hidden, weight, targets, options=nn.LinearCrossEntropyOptions())

    kinds: dict[str, Callable[[], Tensor]] = {
        "all logits": lambda: functional.cross_entropy(functional.linear(hidden, weight), targets),
        "in the logits' memory, as ready tasks": lambda: mean_loss(functional.linear(hidden, weight), targets),
    }
    known = hasattr(functional, "linear_cross_entropy")
    kinds |= {"in chunks, by torch": chunked} if known else {}
    cases = {name: _backwards(loss, hidden, options.device) for name, loss in kinds.items()}
    rounds = measure.in_turns(cases, options.rounds)
    title = f"Head and loss over {config.vocab_size:,} words, {tokens} tokens"
    table = Table("losses", title, ["loss", "time / all logits", "MB at the peak"])
    for name, case in cases.items():
        table.rows.append(
            [name, measure.ratios(rounds, name, "all logits", "step"), measure.peak_bytes(case, options.device) / MB]
        )
    table.notes += [] if known else ["The loss in chunks is skipped: this torch has no `linear_cross_entropy`."]
    return table


def main(options: Options) -> list[Table]:
    """Measure AdamW and the loss."""
    return [optimizers(options), losses(options)]


def _adapter_sizes() -> list[torch.Size]:
    with torch.device("meta"):
        model = LlamaModel(subjects.smollm2_config())
    inject(model, LoRA(r=8))
    return [parameter.shape for parameter in model.parameters() if parameter.requires_grad]


def _stepping(shapes: list[torch.Size], arguments: Mapping[str, bool], device: str) -> measure.Timed:
    parameters = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer: Any = torch.optim.AdamW(parameters, lr=1e-4, **arguments)
    return lambda: {"step": measure.seconds(optimizer.step, device)}


def _backwards(loss: Callable[[], Tensor], hidden: Tensor, device: str) -> measure.Timed:
    def run() -> None:
        loss().backward()
        hidden.grad = None

    return lambda: {"step": measure.seconds(run, device)}


if __name__ == "__main__":
    answer(main)

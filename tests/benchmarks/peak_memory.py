"""How much memory does a training step need, beside full fine-tuning with AdamW? Deterministic on a CPU."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks import measure, subjects, variants
from benchmarks.report import MB, Options, Table, answer


def step_memory(model: nn.Module, hidden: Tensor, device: str = "cpu") -> dict[str, int]:
    """Return bytes of weights and optimizer state, and of what a step adds to them: activations and gradients."""
    optimizer = measure.adamw(model)
    measure.training_step(model, hidden, optimizer)
    added = measure.peak_bytes(lambda: measure.training_step(model, hidden, optimizer), device)
    state = [t for s in (optimizer.state.values() if optimizer else ()) for t in s.values() if isinstance(t, Tensor)]
    return {
        "weights": _bytes([*model.parameters(), *model.buffers()]),
        "state": _bytes(state),
        "added": added,
    }


def without_activations(weights: int, trained: int) -> float:
    """Return LoRA / full fine-tuning where activations are nothing: weights alone against weights, gradients, moments.

    Of what is trained there are four copies: weight, gradient and AdamW's two moments.
    """
    return (weights + 3 * trained) / (4 * (weights - trained))


def main(options: Options) -> list[Table]:
    """Measure the peak memory of a training step."""
    parts_named = ["weights", "optimizer state", "activations and gradients", "peak"]
    columns = ["model", "variant", *parts_named, "/ full", "/ full by formula"]
    table = Table("peak_memory", "Peak memory of a training step in MB", columns)
    for name, shape in _shapes(options).items():
        subject, hidden = shape.build(options.device, options.dtype), shape.inputs(options.device, options.dtype)
        full = None
        for variant in sorted(variants.present(), key=lambda v: v.name != variants.FULL):
            model = variant.build(subject)
            parts = step_memory(model, hidden, options.device)
            peak = sum(parts.values())
            full = full or peak
            megabytes = [part / MB for part in (*parts.values(), peak)]
            trained = _bytes([p for p in model.parameters() if p.requires_grad])
            lora = variant.name not in (variants.FULL, variants.BOUND)
            formula = without_activations(parts["weights"], trained) if lora else "-"
            table.rows.append([name, variant.name, *megabytes, peak / full, formula])
            del model
    table.notes.append("By formula: without activations and without temporaries of the optimizer.")
    table.notes += variants.notes(options.device)
    return [table]


def _shapes(options: Options) -> dict[str, subjects.Shape]:
    if options.device != "cpu":
        llama = subjects.llama_config("7B", 2)
        return {f"Llama-7B, 2 layers, {tokens:,} tokens": subjects.Shape(llama, 1, tokens) for tokens in (4096, 128)}
    if options.quick:
        return subjects.shapes(quick=True)
    smollm2, llama = subjects.smollm2_config(8), subjects.llama_config("7B", 1)
    return {
        "SmolLM2-135M, 8 layers, 512 tokens": subjects.Shape(smollm2, 4, 128),
        "Llama-7B, 1 layer, 512 tokens": subjects.Shape(llama, 1, 512),
        "Llama-7B, 1 layer, 128 tokens": subjects.Shape(llama, 1, 128),
    }


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in {t.untyped_storage().data_ptr(): t for t in tensors}.values())


if __name__ == "__main__":
    answer(main)

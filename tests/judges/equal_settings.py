"""Runs of equal settings here and in HF PEFT, over several seeds: means and standard deviations of what is learned.

    PYTHONPATH=tests:tests/shared python -m judges.equal_settings --model runs/papers/base \\
        --data runs/papers/data/entailment

trains each method on the same examples in the same order with the same rates, by `PEFTStrategy` in a Lightning Trainer
and by HF PEFT in a plain loop. Each draws its own initial values, so that what differs is what a user would see. The
metric is the loss on the validation file, in nats per token of the answers.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import peft
import torch
import transformers
from torch import Tensor, nn

from lightning_peft import IA3, DoRA, LoRA, PEFTMethod, PEFTStrategy, PrefixTuning, PromptTuning

TARGETS = ["q_proj", "v_proj"]
CAUSAL = "CAUSAL_LM"
METHODS: dict[str, tuple[PEFTMethod, Any, float]] = {
    "LoRA": (
        LoRA(r=8, alpha=16, target_modules=TARGETS),
        peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type=CAUSAL),
        5e-3,
    ),
    "DoRA": (
        DoRA(r=8, alpha=16, target_modules=TARGETS),
        peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, use_dora=True, task_type=CAUSAL),
        5e-3,
    ),
    "IA3": (IA3(), peft.IA3Config(task_type=CAUSAL), 3e-2),
    "prefix": (
        PrefixTuning(num_virtual_tokens=10),
        peft.PrefixTuningConfig(num_virtual_tokens=10, task_type=CAUSAL),
        3e-2,
    ),
    "prompt": (
        PromptTuning(num_virtual_tokens=10, init="random"),
        peft.PromptTuningConfig(num_virtual_tokens=10, task_type=CAUSAL),
        3e-2,
    ),
}
Batch = dict[str, Tensor]


def read(path: Path, tokenizer: Any, size: int) -> list[Batch]:
    """Batches of prompts with their answers, which alone are learned, padded on the left."""
    rows = []
    for record in map(json.loads, path.read_text().splitlines()):
        prompt = tokenizer(record["prompt"])["input_ids"]
        answer = tokenizer(f" {record['answer']}{tokenizer.eos_token}")["input_ids"]
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    return [_padded(rows[start : start + size]) for start in range(0, len(rows), size)]


def _padded(rows: list[tuple[list[int], list[int]]]) -> Batch:
    width = max(len(ids) for ids, _ in rows)
    pads = [width - len(ids) for ids, _ in rows]
    return {
        "input_ids": torch.tensor([[0] * pad + ids for pad, (ids, _) in zip(pads, rows, strict=True)]),
        "attention_mask": torch.tensor([[0] * pad + [1] * len(ids) for pad, (ids, _) in zip(pads, rows, strict=True)]),
        "labels": torch.tensor([[-100] * pad + labels for pad, (_, labels) in zip(pads, rows, strict=True)]),
    }


def order(train: list[Batch], steps: int, seed: int) -> Iterator[Batch]:
    draw = torch.Generator().manual_seed(seed)
    yield from (train[int(i)] for i in torch.randperm(len(train), generator=draw)[:steps])


class Module(L.LightningModule):
    def __init__(self, model: nn.Module, rate: float) -> None:
        super().__init__()
        self.model, self.rate = model, rate

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.rate)


def ours(base: Any, method: PEFTMethod, rate: float, batches: list[Batch], seed: int) -> nn.Module:
    L.seed_everything(seed, verbose=False)
    module = Module(base, rate)
    L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        strategy=PEFTStrategy(method, merge_on_train_end=False),
    ).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return module.model


def theirs(base: Any, config: Any, rate: float, batches: list[Batch], seed: int) -> nn.Module:
    L.seed_everything(seed, verbose=False)
    model: Any = peft.get_peft_model(base, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    for batch in batches:
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def validation_loss(model: Any, batches: list[Batch]) -> float:
    model.eval()
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    losses = [float(model(**batch).loss) * count for batch, count in zip(batches, counts, strict=True)]
    return sum(losses) / sum(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare what is learned here and in HF PEFT at equal settings.")
    parser.add_argument("--model", required=True, help="a causal language model")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and val.jsonl")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    train, val = (read(args.data / f"{name}.jsonl", tokenizer, 16) for name in ("train", "val"))
    print("| method | lightning_peft | HF PEFT | within one standard deviation |\n| --- | --- | --- | --- |")
    for name in args.methods:
        method, config, rate = METHODS[name]
        found: dict[str, list[float]] = {"ours": [], "theirs": []}
        for seed in range(args.seeds):
            batches = list(order(train, args.steps, seed))
            for who, run, what in (("ours", ours, method), ("theirs", theirs, config)):
                base = transformers.AutoModelForCausalLM.from_pretrained(args.model)
                found[who].append(validation_loss(run(base, what, rate, batches, seed), val))  # type: ignore[operator]
        means = [statistics.mean(values) for values in found.values()]
        spread = [statistics.stdev(values) for values in found.values()]
        shown = " | ".join(f"{mean:.4f} ± {sd:.4f}" for mean, sd in zip(means, spread, strict=True))
        print(f"| {name} | {shown} | {'yes' if abs(means[0] - means[1]) <= max(spread) else 'no'} |", flush=True)


if __name__ == "__main__":
    main()

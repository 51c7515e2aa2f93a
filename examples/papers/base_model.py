"""A small base model for the papers' experiments: a Llama of one million parameters, trained from nothing on text.

    python examples/papers/base_model.py --out runs/papers/base

The text is that of `base_text.py`: the model knows the words of the tasks and what they have to do with one another,
and none of the tasks in their form; an adapter has something to adapt.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from base_text import texts
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1024


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the text's own words; numbers are read digit by digit."""
    raw = Tokenizer(models.BPE())
    raw.decoder = decoders.ByteLevel()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    source = texts(seed)
    sample = [next(source) for _ in range(5000)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        sample, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")


def make_model(vocabulary: int) -> LlamaForCausalLM:
    """Return the model before training: 4 layers, 128 wide."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, size: int, length: int) -> Iterator[torch.Tensor]:
    """Texts one behind the other, parted by the end-of-text token, (size, length)."""
    ids: list[int] = []
    for text in texts(seed + 1):
        ids += [*tokenizer(text)["input_ids"], 0]
        while len(ids) >= size * length:
            yield torch.tensor(ids[: size * length]).view(size, length)
            ids = ids[size * length :]


def train(model: nn.Module, data: Iterator[torch.Tensor], steps: int, lr: float) -> None:
    """Train with AdamW; the rate falls along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=max(0.05, 2 / steps))
    started = time.perf_counter()
    for step in range(1, steps + 1):
        ids = next(data)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            print(f"step {step} of {steps}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    """Make and train the model, as the command line says."""
    parser = argparse.ArgumentParser(description="Train a small base model for the papers' experiments.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--steps", type=int, default=400, help="of 32 rows of 128 tokens (default: 400)")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (default: 0.003)")
    parser.add_argument("--seed", type=int, default=0, help="of text and initial values (default: 0)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(args.seed)
    model = make_model(len(tokenizer))
    train(model, batches(tokenizer, args.seed, 32, 128), args.steps, args.lr)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()

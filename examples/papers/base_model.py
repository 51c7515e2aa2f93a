"""A small base model for the papers' experiments: a Llama of one million parameters, trained from nothing on text.

    python examples/papers/base_model.py --out runs/papers/base

The text is made up from a seed, of the same words as the tasks in `make_data.py` but in other forms: tables are told in
sentences, queries are written in lower case below a comment, rules come with what follows from them, sums stand alone,
dialogues have no summary. So the model knows the words and what they have to do with one another, and none of the tasks
in their form; an adapter has something to adapt.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from arithmetic import THINGS
from dialogues import make_dialogue
from entailment import ACTS, CITIES, JOBS, NAMES
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from text_to_sql import TABLES, make_rows

VOCABULARY = 1024
# ---------------------------------------------------------------------------------------------------- the text


def told(rng: random.Random) -> str:
    """A row of a table in sentences."""
    table = rng.choice(TABLES)
    row = dict(zip(table.columns, rng.choice(make_rows(table, rng)), strict=True))
    facts = [f"{column} is {value}" for column, value in row.items() if column != table.label]
    rng.shuffle(facts)
    return f"{table.name}({', '.join(table.columns)}). {row[table.label]} is a {table.one}: {' and '.join(facts)}."


def queried(rng: random.Random) -> str:
    """A query below a comment."""
    table = rng.choice(TABLES)
    row = dict(zip(table.columns, rng.choice(make_rows(table, rng)), strict=True))
    column = rng.choice([c for c in table.columns if c != table.label])
    value = row[column]
    if column in table.numbers:
        word, sign = rng.choice((("over", ">"), ("under", "<")))
        meant, where = f"{column} {word} {value}", f"{column} {sign} {value}"
    else:
        meant, where = f"{column} {value}", f"{column} = '{value}'"
    number = rng.choice(tuple(table.numbers))
    what, query = rng.choice(
        (
            ("count them", "count(*)"),
            (f"their {table.label}", table.label),
            (f"mean {number}", f"avg({number})"),
            (f"greatest {number}", f"max({number})"),
            (f"least {number}", f"min({number})"),
        )
    )
    order = rng.choice(("", "", f" order by {number}", f" order by {number} desc"))
    limit = f" limit {rng.randint(1, 5)}" if order else ""
    return f"-- {table.name} with {meant}, {what}{order}{limit}\nselect {query} from {table.name} where {where}{order}{limit};"


def concluded(rng: random.Random) -> str:
    """A rule, somebody to whom it applies or not, and what follows."""
    name, job, city, act = rng.choice(NAMES), rng.choice(JOBS), rng.choice(CITIES), rng.choice(ACTS)
    their_job, their_city = (
        rng.choice(values) if rng.random() < 0.3 else v for values, v in ((JOBS, job), (CITIES, city))
    )
    quantifier = rng.choice(("Every", "No", "Some"))
    met = (their_job, their_city) == (job, city) and quantifier != "Some"
    follows = (f"{name} {act[0]}" if quantifier == "Every" else f"{name} does not {act[1]}") if met else "who knows"
    return f"{quantifier} {job} in {city} {act[0]}. {name} is a {their_job} in {their_city}, so {follows}."


def summed(rng: random.Random) -> str:
    """A few sums."""
    sums = []
    for _ in range(4):
        a, b = rng.randint(1, 30), rng.randint(1, 15)
        sums.append(rng.choice((f"{a} + {b} = {a + b}.", f"{a + b} - {b} = {a}.", f"{a} {rng.choice(THINGS)}.")))
    return " ".join(sums)


def spoken(rng: random.Random) -> str:
    """A dialogue, and where one of them went."""
    made = make_dialogue(rng)
    words = made["summary"].split()
    return f"{made['dialogue']}\nSo {words[2]} went to the {words[6]} on {words[8]}."


KINDS = (told, queried, concluded, summed, spoken)


def texts(seed: int) -> Iterator[str]:
    """Text without end."""
    rng = random.Random(f"base/{seed}")
    while True:
        yield rng.choice(KINDS)(rng)


# --------------------------------------------------------------------------------------------------- the model


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
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
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
    parser.add_argument("--steps", type=int, default=300, help="of 32 rows of 128 tokens (default: 300)")
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

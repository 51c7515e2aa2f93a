"""Fine-tune SmolLM2-135M-Instruct by LoRA to answer questions about small tables in SQL, and judge it by running it.

    python examples/quickstart.py                      # the real job: about two minutes on two CPU cores
    python examples/quickstart.py --without-template   # the same, with questions as they are: see examples/README.md
    python examples/quickstart.py --fast               # a tiny random model, as a check of the installation

What is trained, and how, stands in `examples/configs/quickstart.yaml`. Here stand the questions before and after.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from text_to_sql import ReadOnlyDatabase, Score, execution_accuracy, write_data
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_peft import merge, save_adapter
from lightning_peft.cli import PEFTCLI

CONFIG = Path(__file__).parent / "configs" / "quickstart.yaml"
OUT = Path(".quickstart")
SHOWN = 4


class Quickstart(PEFTCLI):
    """`lightning-peft fit`, with the same questions put to the model before and after."""

    def __init__(
        self, args: list[str], questions: list[dict[str, str]], seconds: dict[str, float], template: bool
    ) -> None:
        self.questions = questions
        self.seconds = seconds
        self.template = template
        self.answers: dict[str, list[str]] = {}
        self.started = time.perf_counter()
        super().__init__(args)

    def before_fit(self) -> None:
        """Ask the untrained model."""
        self._lap("load the model")
        self._ask("before")

    def after_fit(self) -> None:
        """Ask the trained one: its adapters are merged by now."""
        self._lap("train")
        self._ask("after")

    def _ask(self, when: str) -> None:
        print(f"\nasking {len(self.questions)} questions {when} training ...", flush=True)
        prompts = [question["prompt"] for question in self.questions]
        # As InstructionData writes them for training; the tiny model has no template.
        if self.template and self.model.tokenizer.chat_template:
            prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        self.answers[when] = self.model.generate(prompts)
        self._lap(f"ask {when} training")

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.started = now - self.started, now


@contextmanager
def timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Note how long the block took."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def make_tiny_model(path: Path, texts: list[str]) -> None:
    """Write a two-layer random model whose tokenizer knows the texts: it stands in where only the path is checked."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def size(path: Path) -> int:
    """Bytes of all files below a path."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def report(cli: Quickstart, seconds: dict[str, float], data: Path) -> None:
    """Print the scores, some answers, the sizes and the times."""
    gold = [question["answer"] for question in cli.questions]
    with closing(ReadOnlyDatabase(data / "tables.sqlite")) as database:
        scores: dict[str, Score] = {
            when: execution_accuracy(database, gold, answers) for when, answers in cli.answers.items()
        }
    for i in range(min(SHOWN, len(gold))):
        print(f"\n{cli.questions[i]['prompt']}")
        for when, answers in cli.answers.items():
            print(f"  {when:<6}  {answers[i]}")
        print(f"  right   {gold[i]}")

    print(f"\n{'of ' + str(len(gold)) + ' questions':<24}{'before':>9}{'after':>9}")
    for name in ("execution", "exact", "valid"):
        label = {"execution": "right result", "exact": "the very same query", "valid": "query that runs"}[name]
        print(f"{label:<24}" + "".join(f"{getattr(score, name):>9.2f}" for score in scores.values()))

    # AdamW keeps two numbers for every trained one; a full checkpoint would hold three times the model.
    model = sum(p.numel() * p.element_size() for p in cli.model.model.parameters())
    last = Path(cli.trainer.checkpoint_callback.last_model_path)
    adapter, checkpoint = size(OUT / "adapter"), size(last)
    print(f"\n{'bytes':<24}{'adapter':>15}{'whole model':>15}")
    print(f"{'to use it':<24}{adapter:>15,}{model:>15,}   {model / adapter:.0f} times")
    print(f"{'to go on training':<24}{checkpoint:>15,}{3 * model:>15,}   {3 * model / checkpoint:.0f} times")

    print(f"\n{'seconds':<24}")
    for name, value in seconds.items():
        print(f"{name:<24}{value:>9.1f}")
    print(f"{'all':<24}{sum(seconds.values()):>9.1f}")


def print_how_to_load(base: str) -> None:
    """Print the lines that load what was written."""
    read_base = f'AutoModelForCausalLM.from_pretrained("{base}")'
    print(
        f"\nThe adapter is in {OUT / 'adapter'}, the merged model in {OUT / 'merged'}. To load them (after\n"
        "`from transformers import AutoModelForCausalLM`):\n"
        f'  model = {read_base}; lightning_peft.load_adapter(model, "{OUT / "adapter"}")\n'
        f'  model = peft.PeftModel.from_pretrained({read_base}, "{OUT / "adapter"}")\n'
        f'  model = AutoModelForCausalLM.from_pretrained("{OUT / "merged"}")'
    )


def main() -> None:
    """Make the data, train, judge and write."""
    parser = argparse.ArgumentParser(description="Fine-tune a small language model to write SQL.")
    parser.add_argument("--fast", action="store_true", help="a tiny random model and a few steps: checks the path only")
    parser.add_argument(
        "--without-template", action="store_true", help="put questions as they are, without the model's chat template"
    )
    given = parser.parse_args()
    fast, template = given.fast, not given.without_template
    # Deprecations within Lightning, and that there are no validation data: nothing that a reader could mend.
    warnings.filterwarnings(
        "ignore", message=".*LeafSpec|Total length of `list` across ranks is zero", module="lightning"
    )
    seconds: dict[str, float] = {}
    data = OUT / "data"
    with timed("make questions", seconds):
        write_data(data, test=8 if fast else 64)
    questions = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]

    args = ["fit", "--config", str(CONFIG)]
    if fast:
        tiny = OUT / "tiny"
        make_tiny_model(tiny, [question["prompt"] + question["answer"] for question in questions])
        args += [f"--model.init_args.model={tiny}", "--trainer.max_steps=3", "--model.init_args.max_new_tokens=8"]
    if not template:
        args += ["--data.init_args.chat_template=false"]
    cli = Quickstart(args, questions, seconds, template)
    with timed("write", seconds):
        save_adapter(cli.model, OUT / "adapter")
        merge(cli.model, unload=True)
        cli.model.model.save_pretrained(OUT / "merged")
        cli.model.tokenizer.save_pretrained(OUT / "merged")
    report(cli, seconds, data)
    print_how_to_load(cli.model.model.config._name_or_path)


if __name__ == "__main__":
    sys.exit(main())

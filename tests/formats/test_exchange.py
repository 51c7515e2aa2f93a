"""The exchange of files with HF PEFT, configuration by configuration: what comes over is equal, or is refused in words.

``PYTHONPATH=tests:tests/shared:tests/formats python tests/formats/test_exchange.py`` prints the counts.
"""

import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from exchange import CASES, PROMPTS, adapted
from families import build, outputs, strongly

from lightning_peft import PEFTError, load_adapter, save_adapter

# What HF PEFT has and this package has not, by what the refusal says.
REASONS = (
    "is an adapter of type",  # BOFT, HRA
    "shares a parameter with",  # a tied head or embedding that is trained whole: which of the two is meant?
    "works on decoder-only transformers models",  # prompts and prefixes before an encoder
)
FAST = [
    ("llama", "plain"), ("gpt2", "bias all"), ("bert", "lora_bias"), ("gemma3", "tokens"), ("t5", "bias lora_only"),
    ("qwen2", "pissa"), ("vit", "whole head"), ("whisper", "expression"), ("mixtral", "all-linear"), ("llama", "oft"),
    ("gpt2", "whole head"), ("t5", "prompt"), ("llama", "adalora"), ("bert", "ia3"), ("llama", "prompt"),
]  # fmt: skip


def exchanged(family: str, name: str, directory: Path) -> str:
    """Return what became of a configuration: ``equal``, ``refused: …``, ``wrong: …``, or ``HF PEFT cannot: …``."""
    model, inputs = build(family)
    try:
        judge = adapted(model, family, name).eval()
        strongly(judge)
        judge.save_pretrained(directory / "theirs")
        # What counts is what HF PEFT makes of the file.
        judge = peft.PeftModel.from_pretrained(build(family)[0], directory / "theirs").eval()
        expected = outputs(judge, inputs)
    except Exception as error:  # whatever it raises, it is no judge here
        return f"HF PEFT cannot: {type(error).__name__}"
    loaded = build(family)[0]
    try:
        load_adapter(loaded, directory / "theirs")
    except PEFTError as error:
        return f"refused: {error}"
    found = outputs(loaded, inputs)
    if name in PROMPTS:  # the logits of virtual tokens are HF PEFT's alone
        expected = expected[..., -found.shape[-2] :, :]
    effect = (expected - outputs(build(family)[0], inputs)).abs().max()
    if (difference := (found - expected).abs().max()) > 2e-5 + 1e-4 * effect:
        return f"wrong: {difference:.2g}"
    save_adapter(loaded, directory / "ours")
    again = outputs(peft.PeftModel.from_pretrained(build(family)[0], directory / "ours").eval(), inputs)
    again = again[..., -found.shape[-2] :, :] if name in PROMPTS else again
    if (difference := (again - expected).abs().max()) > 2e-5 + 1e-4 * effect:
        return f"wrong on the way back: {difference:.2g}"
    return "equal" if effect > 1e-3 else f"without effect: {effect:.2g}"


def acceptable(result: str) -> bool:
    return result.startswith(("equal", "HF PEFT cannot", "without effect")) or (
        result.startswith("refused") and any(reason in result for reason in REASONS)
    )


@pytest.mark.parametrize(("family", "name"), FAST)
def test_exchange(family: str, name: str, tmp_path: Path) -> None:
    assert acceptable(result := exchanged(family, name, tmp_path)), result


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case not in FAST])
def test_every_exchange(family: str, name: str, tmp_path: Path) -> None:
    assert acceptable(result := exchanged(family, name, tmp_path)), result


def test_the_fast_ones_say_something() -> None:
    """Most of them are equal, with an effect that is no rounding."""
    results = Counter()
    for family, name in FAST[:4]:
        with tempfile.TemporaryDirectory() as directory:
            results[exchanged(family, name, Path(directory))] += 1
    assert results == {"equal": 4}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for of_family, of_name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            outcome = exchanged(of_family, of_name, Path(folder)).replace(folder, "DIR")
        counts[outcome.partition(":")[0]] += 1
        if outcome != "equal":
            print(of_family, of_name, outcome[:200], flush=True)
    print(dict(counts), file=sys.stdout)

"""How long do injecting, loading, saving, merging and switching take, beside HF peft?"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks import measure, subjects
from benchmarks.report import Options, Table, answer
from lightning_peft import LoRA, inject, load_adapter, merge, save_adapter, set_adapter

Prepared = tuple[Callable[[], object], Callable[[], object]]
"""What is timed, ours and HF peft's, each on an object of its own."""

OURS, PEFT = LoRA(r=8), {"r": 8, "target_modules": "all-linear"}


def on_meta(size: str) -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(subjects.llama_config(size))


def injecting(size: str) -> Prepared:
    mine, theirs = on_meta(size), on_meta(size)
    return lambda: inject(mine, OURS), lambda: peft.get_peft_model(theirs, peft.LoraConfig(**PEFT))


class Files:
    """A base model and an adapter of it in HF peft's format, which both read."""

    def __init__(self, folder: Path, layers: int) -> None:
        torch.manual_seed(0)
        self.base = LlamaForCausalLM(subjects.smollm2_config(layers))
        self.folder, self.adapter = folder, folder / "adapter"
        self.mine().save_pretrained(self.adapter)

    def mine(self) -> Any:
        model = peft.get_peft_model(copy.deepcopy(self.base), peft.LoraConfig(**PEFT))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.01)
        return model

    def loading(self) -> Prepared:
        mine, theirs = copy.deepcopy(self.base), copy.deepcopy(self.base)
        return lambda: load_adapter(mine, self.adapter), lambda: peft.PeftModel.from_pretrained(theirs, self.adapter)

    def loaded(self) -> tuple[nn.Module, Any]:
        mine, theirs = copy.deepcopy(self.base), copy.deepcopy(self.base)
        load_adapter(mine, self.adapter)
        return mine, peft.PeftModel.from_pretrained(theirs, self.adapter)

    def saving(self) -> Prepared:
        mine, theirs = self.loaded()
        here = self.folder
        return lambda: save_adapter(mine, here / "mine"), lambda: theirs.save_pretrained(here / "theirs")

    def merging(self) -> Prepared:
        mine, theirs = self.loaded()
        return lambda: merge(mine), theirs.merge_adapter

    def merging_for_good(self) -> Prepared:
        mine, theirs = self.loaded()
        return lambda: merge(mine, unload=True), theirs.merge_and_unload


def switching(width: int, adapters: int = 32, layers: int = 12) -> Prepared:
    """Among resident adapters of a stack of linear layers ``width`` wide."""
    base = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    mine, theirs = base, copy.deepcopy(base)
    config = peft.LoraConfig(r=2, target_modules=[str(layer) for layer in range(layers)])
    theirs = peft.get_peft_model(theirs, config, adapter_name="a0")
    for number in range(adapters):
        inject(mine, LoRA(r=2), name=f"a{number}")
        if number:
            theirs.add_adapter(f"a{number}", config)
    turns = iter(range(10**6))

    def switch(to: Callable[[str], object]) -> None:
        for _ in range(4):
            to(f"a{next(turns) % adapters}")

    return lambda: switch(lambda name: set_adapter(mine, name)), lambda: switch(theirs.set_adapter)


def compare(prepare: Callable[[], Prepared], rounds: int) -> tuple[float, measure.Spread]:
    """Return our median seconds and the ratio to HF peft's, each round on new objects."""
    taken, against = [], []
    for turn in range(rounds + 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mine, theirs = (measure.seconds(run) for run in prepare())
        if turn:
            taken.append(mine)
            against.append(mine / theirs)
    return measure.Spread.of(taken).median, measure.Spread.of(against)


def merge_memory(width: int, layers: int, dtype: torch.dtype, keep: bool) -> tuple[float, float]:
    """Return the extra bytes at the peak of a merge, ours and HF peft's, in deltas (``[width, width]``) of float32."""
    base = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)]).to(dtype)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=8, target_modules=[str(layer) for layer in range(layers)])
    )
    inject(base, OURS)
    runs = (lambda: merge(base, unload=not keep)), (theirs.merge_adapter if keep else theirs.merge_and_unload)
    mine, other = (measure.peak_bytes(run) / (4 * width * width) for run in runs)
    return mine, other


def main(options: Options) -> list[Table]:
    """Time what is done once or now and then."""
    size, layers = ("7B", 2) if options.quick else ("70B", 30)
    times = Table("lifecycle", "Once or now and then: seconds, and medians of ratios", ["what", "s", "/ HF peft"])
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder), layers)
        for what, prepare in {
            f"inject all linear layers of Llama-{size} (meta)": lambda: injecting(size),
            f"load an adapter, SmolLM2 of {layers} layers": files.loading,
            "save it": files.saving,
            "merge it, ready to be undone": files.merging,
            "merge it for good": files.merging_for_good,
            "4 switches among 32 adapters, width 64": lambda: switching(64),
            "4 switches among 32 adapters, width 1024": lambda: switching(1024),
        }.items():
            taken, against = compare(prepare, options.rounds)
            times.rows.append([what, taken, against])
    times.notes += [
        "HF peft's merge keeps nothing and subtracts to undo; ours keeps a copy and is undone bit for bit.",
        "Ours waits until a saved adapter is on the disk (fsync); HF peft's may be lost in a power cut.",
    ]
    columns = ["base", "layers", "merge", "lightning_peft", "HF peft"]
    memory = Table("merge_memory", "Extra memory at the peak of a merge, in float32 deltas of one layer", columns)
    for dtype in (torch.float32, torch.bfloat16):
        for depth in (2, 8):
            for keep in (False, True):
                mine, theirs = merge_memory(512 if options.quick else 2048, depth, dtype, keep)
                name = str(dtype).removeprefix("torch.")
                memory.rows.append([name, depth, "to be undone" if keep else "for good", mine, theirs])
    return [times, memory]


if __name__ == "__main__":
    answer(main)

"""What does `torch.compile` make of a training step, and after how many steps has it paid?

Each variant is compiled as a whole, and block by block, beside the same one as it is; the compiled frozen bound is what
no adapter can be faster than. Compiling takes long: a process compiles each variant once.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from benchmarks import measure, subjects, variants
from benchmarks.report import Options, Table, answer
from benchmarks.step_time import Case

_FIRST = 3
EAGER, WHOLE, BLOCKS, GRAPHS = "as it is", "whole", "block by block", "whole, reduce-overhead"


def whole(model: nn.Module) -> nn.Module:
    """Compile a model as one program."""
    model.compile(fullgraph=True, dynamic=False)
    return model


def by_block(model: nn.Module) -> nn.Module:
    """Compile each block of a transformers model; blocks that are alike share a program."""
    for block in blocks_of(model):
        block.compile(fullgraph=True, dynamic=False)
    return model


def with_graphs(model: nn.Module) -> nn.Module:
    """Compile a model as one program whose kernels are launched by a CUDA graph."""
    model.compile(fullgraph=True, dynamic=False, mode="reduce-overhead")
    return model


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {EAGER: lambda m: m, WHOLE: whole, BLOCKS: by_block}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model: what its longest list of modules holds."""
    return [*max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)]


def first_steps(case: Case) -> float:
    """Return the seconds of the first steps: what compiling takes is in there, and recording graphs in the second."""
    start = time.perf_counter()
    for _ in range(_FIRST):
        case()
    return time.perf_counter() - start


def break_even(compiling: float, eager: float, compiled: float) -> float:
    """Return after how many steps the time spent on compiling has been spared."""
    return compiling / (eager - compiled) if compiled < eager else math.inf


def main(options: Options) -> list[Table]:
    """Time steps as they are and compiled."""
    columns = [
        "model",
        "variant",
        "compiled",
        "step / bound, likewise",
        "step / as it is",
        "compiling, s",
        "pays after",
    ]
    table = Table("compiled", "Compiled training steps: medians (and quartiles) of ratios within a round", columns)
    # Blocks of all variants are of one class, and so programs of one function.
    torch._dynamo.config.recompile_limit = 64
    # What another run has compiled would take no time.
    torch._inductor.config.force_disable_caches = True
    ways = WAYS if options.device == "cpu" else {**WAYS, GRAPHS: with_graphs}
    for name, shape in _shapes(options).items():
        subject, hidden = shape.build(options.device, options.dtype), shape.inputs(options.device, options.dtype)
        cases, compiling = {}, {}
        wanted = (variants.BOUND, variants.OURS, variants.PEFT) if options.quick else ()
        for variant in variants.present(*wanted):
            for way, compile_ in ways.items():
                case = Case(compile_(_built(variant, subject)), hidden, options.device)
                try:
                    compiling[variant.name, way] = first_steps(case)
                except torch._dynamo.exc.TorchDynamoException as error:
                    table.rows.append([name, variant.name, way, f"fails: {type(error).__name__}", "-", "-", "-"])
                else:
                    cases[variant.name, way] = case
        table.rows += _rows(name, cases, compiling, options)
        del cases, subject
        torch.compiler.reset()
    table.notes += variants.notes(options.device)
    return [table]


def _rows(
    name: str, cases: Mapping[tuple[str, str], Case], compiling: Mapping[tuple[str, str], float], options: Options
) -> list[list[object]]:
    rounds = measure.in_turns(cases, options.rounds)
    rows: list[list[object]] = []
    for variant, way in cases:
        beside = [
            measure.ratios(rounds, (variant, way), of, "step") for of in ((variants.BOUND, way), (variant, EAGER))
        ]
        step, eager = (statistics.median(turn[variant, w]["step"] for turn in rounds) for w in (way, EAGER))
        spent = compiling[variant, way] - _FIRST * step
        pays = break_even(spent, eager, step)
        cost = ["-", "-"] if way == EAGER else [spent, "never" if math.isinf(pays) else math.ceil(pays)]
        rows.append([name, variant, way, *beside, *cost])
    return rows


def _built(variant: variants.Variant, subject: subjects.Subject) -> nn.Module:
    """Return a variant whose modules are its own: compiling marks them."""
    return variant.build(copy.deepcopy(subject) if variant.own_weights else subject)


def _shapes(options: Options) -> dict[str, subjects.Shape]:
    """Return the models: narrow ones, where compiling can help, and a cut of a wide one."""
    every = subjects.shapes(options.quick, options.device)
    if options.quick:
        return dict([next(iter(every.items()))])
    narrow = {"SmolLM2-135M, 4 layers, 4 x 128 tokens": subjects.Shape(subjects.smollm2_config(4), 4, 128)}
    kept = {name: shape for name, shape in every.items() if "70B" not in name and "8 layers" not in name}
    return {name: shape for name, shape in {**narrow, **kept}.items() if options.model in name}


if __name__ == "__main__":
    answer(main)

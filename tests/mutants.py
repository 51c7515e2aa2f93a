"""How many small changes of the package the tests notice: ``make mutants MUTANTS=300 SEED=0``.

mutmut says what can be changed; a sample of it is made, one after another, in a copy of the project. Against each run
the tests that reach the changed line, quickest first, in a process that is forked from one in which torch, Lightning
and transformers are imported already. Tests that start processes of their own are left out: what they alone reach is
counted apart.
"""

import argparse
import ast
import contextlib
import difflib
import gc
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import libcst
import pytest
from coverage import CoverageData
from coverage.parser import PythonParser
from mutmut.mutation import file_mutation
from mutmut.mutation.mutators import mutation_operators, operator_string

ROOMS = ("core", "files", "operations", "storage", "strategy", "targets", "tensors")
TESTS = (*ROOMS, "adapters", "callbacks", "formats", "structure")
# These start processes, which takes long.
LEFT_OUT = ("deepspeed", "distributed", "leaving_distributed", "matrix", "multinode", "several_processes")
LEFT_OUT += ("signals", "steps", "tensor_parallel", "training_features")
# What is imported once, before processes are forked.
WARM = ("deepspeed", "hypothesis", "jsonargparse", "lightning", "peft", "torch", "torchmetrics", "transformers")

STORE = Path(".mutants").resolve()
TREE, DATA, SECONDS = STORE / "tree", STORE / "coverage", STORE / "seconds.json"
QUICK = 20.0
"""Seconds: tests that take longer are left out."""
BUDGET = 30.0
"""Seconds that the tests of one mutant took when they were recorded, together."""


@dataclass(frozen=True)
class Mutant:
    path: str
    line: int
    code: str
    shown: str


def dropped(node: libcst.SimpleStatementLine) -> Iterator[libcst.CSTNode]:
    """Leave out a statement that is a call: what it says or does is then not said or done."""
    if isinstance(node.body[0], libcst.Expr) and isinstance(node.body[0].value, libcst.Call):
        yield node.with_changes(body=[libcst.Pass()])


# The words of errors are looked at by parts in the tests; what else is written as text is a name that a lookup needs.
mutation_operators[:] = [
    *((kind, operator) for kind, operator in mutation_operators if operator is not operator_string),
    (libcst.SimpleStatementLine, dropped),
]


def mutants_of(path: str) -> list[Callable[[], Mutant]]:
    """Return what makes each mutant of a file."""
    code = (TREE / path).read_text()
    module, mutations, _, _ = file_mutation.create_mutations(path, code)

    def make(mutation: file_mutation.Mutation) -> Mutant:
        changed = module.deep_replace(mutation.original_node, mutation.mutated_node).code
        difference = list(difflib.unified_diff(code.splitlines(), changed.splitlines(), n=0, lineterm=""))[2:]
        line = int(difference[0].split()[1].lstrip("-").split(",")[0])
        return Mutant(path, line, changed, "\n".join(difference[1:]))

    return [partial(make, mutation) for mutation in mutations]


def forked(target: Callable[[], int], limit: float) -> int:
    """Return what ``target`` does in a process of its own; of one that takes longer than ``limit`` seconds, -1."""

    def run() -> None:
        os.setsid()
        os.chdir(TREE)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        os._exit(target())

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(limit)
    code = process.exitcode
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    return -1 if code is None else code


class Recorder:
    """Notes how long each test took, and which passed."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.bad: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.bad.add(report.nodeid)


def record() -> int:
    recorder = Recorder()
    rooms = [f"tests/{room}" for room in TESTS]
    left_out = [f"--ignore=tests/strategy/test_{name}.py" for name in LEFT_OUT]
    measured = ["--cov=lightning_peft", "--cov-context=test", "--cov-report="]
    pytest.main(
        [*rooms, *left_out, *measured, "-q", "-p", "no:cacheprovider"],
        plugins=[recorder],
    )
    shutil.move(".coverage", DATA)
    tests = {test: seconds for test, seconds in recorder.seconds.items() if test not in recorder.bad}
    warm = sorted(name for name in sys.modules if name.partition(".")[0] in WARM)
    SECONDS.write_text(json.dumps({"tests": tests, "warm": warm}))
    return 0


@cache
def reached(path: str) -> dict[int, set[str]]:
    """Return the tests that reach each statement of a file, by its first line; under 0, those that reach any."""
    data = CoverageData(str(DATA))
    data.read()
    first_line = parsed(path).first_line
    found: defaultdict[int, set[str]] = defaultdict(set)
    for line, contexts in data.contexts_by_lineno(str(TREE / path)).items():
        # Processes that tests start, and what is imported before the first one, have no test's name.
        found[first_line(line)].update(context.rpartition("|")[0] for context in contexts if context)
    return {**found, 0: set().union(*found.values())}


@cache
def parsed(path: str) -> PythonParser:
    parser = PythonParser(text=(TREE / path).read_text())
    parser.parse_source()
    return parser


@cache
def in_functions(path: str) -> set[int]:
    """Return the lines of a file that do not run on import."""
    functions = [n for n in ast.walk(ast.parse((TREE / path).read_text())) if isinstance(n, ast.FunctionDef)]
    return {line for node in functions for line in range(node.body[0].lineno, (node.end_lineno or 0) + 1)}


def tests_for(mutant: Mutant, seconds: dict[str, float]) -> list[str]:
    """Return the tests to run against a mutant; those of a line that runs on import are all that reach the file."""
    line = parsed(mutant.path).first_line(mutant.line) if mutant.line in in_functions(mutant.path) else 0
    tests = reached(mutant.path).get(line, set())
    chosen, left = [], BUDGET
    for test in spread(sorted(tests & seconds.keys(), key=seconds.__getitem__)):
        if seconds[test] <= min(QUICK, left):
            chosen.append(test)
            left -= seconds[test]
    return chosen


def spread(tests: Sequence[str]) -> list[str]:
    """Return ``tests`` with the first of each file before the second ones: they look at different things."""
    before: Counter[str] = Counter()
    places = []
    for test in tests:
        file = test.partition("::")[0]
        places.append(before[file])
        before[file] += 1
    return [test for _, test in sorted(zip(places, tests, strict=True), key=lambda pair: pair[0])]


def survives(mutant: Mutant, tests: list[str]) -> bool:
    file = TREE / mutant.path
    original = file.read_text()
    file.write_text(mutant.code)
    try:
        options = ["-x", "-q", "-W", "ignore", "-p", "no:cacheprovider", "--timeout=60"]
        return forked(lambda: int(pytest.main([*options, *tests])), limit=60 + 4 * BUDGET) == 0
    finally:
        file.write_text(original)


def copy_project() -> None:
    shutil.rmtree(TREE, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-z"], check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        (TREE / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, TREE / name, follow_symlinks=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", type=int, help="how many mutants to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the paths of files to change")
    parser.add_argument("--again", action="store_true", help="use what an earlier run recorded about the tests")
    options = parser.parse_args()

    copy_project()
    sys.path[:0] = [str(TREE)]
    os.environ.update(PYTHONPATH=str(TREE), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    if not (options.again and SECONDS.exists()):
        print("which tests reach which lines is recorded; this takes minutes", flush=True)
        forked(record, limit=3600)
    recorded = json.loads(SECONDS.read_text())
    for name in recorded["warm"]:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a process that is forked would copy each page that its collector looks at

    files = sorted(
        str(path.relative_to(TREE)) for room in ROOMS for path in (TREE / "lightning_peft" / room).rglob("*.py")
    )
    every = [make for path in files if options.only in path for make in mutants_of(path)]
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    with contextlib.suppress(KeyboardInterrupt):  # what was tried by then is reported
        for make in random.Random(options.seed).sample(every, min(options.number, len(every))):
            mutant = make()
            tests = tests_for(mutant, recorded["tests"])
            outcome = "not reached" if not tests else "survived" if survives(mutant, tests) else "killed"
            counts[mutant.path][outcome] += 1
            print(f"{outcome}: {mutant.path}:{mutant.line} ({len(tests)} tests)", flush=True)
            if outcome != "killed":
                print(mutant.shown, flush=True)
    report(counts)


def report(counts: dict[str, Counter[str]]) -> None:
    total: Counter[str] = sum(counts.values(), Counter())
    for path, count in [*sorted(counts.items()), ("all", total)]:
        tried = count["killed"] + count["survived"]
        score = f"{100 * count['killed'] / tried:.0f} %" if tried else "-"
        print(f"{path:50} {score:>6} of {tried:4} killed; {count['not reached']} not reached")


if __name__ == "__main__":
    main()

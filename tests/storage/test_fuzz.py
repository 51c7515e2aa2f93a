"""Files, patterns and hyper-parameters that were changed by chance: refused in words of ours, or used, and soon."""

import copy
import json
import resource
import time
from argparse import ArgumentError
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hostile import CONFIG, MARKER, METHODS, NASTY, header_changed, seed, tried
from jsonargparse import ArgumentParser

from lightning_peft import PEFTError, PEFTMethod
from lightning_peft.core.method import method_from_config
from lightning_peft.targets.patterns import matches

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


DEEPEST = 20
CHUNK = 1000


def places(content: Any, lead: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in JSON; what is nested deeply is left as it is, whatever Python's limit."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    if len(lead) == DEEPEST:
        return []
    return [path for key, value in items for path in ((*lead, key), *places(value, (*lead, key)))]


LEAVES = st.sampled_from(NASTY) | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3), max_leaves=5
)


@cache
def keys() -> list[str]:
    return sorted({str(path[-1]) for name in METHODS for path in places(json.loads(seed(name)[CONFIG]))})


def mutated_json(draw: Any, raw: bytes) -> bytes:
    content = json.loads(raw)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(content)))
        holder = content
        for step in path[:-1]:
            holder = holder[step]
        what = draw(st.sampled_from(["put", "put", "put", "remove", "add", "rename"]))
        if what == "put":
            holder[path[-1]] = copy.deepcopy(draw(VALUES))
        elif what == "remove":
            del holder[path[-1]]
        elif what == "add":
            content[draw(st.sampled_from(keys()))] = copy.deepcopy(draw(VALUES))
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=9))] = holder.pop(path[-1])
        if not places(content):
            break
    return json.dumps(content).encode("utf-8", "surrogatepass")


def mutated_header(draw: Any, files: dict[str, bytes]) -> dict[str, bytes]:
    def change(header: dict[str, Any]) -> None:
        name = draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
        what = draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "metadata"]))
        if what == "dtype":
            header[name]["dtype"] = draw(
                st.sampled_from(["F64", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "C64", "X", 3])
            )
        elif what == "shape":
            header[name]["shape"] = draw(st.lists(st.sampled_from([0, 1, 2, 2**32, 2**63, -1]), max_size=3))
        elif what == "data_offsets":
            header[name]["data_offsets"] = draw(st.lists(st.integers(-1, 2**64), min_size=1, max_size=3))
        elif what == "name":
            header[draw(st.sampled_from(["../x", "", "x" * 5000, f"{name}#0:0:9", f"{name}#1:0:{10**30}"]))] = (
                header.pop(name)
            )
        else:
            header["__metadata__"] = draw(VALUES)

    return header_changed(files, change)


def mutated_bytes(draw: Any, raw: bytes) -> bytes:
    changed = bytearray(raw)
    for place in draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=8)):
        changed[place % max(1, len(changed))] = draw(st.integers(0, 255))
    start = draw(st.integers(0, len(raw)))
    return bytes(changed[:start] if draw(st.booleans()) else changed)


@st.composite
def mutated(draw: Any) -> dict[str, bytes]:
    """Draw the files of an adapter, one of which is changed somewhere."""
    files = dict(seed(draw(st.sampled_from(sorted(METHODS)))))
    what = draw(st.sampled_from([CONFIG, CONFIG, CONFIG, MARKER, "header", "bytes"]))
    if what == "header":
        return mutated_header(draw, files)
    if what == "bytes":
        file = draw(st.sampled_from(sorted(files)))
        return {**files, file: mutated_bytes(draw, files[file])}
    return {**files, what: mutated_json(draw, files[what])}


def fuzzed(property_: Callable[..., None], examples: int, **given: Any) -> None:
    # In pieces: hypothesis remembers every example of a run.
    for done in range(0, examples, CHUNK):
        settings = hypothesis.settings(
            max_examples=min(CHUNK, examples - done), deadline=None, database=None, derandomize=examples < CHUNK,
            suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate],
        )  # fmt: skip
        settings(hypothesis.given(**given)(property_))()
        if examples > CHUNK:
            print(f"{done + CHUNK:,} of {examples:,}", flush=True)


def fuzz_files(directory: Path, examples: int) -> dict[bool, int]:
    counts = {True: 0, False: 0}

    def property_(files: dict[str, bytes]) -> None:
        counts[tried(directory / "it", files)] += 1

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzzed(property_, examples, files=mutated())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 500 * 1024
    return counts


def fuzz_patterns(examples: int) -> None:
    name = "model.layers.0.self_attn.q_proj"

    def property_(pattern: str) -> None:
        began = time.process_time()
        with suppress(PEFTError):
            matches(pattern, name)
        assert time.process_time() - began < 2

    parts = st.sampled_from([*"()[]{}*+?|\\.^$aq_", "re:", "**", "(.*)", "{9}", "(?i)", "\\d", "q_proj", "layers"])
    fuzzed(property_, examples, pattern=st.lists(parts, max_size=12).map("".join) | st.text(max_size=30))


def fuzz_methods(examples: int) -> None:
    """Hyper-parameters as a command line gives them, and as a file does."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PEFTMethod, "method")

    def property_(method: Any, data: Any) -> None:
        kind = type(method[0] if isinstance(method, list) else method)
        field = data.draw(st.sampled_from(sorted(kind.__dataclass_fields__)))
        value = data.draw(VALUES)
        with suppress(PEFTError):
            method_from_config({"method": kind.name, field: value})
        # jsonargparse has words of its own, and says what it was given.
        with suppress(ValueError, ArgumentError):
            parser.instantiate_classes(parser.parse_args([f"--method={kind.__name__}", f"--method.{field}={value}"]))

    fuzzed(property_, examples, method=st.sampled_from(list(METHODS.values())), data=st.data())


def test_files_that_were_changed_by_chance(tmp_path: Path) -> None:
    counts = fuzz_files(tmp_path, 100)
    assert all(counts.values())


def test_patterns_by_chance() -> None:
    fuzz_patterns(300)


def test_methods_by_chance() -> None:
    fuzz_methods(60)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_hundred_thousand_by_chance(tmp_path: Path) -> None:
    print(f"files that were loaded and refused: {fuzz_files(tmp_path, 80_000)}")
    fuzz_patterns(15_000)
    fuzz_methods(5_000)

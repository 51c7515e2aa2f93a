"""What is done to a model in a state in which it cannot be done: an error that says why, and nothing has changed."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import torch.distributed as dist
from families import build, randomise
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from unchanged import assert_unchanged, snapshot

from lightning_peft import (
    LoRA,
    PEFTError,
    adapter_names,
    combine,
    disable,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)

ANOTHER = LoRA(r=3)


@cache
def saved() -> Path:
    directory = Path(mkdtemp()) / "it"
    model = build("sequential")[0]
    inject(model, LoRA(r=2))
    save_adapter(model, directory)
    return directory


def within(context: Callable[[nn.Module], AbstractContextManager[None]]) -> Callable[[nn.Module], Any]:
    def enter(model: nn.Module) -> None:
        with context(model):
            pass

    return enter


ACTIONS: dict[str, Callable[[nn.Module], Any]] = {
    "inject": lambda m: inject(m, ANOTHER, name="new"),
    "inject again": lambda m: inject(m, ANOTHER),
    "inject and train also": lambda m: inject(m, LoRA(r=3, target_modules=["0"]), name="new", train_also=["2"]),
    "inject into a part": lambda m: inject(m[0], LoRA(r=3, target_modules=[""]), name="new"),  # type: ignore[index]
    "switch": lambda m: set_adapter(m, "default"),
    "switch to none": lambda m: set_adapter(m, "nobody"),
    "combine": lambda m: combine(m, ["default", "b"], [1.0, 1.0], "both"),
    "rows": within(lambda m: adapter_names(m, ["default", ""])),
    "rows of none": within(lambda m: adapter_names(m, ["nobody"])),
    "disable": within(disable),
    "merge": merge,
    "unmerge": unmerge,
    "eject": eject,
    "save": lambda m: save_adapter(m, Path(mkdtemp()) / "it"),
    "load": lambda m: load_adapter(m, saved(), name="new"),
    "load over another rank": lambda m: load_adapter(m, saved()),
}


def adapted(rank: int = 3, **options: Any) -> nn.Module:
    model = build("sequential")[0]
    targets = ["0"] if "train_also" in options else "all-linear"
    inject(model, LoRA(r=rank, target_modules=targets), **options)
    randomise(model)
    return model


def two() -> nn.Module:
    model = adapted()
    inject(model, LoRA(r=2), name="b")
    return model


def merged() -> nn.Module:
    model = two()
    merge(model)
    return model


def not_finite() -> nn.Module:
    model = two()
    with torch.no_grad():
        model[0].peft["default"].lora_A[0, 0] = torch.inf  # type: ignore[union-attr, index]
    return model


def for_good() -> nn.Module:
    model = adapted()
    merge(model, unload=True)
    return model


def part() -> nn.Module:
    """A model that shares a part with one that has adapters."""
    return nn.Sequential(adapted()[0], nn.ReLU())  # type: ignore[index]


def sharded(model: nn.Module) -> nn.Module:
    """Cut a model up by FSDP2, on a mesh of this process alone."""
    mesh = init_device_mesh("cpu", (1,))
    for part in (model[0], model[2], model):  # type: ignore[index]
        fully_shard(part, mesh=mesh)  # type: ignore[arg-type]
    return model


def sharded_first() -> nn.Module:
    model = sharded(build("sequential")[0])
    inject(model, LoRA(r=3), allow_sharded=True)
    inject(model, LoRA(r=2), name="b", allow_sharded=True)
    randomise(model)
    return model


def sharded_and_merged() -> nn.Module:
    model = sharded(two())
    merge(model)
    return model


STATES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], AbstractContextManager[Any]]]] = {
    "plain": (lambda: build("sequential")[0], nullcontext),
    "adapted": (two, nullcontext),
    "merged": (merged, nullcontext),
    "merged for good": (for_good, nullcontext),
    "trained whole": (lambda: adapted(train_also=["2"]), nullcontext),
    "rows": (two, lambda model: adapter_names(model, ["b"])),
    "disabled": (two, disable),
    "not finite": (not_finite, nullcontext),
    "a part of another": (part, nullcontext),
    "sharded": (lambda: sharded(build("sequential")[0]), nullcontext),
    "sharded, then adapted": (sharded_first, nullcontext),
    "adapted, then sharded": (lambda: sharded(two()), nullcontext),
    "sharded and merged": (sharded_and_merged, nullcontext),
}

NONE, PART, NOBODY = "has no adapters", "shares a part with", "There is no adapter 'nobody'"
MERGED, INSIDE, WHOLE = "are merged into the weights", "Leave it first", "that is trained itself belongs to one adapter"
OF_ADAPTERS = (
    *("switch", "switch to none", "combine", "rows", "rows of none", "disable", "merge", "unmerge", "eject", "save"),
)
NEVER = {"inject and train also": WHOLE, "inject into a part": PART, "switch to none": NOBODY, "rows of none": NOBODY}
SHAPE = {"load over another rank": "has shape [2, 8], this model's has [3, 8]"}
PIECES = "is already sharded: adapters injected now would not be kept equal between ranks"
IN_PIECES = {**NEVER, **SHAPE, **dict.fromkeys(("inject", "combine", "load"), PIECES)}
IS_MERGED = {
    **NEVER,
    **dict.fromkeys(("inject", "switch", "combine", "rows", "rows of none", "disable"), MERGED),
    **dict.fromkeys(("load", "load over another rank"), MERGED),
}
WITHIN = {**NEVER, **SHAPE, **dict.fromkeys(("inject", "switch", "combine", "merge", "eject", "load"), INSIDE)}
# By state, what is refused there, with words of the error; everything else works.
REFUSED: dict[str, dict[str, str]] = {
    "plain": dict.fromkeys(OF_ADAPTERS, NONE),
    "adapted": {**NEVER, **SHAPE},
    "merged": IS_MERGED,
    "merged for good": {
        **dict.fromkeys(OF_ADAPTERS, NONE),
        **dict.fromkeys(("load", "load over another rank"), "was written for another base model"),
    },
    "trained whole": {
        **NEVER,
        "inject": WHOLE,
        "inject again": "already has an adapter 'default'",
        "combine": "There is no adapter 'b'",
        "rows": "'2.weight' is trained itself",
        "load": WHOLE,
        "load over another rank": "Missing: 2.bias, 2.weight",
    },
    "rows": WITHIN,
    "disabled": WITHIN,
    "not finite": {**NEVER, **SHAPE, "merge": "holds NaN or infinity"},
    "a part of another": {
        **dict.fromkeys(ACTIONS, PART),
        "inject and train also": "'2' matches no module",
        **dict.fromkeys(("load", "load over another rank"), "that this Sequential does not have"),
    },
    "sharded": {
        **dict.fromkeys(OF_ADAPTERS, NONE),
        **dict.fromkeys((action for action in ACTIONS if "inject" in action or "load" in action), PIECES),
    },
    "sharded, then adapted": IN_PIECES,
    "adapted, then sharded": {**IN_PIECES, "rows": "'default' is in pieces on several processes"},
    "sharded and merged": IS_MERGED,
}


@pytest.fixture(autouse=True)
def _group(state: str) -> Iterator[None]:
    """Have this process be a group of one where models are sharded."""
    if "sharded" in state:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if "sharded" in state:
        dist.destroy_process_group()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("action", ACTIONS)
def test_what_is_refused_changes_nothing(action: str, state: str) -> None:
    make, context = STATES[state]
    model = make()
    with context(model):
        before, message = snapshot(model), REFUSED[state].get(action)
        if message is None:
            ACTIONS[action](model)
            return
        with pytest.raises(PEFTError) as refusal:
            ACTIONS[action](model)
        assert message in str(refusal.value)
        assert_unchanged(model, before)

"""What the command says where jsonargparse would list types: names that do not exist, with those that do."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.strategies import StrategyRegistry

from lightning_peft import tasks
from lightning_peft.core.method import registered_methods
from lightning_peft.errors import PEFTError, near
from lightning_peft.strategy import PEFTStrategy
from lightning_peft.strategy.bases.names import base_names


def in_words(message: str) -> str:
    """Return what to say in place of jsonargparse's ``message``, or the message."""
    if "Expected a dot import path string: peft" in message:
        return (
            "a strategy that is given by its registered name takes no options of its own. Name the class instead:\n"
            f"  --trainer.strategy={PEFTStrategy.__name__} --trainer.strategy.method=LoRA "
            "--trainer.strategy.method.r=16"
        )
    if re.search(r"required: \w+\.model$", message):
        return "no model was given: give --model CLASS, or a file with an entry `model:` by --config FILE."
    if missing := re.search(r"required: (\w+)\.(\w+)$", message):
        return f"{missing[1]} needs {missing[2].upper()}; see lightning-peft {missing[1]} --help."
    if unknown := re.search(r"import path (?:string|format): (.+)$", message, re.MULTILINE):
        return _no_class(message, unknown[1]) or message
    return message


def _no_class(message: str, name: str) -> str | None:
    """Return what to say where no class, perhaps a path, is given as a model or as data."""
    key = re.match(r'Parser key "(model|data)":', message)
    if key is None:
        return None
    kinds = [kind for kind in vars(tasks).values() if isinstance(kind, type)]
    base = LightningModule if key[1] == "model" else LightningDataModule
    names = [kind.__name__ for kind in kinds if issubclass(kind, base)]
    said = f"--{key[1]} {name}: there is no such class. {near(name, names)}"
    said += f"Ready ones are {', '.join(sorted(names))}; one of your own is written as module.Class."
    if "/" in name:
        option = "--model CausalLM --model.model" if key[1] == "model" else "--data InstructionData --data.train_file"
        said += f" A path is an option of the class: {option} {name}"
    return said


def named_strategy(name: str) -> str | Namespace:
    """Return what ``--trainer.strategy=name`` stands for: a registered strategy, or this package's class.

    jsonargparse reads a class's name as a plain string here, because a strategy may be one.

    Raises:
        PEFTError: There is no such strategy; the message lists those that exist.
    """
    if name.rpartition(".")[2] == PEFTStrategy.__name__:
        return Namespace(class_path=f"{PEFTStrategy.__module__}.{PEFTStrategy.__name__}", init_args=Namespace())
    known = ["auto", *StrategyRegistry.available_strategies()]
    if name.lower() in known:
        return name
    raise PEFTError(
        f"{f'There is no strategy {name!r}. {near(name, known)}'.rstrip()}\n"
        "Names are: peft, peft_METHOD, peft_METHOD_BASE and, without adapters, any BASE.\n"
        f"{_wrapped('METHOD', registered_methods())}\n{_wrapped('BASE', base_names())}"
    )


def _wrapped(label: str, names: Iterable[str]) -> str:
    text = f"  {label}: {', '.join(names)}"
    return textwrap.fill(text, width=110, subsequent_indent=" " * (len(label) + 4), break_on_hyphens=False)

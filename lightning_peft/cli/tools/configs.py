"""``lightning-peft configs``: the configs that come with the package, to be listed and copied."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

from lightning_peft.errors import PEFTError, near

_USAGE = "`lightning-peft configs` lists them; `lightning-peft configs copy NAME` writes one to edit"


def configs(words: Sequence[str] = (), out: str | None = None) -> None:
    """List the configs that come with the package, or copy one to edit: `configs copy NAME`.

    Args:
        words: Nothing, or `copy` and the name of a config.
        out: The file to write; NAME.yaml in this folder by default.

    Raises:
        PEFTError: There is no such config, or the file exists.
    """
    folder = files("lightning_peft") / "configs"
    found = {entry.name.removesuffix(".yaml"): entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}
    if not words:
        width = max(map(len, found))
        for name, entry in sorted(found.items()):
            print(f"{name:{width}}  {_purpose(entry.read_text(encoding='utf-8'))}")
        return
    if words[0] != "copy" or len(words) != 2:
        raise PEFTError(f"configs {' '.join(words)}: {_USAGE}.")
    name = words[1].removesuffix(".yaml")
    if name not in found:
        raise PEFTError(f"There is no config {name!r}. {near(name, found)}There are: {', '.join(sorted(found))}.")
    target = Path(out or f"{name}.yaml")
    if target.exists():
        raise PEFTError(f"{target} exists. Name another file: lightning-peft configs copy {name} --out FILE.")
    try:
        with as_file(found[name]) as source:
            shutil.copyfile(source, target)
    except OSError as error:
        raise PEFTError(f"{target} cannot be written: {error.strerror}. Name another file by --out.") from error
    print(f"{target} written. Change the lines of the model and the data, then: lightning-peft fit --config {target}")


def _purpose(text: str) -> str:
    """Return the first sentence of a config's heading."""
    heading = re.match(r"(?:# .*\n)+", text)
    words = " ".join(line.removeprefix("# ") for line in heading[0].splitlines()) if heading else ""
    return words.partition(". ")[0].rstrip(".")

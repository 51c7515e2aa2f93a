"""What names a pretrained model: a directory, a name on the Hugging Face hub, or an installed Python package."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from lightning_peft.errors import PEFTError

PACKAGE_PREFIX = "package:"
EXPECTED = (
    "expected a directory with a model, the name of a model on the Hugging Face hub, or 'package:NAME' for "
    "model files inside the installed Python package NAME (or 'package:NAME/FOLDER')"
)


@dataclass(frozen=True)
class Source:
    """A place `from_pretrained` can read: a directory or hub name, and the GGUF file in it if there is one."""

    path: str
    gguf_file: str | None = None
    revision: str | None = None
    """Of a model on the hub: a branch, a tag or a commit."""


def locate(model: str) -> Source:
    """Find out what a model string means, without loading anything.

    Args:
        model: A local directory (or one `.gguf` file), a name on the Hugging Face hub, which may be followed by a
            revision as in `NAME@REVISION`, or `package:NAME`, or `package:NAME/FOLDER` for a folder in the package.

    Raises:
        PEFTError: The string names a package or a path that does not exist or holds no model.
    """
    if model.startswith(PACKAGE_PREFIX):
        return _in_directory(_package_directory(model), model)
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Source(str(path.parent), path.name)
    if path.is_dir():
        return _in_directory(path, model)
    # A hub name is NAME or OWNER/NAME; anything else can only have been meant as a path.
    if not model or path.is_absolute() or model[0] in ".~" or model.count("/") > 1 or path.suffix == ".gguf":
        raise PEFTError(f"model={model!r}: there is no such directory; {EXPECTED}")
    name, _, revision = model.partition("@")
    return Source(name, revision=revision or None)


def _package_directory(model: str) -> Path:
    name, _, folder = model.removeprefix(PACKAGE_PREFIX).partition("/")
    # A dotted name would make find_spec import the parent package; model files need no code to run.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise PEFTError(
            f"model={model!r}: no package {name!r} is installed for import; expected the name of the package's "
            f"module (letters, digits, '_'): install it with pip, or give another model"
        )
    package = Path(spec.submodule_search_locations[0])
    if ".." in Path(folder).parts or not (package / folder).is_dir():
        found = ", ".join(sorted(path.name for path in package.iterdir() if path.is_dir())) or "none"
        raise PEFTError(f"model={model!r}: the package has no folder {folder!r}; its folders are: {found}")
    return package / folder


def _in_directory(path: Path, model: str) -> Source:
    if (path / "config.json").is_file():
        return Source(str(path))
    files = sorted(file.name for file in path.glob("*.gguf"))
    if len(files) == 1:
        return Source(str(path), files[0])
    found = f"several GGUF files: {', '.join(files)}; give one of them by its path" if files else "neither"
    raise PEFTError(f"model={model!r}: expected config.json or one .gguf file in {path}, found {found}")

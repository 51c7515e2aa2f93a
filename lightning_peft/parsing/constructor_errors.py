"""What a constructor says, told as it was said.

Where a value may be of several types, as a strategy or a model may, jsonargparse takes any exception for "not of this
type" and reports a list of types, without the message and the traceback that tell what is wrong.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lightning_peft.core.method import PEFTMethod
from lightning_peft.errors import PEFTError

_instantiate_classes = LightningArgumentParser.instantiate_classes


class Escaped(BaseException):
    """Carries a constructor's exception past jsonargparse."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def make(kind: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make an object of the class ``kind``, as jsonargparse does where it is not told how."""
    return kind(*args, **kwargs)


def escaping(instantiator: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``instantiator``, of which exceptions leave jsonargparse as they are; see :func:`unescaped`."""

    @functools.wraps(instantiator)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return instantiator(*args, **kwargs)
        except Exception as error:
            raise Escaped(error) from None

    return call


def unescaped(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``function``; what escapes from it is raised as the exception that it was."""
    try:
        return function(*args, **kwargs)
    except Escaped as caught:
        error = caught.error
    # Here, where Python does not take it for an error in the handling of another.
    raise error


def _in_words(parser: LightningArgumentParser, *args: Any, **kwargs: Any) -> Any:
    """Make the objects of a config; end in one line if a method or the strategy says that it cannot be made."""
    for kind in (PEFTMethod, pkgutil.resolve_name("lightning_peft.PEFTStrategy")):
        parser.add_instantiator(escaping(make), kind, subclasses=True)
    try:
        return unescaped(_instantiate_classes, parser, *args, **kwargs)
    except PEFTError as error:
        parser.exit(2, f"error: {error}\n")


def install() -> None:
    """Have every LightningCLI in this program say in one line why a method or the strategy cannot be made."""
    LightningArgumentParser.instantiate_classes = _in_words  # type: ignore[method-assign, assignment]

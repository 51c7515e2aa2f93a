"""Something else in place of the active adapters for a while, for the calling context of ``contextvars``."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_peft.core.of_thread import OfThread
from lightning_peft.errors import PEFTError

_Adapter = TypeVar("_Adapter", bound=nn.Module)


class StandIns:
    """What runs instead of the active adapter of one host: in each calling context something else."""

    def __init__(self) -> None:
        self.contexts: set[object] = set()
        self.any = False
        """Whether there is such a context, of whatever thread."""
        self.alone: object | None = None
        """The one that has written to the model, so that no other caller may be served."""
        # Programs of torch.compile cannot read context variables. They have guards on what a thread has for itself.
        self._of_thread = OfThread()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def chosen(self, running: _Adapter | None) -> _Adapter | None:
        """Return what the caller's context has instead of ``running``, or that.

        Raises:
            PEFTError: Another context has written to the model.
        """
        if not torch.compiler.is_compiling():
            return _looked_up(self, running)
        mine = self._of_thread.value
        # What it is in a thread that a context was handed to ends the program here, or is an error with fullgraph=True.
        return _looked_up_outside(self, running) if mine is None else mine[0]  # type: ignore[no-any-return]

    def enter(self, context: object, own: frozenset[object], adapter: nn.Module | None, alone: bool) -> None:
        """Let ``context``, which lies within the contexts ``own``, have ``adapter`` run.

        Raises:
            PEFTError: It is to be alone, or another one is, and there are both.
        """
        others = self.contexts - own
        if others and (alone or self.alone in others):
            raise PEFTError(
                "disable(model) writes to the model where parts of it are trained whole or have changed: that would "
                "be mixed with what others compute. Another thread or task is within disable or adapter_names of this "
                "model; let one finish before the other begins."
            )
        self.contexts.add(context)
        self.any = True
        if alone:
            self.alone = context
        if not _in_event_loop():
            self._of_thread.value = (adapter,)

    def leave(self, context: object, before: Any) -> None:
        """Undo :meth:`enter`; ``before`` is what :meth:`of_thread` returned then."""
        self.contexts.discard(context)
        self.any = bool(self.contexts)
        self.alone = None if self.alone is context else self.alone
        self._of_thread.value = before

    def of_thread(self) -> Any:
        """Return what programs of torch.compile find in this thread."""
        return self._of_thread.value


_Table = Mapping[StandIns, tuple[Any, frozenset[object]]]
_TABLE: ContextVar[_Table] = ContextVar("stand_ins", default={})  # noqa: B039
"""By host: the adapter that the calling context has run, and that context with those around it."""
_ENTRANCE = threading.Lock()


@contextmanager
def stand_in(adapters: Sequence[tuple[StandIns, nn.Module | None]], *, alone: bool = False) -> Iterator[None]:
    """Within it, in the calling context, each host calls the adapter beside it, or none.

    Args:
        adapters: Of each host, what it calls.
        alone: Whether the caller writes to the model, so that nobody else may be within such a context.

    Raises:
        PEFTError: Somebody is, or writes to the model; or it is left in another context than it was entered in.
    """
    context, table = object(), dict(_TABLE.get())
    before = [(stand_ins, stand_ins.of_thread()) for stand_ins, _ in adapters]
    token, elsewhere = None, False
    try:
        with _ENTRANCE:
            for stand_ins, adapter in adapters:
                _, own = table.get(stand_ins, (None, frozenset()))
                stand_ins.enter(context, own, adapter, alone)
                table[stand_ins] = adapter, own | {context}
        token = _TABLE.set(table)
        yield
    finally:
        if token is not None:
            try:
                _TABLE.reset(token)
            except ValueError:
                elsewhere = True
        with _ENTRANCE:
            for stand_ins, of_thread in before:
                stand_ins.leave(context, of_thread)
        if elsewhere:
            raise PEFTError(
                "disable or adapter_names was left in another context than it was entered in: a generator held it over "
                "a yield, and a server asked for each item in a context of its own. All but the first item may be of "
                "other adapters. Enter it anew for each call of the model, and leave it before the yield."
            )


def _looked_up(stand_ins: StandIns, running: _Adapter | None) -> _Adapter | None:
    table = _TABLE.get() or _of_backward()
    if stand_ins in table:
        found: _Adapter | None = table[stand_ins][0]
        return found
    if stand_ins.alone is not None:
        raise PEFTError(
            "The model was called while another thread or task is within disable(model), which has written to it: "
            "parts of it are trained whole, or have changed. Let that finish first."
        )
    return running


_looked_up_outside = torch.compiler.disable(_looked_up)


def _of_backward() -> _Table:
    """Return the table of who has called ``backward``, if this is within it.

    Activation checkpointing computes layers again there, on a GPU in a thread of autograd's that has a context of its
    own. torch hands it that of the caller.

    Raises:
        PEFTError: This release of torch does not yet.
    """
    if torch._C._current_graph_task_id() == -1:
        return {}
    if not torch._C._is_key_in_tls("context"):
        raise PEFTError(
            "Activations were computed again, for a backward pass, while a caller is within disable or adapter_names: "
            f"torch {torch.__version__} does not tell for whom. Take a newer one, or leave checkpointing off."
        )
    table: _Table = torch._C._get_obj_in_tls("context").get(_TABLE, {})
    return table


def _in_event_loop() -> bool:
    """Whether tasks may take turns in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True

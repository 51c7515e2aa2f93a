"""What is known of the call that a decoder is in, for what runs within it."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.of_thread import OfThread
from lightning_peft.errors import PEFTError


class OfCall:
    """A value of the present call: each thread has its own, and so has what computes activations again in a backward.

    A copy of it has none.

    Args:
        method: Name of the method, for errors.
        what: What it says, likewise.
    """

    def __init__(self, method: str, what: str) -> None:
        self._words = method, what
        self._of_thread, self._differentiated = OfThread(), OfThread()
        self._latest: tuple[Any, set[int]] = None, set()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._words

    @property
    def value(self) -> Any:
        """The value, ``None`` outside of calls.

        Raises:
            PEFTError: Layers are computed again, in a thread of autograd's, and several threads have called the model.
        """
        mine = self._of_thread.value
        if torch.compiler.is_compiling() or (task := torch._C._current_graph_task_id()) == -1:
            return mine
        of_task, value = self._differentiated.value or (-1, None)
        if of_task == task:
            return value
        if mine is not None:
            return mine
        latest, threads = self._latest
        if len(threads) > 1 and threading.get_ident() not in threads:
            method, what = self._words
            raise PEFTError(
                f"{method}: activations were computed again for a backward pass, and several threads have called the "
                f"model: {what} is not known. Train in one thread, or without activation checkpointing."
            )
        return latest

    @value.setter
    def value(self, value: Any) -> None:
        self._of_thread.value = value
        if not torch.compiler.is_compiling():
            self._latest = value, self._latest[1] | {threading.get_ident()}

    def follow(self, output: Tensor) -> None:
        """Have the present value come back when ``output``, of the present call, is differentiated.

        Activations are computed again after that, and there may have been other calls since.
        """
        if not output.requires_grad or torch.compiler.is_compiling():
            return
        value = self._of_thread.value

        def begin(gradient: Tensor) -> None:
            self._differentiated.value = torch._C._current_graph_task_id(), value

        output.register_hook(begin)

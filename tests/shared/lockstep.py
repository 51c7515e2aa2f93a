"""Threads that go from one linear layer to the next side by side: what they share, they meet in."""

import threading
from collections.abc import Callable
from typing import Any

from torch.nn import functional


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """Return what ``calls`` return, each in a thread of its own."""
    results: list[Any] = [None] * len(calls)

    def work(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def side_by_side(*calls: Callable[[], Any]) -> list[Any]:
    """Do as :func:`in_threads`, and have the threads wait for one another before each linear layer."""
    real, barrier, here = functional.linear, threading.Barrier(len(calls)), threading.current_thread()

    def linear(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is not here:
            # One may have to wait for another elsewhere, or have fewer layers to go through.
            try:
                barrier.wait(0.02)
            except threading.BrokenBarrierError:
                barrier.reset()
        return real(*args, **kwargs)

    functional.linear = linear  # type: ignore[assignment]
    try:
        return in_threads(*calls)
    finally:
        functional.linear = real

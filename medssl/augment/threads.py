"""Samples side by side on the CPU: one thread a sample, each operation on one thread.

An operation that torch spreads over threads waits for the slowest of them, and beside a training step that uses the
same cores it waits long; whole samples side by side wait once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier
from typing import TypeVar

import torch

_LEAST_WORK = 1 << 16  # voxels a thread; below, starting it costs more than it saves

A = TypeVar("A")
B = TypeVar("B")


def in_threads(function: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """Give ``function`` of each item, in order, on as many threads as torch may use here.

    Args:
        function: Leaves gradients alone; what it raises is raised.
        items: Samples, or what names them.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) == 1:
        return [function(item) for item in items]

    def without_gradient(item: A) -> B:
        with torch.no_grad():  # a mode of each thread
            return function(item)

    return list(_pool(threads).map(without_gradient, items))


def share(work: Callable[[int, int], None], num: int, *, voxels: int) -> None:
    """Run ``work(start, stop)`` over ``num`` things, on as many threads as torch may use here.

    Args:
        work: Holds no lock of the interpreter; its ranges never touch the same output.
        num: Planes, blocks or samples.
        voxels: Size of all things together; little work stays on the calling thread.
    """
    parts = max(1, min(torch.get_num_threads(), num, voxels // _LEAST_WORK))
    cuts = [num * part // parts for part in range(parts + 1)]
    in_threads(lambda part: work(cuts[part], cuts[part + 1]), range(parts))


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(threads, "augment", initializer=_one_thread)
    together = Barrier(threads)
    list(pool.map(lambda _: together.wait(), range(threads)))  # all threads start now
    torch.set_num_threads(threads)  # what they have set is also the number that later threads begin with
    return pool


def _one_thread() -> None:
    torch.get_num_threads()  # the first call in a thread takes over the number of the others
    torch.set_num_threads(1)

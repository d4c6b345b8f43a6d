"""Run one function over many cases in processes of their own; a bad case costs only itself.

A worker that dies (a crash in a native reader, the kernel's memory killer) or hangs is replaced, its case is tried once
more, and then set aside by name. Faults come back as values, never as exceptions that may not survive a pickle.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from medssl.errors import CaseError, MedSSLError

T = TypeVar("T")
R = TypeVar("R")

_ATTEMPTS = 2
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1", "BLOSC_NTHREADS": "1"}


def run(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    name: Callable[[T], str],
    workers: int = 0,
    timeout_s: float = 600.0,
) -> Iterator[tuple[T, R | MedSSLError]]:
    """Yield each item with the result of ``function``, or with the error that it ended in, as they finish.

    Args:
        function: A module-level function.
        items: What to run it on; each must survive a pickle.
        name: What to call an item in an error.
        workers: Processes; 0 takes one for each core. One worker runs in this process, without its protection.
        timeout_s: An item that takes longer counts as hung; not kept by a single worker.
    """
    count = min(workers or len(os.sched_getaffinity(0)), len(items))
    if count <= 1:
        for item in items:
            yield item, attempt(function, item, name(item))
        return
    crew = _Crew(function, name, timeout_s)
    try:
        yield from crew.work(items, count)
    finally:
        crew.dismiss()


@dataclass
class _Worker(Generic[T]):
    process: multiprocessing.process.BaseProcess
    pipe: multiprocessing.connection.Connection[Any, Any]
    item: T
    attempts: int
    deadline: float


class _Crew(Generic[T, R]):
    """The running workers: each holds one item, known to the parent."""

    def __init__(self, function: Callable[[T], R], name: Callable[[T], str], timeout_s: float) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._function, self._name, self._timeout_s = function, name, timeout_s
        self._busy: list[_Worker[T]] = []

    def work(self, items: Sequence[T], count: int) -> Iterator[tuple[T, R | MedSSLError]]:
        waiting = deque((item, 1) for item in items)
        for _ in range(count):
            self._busy.append(self._hire(*waiting.popleft()))
        while self._busy:
            patience = max(0.0, min(worker.deadline for worker in self._busy) - time.monotonic())
            ready = multiprocessing.connection.wait([worker.pipe for worker in self._busy], timeout=patience)
            for worker in [
                worker for worker in self._busy if worker.pipe in ready or worker.deadline < time.monotonic()
            ]:
                answer = self._answer(worker)
                if isinstance(answer, _Lost):
                    self._fire(worker)
                    if worker.attempts < _ATTEMPTS:
                        self._busy.append(self._hire(worker.item, worker.attempts + 1))
                        continue
                    yield worker.item, answer.error
                    if waiting:
                        self._busy.append(self._hire(*waiting.popleft()))
                    continue
                yield worker.item, answer
                if waiting:
                    self._give(worker, *waiting.popleft())
                else:
                    self._fire(worker)

    def dismiss(self) -> None:
        """End every worker, whatever it is doing."""
        for worker in list(self._busy):
            self._fire(worker)

    def _hire(self, item: T, attempts: int) -> _Worker[T]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(process, ours, item, attempts, 0.0)
        with contextlib.suppress(OSError):  # a worker that is gone already shows as the end of its pipe
            ours.send(self._function)
        self._give(worker, item, attempts)
        return worker

    def _give(self, worker: _Worker[T], item: T, attempts: int) -> None:
        worker.item, worker.attempts, worker.deadline = item, attempts, time.monotonic() + self._timeout_s
        with contextlib.suppress(OSError):
            worker.pipe.send((item, self._name(item)))

    def _fire(self, worker: _Worker[T]) -> None:
        self._busy.remove(worker)
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()

    def _answer(self, worker: _Worker[T]) -> R | MedSSLError | _Lost:
        name = self._name(worker.item)
        if not worker.pipe.poll():
            return _Lost(
                CaseError(
                    f"{name}: took longer than {self._timeout_s:.0f} s, twice. Look at the file, or leave it out.",
                    code="E_HUNG",
                )
            )
        try:
            answer: R | MedSSLError = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            return _Lost(
                CaseError(
                    f"{name}: its worker process died twice ({_cause(worker.process.exitcode)}). "
                    "The file crashes its reader or needs more memory than there is; leave it out or free memory.",
                    code="E_READER_CRASH",
                )
            )
        return answer


@dataclass(frozen=True)
class _Lost:
    """The worker is gone, with what to say if this was its item's last attempt."""

    error: MedSSLError


def _serve(pipe: multiprocessing.connection.Connection[Any, Any]) -> None:
    """Life of a worker: take an item, answer, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    os.environ.update(_ONE_THREAD)  # before the function's modules are imported by the first message
    try:
        function = pipe.recv()
        while True:
            item, name = pipe.recv()
            pipe.send(attempt(function, item, name))
    except (EOFError, OSError):
        return


def attempt(function: Callable[[T], R], item: T, name: str) -> R | MedSSLError:
    """Result of ``function``, or the error that it ended in, whatever that is; ``name`` is what to call the item."""
    try:
        return function(item)
    except MedSSLError as error:
        return error
    except MemoryError:
        return CaseError(
            f"{name}: needs more memory than there is. Free memory, or use fewer workers.", code="E_MEMORY"
        )
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} in {os.path.basename(frame.filename)}:{frame.lineno}"  # noqa: PTH119
        return CaseError(f"{name}: unexpected {where}. Please report it; the other cases go on.", code="E_UNEXPECTED")


def _cause(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return signal.Signals(-exitcode).name
    return f"exit code {exitcode}"

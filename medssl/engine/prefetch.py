"""Batches made ready ahead of the step: loaded, moved to the device and augmented while the one before is trained on.

``prepare`` is a pure function of the batch, so a prefetched run has the bits of one that is not.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import NamedTuple, Self

import torch

from medssl.trainable import Batch

_DEPTH = 2
_MOST_THREADS = 4
_JOIN_SECONDS = 10.0
_M_ARENA_MAX = -8  # of malloc.h
_SWITCH_SECONDS = 5e-4  # a thread that has left the interpreter for a loop must not wait 5 ms to come back

Prepare = Callable[[Batch], Batch]


class Feed:
    """Prepared batches on the device, each made when it is asked for.

    Args:
        data: Batches as the loader gives them; closed by :meth:`close` if it can be.
        prepare: What is done to each on the device.
        device: Where the step runs.

    Attributes:
        waited: Seconds that the step was held up in all.
    """

    def __init__(self, data: Iterator[Batch], prepare: Prepare, *, device: torch.device) -> None:
        self._data, self._prepare, self._device = data, prepare, device
        self.waited = 0.0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch; whatever the loader or ``prepare`` raises comes from here."""
        before = time.perf_counter()
        batch = self._prepared(next(self._data))
        self.waited += time.perf_counter() - before
        return batch

    def close(self) -> None:
        """End the loader."""
        getattr(self._data, "close", lambda: None)()

    def _prepared(self, batch: Batch) -> Batch:
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            return self._prepare(batch.to(self._device))


class Prefetcher(Feed):
    """Makes batches ahead in threads; on CUDA in one, from page-locked memory and on a stream of its own.

    On the CPU up to four threads, if torch may use so many, take turns with the loader, and each prepares its batch by
    itself on one thread; batches come in the loader's order. An exception is kept until the step that misses the
    batch. On CUDA a place is free again only when the device has done the step with its batch, so that no more than
    two batches ever lie ahead in its memory, and a wait counts as waiting only if the device had nothing left to do.

    Args:
        data: As for :class:`Feed`; only the threads touch it, one at a time.
        prepare: Called in the threads.
        device: Where the step runs.
    """

    def __init__(self, data: Iterator[Batch], prepare: Prepare, *, device: torch.device) -> None:
        super().__init__(data, prepare, device=device)
        usual = torch.get_num_threads()
        threads = min(_MOST_THREADS, usual) if device.type == "cpu" else 1
        depth = max(_DEPTH, threads)
        self._ready: list[SimpleQueue[_Ready]] = [SimpleQueue() for _ in range(depth)]  # batch n in queue n % depth
        self._places: SimpleQueue[torch.cuda.Event | None] = SimpleQueue()  # free ones; on CUDA, once the event is over
        for _ in range(depth):
            self._places.put(None)
        self._turn = threading.Lock()
        self._loaded = 0
        self._taken = 0
        self._stopping = threading.Event()
        self._finished = False
        self._in_use = False
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._usual_switch = sys.getswitchinterval()
        sys.setswitchinterval(min(_SWITCH_SECONDS, self._usual_switch))
        _share_free_memory()
        self._alone = threading.Barrier(threads + 1)
        self._threads = [
            threading.Thread(target=self._work, name="medssl-prefetch", daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        if threads > 1:
            self._alone.wait()
            torch.set_num_threads(usual)  # what they have set is also the number that later threads begin with

    def __next__(self) -> Batch:
        """The next batch, in order."""
        if self._finished:
            raise StopIteration
        step_end = self._free_place()
        before = time.perf_counter()
        ready = self._ready[self._taken % len(self._ready)].get()
        self._taken += 1
        if step_end is None or step_end.query():  # type: ignore[no-untyped-call]
            self.waited += time.perf_counter() - before
        if ready.batch is None:
            self._finished = True
            raise ready.error or StopIteration
        self._in_use = True
        if ready.event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(ready.event)
            for tensor in (*ready.batch.tensors.values(), *ready.batch.notes.values()):
                if tensor.is_cuda:
                    tensor.record_stream(stream)
        return ready.batch

    def close(self) -> None:
        """Stop the threads after the batches that they are making, and the loader with them."""
        self._stopping.set()
        self._finished = True
        for _ in self._threads:
            self._places.put(None)
        until = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        sys.setswitchinterval(self._usual_switch)

    def _free_place(self) -> torch.cuda.Event | None:
        """Give back the place of the batch before; the event is the end of the device's work on it."""
        if not self._in_use:
            return None
        self._in_use = False
        event: torch.cuda.Event | None = None
        if self._stream is not None:
            # blocking: the thread sleeps until the device is there, and does not spin
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
        self._places.put(event)
        return event

    def _work(self) -> None:
        """Load and prepare one batch after the other, until the data end, something fails or the run is over."""
        if len(self._threads) > 1:
            torch.get_num_threads()  # the first call in a thread takes over the number of the others
            torch.set_num_threads(1)
            self._alone.wait()
        while True:
            step_end = self._places.get()
            if self._stopping.is_set():
                break
            if step_end is not None:
                step_end.synchronize()
            if not self._make_next():
                break
        with self._turn:
            super().close()

    def _make_next(self) -> bool:
        """Load and prepare one batch, and keep nothing of it; False at the end, or where something failed."""
        with self._turn:
            number, self._loaded = self._loaded, self._loaded + 1
            batch, error = self._load()
        ready = _Ready(None, error=error) if batch is None else self._make_ready(batch)
        self._ready[number % len(self._ready)].put(ready)
        return ready.batch is not None

    def _load(self) -> tuple[Batch | None, BaseException | None]:
        try:
            return next(self._data), None
        except StopIteration:
            return None, None
        except BaseException as error:  # raised where the batch is missed
            return None, error

    def _make_ready(self, batch: Batch) -> _Ready:
        try:
            if self._stream is None:
                return _Ready(self._prepared(batch))
            with torch.cuda.stream(self._stream), torch.no_grad(), torch.autocast("cuda", enabled=False):
                made = self._prepare(batch.pin_memory().to(self._device))
            return _Ready(made, event=self._stream.record_event())
        except BaseException as error:  # raised where the batch is missed
            return _Ready(None, error=error)


def _share_free_memory() -> None:
    """Let threads allocate from one pool: by default glibc keeps for each what its largest batch has needed."""
    with suppress(OSError, AttributeError, TypeError):  # another system, or another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


class _Ready(NamedTuple):
    """A batch and, on CUDA, when it is whole; without a batch, the end or what went wrong."""

    batch: Batch | None
    event: torch.cuda.Event | None = None
    error: BaseException | None = None


def open_feed(data: Iterator[Batch], prepare: Prepare, *, device: torch.device, prefetch: bool) -> Feed:
    """Prepared batches, ahead of the step or when they are asked for."""
    return (Prefetcher if prefetch else Feed)(data, prepare, device=device)

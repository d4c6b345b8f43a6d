"""Signals become a wish to stop, which the loop grants at the end of a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import distributed

from medssl.errors import ExitCode, StoppedError

_GRACEFUL = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopSignals:
    """While entered, SIGINT, SIGTERM, SIGUSR1 and SIGHUP only set a flag; a second SIGINT stops at once.

    In a thread other than the main one no handler can be set, and the process's own stay.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._group: distributed.ProcessGroup | None = None

    def __enter__(self) -> Self:
        if distributed.is_available() and distributed.is_initialized():
            self._group = distributed.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _GRACEFUL}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wanted(self) -> bool:
        """Whether to stop after this step; processes that train together agree on it."""
        if self._group is None:
            return self.received is not None
        flag = torch.tensor(int(self.received is not None))
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is signal.SIGINT:
            raise StoppedError(
                "stopped at once by a second interrupt; the last checkpoint is good. Run the same command to go on.",
                exit_code=ExitCode.INTERRUPTED,
            )
        self.received = signal.Signals(number)

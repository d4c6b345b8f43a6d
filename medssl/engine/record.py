"""What the loop writes down: means over the steps since the last line, and steps that were skipped."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from medssl.errors import ConfigError, TrainingError
from medssl.runfolder import RunFolder

_MAX_SKIPS_IN_A_ROW = 5

Totals = dict[str, tuple[float, float]]


class Window:
    """Scalars and times of the steps since the last journal line, left on the device until asked for."""

    def __init__(self) -> None:
        self._pending: list[Mapping[str, Tensor]] = []
        self._sums: Totals = {}
        self._steps = 0.0
        self._start = time.perf_counter()
        self._waited = 0.0

    def add(self, scalars: Sequence[Mapping[str, Tensor]], *, waited: float) -> None:
        """Book one step: the scalars (without graph) of its micro batches, and the seconds it waited for batches."""
        self._pending.extend(scalars)
        self._steps += 1
        self._waited += waited

    def totals(self) -> Totals:
        """Numerator and denominator of each mean: scalars over their finite values, seconds a step, percent of waiting.

        Scalars are added one after the other, so that the moment of asking does not change a bit.
        """
        names = dict.fromkeys(name for scalars in self._pending for name in scalars)
        for name in names:
            found = torch.stack([scalars[name].float() for scalars in self._pending if name in scalars]).tolist()
            total, count = self._sums.get(name, (0.0, 0.0))
            for value in filter(math.isfinite, found):
                total, count = total + value, count + 1
            self._sums[name] = (total, count)
        self._pending.clear()
        elapsed = time.perf_counter() - self._start
        return {**self._sums, "step_seconds": (elapsed, self._steps), "stall_percent": (100 * self._waited, elapsed)}

    def restore(self, totals: Mapping[str, Sequence[float]]) -> None:
        """Go on from what :meth:`totals` gave."""
        self._sums = {name: (total, count) for name, (total, count) in totals.items()}
        elapsed, self._steps = self._sums.pop("step_seconds")
        self._waited = self._sums.pop("stall_percent")[0] / 100
        self._start = time.perf_counter() - elapsed


def means(totals: Totals) -> dict[str, float]:
    """The quotients of :meth:`Window.totals`; NaN where no value was finite."""
    return {name: total / count if count else math.nan for name, (total, count) in totals.items()}


class SkipWatch:
    """Counts steps whose loss or gradient was not finite and that the optimiser therefore skipped.

    Args:
        skipped: Count of an earlier part of the run.
        in_a_row: How many of these were the last steps taken.
    """

    def __init__(self, *, skipped: int = 0, in_a_row: int = 0) -> None:
        self.skipped = skipped
        self.in_a_row = in_a_row
        self._pending: list[tuple[int, tuple[str, ...], Tensor]] = []

    def add(self, step: int, case_ids: tuple[str, ...], skipped: Tensor) -> None:
        """Book one step; ``skipped`` is a scalar on the device, above 0 if it was skipped."""
        self._pending.append((step, case_ids, skipped))

    def drain(self) -> list[tuple[int, tuple[str, ...]]]:
        """Steps skipped since the last drain, with their cases; waits for the device.

        Raises:
            TrainingError: after five skipped steps in a row.
        """
        if not self._pending:
            return []
        flags = torch.stack([flag for _, _, flag in self._pending]).tolist()
        found = []
        for (step, cases, _), flag in zip(self._pending, flags, strict=True):
            self.in_a_row = self.in_a_row + 1 if flag else 0
            if flag:
                found.append((step, cases))
                self.skipped += 1
            if self.in_a_row >= _MAX_SKIPS_IN_A_ROW:
                raise TrainingError(
                    f"step {step}: loss or gradient not finite in {self.in_a_row} steps in a row, the last with cases "
                    f"{', '.join(cases)}. Look at these cases, or start in another folder with a lower train.lr or "
                    "train.precision=32.",
                    code="E_NONFINITE_LOSS",
                )
        self._pending.clear()
        return found


class Recorder:
    """Journal of the run folder and, if asked for, TensorBoard; silent in all processes but the first.

    Args:
        run: Where both live.
        tensorboard: Also write TensorBoard files.
        silent: Write nothing.

    Raises:
        ConfigError: if TensorBoard is asked for and not installed.
    """

    def __init__(self, run: RunFolder, *, tensorboard: bool = False, silent: bool = False) -> None:
        self._run = run
        self._silent = silent
        self._writer: Any = None
        if tensorboard and not silent:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError(
                    "train.tensorboard is on and TensorBoard is not installed. "
                    "Install medssl[tensorboard], or set train.tensorboard=false."
                ) from error
            self._writer = SummaryWriter(str(run.path / "tensorboard"))

    def log(self, step: int, values: Mapping[str, object]) -> None:
        """Write one line of named values at ``step``."""
        if self._silent:
            return
        self._run.journal.log(step, **values)
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """End the TensorBoard file."""
        if self._writer is not None:
            self._writer.close()

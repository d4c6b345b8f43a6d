"""All state of a run of the loop, out of its objects into a snapshot and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from medssl.engine.checkpoint import Snapshot
from medssl.engine.monitor import PlateauAlarm
from medssl.engine.optim import WeightAverage
from medssl.engine.record import SkipWatch, Totals, Window
from medssl.errors import CheckpointError
from medssl.trainable import Trainable


@dataclass
class TrainingState:
    """What changes from step to step. The learning rate, the data and every draw are functions of the step instead.

    Args:
        trainable: Parameters and buffers; a method's queues and counters must be buffers.
        optimizer: Moments.
        average: Averaged weights, if wanted.
        scaler: Gradient scaler of fp16, if used.
        plateau: The alarm and its memory.
        skips: Count of skipped steps.
        fingerprint: Digests of recipe and data that a checkpoint belongs to.
        window: Scalars since the last journal line.
        losses: Means of the last journal line.
        checks: Results of the last run of each check, as ``name/number``.
        alarms: Sentences raised so far.
    """

    trainable: Trainable
    optimizer: Optimizer
    average: WeightAverage | None
    scaler: torch.amp.GradScaler | None
    plateau: PlateauAlarm
    skips: SkipWatch
    fingerprint: Mapping[str, str]
    window: Window = field(default_factory=Window)
    losses: dict[str, float] = field(default_factory=dict)
    checks: dict[str, float] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)

    def capture(self, step: int, *, window: Totals) -> Snapshot:
        """Snapshot after ``step`` steps; its tensors are the live ones, to be written at once.

        Args:
            step: Steps taken.
            window: Totals of all processes since the last journal line.
        """
        tensors = {"weights": _only_tensors(self.trainable), "optimizer": self._optimizer_tensors()}
        if self.average is not None:
            tensors["average"] = self.average.state_dict()
        state: dict[str, Any] = {
            "fingerprint": dict(self.fingerprint),
            "skipped": self.skips.skipped,
            "skipped_in_a_row": self.skips.in_a_row,
            "plateau": self.plateau.state_dict(),
            "window": window,
            "losses": self.losses,
            "checks": self.checks,
            "alarms": self.alarms,
            "scaler": self.scaler.state_dict() if self.scaler is not None else {},
        }
        return Snapshot(step, tensors, state)

    def restore(self, snapshot: Snapshot, *, allow_changed: Sequence[str] = (), is_first: bool = True) -> None:
        """Put everything back; the window, which is that of all processes, only in the first.

        Raises:
            CheckpointError: if the snapshot belongs to another recipe, other data or another architecture.
        """
        self._check_fingerprint(snapshot, allow_changed)
        missing = ({"average"} if self.average is not None else set()) - set(snapshot.tensors)
        weights = {name: value.shape for name, value in snapshot.tensors["weights"].items()}
        wanted = {name: value.shape for name, value in _only_tensors(self.trainable).items()}
        differing = sorted(name for name in weights.keys() | wanted if weights.get(name) != wanted.get(name))
        if differing or missing:
            raise CheckpointError(
                f"checkpoint of step {snapshot.step}: {len(differing)} of {len(wanted)} tensors of the trainable are "
                f"missing, unexpected or of another shape ({', '.join([*differing[:3], *sorted(missing)])}). It was "
                "made by another architecture or train.average_weights; use the recipe that made it."
            )
        self.trainable.load_state_dict(dict(snapshot.tensors["weights"]))
        self._restore_optimizer(snapshot.tensors["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(snapshot.tensors["average"])
        if self.scaler is not None:
            self.scaler.load_state_dict(snapshot.state["scaler"])
        self.plateau.load_state_dict(snapshot.state["plateau"])
        self.skips.skipped = snapshot.state["skipped"]
        self.skips.in_a_row = snapshot.state["skipped_in_a_row"]
        if is_first:
            self.window.restore(snapshot.state["window"])
        self.losses = dict(snapshot.state["losses"])
        self.checks = dict(snapshot.state["checks"])
        self.alarms = list(snapshot.state["alarms"])

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        """Moments under ``<slot>.<parameter's name>``."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.trainable.named_parameters()}
        return {
            f"{slot}.{names[parameter]}": value
            for parameter, slots in self.optimizer.state.items()
            for slot, value in slots.items()
            if value is not None
        }

    def _restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        parameters = dict(self.trainable.named_parameters())
        self.optimizer.state.clear()
        for key, value in tensors.items():
            slot, name = key.split(".", 1)
            parameter = parameters[name]
            # moments take the memory order of their parameter: the fused kernel walks both as flat memory
            like = torch.empty_like(parameter) if value.shape == parameter.shape else value
            counts_on_host = slot == "step" and not self.optimizer.defaults["fused"]
            moved = like.to(value.dtype).copy_(value)
            self.optimizer.state[parameter][slot] = moved if counts_on_host else moved.to(parameter.device)

    def _check_fingerprint(self, snapshot: Snapshot, allow_changed: Sequence[str]) -> None:
        saved: Mapping[str, str] = snapshot.state["fingerprint"]
        names = sorted((saved.keys() | self.fingerprint.keys()) - set(allow_changed))
        changed = [name for name in names if saved.get(name) != self.fingerprint.get(name)]
        if changed:
            raise CheckpointError(
                f"checkpoint of step {snapshot.step}: made with another {' and another '.join(changed)} than this run "
                "has. Resume with what it was made with, or choose another folder.",
                code="E_RESUME_DIFF",
            )


def _only_tensors(trainable: Trainable) -> dict[str, Tensor]:
    state = trainable.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{type(trainable).__name__}: state {name} is a {type(value).__name__}; a checkpoint holds tensors "
                "only. Keep it in a buffer."
            )
    return dict(state)

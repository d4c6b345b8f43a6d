"""The loop: the same for every method and every task, which it knows only as a Trainable."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor, distributed, nn

from medssl.engine.bf16 import guard_convolutions
from medssl.engine.checkpoint import CheckpointStore
from medssl.engine.device import compile_children, device_faults, make_fabric, seed_draws, use_channels_last
from medssl.engine.monitor import PlateauAlarm, collapse_alarm, views_alarm
from medssl.engine.optim import TrainConfig, WeightAverage, build_optimizer, learning_rate, set_learning_rate
from medssl.engine.prefetch import Feed, open_feed
from medssl.engine.record import Recorder, SkipWatch, Totals, Window, means
from medssl.engine.signals import StopSignals
from medssl.engine.state import TrainingState
from medssl.errors import CheckpointError, NoInputError, StoppedError, TrainingError
from medssl.progress import track
from medssl.runfolder import RunFolder
from medssl.trainable import Batch, Progress, Trainable

_log = logging.getLogger(__name__)
_MAX_GRACE_STEPS = 5000
_MIN_SCALE = 1.0

Batches = Callable[[int], Iterator[Batch]]


class Check(Protocol):
    """A look at held-out cases while training goes on; run in eval mode, without gradients, in the first process.

    ``every`` counts optimiser steps; 0 takes ``TrainConfig.check_every``. The start and the last step are always
    checked: the first weights are what all later numbers are held against. Where weights are averaged, the average is
    checked, as it is what is exported.
    """

    name: str
    every: int

    def __call__(self, trainable: Trainable, step: int) -> dict[str, float]:
        """Named numbers; ``rank_share`` and ``feature_std`` are watched for collapse."""
        ...


@dataclass(frozen=True)
class FitResult:
    """What a run of the loop leaves.

    Args:
        step: Optimiser steps taken in all.
        losses: Means of the last journal line.
        average: Averaged state that the trainable loads strictly, or None.
        alarms: What the monitors warned of.
        checks: Results of the last run of each check, as ``name/number``; of the averaged weights if there are any.
        skipped: Steps skipped for a loss or gradient that was not finite.
        precision: What "auto" became.
        resumed_from: Step that this call began at.
    """

    step: int
    losses: dict[str, float]
    average: dict[str, Tensor] | None
    alarms: tuple[str, ...]
    checks: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    precision: str = "32"
    resumed_from: int = 0


def fit(
    trainable: Trainable,
    batches: Batches,
    config: TrainConfig,
    *,
    run: RunFolder,
    seed: int,
    resume: Literal["auto", "never", "must"] = "auto",
    checks: Sequence[Check] = (),
    fingerprint: Mapping[str, str] | None = None,
    allow_changed: Sequence[str] = (),
    on_start: Callable[[int], None] | None = None,
) -> FitResult:
    """Train ``trainable`` in place up to ``config.steps``, from the newest sound checkpoint of the run folder.

    Killed at any moment and called again, it ends with the bits of an uninterrupted run on the CPU: learning rate,
    random numbers and data are functions of the step, and the rest is in the checkpoint.

    Args:
        trainable: Method or task.
        batches: Gives, for the optimiser step to start at, the micro batches from there on, ``config.accumulate`` a
            step; with ``config.prefetch`` a thread takes them. It is called once, after the processes are launched;
            :func:`medssl.engine.device.ranks` tells it which share of the data is this process's.
        config: How to train.
        run: Folder of the run, entered; the journal and ``checkpoints/`` are written there.
        seed: Of the random numbers inside the trainable, such as dropout.
        resume: ``auto`` goes on from a checkpoint if there is one, ``must`` needs one, ``never`` refuses one.
        checks: Looks at held-out cases.
        fingerprint: Digests of what a checkpoint must share with this call, such as recipe and data.
        allow_changed: Keys of ``fingerprint`` that may differ.
        on_start: Told the step to start at once it is sure that the run goes on; nothing was written before.

    Raises:
        StoppedError: after a signal; a checkpoint is left.
        TrainingError: after five steps in a row without a finite loss and gradient, or when weights are not finite.
        CheckpointError: if no checkpoint is sound, or none fits this call.
        EnvironmentFaultError: if the disk is full, memory runs out or the device is lost.
    """
    fabric, precision = make_fabric(config, unused_parameters=trainable.unused_parameters)
    fabric.to_device(trainable)
    trainable.train()
    if config.channels_last:
        use_channels_last(trainable)
    guard_convolutions(trainable)
    if config.compile:
        compile_children(trainable)
    optimizer = build_optimizer(trainable.param_groups(), config, fused=precision != "16")
    state = TrainingState(
        trainable,
        optimizer,
        average=WeightAverage(trainable, config.average_weights) if config.average_weights else None,
        scaler=getattr(fabric.strategy.precision, "scaler", None),
        plateau=_plateau_alarm(trainable, config),
        skips=SkipWatch(),
        fingerprint=fingerprint or {},
    )
    store = CheckpointStore(run.path / "checkpoints", keep=config.keep_checkpoints)
    start = _resume(state, store, resume=resume, allow_changed=allow_changed, is_first=fabric.is_global_zero)
    fabric.barrier()
    if on_start is not None:
        on_start(start)
    with ExitStack() as stack:
        recorder = Recorder(run, tensorboard=config.tensorboard, silent=not fabric.is_global_zero)
        stack.callback(recorder.close)
        recorder.log(start, _opening(fabric, precision, state))
        stop = stack.enter_context(StopSignals())
        stack.enter_context(device_faults(config))
        prepare = partial(trainable.prepare, training=True)
        data = open_feed(batches(start), prepare, device=fabric.device, prefetch=config.prefetch)
        stack.callback(data.close)
        loop = _Loop(fabric, config, state=state, store=store, recorder=recorder, checks=checks, seed=seed)
        loop.begin(start)
        steps = range(start, config.steps)
        for step in track(steps, "training", total=config.steps, completed=start, status=loop.status):
            loop.step(step, data)
            done, last = step + 1, step + 1 == config.steps
            stopping = stop.wanted() and not last
            if last or done % config.log_every == 0:
                loop.log(done)
            loop.check(done, last=last)
            if last or stopping or done % config.checkpoint_every == 0:
                loop.save(done)
            if stopping:
                raise StoppedError(
                    f"stopped by a signal after step {done} of {config.steps}, with a good checkpoint. "
                    "Run the same command to go on."
                )
    return FitResult(
        step=max(start, config.steps),
        losses=state.losses,
        average=state.average.state_dict() if state.average is not None else None,
        alarms=tuple(state.alarms),
        checks=state.checks if checks else {},
        skipped=state.skips.skipped,
        precision=precision,
        resumed_from=start,
    )


class _Loop:
    """What the loop does with a step, and between steps."""

    def __init__(
        self,
        fabric: Fabric,
        config: TrainConfig,
        *,
        state: TrainingState,
        store: CheckpointStore,
        recorder: Recorder,
        checks: Sequence[Check],
        seed: int,
    ) -> None:
        self.fabric, self.config, self.state, self.store, self.recorder = fabric, config, state, store, recorder
        self.checks = checks if fabric.is_global_zero else ()
        self.seed = seed
        self._has_warned_of_views = False
        self.model, self.optimizer = fabric.setup(_Forward(state.trainable), state.optimizer)

    def begin(self, start: int) -> None:
        """Check first weights, for reference, and finished ones that a kill left without results."""
        if start == 0:
            self._run_checks(0, self.checks)
        elif start >= self.config.steps and not self.state.checks:
            self.check(start, last=True)

    def step(self, step: int, data: Feed) -> None:
        """Forward and backward over the micro batches, clip, descend, and let averages and teachers follow."""
        fabric, config, state = self.fabric, self.config, self.state
        progress = Progress(step, config.steps)
        set_learning_rate(state.optimizer, learning_rate(step, config))
        self._seed(step, 0)
        state.trainable.before_step(progress)
        scalars: list[dict[str, Tensor]] = []
        cases: tuple[str, ...] = ()
        before = data.waited
        for part in range(config.accumulate):
            batch = _next(data, step)
            self._seed(step, part + 1)  # after the fetch: a loader may draw when it starts, which a resume repeats
            with fabric.no_backward_sync(self.model, enabled=part + 1 < config.accumulate):
                total, named = self.model(batch)
                fabric.backward(_nan_unless_finite(total) / config.accumulate)
            scalars.append({"loss": total.detach(), **{name: value.detach() for name, value in named.items()}})
            scalars.append({f"views/{name}": note.float().mean() for name, note in batch.notes.items()})
            cases += batch.case_ids
        max_norm = config.clip_norm or math.inf
        norm = fabric.clip_gradients(self.model, self.optimizer, max_norm=max_norm, error_if_nonfinite=False)
        assert norm is not None  # noqa: S101  max_norm is given
        self._descend(step, cases, norm, scalars)
        state.trainable.after_step(progress)
        if state.average is not None:
            state.average.update(step)
        state.window.add([*scalars, {"grad_norm": norm}], waited=data.waited - before)

    def log(self, done: int) -> None:
        """Write the means since the last line, and look at the loss."""
        self._drain()
        state = self.state
        state.losses = means(self._across_processes(state.window.totals()))
        state.window = Window()
        lr = learning_rate(done - 1, self.config)
        self.recorder.log(done, {**state.losses, "lr": lr, "skipped_steps": state.skips.skipped})
        self._alarm(done, state.plateau.update(done, state.losses[state.plateau.monitor]))
        empty = views_alarm(state.losses)
        if empty is not None and not self._has_warned_of_views:
            self._has_warned_of_views = True
            self._alarm(done, empty)
        if state.scaler is not None and state.scaler.get_scale() < _MIN_SCALE:
            scale = state.scaler.get_scale()
            self._alarm(done, f"the fp16 loss scale fell to {scale:.2g}; start another run with train.precision=bf16")

    def status(self) -> str:
        """Loss and stall of the last journal line, for the progress bar."""
        losses = self.state.losses
        return f"loss {losses['loss']:.4g}  stall {losses['stall_percent']:.0f} %" if losses else ""

    def check(self, done: int, *, last: bool) -> None:
        """Run the checks that are due, and look for collapse."""
        due = [check for check in self.checks if last or done % (check.every or self.config.check_every) == 0]
        for name, found in self._run_checks(done, due).items():
            self.state.checks.update({f"{name}/{key}": value for key, value in found.items()})
            self._collapse(done, name, collapse_alarm(found))

    def save(self, done: int) -> None:
        """Write a checkpoint, in the first process, while the others wait."""
        self._drain()
        window = self._across_processes(self.state.window.totals())
        if self.fabric.is_global_zero:
            self.store.save(self.state.capture(done, window=window))
        self.fabric.barrier()

    def _run_checks(self, done: int, due: Sequence[Check]) -> dict[str, dict[str, float]]:
        """Run checks on what would be exported, in eval mode and without gradients, and put everything back."""
        if not due:
            return {}
        trainable, average = self.state.trainable, self.state.average
        modes = [(module, module.training) for module in trainable.modules()]
        trainable.eval()
        found = {}
        with torch.no_grad(), self.fabric.autocast(), average.applied() if average is not None else nullcontext():
            for check in due:
                self._seed(done, 0)
                found[check.name] = check(trainable, done)
                self.recorder.log(done, {f"{check.name}/{key}": value for key, value in found[check.name].items()})
        for module, mode in modes:
            module.training = mode
        return found

    def _seed(self, step: int, part: int) -> None:
        seed_draws(_mix(self.seed, step, part, self.fabric.global_rank), device=self.fabric.device)

    def _descend(self, step: int, cases: tuple[str, ...], norm: Tensor, scalars: list[dict[str, Tensor]]) -> None:
        """One optimiser step, skipped on the device itself if the gradient is not finite."""
        state = self.state
        if state.scaler is None:
            skipped = torch.isfinite(norm).logical_not().float()
            vars(state.optimizer)["found_inf"] = skipped  # the fused kernels of torch leave all as it is if it is set
        else:
            # an overflow of the scaled gradient is the scaler's daily work; a loss that is not finite is not
            loss = torch.stack([values["loss"].float() for values in scalars if "loss" in values])
            skipped = torch.isfinite(loss).all().logical_not().float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        state.skips.add(step, cases, skipped)
        if self.fabric.device.type == "cpu":
            self._drain()

    def _drain(self) -> None:
        for step, cases in self.state.skips.drain():
            self.recorder.log(step + 1, {"skipped": True, "cases": list(cases)})

    def _across_processes(self, totals: Totals) -> Totals:
        if self.fabric.world_size == 1:
            return totals
        names = sorted(totals)
        values = torch.tensor([totals[name] for name in names], dtype=torch.float64, device=self.fabric.device)
        distributed.all_reduce(values)
        summed = dict(zip(names, values.tolist(), strict=True))
        return {name: (summed[name][0], summed[name][1]) for name in totals}

    def _alarm(self, done: int, sentence: str | None) -> None:
        if sentence is not None:
            self.state.alarms.append(sentence)
            self.recorder.log(done, {"alarm": sentence})
            _log.warning("step %d: %s.", done, sentence)

    def _collapse(self, done: int, name: str, sentence: str | None) -> None:
        self._alarm(done, sentence and f"check {name}: {sentence}")
        if sentence is not None and self.config.stop_on_collapse:
            raise TrainingError(
                f"step {done}: check {name}: {sentence}. Start in another folder with a lower train.lr or other "
                "settings of the method, or go on with train.stop_on_collapse=false, which only warns.",
                code="E_COLLAPSE",
            )


class _Forward(nn.Module):
    """The trainable behind plain containers, as Fabric and DDP look into what a module returns."""

    def __init__(self, trainable: Trainable) -> None:
        super().__init__()
        self.trainable = trainable

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.trainable(batch)
        return losses.total, {**losses.parts, **losses.monitors}


def _resume(
    state: TrainingState,
    store: CheckpointStore,
    *,
    resume: Literal["auto", "never", "must"],
    allow_changed: Sequence[str],
    is_first: bool,
) -> int:
    """Step to start at, after putting back what the newest sound checkpoint holds."""
    steps = store.steps()
    if resume == "never" and steps:
        raise CheckpointError(
            f"{store.folder}: holds checkpoints up to step {steps[-1]}, and this run is to start anew. "
            "Choose another folder, or go on with resume=auto.",
            code="E_RESUME_EXISTS",
        )
    snapshot = store.load()
    if snapshot is None:
        if resume == "must":
            raise CheckpointError(
                f"{store.folder}: no checkpoint to resume from. Check the folder, or use resume=auto to start anew.",
                code="E_RESUME_NOTHING",
            )
        return 0
    state.restore(snapshot, allow_changed=allow_changed, is_first=is_first)
    _log.info("resuming from step %d in %s.", snapshot.step, store.folder)
    return snapshot.step


def _opening(fabric: Fabric, precision: str, state: TrainingState) -> dict[str, object]:
    """First line of this call in the journal."""
    parameters = sum(p.numel() for p in state.trainable.parameters() if p.requires_grad)
    return {
        "started": type(state.trainable).__name__,
        "device": fabric.device.type,
        "processes": fabric.world_size,
        "precision": precision,
        "trainable_parameters": parameters,
        "chance_level": state.plateau.chance,
        "chance_monitor": state.plateau.monitor,
    }


def _plateau_alarm(trainable: Trainable, config: TrainConfig) -> PlateauAlarm:
    grace = config.warmup_steps + min(_MAX_GRACE_STEPS, config.steps // 4)
    return PlateauAlarm(trainable.chance_level(), monitor=trainable.chance_monitor, after_step=grace)


def _next(data: Feed, step: int) -> Batch:
    try:
        return next(data)
    except StopIteration:
        raise NoInputError(
            f"step {step}: the batches ended; the run needs steps x accumulate of them. Give batches without an end, "
            "or fewer train.steps."
        ) from None


def _nan_unless_finite(total: Tensor) -> Tensor:
    """``total`` itself; or NaN, gradient included, so that all processes see in the norm that one of them failed."""
    return total * (total - total + 1.0).detach()


def _mix(*numbers: int) -> int:
    """Seed of 63 bits that is a pure function of ``numbers`` (the finaliser of splitmix64 over each)."""
    mask = (1 << 64) - 1
    h = 0
    for number in numbers:
        h = (h + number + 0x9E3779B97F4A7C15) & mask
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & mask
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & mask
        h ^= h >> 31
    return h >> 1

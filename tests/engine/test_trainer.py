from __future__ import annotations

import builtins
import itertools
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medssl.engine import device, trainer
from medssl.engine.checkpoint import CheckpointStore
from medssl.engine.device import KeepInputs, device_faults, ranks, resolve_precision
from medssl.engine.optim import TrainConfig
from medssl.engine.trainer import FitResult, fit
from medssl.errors import (
    CheckpointError,
    ConfigError,
    EnvironmentFaultError,
    ExitCode,
    NoInputError,
    StoppedError,
    TrainingError,
)
from medssl.runfolder import RunFolder, read_journal
from medssl.trainable import Batch, Losses, ParamGroup, Progress, Trainable


class Regressor(Trainable):
    """A line through points, with a dropout and a follower of its own."""

    def __init__(self, *, chance: float | None = None, dropout: float = 0.1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.chance = chance
        self.progress: list[tuple[str, Progress]] = []
        self.dtypes: set[torch.dtype] = set()

    def forward(self, batch: Batch) -> Losses:
        x = batch["x"]
        self.dtypes.add(x.dtype)
        error = F.mse_loss(self.net(x).float(), x.sum(1, keepdim=True))
        return Losses(error, {"error": error}, {"mean": x.mean()})

    def before_step(self, progress: Progress) -> None:
        self.progress.append(("before", progress))

    def after_step(self, progress: Progress) -> None:
        self.progress.append(("after", progress))
        self.seen += 1

    def chance_level(self) -> float | None:
        return self.chance


def _batch(number: int, *, scale: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(6, 4, generator=generator) * scale
    return Batch({"x": x}, torch.arange(6) + number, tuple(f"case_{number}_{i}" for i in range(6)))


def _batches(accumulate: int = 1, *, hook: Callable[[int], float | None] = lambda _: None) -> trainer.Batches:
    def factory(start: int) -> Iterator[Batch]:
        for number in itertools.count(start * accumulate):
            scale = hook(number)
            yield _batch(number, scale=1.0 if scale is None else scale)

    return factory


def _fit(folder: Path, trainable: Trainable, batches: trainer.Batches | None = None, **options: Any) -> FitResult:
    settings = {"steps": 6, "lr": 0.01, "log_every": 2, "checkpoint_every": 3, "precision": "32"}
    keywords = {
        name: options.pop(name)
        for name in set(options) & {"resume", "checks", "fingerprint", "allow_changed", "on_start"}
    }
    with RunFolder(folder) as run:
        return fit(
            trainable, batches or _batches(), TrainConfig(**{**settings, **options}), run=run, seed=7, **keywords
        )


def test_training_takes_every_step_and_tells_the_hooks(tmp_path: Path) -> None:
    method = Regressor()
    result = _fit(tmp_path, method, steps=60)
    assert result.step == 60
    assert result.resumed_from == 0
    assert method.seen == 60
    assert method.progress[:2] == [("before", Progress(0, 60)), ("after", Progress(0, 60))]
    lines = [line for line in read_journal(tmp_path / "journal.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(2, 61, 2))
    assert lines[-1].keys() >= {"loss", "error", "mean", "grad_norm", "lr", "step_seconds", "stall_percent"}
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert result.losses["loss"] == lines[-1]["loss"]


def test_the_journal_opens_with_what_runs_where(tmp_path: Path) -> None:
    _fit(tmp_path, Regressor(chance=0.5))
    opening = read_journal(tmp_path / "journal.jsonl")[0]
    assert opening["started"] == "Regressor"
    assert opening["precision"] == "32"
    assert opening["trainable_parameters"] == 49
    assert opening["chance_level"] == 0.5


def test_journal_losses_are_means_since_the_last_line(tmp_path: Path) -> None:
    seen: list[float] = []

    class Recording(Regressor):
        def forward(self, batch: Batch) -> Losses:
            losses = super().forward(batch)
            seen.append(float(losses.total.detach()))
            return losses

    _fit(tmp_path, Recording(), steps=4)
    lines = [line for line in read_journal(tmp_path / "journal.jsonl") if "loss" in line]
    assert [line["loss"] for line in lines] == pytest.approx([sum(seen[:2]) / 2, sum(seen[2:]) / 2])


def test_the_loop_equals_the_bare_loop(tmp_path: Path) -> None:
    method, twin = Regressor(dropout=0.0), Regressor(dropout=0.0)
    _fit(tmp_path, method, steps=5, clip_norm=None, weight_decay=0.0, schedule="constant")
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.0)
    for number in range(5):
        optimizer.zero_grad()
        twin(_batch(number)).total.backward()
        optimizer.step()
    for ours, theirs in zip(method.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_accumulated_micro_batches_equal_one_large_batch(tmp_path: Path) -> None:
    def joined(start: int) -> Iterator[Batch]:
        for step in itertools.count(start):
            parts = [_batch(2 * step), _batch(2 * step + 1)]
            x = torch.cat([part["x"] for part in parts])
            yield Batch({"x": x}, torch.arange(12), tuple(c for part in parts for c in part.case_ids))

    small, large = Regressor(dropout=0.0), Regressor(dropout=0.0)
    _fit(tmp_path / "small", small, _batches(2), accumulate=2, optimizer="sgd")
    _fit(tmp_path / "large", large, joined, optimizer="sgd")
    for ours, theirs in zip(small.parameters(), large.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_gradient_is_clipped(tmp_path: Path) -> None:
    method, start = Regressor(), Regressor()
    _fit(tmp_path, method, steps=1, lr=1.0, optimizer="sgd", momentum=0.0, weight_decay=0.0, clip_norm=0.01)
    moved = sum(
        float(((a - b).detach() ** 2).sum()) for a, b in zip(method.parameters(), start.parameters(), strict=True)
    )
    assert math.sqrt(moved) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
def test_every_precision_trains_and_leaves_inputs_in_float32(tmp_path: Path, precision: str) -> None:
    method = Regressor()
    result = _fit(tmp_path, method, steps=40, precision=precision)
    assert result.precision == precision
    assert method.dtypes == {torch.float32}
    assert {p.dtype for p in method.parameters()} == {torch.float32}
    losses = [line["loss"] for line in read_journal(tmp_path / "journal.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("flag", "expected"), [(True, "bf16"), (False, "32")])
def test_automatic_precision_follows_the_hardware(flag: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: flag)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: flag)
    assert resolve_precision("auto", device="cpu") == expected
    assert resolve_precision("auto", device="cuda") == expected
    assert resolve_precision("auto", device="mps") == "32"
    assert resolve_precision("16", device="cpu") == "16"


def test_autocast_leaves_inputs_and_outputs_alone() -> None:
    plugin = KeepInputs("bf16-mixed", "cpu")
    x = torch.tensor([1024.5])
    assert plugin.convert_input(x) is x
    assert plugin.convert_output(x) is x


def test_channels_last_trains_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    class Convolutions(Trainable):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.net = nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(24, 1))

        def forward(self, batch: Batch) -> Losses:
            return Losses(self.net(batch["x"].reshape(3, 2, 2, 2, 1).repeat(1, 1, 1, 1, 2)).square().mean())

    straight, first, second = Convolutions(), Convolutions(), Convolutions()
    _fit(tmp_path / "straight", straight, channels_last=True)
    assert straight.net[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    with pytest.raises(StoppedError):
        _fit(tmp_path / "parts", first, _batches(hook=_signal_at(2, signal.SIGTERM)), channels_last=True)
    _fit(tmp_path / "parts", second, channels_last=True)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))


def test_compile_reaches_the_child_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))  # noqa: PLW0108  a method must bind
    method = Regressor()
    method.add_module("nothing", nn.Identity())
    _fit(tmp_path, method, steps=1, compile=True)
    assert compiled == [method.net]


def _signal_at(step: int, number: signal.Signals, *, times: int = 1) -> Callable[[int], None]:
    def hook(current: int) -> None:
        if current == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return hook


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_ends_the_step_saves_and_asks_for_a_requeue(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(StoppedError, match="after step 2 of 6") as caught:
        _fit(tmp_path, Regressor(), _batches(hook=_signal_at(1, number)), prefetch=False)
    assert caught.value.exit_code == ExitCode.PREEMPTED
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == "step_00000002\n"
    assert signal.getsignal(number) is before
    assert _fit(tmp_path, Regressor()).resumed_from == 2


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(StoppedError, match="second interrupt") as caught:
        _fit(tmp_path, Regressor(), _batches(hook=_signal_at(4, signal.SIGINT, times=2)), prefetch=False)
    assert caught.value.exit_code == ExitCode.INTERRUPTED
    assert _fit(tmp_path, Regressor()).resumed_from == 3


def test_a_signal_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    assert _fit(tmp_path, Regressor(), _batches(hook=_signal_at(5, signal.SIGTERM)), prefetch=False).step == 6


def test_outside_the_main_thread_signals_stay_as_they_are(tmp_path: Path) -> None:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(_fit(tmp_path, Regressor()).step))
    thread.start()
    thread.join()
    assert results == [6]


def test_a_bad_step_is_skipped_and_named(tmp_path: Path) -> None:
    method, twin = Regressor(dropout=0.0), Regressor(dropout=0.0)
    result = _fit(tmp_path, method, _batches(hook=lambda n: math.nan if n == 3 else None), schedule="constant")
    assert result.skipped == 1
    assert all(torch.isfinite(p).all() for p in method.parameters())
    line = next(line for line in read_journal(tmp_path / "journal.jsonl") if "skipped" in line)
    assert line["step"] == 4
    assert line["cases"] == [f"case_3_{i}" for i in range(6)]
    numbers = iter([0, 1, 2, 4, 5])

    def without(_: int) -> Iterator[Batch]:
        return (_batch(n) for n in numbers)

    _fit(tmp_path / "twin", twin, without, steps=5, schedule="constant")
    assert all(torch.equal(a, b) for a, b in zip(method.parameters(), twin.parameters(), strict=True))


def test_five_bad_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 8: .* 5 steps in a row, the last with cases case_8_0") as caught:
        _fit(tmp_path, Regressor(), _batches(hook=lambda n: math.inf if n >= 4 else None), steps=20)
    assert caught.value.exit_code == ExitCode.INTEGRITY
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == "step_00000006\n"


def test_four_bad_steps_are_forgiven_and_counted_across_a_resume(tmp_path: Path) -> None:
    def hook(number: int) -> float | None:
        return math.nan if number in {1, 2, 3, 4} else None

    assert _fit(tmp_path, Regressor(), _batches(hook=hook), steps=3).skipped == 2
    assert _fit(tmp_path, Regressor(), _batches(hook=hook), steps=8).skipped == 4


def test_a_finite_gradient_of_a_loss_that_is_not_finite_is_skipped_too(tmp_path: Path) -> None:
    class Offset(Regressor):
        def forward(self, batch: Batch) -> Losses:
            losses = super().forward(batch)
            return Losses(losses.total + (math.inf if int(batch.seeds[0]) == 2 else 0.0))

    assert _fit(tmp_path, Offset()).skipped == 1


def test_fp16_counts_only_losses_that_are_not_finite(tmp_path: Path) -> None:
    result = _fit(tmp_path, Regressor(), _batches(hook=lambda n: math.nan if n == 1 else None), precision="16")
    assert result.skipped == 1


def test_a_vanishing_fp16_scale_raises_an_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda _: 1e-3)
    result = _fit(tmp_path, Regressor(), precision="16")
    assert any("fp16 loss scale fell to 0.001" in alarm for alarm in result.alarms)


def test_weights_that_are_not_finite_end_the_run_and_are_not_saved(tmp_path: Path) -> None:
    class Poisoned(Regressor):
        def after_step(self, progress: Progress) -> None:
            if progress.step == 4:
                with torch.no_grad():
                    self.net[0].bias[0] = math.nan

    with pytest.raises(TrainingError, match="holds NaN"):
        _fit(tmp_path, Poisoned())
    assert _fit(tmp_path, Regressor()).resumed_from == 3


class Watch:
    """A check that records what it sees."""

    def __init__(self, name: str = "watch", every: int = 0, **results: float) -> None:
        self.name, self.every, self.results = name, every, results
        self.seen: list[int] = []
        self.draws: list[float] = []

    def __call__(self, trainable: Trainable, step: int) -> dict[str, float]:
        assert not any(module.training for module in trainable.modules())
        assert not torch.is_grad_enabled()
        self.seen.append(step)
        self.draws.append(float(torch.rand(())))
        return {"value": step / 2, **self.results}


def test_checks_run_when_due_and_at_the_end(tmp_path: Path) -> None:
    often, default = Watch("often", 4), Watch("default")
    result = _fit(tmp_path, Regressor(), steps=10, check_every=3, checks=[often, default])
    assert often.seen == [0, 4, 8, 10]
    assert default.seen == [0, 3, 6, 9, 10]
    assert result.checks == {"often/value": 5.0, "default/value": 5.0}
    lines = [line for line in read_journal(tmp_path / "journal.jsonl") if "often/value" in line]
    assert [line["step"] for line in lines] == [0, 4, 8, 10]


def test_first_weights_are_checked_once_and_not_judged(tmp_path: Path) -> None:
    watch = Watch(every=5, rank_share=0.01)
    result = _fit(tmp_path, Regressor(), steps=4, checkpoint_every=2, checks=[watch])
    assert watch.seen == [0, 4]
    assert [line["step"] for line in read_journal(tmp_path / "journal.jsonl") if "alarm" in line] == [4]
    assert len(result.alarms) == 1
    again = Watch()
    _fit(tmp_path, Regressor(), steps=6, checkpoint_every=2, checks=[again])
    assert again.seen == [6]


class Weigh:
    """A check that tells the first weight."""

    name, every = "weigh", 2

    def __call__(self, trainable: Trainable, step: int) -> dict[str, float]:
        return {"weight": float(next(trainable.parameters()).detach().flatten()[0])}


def test_checks_look_at_the_averaged_weights_and_leave_the_others_alone(tmp_path: Path) -> None:
    plain, watched = Regressor(), Regressor()
    _fit(tmp_path / "plain", plain, average_weights=0.9)
    result = _fit(tmp_path / "watched", watched, average_weights=0.9, checks=[Weigh()])
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert result.average is not None
    average = float(result.average["net.0.weight"].flatten()[0])
    assert result.checks == {"weigh/weight": average}
    assert average != float(watched.net[0].weight.detach().flatten()[0])


def test_a_finished_run_called_again_has_the_results_of_its_checks(tmp_path: Path) -> None:
    first = _fit(tmp_path / "a", Regressor(), average_weights=0.9, checks=[Weigh()])
    watch = Watch()
    assert _fit(tmp_path / "a", Regressor(), average_weights=0.9, checks=[watch]).checks == first.checks
    assert watch.seen == []
    unchecked = _fit(tmp_path / "b", Regressor(), average_weights=0.9)
    assert unchecked.checks == {}
    again = _fit(tmp_path / "b", Regressor(), average_weights=0.9, checks=[Weigh()])
    assert again.checks == first.checks


def test_checks_change_neither_modes_nor_the_run(tmp_path: Path) -> None:
    class Frozen(Regressor):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.net[0].eval()
            return self

    plain, watched = Frozen(), Frozen()
    _fit(tmp_path / "plain", plain)
    watch = Watch(every=1)
    _fit(tmp_path / "watched", watched, checks=[watch])
    assert [m.training for m in plain.modules()] == [m.training for m in watched.modules()]
    assert watched.net[1].training
    assert not watched.net[0].training
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    again = Watch(every=1)
    _fit(tmp_path / "again", Frozen(), checks=[again])
    assert again.draws == watch.draws


def test_collapse_warns_or_stops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = _fit(tmp_path / "warn", Regressor(), checks=[Watch(every=5, rank_share=0.01)])
    assert "check watch: features collapsed" in result.alarms[0]
    assert "features collapsed" in caplog.text
    with pytest.raises(TrainingError, match=r"step 5: check watch: features collapsed"):
        _fit(tmp_path / "stop", Regressor(), checks=[Watch(every=5, rank_share=0.01)], stop_on_collapse=True)


def test_a_loss_on_its_plateau_raises_an_alarm_that_a_resume_remembers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = _fit(tmp_path, Regressor(chance=1e-6), steps=6)
    assert len(result.alarms) == 1
    assert "is what a network gets that ignores its input" in caplog.text
    assert any("alarm" in line for line in read_journal(tmp_path / "journal.jsonl"))
    assert _fit(tmp_path, Regressor(chance=1e-6), steps=12).alarms == result.alarms


def test_the_alarm_watches_what_the_trainable_names(tmp_path: Path) -> None:
    class Named(Regressor):
        chance_monitor = "mean"

    result = _fit(tmp_path, Named(chance=-100.0))
    assert result.alarms[0].startswith("mean ")
    assert read_journal(tmp_path / "journal.jsonl")[0]["chance_monitor"] == "mean"
    assert _fit(tmp_path / "other", Named(chance=100.0)).alarms == ()


def test_a_kill_between_two_lines_of_the_journal_leaves_the_same_lines_and_the_same_alarm(tmp_path: Path) -> None:
    def lines(folder: Path) -> list[dict[str, Any]]:
        times = {"step_seconds", "stall_percent"}
        found = [line for line in read_journal(folder / "journal.jsonl") if "loss" in line or "alarm" in line]
        return [{key: value for key, value in line.items() if key not in times} for line in found]

    options = {"steps": 9, "log_every": 4, "checkpoint_every": 3}
    straight = _fit(tmp_path / "straight", Regressor(chance=1e-6), **options)

    def die(number: int) -> None:
        if number == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / "killed", Regressor(chance=1e-6), _batches(hook=die), **options)
    resumed = _fit(tmp_path / "killed", Regressor(chance=1e-6), **options)
    assert resumed.resumed_from == 3
    assert lines(tmp_path / "killed") == lines(tmp_path / "straight")
    states = [
        CheckpointStore(tmp_path / name / "checkpoints").load().state["plateau"] for name in ("straight", "killed")
    ]
    assert states[0] == states[1]
    assert resumed.losses["loss"] == straight.losses["loss"]


def test_nothing_is_told_or_written_before_a_resume_is_granted(tmp_path: Path) -> None:
    told: list[int] = []
    _fit(tmp_path, Regressor(), fingerprint={"recipe": "a"}, on_start=told.append)
    before = (tmp_path / "journal.jsonl").read_bytes()
    with pytest.raises(CheckpointError):
        _fit(tmp_path, Regressor(), fingerprint={"recipe": "b"}, on_start=told.append)
    assert told == [0]
    assert (tmp_path / "journal.jsonl").read_bytes() == before
    _fit(tmp_path, Regressor(), fingerprint={"recipe": "a"}, on_start=told.append, steps=8)
    assert told == [0, 6]


def test_averaged_weights_lag_behind_and_load_strictly(tmp_path: Path) -> None:
    method = Regressor()
    result = _fit(tmp_path, method, average_weights=0.9)
    assert result.average is not None
    fresh = Regressor()
    fresh.load_state_dict(result.average)
    assert not torch.equal(fresh.net[0].weight, method.net[0].weight)
    assert fresh.seen == 6


def test_a_finished_run_returns_what_it_had(tmp_path: Path) -> None:
    first = _fit(tmp_path, Regressor())
    second = _fit(tmp_path, method := Regressor())
    assert second.step == 6
    assert second.resumed_from == 6
    assert second.losses == first.losses
    assert method.seen == 6


def test_resume_must_find_and_never_must_not(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        _fit(tmp_path, Regressor(), resume="must")
    _fit(tmp_path, Regressor(), resume="never")
    assert _fit(tmp_path, Regressor(), resume="must", steps=8).resumed_from == 6
    with pytest.raises(CheckpointError, match="holds checkpoints up to step 8"):
        _fit(tmp_path, Regressor(), resume="never")


def test_another_recipe_or_other_data_are_not_resumed(tmp_path: Path) -> None:
    _fit(tmp_path, Regressor(), fingerprint={"recipe": "a", "data": "b"})
    with pytest.raises(CheckpointError, match="another data than this run") as caught:
        _fit(tmp_path, Regressor(), fingerprint={"recipe": "a", "data": "c"})
    assert caught.value.code == "E_RESUME_DIFF"
    assert _fit(
        tmp_path, Regressor(), fingerprint={"recipe": "a", "data": "c"}, allow_changed=["data"]
    ).resumed_from == 6  # fmt: skip


def test_another_architecture_is_not_resumed(tmp_path: Path) -> None:
    _fit(tmp_path, Regressor())

    class Wider(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.net[2] = nn.Linear(8, 2)

    with pytest.raises(CheckpointError, match=r"2 of 5 tensors .*net\.2\.bias"):
        _fit(tmp_path, Wider())
    with pytest.raises(CheckpointError, match="average"):
        _fit(tmp_path, Regressor(), average_weights=0.5)


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Stateful(Regressor):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

        def set_extra_state(self, state: object) -> None: ...

    with pytest.raises(CheckpointError, match="Keep it in a buffer"):
        _fit(tmp_path, Stateful())


def test_batches_that_end_too_early_are_named(tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match="step 2: the batches ended"):
        _fit(tmp_path, Regressor(), lambda start: iter([_batch(0), _batch(1)]))


def test_the_source_of_batches_is_closed(tmp_path: Path) -> None:
    closed: list[bool] = []

    def factory(_: int) -> Iterator[Batch]:
        try:
            for number in itertools.count():
                yield _batch(number)
        finally:
            closed.append(True)

    _fit(tmp_path, Regressor(), factory)
    assert closed == [True]


def test_parameters_without_a_gradient_wait_their_turn(tmp_path: Path) -> None:
    class Thawing(Regressor):
        def param_groups(self) -> list[ParamGroup]:
            return [ParamGroup("all", list(self.parameters()))]

        def before_step(self, progress: Progress) -> None:
            self.net[0].requires_grad_(progress.step >= 4)

    for optimizer in ("adamw", "sgd"):
        straight, second = Thawing(), Thawing()
        _fit(tmp_path / f"{optimizer}_straight", straight, optimizer=optimizer)
        assert not torch.equal(straight.net[0].weight, Regressor().net[0].weight)
        for hook, method in ((_signal_at(4, signal.SIGTERM), Thawing()), (_signal_at(2, signal.SIGTERM), Thawing())):
            folder = tmp_path / f"{optimizer}_{id(hook)}"
            with pytest.raises(StoppedError):
                _fit(folder, method, _batches(hook=hook), optimizer=optimizer)
            second = Thawing()
            _fit(folder, second, optimizer=optimizer)
            assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (torch.OutOfMemoryError("x"), "E_OUT_OF_MEMORY", "train.batch_size=2 train.accumulate=2"),
        (MemoryError(), "E_OUT_OF_MEMORY", "train.batch_size=2"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), "E_OUT_OF_MEMORY", "4 samples a step"),
        (torch.AcceleratorError("CUDA error: launch failure\nmore"), "E_DEVICE", "CUDA error: launch failure"),
    ],
)
def test_a_device_in_trouble_ends_with_a_setting_to_try(fault: Exception, code: str, words: str) -> None:
    with pytest.raises(EnvironmentFaultError, match=words) as caught, device_faults(TrainConfig(batch_size=4)):
        raise fault
    assert caught.value.code == code
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


def test_other_errors_pass_the_device_by() -> None:
    with pytest.raises(RuntimeError, match="something else"), device_faults(TrainConfig()):
        raise RuntimeError("something else")
    with pytest.raises(EnvironmentFaultError, match="smaller crop_voxels"), device_faults(TrainConfig(batch_size=1)):
        raise MemoryError


def test_a_process_on_its_own_is_the_first_of_one() -> None:
    assert ranks() == (0, 1)


def test_tensorboard_gets_the_same_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    _fit(tmp_path, Regressor(), tensorboard=True)
    assert list((tmp_path / "tensorboard").iterdir())


def test_tensorboard_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"Install medssl\[tensorboard\]"):
        _fit(tmp_path, Regressor(), tensorboard=True)


def test_seeding_reaches_the_generators_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    device.seed_draws(5, device=torch.device("cuda"))
    first = torch.rand(3)
    device.seed_draws(5, device=torch.device("cpu"))
    assert torch.equal(torch.rand(3), first)
    assert seeds == [5]


def test_seeds_of_neighbouring_steps_have_nothing_in_common() -> None:
    seeds = [trainer._mix(0, step) for step in range(2000)]
    assert len(set(seeds)) == 2000
    bits = torch.tensor([[seed >> k & 1 for k in range(63)] for seed in seeds], dtype=torch.float)
    assert float((bits.mean(0) - 0.5).abs().max()) < 0.05
    assert trainer._mix(1, 2) != trainer._mix(2, 1)


def test_a_loss_that_is_finite_is_not_touched_by_the_guard() -> None:
    x = torch.tensor(0.1, requires_grad=True)
    guarded: Tensor = trainer._nan_unless_finite(x * 3)
    guarded.backward()
    assert torch.equal(guarded.detach(), x.detach() * 3)
    assert x.grad == 3.0

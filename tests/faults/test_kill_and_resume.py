"""Kill -9 at any moment, run again: the same bits as if nothing had happened.

The file is also the script that gets killed: ``python test_kill_and_resume.py <folder>``.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from medssl.engine.checkpoint import CheckpointStore, Snapshot
from medssl.engine.optim import TrainConfig
from medssl.engine.trainer import fit
from medssl.runfolder import RunFolder, read_journal
from medssl.trainable import Batch, Losses, Progress, Trainable

ACCUMULATE = 2


class Student(Trainable):
    """All that can go wrong in a resume: dropout, batch statistics, a teacher, a queue with its pointer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 4))
        self.teacher = nn.Linear(5, 4).requires_grad_(False)
        nn.init.constant_(self.teacher.weight, 0.1)
        nn.init.zeros_(self.teacher.bias)
        self.register_buffer("queue", torch.zeros(7, 4))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Batch) -> Losses:
        z = self.net(batch["x"]).float()
        target = self.teacher(batch["x"]).float() + 0.1 * self.queue.mean(0)
        self.last = z.detach().mean(0)
        loss = (z - target).square().mean() + 0.1 * (z * torch.rand(4)).abs().mean()
        return Losses(loss, {"fit": loss})

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        self.queue[self.pointer] = self.last
        self.pointer.add_(1).remainder_(7)
        self.teacher.weight.mul_(0.9).add_(self.net[0].weight[:4], alpha=0.1)


class Samples(Dataset[Tensor]):
    """Micro batch ``n``, a function of ``n`` alone."""

    def __getitem__(self, n: int) -> Tensor:
        return torch.randn(6, 5, generator=torch.Generator().manual_seed(n))


def batches(
    start: int, *, consumed: Path, workers: int = 0, before: Callable[[int], None] = lambda _: None
) -> Iterator[Batch]:
    order = itertools.count(start * ACCUMULATE)
    loader = DataLoader(
        Samples(),
        batch_size=None,
        sampler=itertools.islice(order, 1000),
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    for n, x in zip(itertools.count(start * ACCUMULATE), loader, strict=False):
        before(n)
        with consumed.open("a") as file:
            file.write(f"{n} {hashlib.sha256(x.numpy().tobytes()).hexdigest()}\n")
        yield Batch({"x": x}, torch.arange(6) + n, ("a",) * 6)


def train(
    folder: Path,
    *,
    steps: int = 6,
    precision: str = "32",
    optimizer: str = "adamw",
    workers: int = 0,
    every: int = 3,
    before: Callable[[int], None] = lambda _: None,
) -> None:
    torch.set_num_threads(1)
    config = TrainConfig(
        steps=steps, accumulate=ACCUMULATE, lr=0.02, warmup_steps=2, optimizer=optimizer, precision=precision,
        average_weights=0.9, checkpoint_every=every, log_every=1,
    )  # fmt: skip
    with RunFolder(folder) as run:
        source = functools.partial(batches, consumed=folder / "consumed.txt", workers=workers, before=before)
        fit(Student(), source, config, run=run, seed=3, fingerprint={"recipe": "r"})


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor of the newest checkpoint, under ``collection/name``."""
    snapshot = CheckpointStore(folder / "checkpoints").load()
    assert snapshot is not None
    return {
        f"{collection}/{name}": hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        if tensor.ndim
        else repr(tensor.item())
        for collection, tensors in snapshot.tensors.items()
        for name, tensor in tensors.items()
    }


def _die_at(micro_batch: int) -> Callable[[int], None]:
    def before(n: int) -> None:
        if n == micro_batch:
            os.kill(os.getpid(), signal.SIGKILL)

    return before


def _fork(work: Callable[[], None], *, kill_after: float | None = None) -> int:
    """Run ``work`` in a child, killed after so many seconds; its exit code, or minus the signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _resume_campaign(folder: Path) -> None:
    """Straight against killed-and-resumed, for each precision, optimiser and number of workers."""
    for precision, optimizer, workers in [
        ("32", "adamw", 0),
        ("bf16", "adamw", 0),
        ("32", "sgd", 0),
        ("32", "adamw", 2),
    ]:
        options = {"precision": precision, "optimizer": optimizer, "workers": workers}
        name = f"{precision}-{optimizer}-{workers}"
        straight = _fork(functools.partial(train, folder / f"{name}-straight", **options))
        killed = _fork(functools.partial(train, folder / f"{name}-parts", before=_die_at(9), **options))
        resumed = _fork(functools.partial(train, folder / f"{name}-parts", **options))
        _say({"campaign": "resume", "name": name, "codes": [straight, killed, resumed]})


def _random_campaign(folder: Path) -> None:
    """Killed fifteen times after random delays, then left in peace."""
    work = functools.partial(train, folder / "parts", steps=80, every=2)
    _fork(functools.partial(train, folder / "straight", steps=80, every=2))
    rng = random.Random(0)
    codes = [_fork(work, kill_after=rng.uniform(0.0, 0.2)) for _ in range(15)]
    _say({"campaign": "random", "codes": [*codes, _fork(work)]})


def _save_campaign(folder: Path) -> None:
    """Killed before the n-th system call of a save, for every n."""

    def snapshot(step: int) -> Snapshot:
        return Snapshot(step, {"weights": {"w": torch.full((50,), float(step))}}, {"step_again": step})

    def save_and_die(path: Path, n: int) -> None:
        calls = itertools.count(1)

        def dying(function: Callable[..., object]) -> Callable[..., object]:
            def wrapper(*args: object, **kwargs: object) -> object:
                if next(calls) == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapper

        store = CheckpointStore(path, keep=1)
        for owner, name in [
            (os, "fsync"), (os, "open"), (Path, "rename"), (Path, "replace"), (Path, "write_bytes"), (Path, "mkdir"),
            (Path, "unlink"),
        ]:  # fmt: skip
            setattr(owner, name, dying(getattr(owner, name)))
        store.save(snapshot(2))

    for n in itertools.count(1):
        path = folder / str(n)
        CheckpointStore(path).save(snapshot(1))
        code = _fork(functools.partial(save_and_die, path, n))
        found = CheckpointStore(path).load()
        good = (
            found is not None
            and found.tensors["weights"]["w"].eq(found.step).all()
            and found.state["step_again"] == found.step
        )
        stale = [file.name for file in path.glob(".tmp-*")]
        _say(
            {"campaign": "save", "n": n, "code": code, "good": bool(good), "step": found and found.step, "stale": stale}
        )
        if code == 0:
            break


def _say(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


@pytest.fixture(scope="module")
def campaigns(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """All campaigns in one process, which imports once and forks what is to be killed."""
    folder = tmp_path_factory.mktemp("campaigns")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, [json.loads(line) for line in done.stdout.splitlines()]


def test_six_steps_equal_three_and_a_kill_and_three(campaigns: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, lines = campaigns
    lines = [line for line in lines if line["campaign"] == "resume"]
    assert len(lines) == 4
    for line in lines:
        assert line["codes"] == [0, -9, 0], line
        straight, parts = folder / "resume" / f"{line['name']}-straight", folder / "resume" / f"{line['name']}-parts"
        expected = digest(straight)
        assert {name.partition("/")[0] for name in expected} == {"weights", "optimizer", "average"}
        assert digest(parts) == expected
        batches_straight = (straight / "consumed.txt").read_text().splitlines()
        batches_parts = (parts / "consumed.txt").read_text().splitlines()
        needed = 6 * ACCUMULATE
        assert needed <= len(batches_straight) <= needed + 2  # prefetched
        assert batches_parts[: 9 + 6] == batches_straight[:9] + batches_straight[6:needed]
        rates, losses = ({}, {}), ({}, {})
        for k, one in enumerate((straight, parts)):
            for entry in read_journal(one / "journal.jsonl"):
                if "loss" in entry:
                    rates[k][entry["step"]], losses[k][entry["step"]] = entry["lr"], entry["loss"]
        assert rates[0] == rates[1]
        assert losses[0] == losses[1]


def test_fifteen_kills_at_random_moments_change_no_bit(campaigns: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, lines = campaigns
    (line,) = [line for line in lines if line["campaign"] == "random"]
    assert line["codes"][-1] == 0
    assert line["codes"].count(-9) >= 5
    assert 1 not in line["codes"]
    assert digest(folder / "random" / "parts") == digest(folder / "random" / "straight")


def test_a_kill_at_any_point_of_a_save_leaves_a_good_generation(campaigns: tuple[Path, list[dict[str, Any]]]) -> None:
    lines = [line for line in campaigns[1] if line["campaign"] == "save"]
    assert len(lines) > 12
    assert [line["code"] for line in lines] == [-9] * (len(lines) - 1) + [0]
    assert all(line["good"] for line in lines)
    assert not any(line["stale"] for line in lines)
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    assert steps[0] == 1
    assert steps[-1] == 2


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_change_of_the_number_of_steps_between_checkpoints_changes_no_bit(tmp_path: Path, precision: str) -> None:
    threads = torch.get_num_threads()
    try:
        train(tmp_path / "often", precision=precision, every=1)
        train(tmp_path / "seldom", precision=precision, every=6)
    finally:
        torch.set_num_threads(threads)
    assert digest(tmp_path / "often") == digest(tmp_path / "seldom")


if __name__ == "__main__":
    for campaign in (_resume_campaign, _random_campaign, _save_campaign):
        campaign(Path(sys.argv[1]) / campaign.__name__.split("_")[1])

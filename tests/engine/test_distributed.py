"""Two processes with half of each batch take the steps of one process with the whole.

The file is also the script of one process: ``python test_distributed.py <folder>``.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from medssl.engine.checkpoint import CheckpointStore
from medssl.engine.device import ranks
from medssl.engine.optim import TrainConfig
from medssl.engine.trainer import fit
from medssl.errors import StoppedError
from medssl.runfolder import RunFolder, read_journal
from medssl.trainable import Batch, Losses, ParamGroup, Progress, Trainable

GLOBAL_BATCH = 8


class Net(Trainable):
    """A small network whose loss is a mean over samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, batch: Batch) -> Losses:
        error = (self.net(batch["x"]) - batch["x"].sum(1, keepdim=True)).square().mean()
        return Losses(error, {"error": error})


class Thawing(Net):
    """Its first layer joins in after two steps, and is in the optimiser from the start."""

    unused_parameters = True

    def param_groups(self) -> list[ParamGroup]:
        return [ParamGroup("all", list(self.parameters()))]

    def before_step(self, progress: Progress) -> None:
        self.net[0].requires_grad_(progress.step >= 2)


def batches(start: int, *, bad: int = -1) -> Iterator[Batch]:
    rank, size = ranks()
    share = slice(rank * GLOBAL_BATCH // size, (rank + 1) * GLOBAL_BATCH // size)
    for n in itertools.count(start * 2):
        x = torch.randn(GLOBAL_BATCH, 4, generator=torch.Generator().manual_seed(n))
        if n == bad:
            x[-1] = torch.nan
        numbers = torch.arange(GLOBAL_BATCH)[share]
        yield Batch({"x": x[share]}, numbers, tuple(f"case_{i}" for i in numbers.tolist()))


def signalled(start: int) -> Iterator[Batch]:
    for n, batch in enumerate(batches(start)):
        if n == 2 and ranks()[0] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch


def config(devices: int, *, prefetch: bool = True) -> TrainConfig:
    return TrainConfig(
        steps=4, accumulate=2, lr=0.05, precision="32", devices=devices, log_every=2, checkpoint_every=4,
        strategy="ddp" if devices > 1 else "auto", prefetch=prefetch,
    )  # fmt: skip


def process(folder: Path) -> None:
    """One of two: train, skip a step that only the other's data spoil, stop at a signal that only one receives."""
    torch.set_num_threads(1)
    result = {}
    for name, source, model in [
        ("plain", batches, Net()),
        ("thawing", batches, Thawing()),
        ("bad", lambda start: batches(start, bad=2), Net()),
        ("stopped", signalled, Net()),
    ]:
        run = RunFolder(folder / name)
        try:
            if int(os.environ["RANK"]) == 0:
                run.__enter__()
            fitted = fit(model, source, config(2, prefetch=name != "stopped"), run=run, seed=0)
            result[name] = [p.detach().flatten().tolist() for p in model.parameters()] + [fitted.skipped]
        except StoppedError as error:
            result[name] = int(error.exit_code)
        finally:
            if int(os.environ["RANK"]) == 0:
                run.__exit__()
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then abort an interpreter that takes its things apart


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, object]]]:
    folder = tmp_path_factory.mktemp("ddp")
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = []
    try:
        for child in processes:
            out, err = child.communicate(timeout=240)
            assert child.returncode == 0, err
            outputs.append(json.loads(out.splitlines()[-1]))
    finally:
        for child in processes:
            child.kill()
    return folder, outputs


def test_two_processes_equal_one(two: tuple[Path, list[dict[str, object]]], tmp_path: Path) -> None:
    folder, (first, second) = two
    assert first["plain"] == second["plain"]
    model = Net()
    with RunFolder(tmp_path) as run:
        result = fit(model, batches, config(1), run=run, seed=0)
    for ours, theirs in zip(model.parameters(), first["plain"], strict=False):
        assert ours.detach().flatten().tolist() == pytest.approx(theirs, abs=1e-5)
    lines = [line for line in read_journal(folder / "plain" / "journal.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[-1]["loss"] == pytest.approx(result.losses["loss"], abs=1e-5)


def test_parameters_that_join_in_later_do_so_in_two_processes_too(
    two: tuple[Path, list[dict[str, object]]], tmp_path: Path
) -> None:
    _, (first, second) = two
    assert first["thawing"] == second["thawing"]
    model = Thawing()
    with RunFolder(tmp_path) as run:
        fit(model, batches, config(1), run=run, seed=0)
    assert not torch.equal(model.net[0].weight, Net().net[0].weight)
    for ours, theirs in zip(model.parameters(), first["thawing"], strict=False):
        assert ours.detach().flatten().tolist() == pytest.approx(theirs, abs=1e-5)


def test_a_step_that_is_bad_in_one_process_is_skipped_in_both(two: tuple[Path, list[dict[str, object]]]) -> None:
    _, (first, second) = two
    assert first["bad"] == second["bad"]
    assert first["bad"][-1] == 1


def test_a_signal_to_one_process_stops_both_after_the_same_step(two: tuple[Path, list[dict[str, object]]]) -> None:
    folder, (first, second) = two
    assert first["stopped"] == second["stopped"] == 75
    snapshot = CheckpointStore(folder / "stopped" / "checkpoints").load()
    assert snapshot is not None
    assert snapshot.step == 2


if __name__ == "__main__":
    process(Path(sys.argv[1]))

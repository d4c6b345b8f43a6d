from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from medssl.engine.optim import TrainConfig
from medssl.engine.prefetch import Feed, Prefetcher, open_feed
from medssl.engine.trainer import fit
from medssl.errors import CaseError
from medssl.runfolder import RunFolder, read_journal
from medssl.trainable import Batch, Losses, Trainable

CPU = torch.device("cpu")


def batch_of(number: int) -> Batch:
    x = torch.full((2, 3), float(number))
    return Batch({"x": x}, torch.arange(2) + number, ("a", "b"), {"padded": torch.tensor([0.0, number])})


class Source:
    """Counts what was taken and where, and whether it was closed."""

    def __init__(self, count: int = 1000, *, error: Exception | None = None) -> None:
        self.numbers = iter(range(count))
        self.error = error
        self.taken = 0
        self.threads: set[str] = set()
        self.closed = False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.threads.add(threading.current_thread().name)
        number = next(self.numbers, None)
        if number is None:
            raise self.error or StopIteration
        self.taken += 1
        return batch_of(number)

    def close(self) -> None:
        self.closed = True


def doubled(batch: Batch) -> Batch:
    assert not torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    return batch.with_tensors({"x": batch["x"] * 2})


def waits_until(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


def settled(source: Source) -> int:
    """How many batches were taken once nothing moves any more."""
    taken = -1
    while taken != source.taken:
        taken = source.taken
        time.sleep(0.1)
    return taken


@pytest.mark.parametrize("prefetch", [False, True])
def test_batches_come_prepared_in_order_with_or_without_a_thread(prefetch: bool) -> None:
    source = Source(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        feed = open_feed(source, doubled, device=CPU, prefetch=prefetch)
        found = list(feed)
    assert [float(batch["x"][0, 0]) for batch in found] == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert [int(batch.seeds[0]) for batch in found] == list(range(5))
    assert source.threads == {"medssl-prefetch" if prefetch else "MainThread"}
    assert feed.waited > 0
    with pytest.raises(StopIteration):
        next(feed)
    feed.close()
    assert source.closed


def test_no_more_than_two_batches_lie_ahead() -> None:
    source = Source()
    feed = Prefetcher(source, doubled, device=CPU)
    assert waits_until(lambda: source.taken == 2)
    assert settled(source) == 2
    for used in (1, 2, 3):
        next(feed)
        assert settled(source) == used + 1
    feed.close()


def test_no_thread_holds_on_to_what_a_batch_was_made_of() -> None:
    raw: list[weakref.ref[Batch]] = []

    def kept() -> Iterator[Batch]:
        for number in range(1000):
            batch = batch_of(number)
            raw.append(weakref.ref(batch))
            yield batch
            del batch

    feed = Prefetcher(kept(), doubled, device=CPU)
    try:
        next(feed)
        taken = weakref.ref(next(feed))
        assert waits_until(lambda: len(raw) >= 3)
        assert waits_until(lambda: gc.collect() >= 0 and all(one() is None for one in raw[:2]))
        assert waits_until(lambda: taken() is None)
    finally:
        feed.close()


def test_the_interpreter_switches_threads_as_before_once_a_feed_is_closed() -> None:
    before = sys.getswitchinterval()
    feed = Prefetcher(iter(Source()), doubled, device=CPU)
    assert sys.getswitchinterval() < before
    feed.close()
    assert sys.getswitchinterval() == before


def test_a_loader_brings_no_reader_of_images_into_memory() -> None:
    code = (
        "import sys, medssl.data.loader, medssl.data.store, medssl.engine.prefetch, medssl.augment.build\n"
        "print(sorted({'SimpleITK', 'nibabel', 'pydicom', 'PIL', 'medssl.io'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_an_exception_arrives_where_the_batch_is_missed() -> None:
    source = Source(2, error=CaseError("case a: broken. Leave it out."))
    feed = Prefetcher(source, doubled, device=CPU)
    assert waits_until(lambda: source.closed or source.taken == 2)
    assert float(next(feed)["x"][0, 0]) == 0.0
    assert float(next(feed)["x"][0, 0]) == 2.0
    with pytest.raises(CaseError, match="case a: broken"):
        next(feed)
    with pytest.raises(StopIteration):
        next(feed)
    assert waits_until(lambda: source.closed)
    feed.close()


def test_what_prepare_raises_arrives_too() -> None:
    def broken(batch: Batch) -> Batch:
        raise ZeroDivisionError

    feed = Prefetcher(Source(), broken, device=CPU)
    with pytest.raises(ZeroDivisionError):
        next(feed)
    feed.close()


def test_closing_stops_the_thread_and_the_source_at_once() -> None:
    source = Source()
    feed = Prefetcher(source, doubled, device=CPU)
    next(feed)
    before = time.monotonic()
    feed.close()
    feed.close()
    assert time.monotonic() - before < 1
    assert source.closed
    assert not [thread for thread in threading.enumerate() if thread.name == "medssl-prefetch"]
    with pytest.raises(StopIteration):
        next(feed)


def test_waiting_is_counted_and_is_short_where_the_step_is_longer() -> None:
    def slow(batch: Batch) -> Batch:
        time.sleep(0.05)
        return batch

    late, early = Feed(Source(), slow, device=CPU), Prefetcher(Source(), slow, device=CPU)
    next(early)
    first = early.waited
    for _ in range(4):
        next(late)
        time.sleep(0.08)
        next(early)
    assert late.waited >= 0.2
    assert first >= 0.04
    assert early.waited - first < 0.1
    early.close()


class Drawing(Trainable):
    """Draws while it trains and while it prepares, from seeds of each sample alone."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def prepare(self, batch: Batch, *, training: bool) -> Batch:
        assert training
        noise = [torch.randn(3, generator=torch.Generator().manual_seed(int(seed))) for seed in batch.seeds]
        return batch.with_tensors({"x": batch["x"] / 10 + torch.stack(noise)}, {"drawn": torch.ones(2)})

    def forward(self, batch: Batch) -> Losses:
        return Losses((self.net(batch["x"]) + torch.rand(1) - 1).square().mean())


def run(folder: Path, *, prefetch: bool, steps: int = 6) -> Drawing:
    def source(step: int) -> Iterator[Batch]:
        return (batch_of(number) for number in itertools.count(2 * step))

    method = Drawing()
    config = TrainConfig(
        steps=steps, accumulate=2, log_every=1, precision="32", lr=0.01, schedule="constant", prefetch=prefetch
    )
    with RunFolder(folder) as opened:
        fit(method, source, config, run=opened, seed=1)
    return method


def test_a_run_has_the_same_bits_with_and_without_prefetch_and_after_a_resume(tmp_path: Path) -> None:
    plain, ahead = run(tmp_path / "plain", prefetch=False), run(tmp_path / "ahead", prefetch=True)
    run(tmp_path / "parts", prefetch=True, steps=3)
    resumed = run(tmp_path / "parts", prefetch=False)
    for other in (ahead, resumed):
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
    journals = [
        [
            {key: value for key, value in line.items() if key not in {"step_seconds", "stall_percent"}}
            for line in read_journal(tmp_path / name / "journal.jsonl")
            if "loss" in line
        ]
        for name in ("plain", "ahead")
    ]
    assert journals[0] == journals[1]


def test_the_journal_has_the_stall_and_the_means_of_the_notes(tmp_path: Path) -> None:
    run(tmp_path, prefetch=True)
    lines = [line for line in read_journal(tmp_path / "journal.jsonl") if "loss" in line]
    assert [line["views/padded"] for line in lines] == [(4 * step + 1) / 4 for step in range(6)]
    assert {line["views/drawn"] for line in lines} == {1.0}
    assert all(0 <= line["stall_percent"] <= 100 for line in lines)


def test_a_run_whose_views_are_empty_warns_once(tmp_path: Path) -> None:
    class Blank(Drawing):
        def prepare(self, batch: Batch, *, training: bool) -> Batch:
            made = super().prepare(batch, training=training)
            return made.with_tensors(made.tensors, {"blank": torch.tensor([0.0, 1.0])})

    source = (batch_of(number) for number in itertools.count())
    with RunFolder(tmp_path) as opened:
        result = fit(Blank(), lambda _: source, TrainConfig(steps=4, log_every=1, precision="32"), run=opened, seed=1)
    assert [alarm for alarm in result.alarms if alarm.startswith("50% of the views have one value only")] != []
    assert len(result.alarms) == 1


@pytest.mark.gpu
def test_on_cuda_a_prefetched_batch_is_whole_when_the_step_sees_it() -> None:
    device = torch.device("cuda")

    def prepare(batch: Batch) -> Batch:
        x = batch["x"]
        for _ in range(50):
            x = x @ torch.eye(1000, device=x.device)
        return batch.with_tensors({"x": x})

    source = (Batch({"x": torch.full((1000, 1000), float(n))}, torch.arange(1), ("a",)) for n in range(20))
    feed = Prefetcher(source, prepare, device=device)
    sums = [batch["x"].sum() for batch in feed]
    assert [float(total) for total in sums] == [n * 1e6 for n in range(20)]
    feed.close()

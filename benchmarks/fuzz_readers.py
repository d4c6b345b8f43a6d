"""Mutated files of every format through medssl's readers: nothing but a volume or a MedSSLError may come out.

Run:  python benchmarks/fuzz_readers.py --count 20000 --seed 0 -o benchmarks/results
Input i of a seed is always the same file. Each is read in a worker process with 3 GiB of address space beyond what it
starts with; a crash or 10 s of silence is counted against the input by name. For each input the time and the growth of
peak memory are kept. Fails (exit 1) on another exception, a crash, a hang, more than 2 GiB, a started process or
connection, a planted identifier in a message, or a volume that is not one. ``--show I --save FOLDER`` writes one input.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_corpus
import numpy as np
import provenance
from fuzz_corpus import PLANTED, Seed
from fuzz_mutations import mutate

from medssl import pool
from medssl.errors import MedSSLError
from medssl.geometry import Geometry
from medssl.io import read_volume

LIMIT_S, LIMIT_MIB, ADDRESS_SPACE_MIB = 10.0, 2048, 3072
WEIGHTS = {"nifti": 15, "metaimage": 6, "nrrd": 8, "raster": 10, "npy": 4, "dicom": 20, "series": 17, "pydicom": 10}
REAL_WEIGHT = 10
_EVENTS: set[str] = set()
_GRID = Geometry((20, 16, 5), np.diag([-0.7, -0.8, 2.5, 1.0]))
FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect"}


@dataclass(frozen=True)
class Job:
    """One input: the file that number ``index`` of ``seed`` stands for."""

    seed: int
    index: int
    data: str


@dataclass(frozen=True)
class Outcome:
    """What became of one input; ``fault`` says what is wrong with that, if anything."""

    index: int
    kind: str
    name: str
    result: str
    fault: str = ""
    seconds: float = 0.0
    growth_mib: float = 0.0


@functools.cache
def _corpus(data: str) -> tuple[Seed, ...]:
    return tuple(fuzz_corpus.corpus(Path(data) if data else None))


def mutated(job: Job) -> tuple[Seed, dict[str, bytes], random.Random]:
    """Seed and files of one input, and the source of its further choices."""
    rng = random.Random(f"{job.seed}/{job.index}")
    seeds = _corpus(job.data)
    weights = {**WEIGHTS, **({"real": REAL_WEIGHT} if job.data else {})}
    kind = rng.choices(list(weights), list(weights.values()))[0]
    seed = rng.choice([seed for seed in seeds if seed.kind == kind])
    files = dict(seed.files)
    for name in rng.sample(sorted(files), k=min(len(files), rng.choice((1, 1, 2)))):
        if len(files) > 2 and rng.random() < 0.05:
            del files[name]
            continue
        for _ in range(rng.choice((1, 1, 1, 1, 2, 4))):
            files[name] = mutate(files[name], rng, seeds)
    return seed, files, rng


def read_one(job: Job, folder: Path) -> Outcome:
    """Write one input into an empty folder, read it, and say what came out."""
    seed, files, rng = mutated(job)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    options = _options(rng)
    said: list[str] = []
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result, fault = _read(folder / seed.entry, options, said)
        except MedSSLError as error:
            said.append(str(error))
            result, fault = error.code, ""
        except Exception as error:  # this is what is looked for
            frame = traceback.extract_tb(error.__traceback__)[-1]
            result = "another exception"
            fault = f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}"
    seconds = time.perf_counter() - started
    said += [str(warning.message) for warning in caught]
    if not fault and any(PLANTED in text for text in said):
        fault = "a planted identifier is in a message"
    return Outcome(job.index, seed.kind, seed.name, result, fault, seconds)


def _options(rng: random.Random) -> dict[str, Any]:
    choices: dict[str, Sequence[Any]] = {
        "unit": ("arbitrary", "arbitrary", "arbitrary", "arbitrary", "label", "HU"),
        "volume": (None, None, None, None, None, None, 0, 0, 1, "channels"),
        "xform": (None, None, None, "sform", "qform"),
        "assume_spacing_mm": (None, None, None, (1.0, 1.0, 2.0)),
        "pages": ("refuse", "refuse", "stack"),
        "regularise": (False, False, True),
        "fix_signedness": (False, False, True),
        "on": (None, _GRID),
    }
    return {name: rng.choice(values) for name, values in choices.items()}


def _read(path: Path, options: dict[str, Any], said: list[str]) -> tuple[str, str]:
    if path.is_dir():
        from medssl.io.dicom.reader import stacks

        assembly = stacks(path)
        said += [str(error) for _, error in assembly.refused] + [note for _, note in assembly.notes]
        said += [warning for item in assembly.items for stack in item.stacks for warning in stack.warnings]
    volume, source = read_volume(path, **options)
    said += [*source.warnings, repr(source), repr(getattr(source, "facts", ""))]
    array = volume.array
    if array.ndim != 4 or array.shape[1:] != volume.geometry.shape or not array.size:
        return "read", f"a volume of shape {array.shape} on a grid of {volume.geometry.shape}"
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return "read", "a volume with NaN or infinity"
    return "read", ""


def judge(job: Job) -> Outcome:
    """Read one input in this worker, within the limits."""
    _limit()
    _EVENTS.clear()
    with tempfile.TemporaryDirectory() as name:
        before = _peak_mib(reset=True)
        outcome = read_one(job, Path(name))
        growth = _peak_mib() - before
    fault = outcome.fault
    if _EVENTS and not fault:
        fault = f"did {', '.join(sorted(_EVENTS))}"
    if growth > LIMIT_MIB and not fault:
        fault = f"{growth:.0f} MiB of memory"
    if outcome.seconds > LIMIT_S and not fault:
        fault = f"{outcome.seconds:.1f} s"
    return Outcome(outcome.index, outcome.kind, outcome.name, outcome.result, fault, outcome.seconds, growth)


@functools.cache
def _limit() -> None:
    """Once a worker: cap what it may allocate, and note what no reader does."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = used + ADDRESS_SPACE_MIB * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    sys.addaudithook(lambda event, _args: _EVENTS.add(event) if event in FORBIDDEN else None)


def _peak_mib(*, reset: bool = False) -> float:
    """Highest resident memory since the last reset; what it is now, after one."""
    if reset:
        with contextlib.suppress(OSError):  # without the right to reset, growth beyond the highest so far still shows
            Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def run(*, seed: int, first: int, count: int, data: str, workers: int) -> list[Outcome]:
    """All outcomes, by index; workers are at least two, so that a crash costs one input."""
    jobs = [Job(seed, index, data) for index in range(first, first + count)]
    outcomes = []
    for number, (job, answer) in enumerate(
        pool.run(judge, jobs, name=_name, workers=max(2, workers), timeout_s=LIMIT_S + 5)
    ):
        if isinstance(answer, Outcome):
            outcomes.append(answer)
        else:
            what = mutated(job)[0]
            outcomes.append(Outcome(job.index, what.kind, what.name, answer.code, f"{answer.code}: {answer.message}"))
        if outcomes[-1].fault:
            print(f"input {job.index} ({outcomes[-1].name}): {outcomes[-1].fault}", file=sys.stderr)
        if number % 1000 == 999:
            print(f"{number + 1} of {count}", file=sys.stderr)
    return sorted(outcomes, key=lambda outcome: outcome.index)


def _name(job: Job) -> str:
    return f"seed {job.seed}, input {job.index}"


def _page(outcomes: Sequence[Outcome], *, wall_s: float) -> Iterator[str]:
    faults = [outcome for outcome in outcomes if outcome.fault]
    yield from provenance.head("Mutated files through the readers", "numpy", "pydicom", "imagecodecs", "pillow", "isal")
    yield f"**{len(outcomes)} inputs, {len(faults)} faults.** A fault is any exception but a MedSSLError, a crash,"
    yield f"more than {LIMIT_S:.0f} s or {LIMIT_MIB} MiB, a started process or connection, a planted identifier in a"
    yield "message, or a volume that is not one. Memory is the growth of the worker's peak resident size."
    yield f"All in {wall_s:.0f} s."
    yield ""
    yield "| seeds | inputs | read | refused | faults | slowest s | median ms | largest MiB |"
    yield "|---|---|---|---|---|---|---|---|"
    for kind in sorted({outcome.kind for outcome in outcomes}):
        some = [outcome for outcome in outcomes if outcome.kind == kind]
        good = [outcome for outcome in some if not outcome.fault]
        read = sum(outcome.result == "read" for outcome in good)
        times = sorted(outcome.seconds for outcome in some)
        yield f"| {kind} | {len(some)} | {read} | {len(good) - read} | {len(some) - len(good)} | {times[-1]:.2f} | " + (
            f"{1e3 * times[len(times) // 2]:.1f} | {max(outcome.growth_mib for outcome in some):.0f} |"
        )
    codes = Counter(outcome.result for outcome in outcomes if outcome.result.startswith("E_"))
    yield ""
    yield f"Refusals: {', '.join(f'{code} {count}' for code, count in codes.most_common())}."
    if faults:
        yield ""
        yield "| input | seed file | fault |"
        yield "|---|---|---|"
        yield from (f"| {outcome.index} | {outcome.name} | {outcome.fault} |" for outcome in faults)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--data", default="", help="folder of real data, whose small files become seeds too")
    parser.add_argument("-o", "--out", type=Path, help="folder for fuzz_readers.md; else it is printed")
    parser.add_argument("--show", type=int, help="write this one input into the folder of --save and end")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    data = str(Path(options.data).resolve()) if options.data else ""
    if options.show is not None:
        options.save.mkdir(parents=True, exist_ok=True)
        print(read_one(Job(options.seed, options.show, data), options.save))
        return
    started = time.perf_counter()
    outcomes = run(seed=options.seed, first=options.first, count=options.count, data=data, workers=options.workers)
    page = "\n".join(_page(outcomes, wall_s=time.perf_counter() - started)) + "\n"
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "fuzz_readers.md").write_text(page)
    print(page)
    if any(outcome.fault for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()

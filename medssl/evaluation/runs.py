"""The runs of a study: each is fine-tuned and scored once, by this process, another one, or another machine."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import torch

from medssl.data.store import ArrayStore
from medssl.evaluation.claims import Claim
from medssl.evaluation.predict import score_stored
from medssl.evaluation.robustness import RobustnessConfig, score_corrupted
from medssl.io import digest
from medssl.progress import track
from medssl.recipe import finetune
from medssl.runfolder import atomic_write

_WAIT_S = 5.0


@dataclass(frozen=True)
class Run:
    """One fine-tuning run of the study: everything a worker needs.

    Args:
        arm: Name of the arm.
        budget: Labelled subjects.
        seed: Of weights, order and label subset.
        trial: Which list of overrides.
        split: Where it is scored.
        recipe: As JSON.
        store: Folder of the store.
        encoder: Bundle to start from.
        folder: Where it is trained and its tables lie.
        nsd_tolerance_mm: Tolerance of the surface Dice.
        threads: Of this run.
        share: Whether other machines may be at it.
        robustness: A :class:`RobustnessConfig` as JSON, if it is tried on corrupted images too.
    """

    arm: str
    budget: int
    seed: int
    trial: int
    split: Literal["val", "test"]
    recipe: str
    store: str
    encoder: str | None
    folder: str
    nsd_tolerance_mm: float
    threads: int
    share: bool = False
    robustness: str | None = None

    @property
    def claim(self) -> Claim:
        """Held by the machine that does the run."""
        return Claim(Path(self.folder).with_suffix(".claim"))


def execute(runs: Sequence[Run], workers: int, label: str) -> Iterator[pd.DataFrame]:
    """Score every run, some at the same time; each leaves its own result, so nothing is done twice."""
    waiting: Sequence[Run] = list(runs)
    while waiting:
        elsewhere = []
        for run, table in _pass(waiting, workers, label):
            if table is None:
                elsewhere.append(run)
            else:
                yield table
        if len(elsewhere) == len(waiting):
            time.sleep(_WAIT_S)
        waiting = elsewhere


def _pass(runs: Sequence[Run], workers: int, label: str) -> Iterator[tuple[Run, pd.DataFrame | None]]:
    """Each run with its scores, or None where another machine is at it."""
    if workers == 1:
        yield from ((run, _attempt(run)) for run in track(runs, label))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(_attempt, run): run for run in runs}
        try:
            for future in track(as_completed(futures), label, total=len(futures)):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _attempt(run: Run) -> pd.DataFrame | None:
    if not run.share:
        return _score(run)
    claim = run.claim
    if not claim.take():
        return None
    with claim:
        return _score(run)


def read_table(run: Run, name: str) -> pd.DataFrame:
    """A table that a finished run left: ``scores-test``, ``scores-val`` or ``robustness``."""
    return pd.read_csv(Path(run.folder) / f"{name}.csv", dtype={"case_id": str, "subject_id": str})


def _score(run: Run) -> pd.DataFrame:
    """Fine-tune and score one run, or read what an earlier call left."""
    store, folder = ArrayStore.open(Path(run.store)), Path(run.folder)
    encoder = Path(run.encoder) if run.encoder else None
    origin = digest(encoder / "digests.json") if encoder else "scratch"
    told = f"{run.recipe} {store.fingerprint} {origin} {run.nsd_tolerance_mm}"
    cases = store.select(split=run.split, labelled=True)
    torch.set_num_threads(run.threads)

    def bundle() -> Path:
        return finetune(json.loads(run.recipe), store=store.path, out=folder, encoder=encoder).bundle

    def plain() -> pd.DataFrame:
        return score_stored(bundle(), cases, nsd_tolerance_mm=run.nsd_tolerance_mm, device="auto")

    def corrupted() -> pd.DataFrame:
        config = RobustnessConfig.parse(json.loads(run.robustness or "{}"))
        return score_corrupted(bundle(), cases, config, nsd_tolerance_mm=run.nsd_tolerance_mm, device="auto")

    table = _kept(run, f"scores-{run.split}", told, plain)
    if run.robustness is not None:
        _kept(run, "robustness", f"{told} {run.robustness}", corrupted)
    return table


def _kept(run: Run, name: str, told: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """A table that is there for the same ``told``, or a new one."""
    stamp = hashlib.sha256(told.encode()).hexdigest()
    done, mark = Path(run.folder) / f"{name}.csv", Path(run.folder) / f"{name}.sha256"
    if done.exists() and mark.exists() and mark.read_text() == stamp:
        return read_table(run, name)
    table = make()
    for column in ("trial", "seed", "budget", "arm"):
        table.insert(0, column, getattr(run, column))
    atomic_write(done, table.to_csv(index=False))
    atomic_write(mark, stamp)
    return table

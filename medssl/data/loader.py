"""Batches for training: each sample is a pure function of (seed, its global number), and of nothing else.

Step ``s`` holds the samples ``s * batch_size ... s * batch_size + batch_size - 1``. Every epoch is a permutation of the
cases; sample ``n`` takes place ``n % num_cases`` in epoch ``n // num_cases``. Workers, ranks and the
point of resumption change who computes a sample, never the sample.
"""

from __future__ import annotations

import logging
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch.utils.data import DataLoader, Dataset

from medssl.errors import CaseError, ConfigError, EnvironmentFaultError, MedSSLError, NoInputError
from medssl.trainable import Batch
from medssl.views import CaseArrays, ViewSampler

_logger = logging.getLogger(__name__)

_WORKER_TIMEOUT_S = 300
_ATTEMPTS = 2

# Philox counters of one key are disjoint streams
_VIEW, _PERMUTATION, _SAMPLE_SEED = 0, 1, 2

_NOTE = "note_"


def batches(
    cases: Sequence[CaseArrays],
    sampler: ViewSampler,
    *,
    batch_size: int,
    seed: int,
    steps: int,
    start_step: int = 0,
    spatial_dims: int = 3,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield the batches of steps ``start_step`` to ``steps - 1``.

    Args:
        cases: What to draw from; each once an epoch.
        sampler: Cuts the arrays of one sample.
        batch_size: Samples of one step over all ranks together, so that a run does not depend on their number.
        seed: Of the run, at least 0.
        steps: Number of steps of the whole run.
        start_step: Where a resumed run goes on.
        spatial_dims: 2 drops the last axis, of one slice, of every array that has one.
        num_workers: Processes that cut ahead; 0 cuts in this one.
        rank: Which share of each batch is wanted.
        world_size: Into how many shares a batch is divided.

    Raises:
        CaseError: if a case cannot be cut; names it.
        ConfigError: if the batch cannot be shared out evenly.
        NoInputError: if there are too few cases.
        EnvironmentFaultError: if workers die or hang twice.
    """
    if batch_size % world_size:
        raise ConfigError(f"batch_size {batch_size}: {world_size} devices share it; set a multiple of {world_size}.")
    share = batch_size // world_size
    places = range(rank * share, (rank + 1) * share)
    dataset = _Steps(cases, sampler, seed=seed, batch_size=batch_size, places=places, spatial_dims=spatial_dims)
    if num_workers == 0:
        for step in range(start_step, steps):
            yield _checked(dataset[step])
    else:
        yield from _ahead(dataset, range(start_step, steps), num_workers)


def fixed_batches(
    cases: Sequence[CaseArrays],
    sampler: ViewSampler,
    *,
    count: int,
    batch_size: int,
    seed: int,
    spatial_dims: int = 3,
) -> list[Batch]:
    """Give ``count`` batches that are the same at every call, for checks on held-out cases.

    Cases take turns, so that none is seen more than once more often than another.

    Args:
        cases: Held-out cases.
        sampler: Cuts the arrays of one sample.
        count: Number of batches.
        batch_size: Samples a batch.
        seed: Of the draws.
        spatial_dims: As in :func:`batches`.
    """
    _enough(cases, sampler)
    made = []
    for step in range(count):
        numbers = range(step * batch_size, (step + 1) * batch_size)
        drawn = [[cases[(n + k) % len(cases)] for k in range(sampler.cases_per_sample)] for n in numbers]
        samples = [_sample(chosen, sampler, seed, n) for chosen, n in zip(drawn, numbers, strict=True)]
        made.append(_collate(samples, _seeds(seed, numbers), [chosen[0] for chosen in drawn], spatial_dims))
    return made


class _Steps(Dataset[Batch | MedSSLError]):
    """One rank's share of each step; faults are values, since an exception may not survive the way to the parent."""

    def __init__(
        self,
        cases: Sequence[CaseArrays],
        sampler: ViewSampler,
        *,
        seed: int,
        batch_size: int,
        places: range,
        spatial_dims: int,
    ) -> None:
        _enough(cases, sampler)
        self._cases, self._sampler, self._seed = cases, sampler, seed
        self._batch_size, self._places, self._spatial_dims = batch_size, places, spatial_dims

    def __getitem__(self, step: int) -> Batch | MedSSLError:
        numbers = [step * self._batch_size + place for place in self._places]
        drawn = [self._draw(n) for n in numbers]
        try:
            samples = [_sample(cases, self._sampler, self._seed, n) for cases, n in zip(drawn, numbers, strict=True)]
            return _collate(samples, _seeds(self._seed, numbers), [cases[0] for cases in drawn], self._spatial_dims)
        except MedSSLError as error:
            return error

    def _draw(self, number: int) -> list[CaseArrays]:
        """Cases of sample ``number``; those after the first follow it in a second permutation, so none repeats."""
        epoch, place = divmod(number, len(self._cases))
        first = _permutation(self._seed, epoch, len(self._cases), 0)[place]
        wanted = self._sampler.cases_per_sample
        if wanted == 1:
            return [self._cases[first]]
        second = _permutation(self._seed, epoch, len(self._cases), 1)
        position = int(np.flatnonzero(second == first)[0])
        return [self._cases[second[(position + k) % len(second)]] for k in range(wanted)]


def _ahead(dataset: _Steps, steps: range, num_workers: int) -> Iterator[Batch]:
    """Cut in workers; where one dies or hangs, start them anew once at the same step."""
    done = 0
    for attempt in range(_ATTEMPTS):
        loader: DataLoader[Batch | MedSSLError] = DataLoader(
            dataset,
            batch_size=None,
            sampler=steps[done:],
            num_workers=num_workers,
            multiprocessing_context="spawn",
            timeout=_WORKER_TIMEOUT_S,
            worker_init_fn=_one_thread,
            generator=torch.Generator(),  # or torch draws from the global one, while a step does
        )
        try:
            for made in _quiet_iterator(loader):
                batch = _checked(made)
                done += 1
                yield batch
            return
        except MedSSLError:
            raise
        except (RuntimeError, OSError, EOFError) as error:  # how torch says that a worker is gone or silent
            if attempt + 1 == _ATTEMPTS:
                raise EnvironmentFaultError(
                    f"loader: workers died or hung at step {steps[done]}, twice. "
                    "Free memory, or set num_workers: 0 and run the same command again.",
                    code="E_WORKER",
                ) from error
            _logger.warning("loader: workers died or hung at step %d; starting them anew", steps[done])


def _quiet_iterator(loader: DataLoader[Batch | MedSSLError]) -> Iterator[Batch | MedSSLError]:
    """Start the workers, and take back the SIGCHLD handler with which torch would raise in the middle of a step.

    A lost worker is then noticed where its batch is missed, within the time-out.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _checked(made: Batch | MedSSLError) -> Batch:
    if isinstance(made, MedSSLError):
        raise made
    return made


def _enough(cases: Sequence[CaseArrays], sampler: ViewSampler) -> None:
    if len(cases) < sampler.cases_per_sample:
        raise NoInputError(
            f"loader: {len(cases)} cases; a sample is cut from {sampler.cases_per_sample}. Choose other splits."
        )


def _sample(cases: Sequence[CaseArrays], sampler: ViewSampler, seed: int, number: int) -> dict[str, np.ndarray]:
    try:
        return sampler(cases, _generator(seed, number, _VIEW))
    except MedSSLError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        names = ", ".join(case.case_id for case in cases)
        raise CaseError(
            f"case {names}: {type(error).__name__} in {Path(frame.filename).name}:{frame.lineno} while cutting sample "
            f"{number}. Please report it, or leave the case out.",
            code="E_SAMPLE",
        ) from error


def _collate(
    samples: Sequence[Mapping[str, np.ndarray]],
    seeds: Int64[torch.Tensor, " b"],
    cases: Sequence[CaseArrays],
    spatial_dims: int,
) -> Batch:
    """Stack the samples; what only some cases have, such as a place in an atlas, is NaN for the others."""
    tensors: dict[str, torch.Tensor] = {}
    notes: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        found = [sample[name] for sample in samples if name in sample]
        arrays = [sample[name] if name in sample else np.full_like(found[0], np.nan) for sample in samples]
        if name.startswith(_NOTE):
            notes[name.removeprefix(_NOTE)] = torch.tensor([float(array) for array in arrays])
            continue
        if len({array.shape for array in arrays}) > 1:
            is_box = f"{name}_to_box" in samples[0]
            fills = [case.fill if is_box else 0.0 for case in cases]
            arrays, extents = _padded(arrays, fills)
            if is_box:
                tensors[f"{name}_extent"] = torch.from_numpy(extents)
        stacked = np.stack(arrays)
        if spatial_dims == 2 and stacked.ndim >= 5:
            if stacked.shape[-1] != 1:
                raise ConfigError(
                    f"case {cases[0].case_id}: {name} has {stacked.shape[-1]} slices; spatial_dims 2 needs 1. "
                    "Set the last of crop_voxels to 1."
                )
            stacked = stacked[..., 0]
        tensors[name] = torch.from_numpy(np.ascontiguousarray(stacked))
    return Batch(tensors, seeds, tuple(case.case_id for case in cases), notes)


def _padded(
    boxes: Sequence[Shaped[np.ndarray, "*v x y z"]], fills: Sequence[float]
) -> tuple[list[Shaped[np.ndarray, "*v x y z"]], Int64[np.ndarray, "b 3"]]:
    """Boxes of one shape, each filled behind its own voxels; and how many voxels of each are its own."""
    extents = np.array([box.shape[-3:] for box in boxes], dtype=np.int64)
    largest = extents.max(axis=0)
    wide = []
    for box, fill in zip(boxes, fills, strict=True):
        behind = [(0, 0)] * (box.ndim - 3) + [(0, int(n - m)) for n, m in zip(largest, box.shape[-3:], strict=True)]
        wide.append(np.pad(box, behind, constant_values=fill))
    return wide, extents


def _seeds(seed: int, numbers: Sequence[int]) -> Int64[torch.Tensor, " b"]:
    """One non-negative int64 a sample."""
    drawn = [int(_generator(seed, n, _SAMPLE_SEED).integers(2**63)) for n in numbers]
    return torch.tensor(drawn, dtype=torch.int64)


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, count: int, which: int) -> Int64[np.ndarray, " n"]:
    return _generator(seed, epoch, _PERMUTATION + 2 * which).permutation(count)


def _generator(seed: int, number: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, 0, stream]))

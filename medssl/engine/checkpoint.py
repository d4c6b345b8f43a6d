"""Checkpoints that are whole or absent: digested, fsynced, renamed into place, several generations deep.

::

    checkpoints/
    ├── LATEST                    name of the newest generation
    └── step_00000500/
        ├── weights.safetensors   and optimizer, average: whatever tensors the snapshot holds
        ├── state.json            step, counters, fingerprint
        └── digests.json          SHA-256 of each of the above, written last

A generation is found by its step number, never by a clock, and is used only if every byte of it is as written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from medssl.errors import CheckpointError, TrainingError
from medssl.runfolder import atomic_path, atomic_write, environment_faults, remove, remove_stale

_log = logging.getLogger(__name__)
_DIGESTS = "digests.json"
_STATE = "state.json"
_LATEST = "LATEST"
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Snapshot:
    """All that is needed to go on as if nothing had happened.

    Args:
        step: Optimiser steps taken.
        tensors: Named collections of tensors, such as ``weights`` and ``optimizer``; one file each.
        state: The rest, as plain JSON data.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any] = field(default_factory=dict)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: Where they live; made, cleared of what a killed process left, and probed for writing.
        keep: Generations that stay.

    Raises:
        EnvironmentFaultError: if the folder cannot be written.
    """

    def __init__(self, folder: Path, *, keep: int = 3) -> None:
        self.folder = folder
        self._keep = keep
        with environment_faults(folder, "preparing for checkpoints"):
            folder.mkdir(parents=True, exist_ok=True)
            remove_stale(folder)
            with tempfile.TemporaryFile(dir=folder):
                pass

    def steps(self) -> list[int]:
        """Steps of the generations on the disk, sound or not, ascending."""
        names = (path.name.removeprefix("step_") for path in self.folder.glob("step_*"))
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, snapshot: Snapshot) -> Path:
        """Write one generation, then drop those beyond ``keep``.

        Raises:
            TrainingError: if a tensor holds NaN or infinity; nothing is written, the last good generation stays.
            EnvironmentFaultError: if the disk is full; nothing half-written is left.
        """
        _check_finite(snapshot)
        files = {f"{name}{_SUFFIX}": _encode(tensors) for name, tensors in snapshot.tensors.items()}
        state = {"step": snapshot.step, **snapshot.state}
        files[_STATE] = json.dumps(state, indent=1).encode()
        files[_DIGESTS] = _digests({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
        path = self._path(snapshot.step)
        total = sum(map(len, files.values()))
        with atomic_path(path) as temporary, environment_faults(path, f"saving a checkpoint of {total} bytes"):
            temporary.mkdir()
            for name, data in files.items():
                (temporary / name).write_bytes(data)
        atomic_write(self.folder / _LATEST, path.name + "\n")
        for step in self.steps()[: -self._keep]:
            remove(self._path(step))
        return path

    def load(self) -> Snapshot | None:
        """The newest sound generation, on the CPU; None where there is none at all.

        Raises:
            CheckpointError: if generations are there and each is damaged.
        """
        steps = self.steps()
        faults: list[str] = []
        for step in reversed(steps):
            try:
                snapshot = self._load(step)
            except _DamageError as damage:
                faults.append(f"{self._path(step).name}: {damage}")
                _log.warning(
                    "checkpoint %s is damaged (%s); trying the generation before it.", self._path(step), damage
                )
                continue
            self._compare_pointer(step, damaged=bool(faults))
            return snapshot
        if faults:
            raise CheckpointError(
                f"{self.folder}: {len(faults)} checkpoints and none is sound ({'; '.join(faults)}). "
                "Restore one from a backup, or start anew in another folder.",
                code="E_DIGEST",
            )
        return None

    def _load(self, step: int) -> Snapshot:
        path = self._path(step)
        files = _verified(path)
        tensors = {
            name.removesuffix(_SUFFIX): safetensors.torch.load(data)
            for name, data in files.items()
            if name.endswith(_SUFFIX)
        }
        state = json.loads(files[_STATE])
        if state.pop("step") != step:
            raise _DamageError("the folder's name and its state name different steps")
        return Snapshot(step, tensors, state)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _compare_pointer(self, step: int, *, damaged: bool) -> None:
        """Say so when the newest generation has vanished; the step numbers decide, not the pointer."""
        try:
            pointed = (self.folder / _LATEST).read_text(errors="replace").strip()
        except OSError:
            pointed = ""
        if not damaged and pointed > self._path(step).name:
            _log.warning("%s: LATEST names %r, which is not there; going on from step %d.", self.folder, pointed, step)


class _DamageError(Exception):
    """A generation is not, byte for byte, what was written."""


def _verified(path: Path) -> dict[str, bytes]:
    """Bytes of every file of a generation, read once and checked."""
    try:
        files = {child.name: child.read_bytes() for child in path.iterdir()}
    except OSError as error:
        raise _DamageError(f"cannot be read: {error.strerror or errno.errorcode.get(error.errno or 0)}") from error
    listing = files.pop(_DIGESTS, None)
    if listing is None:
        raise _DamageError(f"{_DIGESTS} is missing")
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    if _STATE not in files:
        raise _DamageError(f"{_STATE} is missing")
    if listing != _digests(digests):
        raise _DamageError("the SHA-256 of its files is not the recorded one")
    return files


def _digests(digests: Mapping[str, str]) -> bytes:
    """The one spelling of ``digests.json``; another byte anywhere in it counts as damage."""
    return json.dumps(digests, indent=1, sort_keys=True).encode()


def _encode(tensors: Mapping[str, Tensor]) -> bytes:
    """Safetensors bytes of plain copies on the CPU; tensors that share memory are written once each."""
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        pointer = copy.untyped_storage().data_ptr()
        plain[name] = copy.clone() if pointer in seen else copy
        seen.add(pointer)
    return safetensors.torch.save(plain)


def _check_finite(snapshot: Snapshot) -> None:
    for collection, tensors in snapshot.tensors.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise TrainingError(
                    f"step {snapshot.step}: {collection} {name} holds NaN or infinity, so this step is not saved. "
                    "The last checkpoint is good; go on from it with a lower train.lr or in precision 32.",
                    code="E_NONFINITE_WEIGHTS",
                )

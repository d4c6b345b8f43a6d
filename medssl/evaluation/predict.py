"""Label maps for new scans, each on its scan's own grid, and scores of stored cases.

A scan is read, prepared exactly as the training cases were, seen window by window, and the class scores are carried
back to the scan's grid, where the best class is taken and written with the scan's own geometry.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from medssl.data.prepare import PrepareConfig, read_image
from medssl.data.store import StoredCase
from medssl.errors import CaseError, ConfigError, EnvironmentFaultError, MedSSLError, NoInputError, ReadError
from medssl.evaluation.metrics import score_labels
from medssl.evaluation.segment import Segmented, label_map, load_network, segment_volume
from medssl.evaluation.sliding_window import Axis, Network, Settings
from medssl.io import Source, digest, is_image, stem, write_volume
from medssl.ledger import Ledger, Outcome
from medssl.nn.bundle import Passport, load_bundle
from medssl.progress import track
from medssl.runfolder import RunFolder, atomic_write, read_journal
from medssl.volume import Volume

_SUFFIX = ".nii.gz"
_COLUMNS = ("item", "output", "source_digest", "output_digest", "voxels")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictResult:
    """What became of each scan, and the label maps that are there now."""

    ledger: Ledger
    outputs: tuple[Path, ...]


def predict(
    bundle: Path,
    inputs: Path | Sequence[Path],
    *,
    out: Path,
    overlap: float = 0.5,
    mirror_axes: Sequence[Axis] = (),
    batch: int = 2,
    device: str = "auto",
    xform: Literal["sform", "qform"] | None = None,
    assume_spacing_mm: tuple[float, float, float] | None = None,
    dry_run: bool = False,
) -> PredictResult:
    """Write a label map ``<scan>.nii.gz`` for each scan, on the scan's own grid.

    Scans that are already done with the same bundle and settings are skipped after their digests are compared; a scan
    that cannot be used is refused and the others go on.

    Args:
        bundle: What ``finetune`` left.
        inputs: A scan, a folder of scans (read through all its folders), or several of these.
        out: Folder for the label maps, ``predictions.csv``, ``refused.csv``, ``recipe.yaml`` and the journal.
        overlap: Share by which neighbouring windows overlap, in [0, 0.9].
        mirror_axes: Anatomical axes to mirror at test time; never LR where sides have labels of their own.
        batch: Windows in one forward pass.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        xform: Which of two NIfTI transforms to believe where they disagree; by default as in training.
        assume_spacing_mm: Spacing of files that state none; by default as in training.
        dry_run: Say what would be done, and write nothing.

    Returns:
        The ledger of all inputs, and the label maps.

    Raises:
        NoInputError: if there is no scan.
        CheckpointError: if the bundle is damaged or holds no segmentation model.
        EnvironmentFaultError: if disk, memory or device stand in the way; finished scans stay valid.
    """
    settings = Settings(overlap, tuple(mirror_axes), batch, _device(device))
    loaded = load_bundle(bundle)
    network = load_network(loaded, device=settings.device)
    asked = {"xform": xform, "assume_spacing_mm": assume_spacing_mm}
    asked = {name: value for name, value in asked.items() if value is not None}
    reading = PrepareConfig.parse({**loaded.passport.prepare, **asked}, source="prepare options")
    ledger = Ledger()
    jobs = _plan(inputs, out, ledger)
    if dry_run:
        for job in jobs:
            ledger.accept(job.item)
        ledger.check()
        return PredictResult(ledger, tuple(job.target for job in jobs))

    recipe = {
        "command": "predict",
        "bundle_digest": digest(bundle / "digests.json"),
        "overlap": overlap,
        "mirror_axes": list(mirror_axes),
        **asked,
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    records: list[dict[str, Any]] = []
    outputs: list[Path] = []
    with RunFolder(out) as run:
        run.write_recipe({**recipe, "bundle": str(bundle), "device": settings.device, "medssl": version("medssl")})
        done = _finished(run, key)
        for job in track(jobs, "predict"):
            try:
                record = _kept(job, done)
                if record is None:
                    record = _predict_one(job, network, reading, passport=loaded.passport, settings=settings)
                    run.journal.log(event="predicted", key=key, **record)
            except EnvironmentFaultError:
                raise
            except MedSSLError as error:
                _log.warning("%s: %s: %s", job.item, error.code, error.message)
                ledger.reject(job.item, error)
            else:
                ledger.accept(job.item, warnings=tuple(record["warnings"]))
                records.append(record)
                outputs.append(job.target)
        atomic_write(out / "predictions.csv", _table(records))
        atomic_write(out / "refused.csv", ledger.to_csv(Outcome.REJECTED, Outcome.DUPLICATE, Outcome.IGNORED))
        ledger.check()
        run.journal.log(command="predict", **ledger.counts())
    return PredictResult(ledger, tuple(outputs))


def score_stored(
    bundle: Path,
    cases: Sequence[StoredCase],
    *,
    nsd_tolerance_mm: float,
    overlap: float = 0.5,
    batch: int = 2,
    device: str = "cpu",
) -> pd.DataFrame:
    """Segment labelled cases of a store and score them against the labels as drawn, on their source grids.

    Args:
        bundle: What ``finetune`` left.
        cases: Labelled cases.
        nsd_tolerance_mm: Tolerance of the surface Dice.
        overlap: See :func:`predict`.
        batch: See :func:`predict`.
        device: See :func:`predict`.

    Returns:
        One row a case and structure: ``case_id, subject_id, label`` and the columns of ``metrics.Scores``.
    """
    settings = Settings(overlap, (), batch, _device(device))
    loaded = load_bundle(bundle)
    network = load_network(loaded, device=settings.device)
    rows = []
    for case in cases:
        image = case.read("image", (0, 0, 0), case.shape)
        prediction = label_map(
            image,
            network,
            prepared=case.geometry,
            source=case.source_geometry,
            fill=case.fill,
            passport=loaded.passport,
            settings=settings,
        )
        found = score_labels(
            prediction.array[0],
            case.source_label(),
            geometry=case.source_geometry,
            label_values=[value for value in loaded.passport.label_values or () if value != 0],
            nsd_tolerance_mm=nsd_tolerance_mm,
        )
        names = {"case_id": case.case_id, "subject_id": case.subject_id}
        rows += [{**names, "label": value, **scores.to_dict()} for value, scores in found.items()]
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _Job:
    item: str
    path: Path
    target: Path


def _plan(inputs: Path | Sequence[Path], out: Path, ledger: Ledger) -> list[_Job]:
    """Announce all inputs and book those that no label map can be made of; the rest is the work."""
    given = [inputs] if isinstance(inputs, Path) else list(inputs)
    jobs: list[_Job] = []
    seen: set[Path] = set()
    for item, path in _files(given, out):
        ledger.expect(item)
        if not path.exists():
            ledger.reject(item, ReadError(f"{item}: there is no such file. Correct the path."))
        elif not is_image(path):
            ledger.ignore(item, "not an image by its name")
        elif path.resolve() in seen:
            ledger.duplicate(item, "given twice")
        else:
            seen.add(path.resolve())
            jobs.append(_Job(item, path, out / f"{stem(path)}{_SUFFIX}"))
    if not jobs:
        raise NoInputError(
            f"{', '.join(map(str, given)) or 'inputs'}: no image found; NIfTI, MHA, NRRD, PNG, JPEG or TIFF files are "
            "needed. Give a scan or a folder of scans."
        )
    overwritten = seen & {job.target.resolve() for job in jobs}
    if overwritten:
        raise ConfigError(
            f"{out}: label maps would overwrite {len(overwritten)} of the scans. Choose another output folder.",
            code="E_OVERWRITE",
        )
    clashes = Counter(_folded(job) for job in jobs)
    for job in jobs:
        if clashes[_folded(job)] > 1:
            message = (
                f"{job.item}: {clashes[_folded(job)]} scans would be written to {job.target.name}, upper case and "
                "accents apart; one is needed. Rename them, or predict them into folders of their own."
            )
            ledger.reject(job.item, CaseError(message, code="E_NAME_CLASH"))
    return [job for job in jobs if clashes[_folded(job)] == 1]


def _files(given: Iterable[Path], out: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of every file, through folders but not into the output folder or hidden places."""
    for path in given:
        if not path.is_dir():
            yield path.name, path
            continue
        for file in sorted(path.rglob("*")):
            relative = file.relative_to(path)
            is_hidden = any(part.startswith(".") for part in relative.parts)
            if file.is_file() and not is_hidden and not file.resolve().is_relative_to(out.resolve()):
                yield relative.as_posix(), file


def _folded(job: _Job) -> str:
    return unicodedata.normalize("NFC", job.target.name).casefold()


def _predict_one(
    job: _Job, network: Network, reading: PrepareConfig, *, passport: Passport, settings: Settings
) -> dict[str, Any]:
    """Read, segment and write one scan; give its record."""
    volume, source = read_image(job.path, reading)
    if reading.spacing_mm is not None and reading.assume_spacing_mm is None and _states_no_spacing(source):
        raise CaseError(
            f"{job.item}: states no spacing; the bundle works at {reading.spacing_mm} mm. "
            "Give the true spacing with assume_spacing_mm.",
            code="E_NO_SPACING",
        )
    segmented = _segment(volume, network, passport=passport, settings=settings)
    write_volume(segmented.labels, job.target, like=source)
    values, counts = np.unique(segmented.labels.array, return_counts=True)
    return {
        "item": job.item,
        "output": job.target.name,
        "source_digest": source.digest,
        "output_digest": digest(job.target),
        "voxels": {str(value): int(count) for value, count in zip(values, counts, strict=True)},
        "warnings": [*source.warnings, *segmented.warnings],
    }


def _states_no_spacing(source: Source) -> bool:
    return any(warning.startswith("W_NO_SPACING") for warning in source.warnings)


def _segment(volume: Volume, network: Network, *, passport: Passport, settings: Settings) -> Segmented:
    """Run, once more with one window a pass if memory is short, and then name the fault."""
    single = Settings(settings.overlap, settings.mirror_axes, 1, settings.device)
    for tried in dict.fromkeys((settings, single)):
        try:
            return segment_volume(volume, network, passport=passport, settings=tried)
        except (torch.OutOfMemoryError, MemoryError):
            _log.warning("out of memory with %d windows a pass", tried.batch)
    raise EnvironmentFaultError(
        f"device {settings.device}: out of memory for a volume of {volume.geometry.shape} voxels with one window a "
        "pass. Use the CPU (device=cpu) or a machine with more memory.",
        code="E_MEMORY",
    )


def _device(name: str) -> str:
    """The device that ``name`` asks for.

    Raises:
        ConfigError: if there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {name}: not available here. Use auto, cpu, or cuda on a machine with a CUDA device.",
            code="E_DEVICE",
        ) from error
    return name


def _finished(run: RunFolder, key: str) -> dict[str, dict[str, Any]]:
    """Last record of each scan that an earlier run wrote with the same bundle and settings."""
    path = run.path / "journal.jsonl"
    lines = read_journal(path) if path.exists() else []
    return {line["item"]: line for line in lines if line.get("event") == "predicted" and line.get("key") == key}


def _kept(job: _Job, done: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The record of a scan whose file and label map are still what they were, or None."""
    record = done.get(job.item)
    if record is None or not job.target.exists() or digest(job.target) != record["output_digest"]:
        return None
    return record if digest(job.path) == record["source_digest"] else None


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for record in records:
        voxels = " ".join(f"{value}:{count}" for value, count in record["voxels"].items())
        writer.writerow([*(record[name] for name in _COLUMNS[:-1]), voxels])
    return buffer.getvalue()

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
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from medssl import pool
from medssl.config import Config
from medssl.data.prepare import PrepareConfig, reading_of
from medssl.data.reading import Reading, nameless, read_image
from medssl.data.series import modality_of
from medssl.data.store import StoredCase
from medssl.errors import CaseError, ConfigError, EnvironmentFaultError, MedSSLError
from medssl.evaluation.inputs import Job, plan
from medssl.evaluation.metrics import score_labels
from medssl.evaluation.segment import Segmented, label_map, load_network, segment_volume
from medssl.evaluation.sliding_window import Axis, Network, Settings
from medssl.io import digest, write_volume
from medssl.io.dicom.series_list import write_list
from medssl.ledger import Ledger, Outcome
from medssl.nn.bundle import Passport, load_bundle
from medssl.progress import track
from medssl.runfolder import RunFolder, atomic_write, read_journal, remove
from medssl.volume import Volume, respace

_COLUMNS = ("item", "output", "source_digest", "output_digest", "voxels")

_UNPACKED = ".tmp-unpacked-"  # a run that is killed leaves it, and a later one removes it

_log = logging.getLogger(__name__)


class PredictConfig(Config):
    """Options of a prediction as a mapping, for the command line; see :func:`predict`."""

    overlap: float = Field(0.5, ge=0, le=0.9)
    mirror_axes: tuple[Axis, ...] = ()
    batch: int = Field(2, ge=1)
    xform: Literal["sform", "qform"] | None = None
    assume_spacing_mm: tuple[float, float, float] | None = None


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

    Label maps are named like the file of their scan; by case id where a table is given; by a hash of the series, and
    the number of the volume, for DICOM.

    Scans that are already done with the same bundle and settings are skipped after their digests are compared; a scan
    that cannot be used is refused and the others go on. A label map that an earlier call left of a scan that is refused
    now is removed, so that no map in the folder is older than its ledger.

    Args:
        bundle: What ``finetune`` left.
        inputs: A scan, a folder of scans (read through all its folders), an archive of one, a table that
            ``medssl scan`` wrote, a series list, or several of these. Of DICOM files every volume is taken.
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
        EnvironmentFaultError: if the disk stands in the way; finished scans stay valid.
    """
    settings = Settings(overlap, tuple(mirror_axes), batch, _device(device))
    loaded = load_bundle(bundle)
    network = load_network(loaded, device=settings.device)
    asked = {"xform": xform, "assume_spacing_mm": assume_spacing_mm}
    asked = {name: value for name, value in asked.items() if value is not None}
    reading = PrepareConfig.parse({**loaded.passport.preparation, **asked}, source="prepare options")
    ledger = Ledger()
    room = (Path(tempfile.gettempdir()) if dry_run else out) / f"{_UNPACKED}{secrets.token_hex(8)}"
    try:
        jobs = plan(inputs, out, ledger, unpack_to=room)
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
            written = _written(run)
            done = {item: record for item, record in written.items() if record.get("key") == key}
            work = partial(_predict_one, network=network, reading=reading, passport=loaded.passport, settings=settings)
            _write_lists(jobs)
            for job in track(jobs, "predict"):
                kept = _kept(job, done)
                record = pool.attempt(work, job, job.item) if kept is None else kept
                if isinstance(record, EnvironmentFaultError):
                    raise record
                if isinstance(record, MedSSLError):
                    _log.warning("%s: %s: %s", job.item, record.code, record.message)
                    ledger.reject(job.item, record)
                    continue
                if kept is None:
                    run.journal.log(event="predicted", key=key, **record)
                ledger.accept(job.item, warnings=(*job.warnings, *record["warnings"]))
                records.append(record)
                outputs.append(job.target)
            _remove_outdated(out, ledger, written, outputs)
            atomic_write(out / "predictions.csv", _table(records))
            atomic_write(out / "refused.csv", ledger.to_csv(Outcome.REJECTED, Outcome.DUPLICATE, Outcome.IGNORED))
            ledger.check()
            run.journal.log(command="predict", **ledger.counts())
        return PredictResult(ledger, tuple(outputs))
    finally:
        remove(room)


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
        image = _on_grid_of(loaded.passport, case)
        prediction = label_map(
            image.array,
            network,
            prepared=image.geometry,
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


def _on_grid_of(passport: Passport, case: StoredCase) -> Volume:
    """The stored image on a grid of the voxel size that the network works at."""
    stored = case.read("image", (0, 0, 0), case.shape).astype(np.float32, copy=False)
    volume = Volume(stored, case.geometry, "HU" if case.unit == "HU" else "arbitrary")
    spacing = passport.spacing_mm
    if spacing is not None and case.shape[2] == 1:
        spacing = (*spacing[:2], case.spacing_mm[2])
    if spacing is None or np.allclose(case.spacing_mm, spacing, rtol=0, atol=1e-4):
        return volume
    return respace(volume, spacing)


def _predict_one(
    job: Job, *, network: Network, reading: PrepareConfig, passport: Passport, settings: Settings
) -> dict[str, Any]:
    """Read, segment and write one scan; give its record."""
    with nameless(str(job.path), job.item):
        volume, source = read_image(job.path, reading_of(reading, job.reading), unit=reading.unit)
    modality = job.modality if job.modality != "other" else modality_of(str(source.facts.get("modality", "")))
    if "other" not in {modality, reading.modality} and modality != reading.modality:
        raise CaseError(
            f"{job.item}: an image of {modality}; the bundle was made for {reading.modality}. Take a bundle for it.",
            code="E_MODALITY",
        )
    if reading.spacing_mm is not None and not source.has_spacing:
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


def _segment(volume: Volume, network: Network, *, passport: Passport, settings: Settings) -> Segmented:
    """Run, once more with one window a pass if memory is short, and then name the fault."""
    single = Settings(settings.overlap, settings.mirror_axes, 1, settings.device)
    for tried in dict.fromkeys((settings, single)):
        try:
            return segment_volume(volume, network, passport=passport, settings=tried)
        except (torch.OutOfMemoryError, MemoryError):
            _log.warning("out of memory with %d windows a pass", tried.batch)
    raise CaseError(
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


def _written(run: RunFolder) -> dict[str, dict[str, Any]]:
    """Last record of each scan that earlier calls wrote."""
    path = run.path / "journal.jsonl"
    lines = read_journal(path) if path.exists() else []
    return {line["item"]: line for line in lines if line.get("event") == "predicted"}


def _kept(job: Job, done: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The record of a scan whose file and label map are still what they were, or None."""
    record = done.get(job.item)
    if record is None or not _has_digest(job.target, record["output_digest"]):
        return None
    return record if _has_digest(job.path, record["source_digest"], reading=job.reading) else None


def _has_digest(path: Path, expected: str, *, reading: Reading | None = None) -> bool:
    chosen = reading or Reading()
    try:
        return digest(path, volume=chosen.volume, regularise=chosen.regularise) == expected
    except MedSSLError:
        return False


def _write_lists(jobs: Sequence[Job]) -> None:
    """Write the series list of each DICOM image, so that it can be read like a file."""
    for path, series in {job.path: job.series for job in jobs}.items():
        if series is not None:
            write_list(series, path)


def _remove_outdated(out: Path, ledger: Ledger, written: Mapping[str, dict[str, Any]], outputs: Sequence[Path]) -> None:
    """Take away the label maps of earlier calls whose scans are refused now."""
    for entry in ledger:
        record = written.get(entry.item)
        if record is None or entry.outcome is not Outcome.REJECTED:
            continue
        path = out / Path(record["output"]).name
        if path not in outputs and _has_digest(path, record["output_digest"]):
            path.unlink()


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for record in records:
        voxels = " ".join(f"{value}:{count}" for value, count in record["voxels"].items())
        writer.writerow([*(record[name] for name in _COLUMNS[:-1]), voxels])
    return buffer.getvalue()

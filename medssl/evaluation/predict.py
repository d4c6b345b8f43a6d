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
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Integer
from pydantic import Field

from medssl import pool
from medssl.config import Config
from medssl.data.prepare import PrepareConfig
from medssl.data.reading import Reading
from medssl.data.store import StoredCase
from medssl.errors import CaseError, ConfigError, EnvironmentFaultError, MedSSLError
from medssl.evaluation.classify import TABLE, classify, subjects_of
from medssl.evaluation.components import Rules, clean, read_rules, rules_path
from medssl.evaluation.ensemble import load_ensemble, open_members, weight_digests
from medssl.evaluation.inputs import Job, plan
from medssl.evaluation.metrics import score_labels
from medssl.evaluation.mirroring import check_mirrors
from medssl.evaluation.scans import read_scan, write_lists
from medssl.evaluation.segment import Segmented, segment_stored, segment_volume
from medssl.evaluation.sliding_window import Axis, Layout, Network, Precision, Settings
from medssl.io import digest, write_volume
from medssl.ledger import Ledger, Outcome
from medssl.nn.bundle import Passport
from medssl.progress import track
from medssl.runfolder import RunFolder, atomic_write, read_journal, remove
from medssl.volume import Volume

_COLUMNS = ("item", "output", "source_digest", "output_digest", "voxels")

_UNPACKED = ".tmp-unpacked-"  # a run that is killed leaves it, and a later one removes it

_log = logging.getLogger(__name__)


class PredictConfig(Config):
    """Options of a prediction as a mapping, for the command line; see :func:`predict`."""

    overlap: float = Field(0.5, ge=0, le=0.9)
    mirror_axes: tuple[Axis, ...] = ()
    batch: int = Field(2, ge=1)
    layout: Layout = "even"
    skip_empty: bool = True
    precision: Precision = "fp32"
    channels_last: bool = False
    postprocess: bool = True
    xform: Literal["sform", "qform"] | None = None
    assume_spacing_mm: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class PredictResult:
    """What became of each scan, and the label maps that are there now; of a classifier its table."""

    ledger: Ledger
    outputs: tuple[Path, ...]


def predict(
    bundle: Path | Sequence[Path],
    inputs: Path | Sequence[Path],
    *,
    out: Path,
    overlap: float = 0.5,
    mirror_axes: Sequence[Axis] = (),
    batch: int = 2,
    layout: Layout = "even",
    skip_empty: bool = True,
    precision: Precision = "fp32",
    channels_last: bool = False,
    postprocess: bool = True,
    device: str = "auto",
    xform: Literal["sform", "qform"] | None = None,
    assume_spacing_mm: tuple[float, float, float] | None = None,
    dry_run: bool = False,
) -> PredictResult:
    """Write a label map ``<scan>.nii.gz`` for each scan, on the scan's own grid; of a classifier a table alone.

    Label maps are named like the file of their scan; by case id where a table is given; by a hash of the series, and
    the number of the volume, for DICOM.

    Scans that are already done with the same bundle and settings are skipped after their digests are compared; a scan
    that cannot be used is refused and the others go on. A label map that an earlier call left of a scan that is refused
    now is removed, so that no map in the folder is older than its ledger.

    Args:
        bundle: What ``finetune`` left; several, or a folder of them such as ``crossval`` leaves, are an ensemble: the
            mean of their class probabilities is taken.
        inputs: A scan, a folder of scans (read through all its folders), an archive of one, a table that
            ``medssl scan`` wrote, a series list, or several of these. Of DICOM files every volume is taken.
        out: Folder for the label maps, ``predictions.csv``, ``refused.csv``, ``recipe.yaml`` and the journal.
        overlap: Share by which neighbouring windows overlap, in [0, 0.9].
        mirror_axes: Anatomical axes to mirror at test time; only those that the anatomy allows or training had.
        batch: Windows in one forward pass.
        layout: Where windows lie, see :class:`~medssl.evaluation.sliding_window.Settings`, and so the next three.
        skip_empty: Leave out windows without a voxel of the body, where preparation makes a mask of it.
        precision: ``bf16`` is quicker where the processor has it, and differs a little.
        channels_last: Another layout in memory, quicker for some networks.
        postprocess: Apply the rules that ``medssl postprocess`` chose, where there are any.
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
    settings = Settings(
        overlap, tuple(mirror_axes), batch, _device(device), layout, skip_empty, precision, channels_last
    )
    members = open_members(bundle)
    passport, digests = members[0].passport, weight_digests(members)
    is_classifier = passport.kind == "classifier"
    asked = _stated({"xform": xform, "assume_spacing_mm": assume_spacing_mm})
    reading = PrepareConfig.parse({**passport.preparation, **asked}, source="prepare options")
    ledger = Ledger()
    if not is_classifier:
        network = load_ensemble(members, settings=settings)
        check_mirrors(passport, settings.mirror_axes)
        rules = read_rules(rules_path(bundle), weights=digests) if postprocess else {}
    room = (Path(tempfile.gettempdir()) if dry_run else out) / f"{_UNPACKED}{secrets.token_hex(8)}"
    try:
        jobs = plan(inputs, out, ledger, unpack_to=room)
        if dry_run:
            _book(jobs, ledger)
            return PredictResult(ledger, (out / TABLE,) if is_classifier else tuple(job.target for job in jobs))
        if is_classifier:
            table = classify(
                members,
                jobs,
                ledger,
                out=out,
                subjects=subjects_of(inputs),
                reading=reading,
                device=settings.device,
            )
            return PredictResult(ledger, (table,))

        recipe = {
            "command": "predict",
            "bundle_digests": digests,
            "overlap": overlap,
            "mirror_axes": list(mirror_axes),
            "layout": layout,
            "skip_empty": skip_empty,
            "precision": precision,
            "postprocess": {str(value): rule.to_dict() for value, rule in rules.items()},
            **asked,
        }
        key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        records: list[dict[str, Any]] = []
        outputs: list[Path] = []
        with RunFolder(out) as run:
            run.write_recipe(
                {
                    **recipe,
                    "bundles": [str(member.folder) for member in members],
                    "device": settings.device,
                    "medssl": version("medssl"),
                }
            )
            written = _written(run)
            done = {item: record for item, record in written.items() if record.get("key") == key}
            work = partial(
                _predict_one, network=network, reading=reading, passport=passport, settings=settings, rules=rules
            )
            write_lists(jobs)
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
    bundle: Path | Sequence[Path],
    cases: Sequence[StoredCase],
    *,
    nsd_tolerance_mm: float,
    overlap: float = 0.5,
    batch: int = 2,
    device: str = "cpu",
    rules: Rules | None = None,
) -> pd.DataFrame:
    """Segment labelled cases of a store and score them against the labels as drawn, on their source grids.

    Args:
        bundle: As for :func:`predict`.
        cases: Labelled cases.
        nsd_tolerance_mm: Tolerance of the surface Dice.
        overlap: See :func:`predict`.
        batch: See :func:`predict`.
        device: See :func:`predict`.
        rules: Of :func:`~medssl.evaluation.components.clean`; none by default.

    Returns:
        One row a case and structure: ``case_id, subject_id, label`` and the columns of ``metrics.Scores``.
    """
    members = open_members(bundle)
    values = [value for value in members[0].passport.label_values or () if value != 0]
    settings = Settings(overlap, (), batch, _device(device))
    network = load_ensemble(members, settings=settings)
    rows = []
    for case in cases:
        labels = segment_stored(case, network, passport=members[0].passport, settings=settings)
        found = score_labels(
            clean(labels, rules or {}).array[0],
            case.source_label(),
            geometry=case.source_geometry,
            label_values=values,
            nsd_tolerance_mm=nsd_tolerance_mm,
        )
        names = {"case_id": case.case_id, "subject_id": case.subject_id}
        rows += [{**names, "label": value, **scores.to_dict()} for value, scores in found.items()]
    return pd.DataFrame(rows)


def _stated(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _book(jobs: Sequence[Job], ledger: Ledger) -> None:
    for job in jobs:
        ledger.accept(job.item)
    ledger.check()


def _predict_one(
    job: Job, *, network: Network, reading: PrepareConfig, passport: Passport, settings: Settings, rules: Rules
) -> dict[str, Any]:
    """Read, segment and write one scan; give its record."""
    volume, source = read_scan(job, reading)
    segmented = _segment(volume, network, passport=passport, settings=settings)
    labels = clean(segmented.labels, rules)
    write_volume(labels, job.target, like=source)
    return {
        "item": job.item,
        "output": job.target.name,
        "source_digest": source.digest,
        "output_digest": digest(job.target),
        "voxels": {str(value): count for value, count in _counts(labels.array[0]).items()},
        "warnings": [*source.warnings, *segmented.warnings],
    }


def _segment(volume: Volume, network: Network, *, passport: Passport, settings: Settings) -> Segmented:
    """Run, once more with one window a pass if memory is short, and then name the fault."""
    single = replace(settings, batch=1)
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


def _counts(labels: Integer[np.ndarray, "x y z"]) -> dict[int, int]:
    """Voxels of each value that occurs."""
    size = int(labels.max()) + 1
    total = sum((np.bincount(plane.ravel(), minlength=size) for plane in labels), np.zeros(size, dtype=np.int64))
    return {value: int(count) for value, count in enumerate(total) if count}


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

"""A table of probabilities, values and decisions for new scans, by a classifier's bundle or several of them."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Shaped

from medssl import pool
from medssl.data.cohort import Cohort
from medssl.data.prepare import PrepareConfig, Prepared, prepare_volume
from medssl.data.store import box_of
from medssl.errors import CaseError, CheckpointError, EnvironmentFaultError, MedSSLError
from medssl.evaluation.inputs import Job
from medssl.evaluation.scans import read_scan, write_lists
from medssl.io import digest
from medssl.ledger import Ledger, Outcome
from medssl.nn.bundle import DIGESTS, Bundle
from medssl.progress import track
from medssl.runfolder import RunFolder, atomic_write
from medssl.tasks.classification import Classifier
from medssl.verdict import Verdict

TABLE = "predictions.csv"

_SUFFIX = ".nii.gz"
_SHARED = ("column", "kind", "classes", "level")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedCase:
    """A prepared scan in memory, read as a case of a store is.

    Args:
        case_id: Its name.
        array: In the type that a store keeps.
        prepared: What preparation gave.
        is_metric: Whether the file stated its voxel size.
    """

    case_id: str
    array: Shaped[np.ndarray, "c x y z"]
    prepared: Prepared
    is_metric: bool

    atlas_affine = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along each axis."""
        return self.prepared.volume.geometry.shape

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel."""
        x, y, z = (float(value) for value in self.prepared.volume.geometry.spacing_mm)
        return x, y, z

    @property
    def affine(self) -> Float64[np.ndarray, "4 4"]:
        """Voxel index to world mm, RAS+."""
        return self.prepared.volume.geometry.affine

    @property
    def body_box(self) -> Float64[np.ndarray, "2 3"]:
        """Start and size of the box around the body."""
        return np.array(box_of(self.prepared.body_mask.array[0] > 0), dtype=np.float64)

    @property
    def fill(self) -> float:
        """Image value outside the volume."""
        return self.prepared.fill

    @property
    def channels(self) -> int:
        """Channels of the image."""
        return len(self.array)

    def has(self, name: str) -> bool:
        """Whether the case holds it: the image alone."""
        return name == "image"

    def read(self, name: str, start: Sequence[int], shape: Sequence[int]) -> Shaped[np.ndarray, "c x y z"]:
        """Voxels of the box at ``start``; what lies outside the volume is filled.

        Raises:
            KeyError: for anything but ``image``.
        """
        if not self.has(name):
            raise KeyError(f"case {self.case_id} has no {name}")
        box = np.full((self.channels, *shape), self.fill, self.array.dtype)
        low = np.maximum(start, 0)
        high = np.minimum(np.add(start, shape), self.shape)
        if (low < high).all():
            inside = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            place = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
            box[(slice(None), *place)] = self.array[(slice(None), *inside)]
        return box

    def foreground_voxels(self, value: int) -> Shaped[np.ndarray, "n 3"]:  # noqa: ARG002  as a store's case has them
        """None: nothing is drawn at prediction."""
        return np.zeros((0, 3), np.int32)


class Panel:
    """Classifiers that judge together: the mean of their probabilities, or of their values.

    Args:
        members: Bundles of classifiers.
        device: Where they run.

    Raises:
        CheckpointError: if one is no classifier, or they were not made for the same question.
    """

    def __init__(self, members: Sequence[Bundle], *, device: str) -> None:
        self.networks = [Classifier.from_bundle(member).to(device) for member in members]
        self.verdicts = [Verdict.parse(member.passport.target or {}, source="passport target") for member in members]
        first = self.verdicts[0]
        for member, verdict in zip(members, self.verdicts, strict=True):
            different = [name for name in _SHARED if getattr(verdict, name) != getattr(first, name)]
            if different:
                raise CheckpointError(
                    f"{member.folder}: other {', '.join(different)} than {members[0].folder}; classifiers that judge "
                    "together must agree. Predict with each alone.",
                    code="E_CONTRACT",
                )
        thresholds = np.mean([verdict.thresholds for verdict in self.verdicts], axis=0)
        self.verdict = first.model_copy(update={"thresholds": tuple(float(one) for one in thresholds)})

    def judge(self, cases: Sequence[PreparedCase]) -> dict[str, float | str]:
        """Columns of the table for an image, or for a bag of images."""
        both = zip(self.networks, self.verdicts, strict=True)
        found = [verdict.probabilities(network.scores(cases)[None])[0] for network, verdict in both]
        return self.verdict.row(np.mean(found, axis=0))


def classify(
    members: Sequence[Bundle],
    jobs: Sequence[Job],
    ledger: Ledger,
    *,
    out: Path,
    subjects: Mapping[str, str],
    reading: PrepareConfig,
    device: str,
) -> Path:
    """Write ``predictions.csv``: ``case_id``, ``subject_id``, then ``p_<class>`` or ``value``, and ``decision``.

    A bag of images has one row, under the id of its first case that could be read. Where no table tells subjects, a
    scan is a subject, and a bag, of its own.

    Args:
        members: Bundles of classifiers; of several the mean of their probabilities is taken.
        jobs: The scans.
        ledger: Where each is booked; a scan that cannot be used is refused and the others go on.
        out: Folder; gets also ``refused.csv``, ``recipe.yaml`` and the journal.
        subjects: Subject of a scan, by its name in the ledger.
        reading: Preparation of the bundle, with the reader's choices.
        device: Where the networks run.

    Raises:
        CheckpointError: if a bundle is no classifier, or they do not belong together.
        EnvironmentFaultError: if the disk stands in the way.
    """
    panel = Panel(members, device=device)
    in_bags = panel.verdict.level == "bag"
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(subjects.get(job.item, _name(job)) if in_bags else job.item, []).append(job)
    channels = members[0].passport.image_channels or members[0].passport.in_channels
    rows: list[dict[str, Any]] = []
    with RunFolder(out) as run:
        digests = [digest(member.folder / DIGESTS) for member in members]
        recipe = {"command": "predict", "bundle_digests": digests, "device": device, "medssl": version("medssl")}
        run.write_recipe({**recipe, "bundles": [str(member.folder) for member in members]})
        write_lists(jobs)
        work = partial(_prepared, reading=reading, channels=channels)
        for group in track(list(groups.values()), "predict"):
            cases = []
            for job in group:
                result = pool.attempt(work, job, job.item)
                if isinstance(result, EnvironmentFaultError):
                    raise result
                if isinstance(result, MedSSLError):
                    _log.warning("%s: %s: %s", job.item, result.code, result.message)
                    ledger.reject(job.item, result)
                    continue
                case, warnings = result
                ledger.accept(job.item, warnings=(*job.warnings, *warnings))
                cases.append((job, case))
            if cases:
                job, first = cases[0]
                names = {"case_id": first.case_id, "subject_id": subjects.get(job.item, first.case_id)}
                rows.append({**names, **panel.judge([case for _, case in cases])})
        atomic_write(out / TABLE, _table(rows, panel.verdict.columns))
        atomic_write(out / "refused.csv", ledger.to_csv(Outcome.REJECTED, Outcome.DUPLICATE, Outcome.IGNORED))
        ledger.check()
        run.journal.log(command="predict", rows=len(rows), **ledger.counts())
    return out / TABLE


def subjects_of(inputs: Path | Sequence[Path]) -> dict[str, str]:
    """Subject of each case of the tables among some inputs."""
    given = [inputs] if isinstance(inputs, Path) else inputs
    tables = [path for path in given if path.suffix.lower() == ".csv" and path.is_file()]
    return {case.case_id: case.subject_id for table in tables for case in Cohort.from_csv(table)}


def _prepared(job: Job, *, reading: PrepareConfig, channels: int) -> tuple[PreparedCase, tuple[str, ...]]:
    volume, source = read_scan(job, reading)
    if len(volume.array) != channels:
        raise CaseError(
            f"{job.item}: {len(volume.array)} channels; the bundle was trained on {channels}. Use a bundle made for "
            "such images.",
            code="E_CONTRACT",
        )
    prepared = prepare_volume(volume, reading)
    stored = prepared.volume.array.astype(reading.dtype)
    return PreparedCase(_name(job), stored, prepared, source.has_spacing), (*source.warnings, *prepared.warnings)


def _name(job: Job) -> str:
    return job.target.name.removesuffix(_SUFFIX)


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("case_id", "subject_id", *columns))
    for row in rows:
        cells = [f"{row[name]:.9g}" if isinstance(row[name], float) else row[name] for name in columns]
        writer.writerow((row["case_id"], row["subject_id"], *cells))
    return buffer.getvalue()

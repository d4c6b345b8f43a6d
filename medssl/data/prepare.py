"""Bring every case to one orientation, spacing and intensity scale, once, into a store that is read by crop.

For one volume, in this order: right angles if the grid is sheared; orientation; spacing; body mask; foreground crop;
intensity. ``prepare_volume`` is the only place where this happens, for training and for prediction.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped
from pydantic import Field, model_validator

from medssl import io, pool
from medssl.config import Config
from medssl.data.cohort import Case, Cohort, Modality
from medssl.data.facts import facts_of
from medssl.data.normalise import (
    BodyMaskConfig,
    CropConfig,
    IntensityConfig,
    body_mask,
    cuts_label,
    foreground_box,
    scale_intensity,
)
from medssl.data.reading import Reading, nameless, one_channel, read_image, read_label
from medssl.data.store import (
    STORE_VERSION,
    ArrayStore,
    Entry,
    IndexRow,
    entry_folder,
    label_values,
    verify_entry,
    write_entry,
    write_index,
)
from medssl.errors import CaseError, CheckpointError, EnvironmentFaultError, MedSSLError
from medssl.ledger import Ledger, Outcome
from medssl.progress import track
from medssl.runfolder import Journal, atomic_write, make_folder, remove, remove_stale
from medssl.volume import Volume, crop, reorient, resample_to, respace

Region = Literal[
    "whole_body", "head_neck", "brain", "eye", "chest", "cardiac", "breast", "abdomen", "pelvis", "spine", "extremity",
    "skin", "tissue",
]  # fmt: skip
"""Parts of the body of which ``medssl.augment.anatomy`` knows what may be done to an image."""

_COLOURS = 3
_SHEAR_TOLERANCE_DEG = 0.1
_MOST_IN_AIR_HU = -200.0


class PrepareConfig(Config):
    """How a volume is prepared; goes into the passport of every bundle, so that prediction does the same.

    Args:
        modality: Cases of another modality are refused; ``other`` takes all.
        region: Part of the body; augmentation is checked against it. It changes no voxel.
        spatial_dims: 2 refuses volumes, 3 refuses images of one slice; None takes both, which one model cannot.
        channels: Images of another number of channels are refused; None takes all, which one model cannot.
        orientation: Where the array axes point; images of one slice keep their own, columns and then rows.
        spacing_mm: Voxel size to resample to, of images of one slice that of a pixel; None keeps each case's own.
        intensity: Scaling of values.
        body_mask: Where statistics are taken and crops are drawn.
        crop: Cutting the air off.
        xform: Which NIfTI transform to believe where the two disagree, for cases without such a choice of their own.
        assume_spacing_mm: Voxel size of files that state none, likewise.
    """

    modality: Modality = "other"
    region: Region | None = None
    spatial_dims: Literal[2, 3] | None = None
    channels: int | None = Field(None, ge=1)
    orientation: str = "RAS"
    spacing_mm: tuple[float, float, float] | None = None
    intensity: IntensityConfig = IntensityConfig()
    body_mask: BodyMaskConfig = BodyMaskConfig()
    crop: CropConfig = CropConfig()
    xform: Literal["sform", "qform"] | None = None
    assume_spacing_mm: tuple[float, float, float] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> PrepareConfig:
        for spacing in (self.spacing_mm, self.assume_spacing_mm):
            if spacing is not None and min(spacing) <= 0:
                raise ValueError("spacings must be above 0 mm")
        if self.intensity.mode == "hu" and self.modality in {"MR", "PT", "US", "XR"}:
            raise ValueError(f"intensity mode hu is for CT, not for {self.modality}; take robust_zscore")
        if sorted("RAS".find(axis) for axis in self.orientation.translate(str.maketrans("LPI", "RAS"))) != [0, 1, 2]:
            raise ValueError("orientation needs one letter each of R/L, A/P and S/I, for example RAS")
        return self

    @property
    def unit(self) -> Literal["HU", "arbitrary"]:
        """Unit of the prepared image."""
        return "HU" if self.intensity.mode == "hu" else "arbitrary"

    @property
    def dtype(self) -> np.dtype[Any]:
        """What the store keeps: int16 HU, float16 z-scores, or float32 where any value may occur."""
        return np.dtype({"hu": np.int16, "robust_zscore": np.float16, "none": np.float32}[self.intensity.mode])


@dataclass(frozen=True)
class Prepared:
    """One prepared volume.

    Args:
        volume: Float32, rounded to what the store keeps, so that training and prediction see equal values.
        body_mask: 1 inside the body, uint8, on the same grid; all 1 where there is no mask.
        record: JSON-able: source and prepared geometry, shear, crop, and the centre and scale of each channel.
        label: The label map on the same grid, if one was given.
        warnings: ``W_CODE: sentence`` strings.
    """

    volume: Volume
    body_mask: Volume
    record: dict[str, Any]
    label: Volume | None = None
    warnings: tuple[str, ...] = ()

    @property
    def fill(self) -> float:
        """Value around the image: of HU air, of colours the median of the border, of others the darkest value."""
        voxels = self.volume.array
        if voxels.shape[0] != _COLOURS or voxels.shape[3] > 1:
            return self.volume.default_fill
        border = [voxels[:, :1], voxels[:, -1:], voxels[:, :, :1], voxels[:, :, -1:]]
        return float(np.median(np.concatenate([edge.ravel() for edge in border])))


@dataclass(frozen=True)
class PrepareResult:
    """What ``prepare`` leaves: the store (None after a dry run, or when no case was usable) and the ledger."""

    store: ArrayStore | None
    ledger: Ledger


def prepare(
    config: PrepareConfig, *, cohort: Path, out: Path, workers: int = 0, dry_run: bool = False
) -> PrepareResult:
    """Prepare every case of a cohort into a store.

    Finished cases are verified by digest and skipped, damaged ones are made anew; the command may be killed at any
    time, and two may write one store at once.

    Args:
        config: What to do with each volume.
        cohort: Table that ``medssl scan`` wrote; a ``facts.csv`` beside it goes into the store.
        out: Folder of the store; gets also ``prepare.yaml``, ``journal.jsonl`` and ``refused.csv``.
        workers: Processes; 0 chooses by the machine.
        dry_run: Book every case, but write nothing.

    Raises:
        EnvironmentFaultError: if the disk is full or the folder may not be written; finished cases stay.
    """
    started = time.monotonic()
    cases, facts = Cohort.from_csv(cohort), facts_of(cohort)
    ledger = Ledger()
    for case in cases:
        ledger.expect(case.case_id)
    tasks = [_Task(case, config, out) for case in cases]
    if not dry_run:
        make_folder(out / "cases")
        remove_stale(out)
        remove_stale(out / "cases")
    function, hands = (_look_up, 1) if dry_run else (_prepare_case, workers)
    finished = pool.run(function, tasks, name=lambda task: f"case {task.case.case_id}", workers=hands)
    done: dict[str, _Done] = {}
    for task, result in track(finished, "prepare", total=len(tasks)):
        if isinstance(result, EnvironmentFaultError):
            raise result
        if isinstance(result, MedSSLError):
            ledger.reject(task.case.case_id, result)
        else:
            done[task.case.case_id] = result
            ledger.accept(task.case.case_id, warnings=result.warnings)
    ledger.check()
    if dry_run:
        return PrepareResult(None, ledger)
    rows = [_row(case, done[case.case_id]) for case in cases if case.case_id in done]
    atomic_write(out / "refused.csv", ledger.to_csv(Outcome.REJECTED, Outcome.WARNED))
    journal = Journal(out / "journal.jsonl")
    states = [result.state for result in done.values()]
    tally = {state: states.count(state) for state in ("made", "kept", "rebuilt")}
    journal.log(command="prepare", seconds=round(time.monotonic() - started, 2), **ledger.counts(), **tally)
    journal.close()
    if not rows:
        return PrepareResult(None, ledger)
    write_index(out, rows, prepare=config.to_dict(), unit=config.unit, modality=config.modality, facts=facts)
    return PrepareResult(ArrayStore.open(out), ledger)


def prepare_volume(
    volume: Volume, config: PrepareConfig, *, label: Volume | None = None, keep_label: bool = True
) -> Prepared:
    """Prepare one volume; the same function serves training and prediction.

    Args:
        volume: As read, (C, X, Y, Z).
        config: What to do.
        label: Label map on the grid of ``volume``; goes along, and never changes a voxel value of the image.
        keep_label: Keep the foreground crop from cutting the label. Only for training: a case that is scored must be
            cut as one without a label would be.

    Returns:
        Image, body mask and label on the prepared grid, with the record of what was done.

    Raises:
        CaseError: E_SPATIAL_DIMS for a volume where images of one slice are wanted, and the other way round;
            E_CHANNELS for another number of channels than is wanted.
    """
    source = volume.geometry
    is_flat = source.shape[2] == 1
    if config.spatial_dims == (3 if is_flat else 2):
        raise CaseError(
            f"volume of {source.shape[2]} slice{'s' * (not is_flat)}; this preparation is for {config.spatial_dims}D "
            "images. Prepare it with a configuration of its own.",
            code="E_SPATIAL_DIMS",
        )
    if config.channels not in {None, len(volume.array)}:
        raise CaseError(
            f"image of {len(volume.array)} channels; this preparation is for {config.channels}. Prepare it with a "
            "configuration of its own.",
            code="E_CHANNELS",
        )
    notes: list[str] = []
    if config.unit == "HU" and volume.array.min() >= _MOST_IN_AIR_HU:
        notes.append(
            f"W_NOT_HU: values from {volume.array.min():g} to {volume.array.max():g}, and none of air or lung; mode hu "
            "takes Hounsfield units, not a scaled or windowed image."
        )
    image, mask_label = Volume(volume.array, source, config.unit), label
    if source.shear_deg > _SHEAR_TOLERANCE_DEG:
        notes.append(
            f"W_SHEAR: axes are {source.shear_deg:.2f} degrees off the right angle; resampled to right angles."
        )
        image, mask_label = _both(image, mask_label, lambda v: resample_to(v, v.geometry.orthogonalised()))
    spacing = config.spacing_mm
    if not is_flat:
        image, mask_label = _both(image, mask_label, lambda v: reorient(v, config.orientation))
    elif spacing is not None:
        spacing = (*spacing[:2], image.geometry.spacing_mm[2])
    if spacing is not None and not np.allclose(image.geometry.spacing_mm, spacing, rtol=0, atol=1e-4):
        image, mask_label = _both(image, mask_label, lambda v: respace(v, spacing))
    mask, mask_notes = body_mask(image.array[0].astype(np.float32, copy=False), config.body_mask)
    notes += mask_notes
    body = Volume(mask[None].astype(np.uint8), image.geometry, "label")
    start, shape = foreground_box(mask, image.geometry.spacing_mm, config.crop)
    if mask_label is not None and cuts_label(mask_label.array, start, shape):
        kept = "the whole volume is kept" if keep_label else "they count as missed, as in a new scan"
        notes.append(f"W_CROP_LABEL: the foreground crop would cut labelled voxels; {kept}.")
        if keep_label:
            start, shape = (0, 0, 0), image.geometry.shape
    image, mask_label = _both(image, mask_label, lambda v: crop(v, start, shape))
    body = crop(body, start, shape)
    array, scaling, scale_notes = scale_intensity(
        image.array.astype(np.float32, copy=False), body.array[0] > 0, config.intensity
    )
    notes += scale_notes
    lost = set(label_values(label.array)) - set(label_values(mask_label.array)) if label and mask_label else set()
    if lost:
        notes.append(f"W_LABEL_LOST: label values {sorted(lost)} are too small for the prepared grid and vanished.")
    record = {
        "source_geometry": source.to_dict(),
        "prepared_geometry": image.geometry.to_dict(),
        "shear_deg": source.shear_deg,
        "crop": {"start": list(start), "shape": list(shape)},
        "intensity": {"mode": config.intensity.mode, "channels": scaling},
    }
    rounded = array.astype(config.dtype).astype(np.float32)
    return Prepared(Volume(rounded, image.geometry, config.unit), body, record, mask_label, tuple(notes))


def reading_of(config: PrepareConfig, chosen: Reading | None = None) -> Reading:
    """How to read a case: its own choices first, then those of the preparation."""
    return (chosen or Reading()).completed(xform=config.xform, assume_spacing_mm=config.assume_spacing_mm)


@dataclass(frozen=True)
class _Task:
    case: Case
    config: PrepareConfig
    store: Path


@dataclass(frozen=True)
class _Done:
    key: str
    labels: tuple[int, ...]
    warnings: tuple[str, ...]
    state: Literal["made", "kept", "rebuilt", "seen"]


def _prepare_case(task: _Task) -> _Done:
    """What a worker does with one case."""
    case, config = task.case, task.config
    key, digests = _key(case, config)
    folder = entry_folder(task.store, key)
    state: Literal["made", "rebuilt"] = "made"
    if folder.exists():
        try:
            verify_entry(folder)
            meta = json.loads((folder / "case.json").read_text())
            return _Done(key, tuple(meta["label_values"]), tuple(meta["warnings"]), "kept")
        except CheckpointError:
            remove(folder)
            state = "rebuilt"
    reading = reading_of(config, case.reading)
    with nameless(case.image, f"case {case.case_id}: image"):
        volume, source = read_image(Path(case.image), reading, unit=config.unit)
    warnings = list(source.warnings)
    label = None
    if case.label is not None:
        with nameless(case.label, f"case {case.case_id}: label"):
            label, said = read_label(Path(case.label), reading, image=volume, item=f"case {case.case_id}")
        label = one_channel(label, item=f"case {case.case_id}")
        warnings += said
    prepared = prepare_volume(volume, config, label=label, keep_label=_keeps_label(case))
    if label is not None and not label.array.any():
        warnings.append("W_EMPTY_LABEL: the label map is background only.")
    warnings += prepared.warnings
    meta = {
        **prepared.record,
        **digests,
        "unit": config.unit,
        "fill": prepared.fill,
        "warnings": warnings,
    }
    image = prepared.volume.array.astype(config.dtype)
    label_array = None if prepared.label is None else _small_integers(prepared.label.array)
    source_label = None if label is None else _small_integers(label.array)
    write_entry(task.store, key, Entry(image, label_array, prepared.body_mask.array, meta, source_label))
    labels = () if label_array is None else tuple(label_values(label_array))
    return _Done(key, labels, tuple(warnings), state)


def _look_up(task: _Task) -> _Done:
    """What a dry run does with one case: everything that needs no voxel."""
    key, _ = _key(task.case, task.config)
    return _Done(key, (), (), "seen")


def _key(case: Case, config: PrepareConfig) -> tuple[str, dict[str, str]]:
    """Name of the entry: a hash of everything that it is made from."""
    if "other" not in {case.modality, config.modality} and case.modality != config.modality:
        raise CaseError(
            f"case {case.case_id}: modality {case.modality}; this preparation is for {config.modality}. "
            "Prepare it with a configuration of its own.",
            code="E_MODALITY",
        )
    reading = case.reading
    with nameless(case.image, f"case {case.case_id}: image"):
        digest = io.digest(Path(case.image), volume=reading.volume, regularise=reading.regularise)
    digests = {"image_digest": digest}
    prepare = {name: value for name, value in config.to_dict().items() if name != "region"}
    content: dict[str, Any] = {"prepare": prepare, "store_version": STORE_VERSION}
    if not reading.is_plain:
        content["reading"] = reading.to_text()
    if case.label is not None:
        with nameless(case.label, f"case {case.case_id}: label"):
            digests["label_digest"] = io.digest(Path(case.label))
        content["keep_label"] = _keeps_label(case)
    content |= digests
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24], digests


def _keeps_label(case: Case) -> bool:
    return case.split == "train"


def _row(case: Case, done: _Done) -> IndexRow:
    return IndexRow(
        case.case_id, case.subject_id, case.split, case.modality, done.key, case.label is not None, done.labels
    )


def _both(image: Volume, label: Volume | None, change: Callable[[Volume], Volume]) -> tuple[Volume, Volume | None]:
    return change(image), None if label is None else change(label)


def _small_integers(label: Shaped[np.ndarray, "1 x y z"]) -> Shaped[np.ndarray, "1 x y z"]:
    """The smallest of uint8, int16 and int32 that holds every value, negative ones too."""
    for dtype in (np.uint8, np.int16):
        limits = np.iinfo(dtype)
        if label.min() >= limits.min and label.max() <= limits.max:
            return label.astype(dtype)
    return label.astype(np.int32)

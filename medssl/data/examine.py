"""Read one case to the end and say what it is, or why it cannot be used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped

from medssl import pool
from medssl.data.cohort import Case
from medssl.data.incremental import Cache, fingerprint
from medssl.data.reading import label_values_of, read_image, read_label
from medssl.errors import CaseError, MedSSLError
from medssl.progress import track
from medssl.report import thumbnails
from medssl.runfolder import atomic_write
from medssl.volume import Volume, reoriented_view

_SAMPLE_VOXELS = 1_000_000
_PERCENTILES = (1, 99)
_MAY_BE_BURNED_IN = {"US", "IVUS", "XC", "ES", "SC", "OT"}
_WITH_FACE = {"HEAD", "BRAIN", "SKULL", "FACE", "HEADNECK", "ORBIT", "ORBITS", "SINUS", "SINUSES", "EAR", "IAC", "JAW"}


@dataclass(frozen=True)
class Task:
    """One case to examine.

    Args:
        item: Its name in the ledger.
        case: Image, label and how to read them.
        files: What is read for it; it is examined anew when one of them changes.
        label_values: The values that a label may have beside 0; None for any.
        burned_in: Whether images whose header says that text is burned in are refused.
        thumbnail: Picture to draw, if one is wanted.
    """

    item: str
    case: Case
    files: tuple[Path, ...] = ()
    label_values: tuple[int, ...] | None = None
    burned_in: Literal["refuse", "accept"] = "refuse"
    thumbnail: Path | None = None

    def rules(self) -> dict[str, Any]:
        """Everything beside the files that the result depends on; plain data."""
        case = self.case
        return {
            "label": case.label is not None,
            "modality": case.modality,
            "reading": case.reading.to_text(),
            "image": Path(case.image).name,
            "label_values": self.label_values,
            "burned_in": self.burned_in,
        }


@dataclass(frozen=True)
class Checked:
    """What an examination found.

    Args:
        content: Hash of voxels and place, the same for equal images in any file type and order of axes.
        shape: Voxels along the array axes.
        spacing_mm: Along the same axes.
        orientation: Where these point.
        unit: Of the values.
        low: Value below which 1 % of a sample of the voxels lie.
        high: Value above which 1 % of it lie.
        minimum: Smallest value.
        maximum: Largest value.
        labels: Label values that occur.
        facts: Harmless fields of a DICOM header.
        warnings: ``W_CODE: sentence`` strings.
        has_spacing: Whether the voxel size is known.
    """

    content: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    orientation: str
    unit: str
    low: float
    high: float
    minimum: float
    maximum: float
    labels: tuple[int, ...]
    facts: Mapping[str, str | float]
    warnings: tuple[str, ...]
    has_spacing: bool

    @property
    def may_be_shown(self) -> bool:
        """Whether a picture of it may be drawn: not where the header says that text is burned in."""
        return self.facts.get("burned_in") != "yes"

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :meth:`from_dict` reads back."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(replace(self, facts=dict(self.facts)))))
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Checked:
        """Read back what :meth:`to_dict` gave."""
        lists = {name: tuple(data[name]) for name in ("shape", "spacing_mm", "labels", "warnings")}
        return cls(**{**data, **lists})


def examine_all(tasks: Sequence[Task], *, cache: Cache, workers: int) -> dict[str, Checked | MedSSLError]:
    """What each case is, or why it cannot be used, by its name; those that have not changed are not read again.

    Args:
        tasks: Cases, with names of their own.
        cache: What an earlier scan found; gets what is found now.
        workers: Processes; 0 chooses by the machine.
    """
    results: dict[str, Checked | MedSSLError] = {}
    marks = {task.item: fingerprint(task.files, task.rules()) for task in tasks}
    changed = []
    for task in tasks:
        found = _known(cache, marks[task.item])
        if found is None or (isinstance(found, Checked) and not _has_picture(task, found)):
            changed.append(task)
        else:
            results[task.item] = found
    finished = pool.run(examine, changed, name=lambda task: task.item, workers=workers)
    for task, result in track(finished, "scan", total=len(tasks), completed=len(results)):
        results[task.item] = result
        cache.keep_check(marks[task.item], result if isinstance(result, MedSSLError) else result.to_dict())
    return {task.item: results[task.item] for task in tasks}


def examine(task: Task) -> Checked:
    """Read image and label of a case to the end, and see whether they fit.

    Raises:
        ReadError: if a file is missing, damaged or of another kind.
        GeometryError: if a grid is impossible or ambiguous, or label and image lie apart.
        CaseError: if voxels, label values or the header break a rule.
    """
    case = task.case
    image, source = read_image(Path(case.image), case.reading)
    if case.modality == "CT" and source.format != "dicom":
        image = Volume(image.array, image.geometry, "HU")
    warnings = [*source.warnings, *_identity_warnings(task, source.facts)]
    minimum, maximum = float(image.array.min()), float(image.array.max())
    if minimum == maximum:
        warnings.append("W_CONSTANT: every voxel has the same value.")
    label: Volume | None = None
    values: tuple[int, ...] = ()
    if case.label is not None:
        label, said = read_label(Path(case.label), case.reading, image=image, item=task.item)
        values = label_values_of(label)
        warnings += said
        if not values:
            warnings.append("W_EMPTY_LABEL: the label map is background only.")
        _check_values(task.item, label, values, task.label_values)
    low, high = np.percentile(_sample(image.array), _PERCENTILES).tolist()
    checked = Checked(
        content=_content(image),
        shape=image.geometry.shape,
        spacing_mm=image.geometry.spacing_mm,
        orientation=image.geometry.orientation,
        unit=image.unit,
        low=low,
        high=high,
        minimum=minimum,
        maximum=maximum,
        labels=values,
        facts=dict(source.facts),
        warnings=tuple(warnings),
        has_spacing=source.has_spacing,
    )
    if task.thumbnail is not None and checked.may_be_shown:
        atomic_write(task.thumbnail, thumbnails.render(image, label), private=True)
    return checked


def _known(cache: Cache, mark: str) -> Checked | MedSSLError | None:
    known = cache.checked(mark)
    if known is None or isinstance(known, MedSSLError):
        return known
    try:
        return Checked.from_dict(known)
    except (LookupError, TypeError):
        return None  # the line was changed by hand


def _has_picture(task: Task, found: Checked) -> bool:
    return task.thumbnail is None or not found.may_be_shown or task.thumbnail.exists()


def _identity_warnings(task: Task, facts: Mapping[str, str | float]) -> list[str]:
    """What may give a person away in the picture itself.

    Raises:
        CaseError: E_BURNED_IN, where the header says that there is text in the picture.
    """
    if facts.get("burned_in") == "yes" and task.burned_in == "refuse":
        raise CaseError(
            f"{task.item}: the header says that text is burned into the picture; it may name the patient. "
            "Blank it, leave the image out, or set burned_in: accept.",
            code="E_BURNED_IN",
        )
    found = []
    if facts.get("burned_in") == "yes":
        found.append("W_BURNED_IN: the header says that text is burned into the picture; accepted as told.")
    elif "burned_in" not in facts and facts.get("modality") in _MAY_BE_BURNED_IN:
        found.append("W_BURNED_IN: the header does not say whether text is burned into the picture; look at it.")
    part = str(facts.get("body_part", "")).replace(" ", "")
    if part in _WITH_FACE and facts.get("modality") in {"CT", "MR"}:
        found.append("W_FACE: a head, from which a face can be drawn; deface it before it leaves your house.")
    return found


def _check_values(item: str, label: Volume, found: Sequence[int], allowed: tuple[int, ...] | None) -> None:
    strange = [] if allowed is None else [value for value in found if value not in allowed]
    if strange:
        is_one = label.array.shape[0] == 1
        sizes = [int((label.array[0] == n).sum() if is_one else label.array[n - 1].sum()) for n in strange[:5]]
        counts = ", ".join(f"{value} in {size} voxels" for value, size in zip(strange, sizes, strict=False))
        raise CaseError(
            f"{item}: label value {counts}; only {', '.join(map(str, allowed or ()))} are expected. "
            "Correct the label, or label_values.",
            code="E_LABEL_SET",
        )


def _sample(array: Shaped[np.ndarray, "c x y z"]) -> Shaped[np.ndarray, "c a b d"]:
    """Every nth voxel along each axis, about a million at most."""
    step = max(1, int(np.ceil((array.size / _SAMPLE_VOXELS) ** (1 / 3))))
    return array[:, ::step, ::step, ::step]


def _content(image: Volume) -> str:
    """Hash of voxels and place, slice by slice, so that no second volume is made."""
    turned = reoriented_view(image)
    place = np.round(turned.geometry.affine, 3) + 0.0  # -0 becomes 0
    total = hashlib.sha256(repr((turned.array.shape, place.tolist())).encode())
    for number in range(turned.array.shape[3]):
        total.update(np.ascontiguousarray(turned.array[..., number].swapaxes(1, 2), dtype=np.float32).data)
    return total.hexdigest()

"""Which prediction belongs to which reference, and whose it is; from names alone, no voxel is read."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from medssl.data.cohort import Case, Cohort
from medssl.data.reading import Reading
from medssl.data.rows import read_table
from medssl.data.splits import Split
from medssl.errors import CaseError, NoInputError, ReadError
from medssl.io import is_image, stem
from medssl.io.dicom.series_list import SUFFIX
from medssl.ledger import Ledger

NO_PREDICTION = "no prediction"


class Pair(NamedTuple):
    """A case with the two files to compare.

    Args:
        case_id: Its name.
        subject_id: Whose it is.
        prediction: Label map.
        reference: Label map, DICOM-SEG or RTSTRUCT.
        image: What the reference was drawn on, where a cohort names it.
        reading: Choices of the cohort by which image and reference are read.
    """

    case_id: str
    subject_id: str
    prediction: Path
    reference: Path
    image: Path | None = None
    reading: Reading = Reading()


class _Reference(NamedTuple):
    case_id: str
    subject_id: str
    name: str
    path: Path
    split: str | None
    image: Path | None = None
    reading: Reading = Reading()


def match(
    predictions: Path, labels: Path, ledger: Ledger, *, subjects: str | None = None, split: Split | None = None
) -> list[Pair]:
    """Announce every reference and every prediction by case, and book what has no partner.

    Args:
        predictions: Folder of label maps.
        labels: Folder of references, or a cohort table.
        ledger: Where all are booked.
        subjects: Table that says whose the references of a folder are.
        split: Only this split, which must be complete.

    Raises:
        NoInputError: if no case has both a prediction and a reference.
        CaseError: E_NAME_CLASH or E_TABLE.
    """
    found = _by_name(predictions)
    references = _references(labels, subjects)
    _check_names(references, found)
    pairs = []
    for reference in references:
        ledger.expect(reference.case_id)
        own = found.pop(_folded(reference.case_id), None)  # predicted from a table: named by case
        prediction = own or found.pop(_folded(reference.name), None)
        if split is not None and reference.split != split:
            ledger.ignore(reference.case_id, f"not in split {split}")
        elif prediction is not None:
            names = (reference.case_id, reference.subject_id)
            pairs.append(Pair(*names, prediction, reference.path, reference.image, reference.reading))
        elif split is None:
            ledger.ignore(reference.case_id, NO_PREDICTION)
        else:
            message = (
                f"{reference.case_id}: no prediction named {reference.name}; every case of split {split} needs "
                "one, or the failures would be left out of the mean. Predict it, or see why it was refused."
            )
            ledger.reject(reference.case_id, CaseError(message, code="E_NO_PREDICTION"))
    for name, case_id in _without_label(labels):
        if found.pop(_folded(name), None) is not None:
            ledger.expect(case_id)
            ledger.ignore(case_id, "its case has no label to compare with")
    known = {reference.case_id for reference in references}
    for path in found.values():
        name = stem(path)
        item = f"prediction {name}" if name in known else name
        ledger.expect(item)
        message = f"{name}: a prediction without a reference of that name. Give its label map, or take it away."
        ledger.reject(item, ReadError(message, code="E_NO_LABEL"))
    if not pairs:
        raise NoInputError(
            f"{predictions}: {len(found)} predictions and {len(references)} references, none with the same name. "
            "Names without suffix must be equal; DICOM is matched by the cohort.csv of its scan."
        )
    return pairs


def _without_label(labels: Path) -> list[tuple[str, str]]:
    """Names that a prediction of an unlabelled case of a cohort may have, with the case."""
    if labels.suffix.lower() != ".csv":
        return []
    cases = Cohort.from_csv(labels).select(labelled=False)
    return [(name, case.case_id) for case in cases for name in dict.fromkeys((case.case_id, _predicted_name(case)))]


def _check_names(references: Sequence[_Reference], predictions: Mapping[str, Path]) -> None:
    """Refuse a prediction that could be of either of two cases: it bears the name of the case, or of its image."""
    cases: dict[str, list[str]] = defaultdict(list)
    for reference in references:
        for name in {_folded(reference.name), _folded(reference.case_id)}:
            cases[name].append(reference.case_id)
    for name, ids in cases.items():
        if len(ids) > 1 and name in predictions:
            raise CaseError(
                f"{predictions[name].name}: {len(ids)} cases have an image of this name ({', '.join(ids[:3])}); a "
                "prediction is of one. Rename the images, scan and predict again.",
                code="E_NAME_CLASH",
            )


def _references(labels: Path, subjects: str | None) -> list[_Reference]:
    if labels.suffix.lower() == ".csv":
        cases = Cohort.from_csv(labels).select(labelled=True)
        return [
            _Reference(
                case.case_id,
                case.subject_id,
                _predicted_name(case),
                Path(str(case.label)),
                case.split,
                Path(case.image),
                case.reading,
            )
            for case in cases
        ]
    people = _subjects(Path(subjects)) if subjects else {}
    references = []
    for path in _by_name(labels).values():
        name = stem(path)
        person = people.get(name, {"subject_id": name})
        references.append(_Reference(name, person["subject_id"], name, path, person.get("split")))
    lost = [reference.case_id for reference in references if people and reference.case_id not in people]
    if lost:
        raise CaseError(
            f"{subjects}: {len(lost)} of {len(references)} references are not in the table, first {lost[0]}; "
            "the subject of every case is needed. Add them.",
            code="E_TABLE",
        )
    return references


def _predicted_name(case: Case) -> str:
    """What a prediction is called that was made from the image itself, and not from the table."""
    path = Path(case.image)
    if not path.name.endswith(SUFFIX):
        return stem(path)
    number = "" if case.reading.volume is None else f"-{case.reading.volume:03d}"
    return path.name.removesuffix(SUFFIX) + number


def _subjects(path: Path) -> dict[str, dict[str, str]]:
    """Row of each case in a table of subjects."""
    rows: dict[str, dict[str, str]] = {}
    for line, row in read_table(path, required=("case_id", "subject_id")):
        if row["case_id"] in rows or not row["subject_id"]:
            raise CaseError(
                f"{path}: line {line}: case_id is used twice or subject_id is empty. Correct the table.", code="E_TABLE"
            )
        rows[row["case_id"]] = row
    return rows


def _by_name(folder: Path) -> dict[str, Path]:
    """Images of a folder by their folded name.

    Raises:
        ReadError: if there is no such folder.
        CaseError: E_NAME_CLASH, if two names differ only in upper case, accents or suffix.
    """
    if not folder.is_dir():
        raise ReadError(f"{folder}: is not a folder of label maps. Correct the path.")
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.is_file() and is_image(path) and not path.name.startswith("."):
            found[_folded(stem(path))].append(path)
    for paths in found.values():
        if len(paths) > 1:
            raise CaseError(
                f"{folder}: {' and '.join(path.name for path in paths)} stand for one case; one file is needed. "
                "Rename or remove the others.",
                code="E_NAME_CLASH",
            )
    return {name: paths[0] for name, paths in found.items()}


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()

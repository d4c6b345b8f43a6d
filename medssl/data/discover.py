"""Which files of a folder are images, which are labels, and whose; no voxel is read.

One rule serves the decathlon layout (imagesTr, labelsTr, imagesTs), BIDS-like trees (sub-*/anat, derivatives) and plain
folders: a file is a label map if it lies in a folder of labels or its name ends like one, and it belongs to the image
of the same name. DICOM files are known by their content, and what belongs together by their headers; such an image has
the names of the folders that hold it and no other DICOM image.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medssl import io
from medssl.data.archive import is_archive
from medssl.data.cohort import Modality
from medssl.data.identify import safe_id
from medssl.data.incremental import Cache
from medssl.data.series import Series, Volumes, chosen_stacks, doubts, find_series, item_name, modality_of
from medssl.data.walk import Entry, leads_out, walk
from medssl.errors import CaseError, MedSSLError, ReadError
from medssl.io.dicom.model import Item

LABEL_SUFFIXES = ("_seg", "-seg", "_dseg", "_label", "-label", "_labels", "_mask", "-mask")

_LABEL_FOLDERS = {"labels", "label", "labelstr", "labelsts", "labelsval", "masks", "mask", "segmentations"}
_IMAGE_FOLDERS = {"images", "image", "imagestr", "imagests", "imagesval"}
_NNUNET_FOLDERS = {"imagestr", "imagests", "imagesval"}
_NO_PERSON = {"train", "training", "val", "validation", "test", "testing", "data", "raw", "scans", "nifti", "anat"}
_CHANNEL = re.compile(r"_(\d{4})$")
_ENTITIES = re.compile(r"_(label|desc|space)-[A-Za-z0-9]+")
_SUBJECT = re.compile(r"^sub-([A-Za-z0-9]+)")
_NOT_TAKEN = "label of an image that is not taken"


Whose = Literal["told", "folder", "unknown"]


@dataclass(frozen=True)
class Found:
    """An image that was found, with what its name and place say.

    Args:
        item: Path relative to the folder that was scanned; its name in the ledger.
        case_id: Safe name, unique among the found.
        image: Where it lies; for DICOM the name of the series list that has yet to be written.
        label: Its label map, if there is one.
        subject_id: From ``sub-XX`` or the DICOM header, else the folder that it shares with other images, else the
            case.
        whose: How the subject is known.
        warnings: ``W_CODE: sentence`` strings.
        modality: Where the file states it.
        series: The DICOM item that the image is a volume of.
        volume: Which of its volumes, where it has several.
    """

    item: str
    case_id: str
    image: Path
    label: Path | None = None
    subject_id: str = ""
    whose: Whose = "unknown"
    warnings: tuple[str, ...] = ()
    modality: Modality | None = None
    series: Item | None = None
    volume: int | None = None


@dataclass
class Discovery:
    """What a folder holds.

    Args:
        found: Images, sorted by path.
        refused: Files that look like images or labels and cannot be used, with the reason.
        ignored: Other files, with the reason; label maps of the found images are in neither list.
        duplicates: DICOM files, with the file that they equal.
    """

    found: list[Found] = field(default_factory=list)
    refused: list[tuple[str, MedSSLError]] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Rules:
    """How a folder is looked through.

    Args:
        label_suffixes: How names of label maps end, before the file type.
        image_glob: Only paths, relative to the folder, that match are images.
        follow_links: Whether links that lead out of the folder are followed.
        volumes: Which volumes of a DICOM item become cases.
        regularise: Take DICOM series with missing slices or uneven slice distances.
        workers: Processes for DICOM headers; 0 chooses by the machine.
    """

    label_suffixes: tuple[str, ...]
    image_glob: str | None = None
    follow_links: bool = False
    volumes: Volumes = "auto"
    regularise: bool = False
    workers: int = 1


def discover(
    root: Path, *, rules: Rules, key: bytes, unpack_to: Path, leave_out: Sequence[Path] = (), cache: Cache | None = None
) -> Discovery:
    """Look through a folder.

    Args:
        root: Folder to look through, with all below it; or an archive.
        rules: What counts as an image or a label, and which volumes are taken.
        key: Of the tokens that stand for identifiers of DICOM files.
        unpack_to: Folder to unpack archives into.
        leave_out: Folders not to enter.
        cache: What is known of files that have not changed.

    Raises:
        ReadError: if ``root`` is no folder and no archive.
        EnvironmentFaultError: if an archive does not fit on the disk.
    """
    if not root.is_dir() and not (root.is_file() and is_archive(root)):
        text = f"{root}: is no folder and no archive. Give a folder of images, a .zip of one, or a CSV of cases."
        raise ReadError(text, code="E_NO_DATA")
    result = Discovery()
    candidates: list[Entry] = []
    for entry in walk(root, follow_links=rules.follow_links, unpack_to=unpack_to, leave_out=leave_out):
        path = entry.item
        reason = _why_ignored(entry) if entry.fault is None or entry.is_hidden else ""
        if not str(path).isprintable():
            shown = str(path).encode("unicode_escape").decode()
            text = f"{shown}: the name has control characters or is not UTF-8. Rename the file."
            result.refused.append((shown, ReadError(text, code="E_NAME")))
        elif reason:
            result.ignored.append((str(path), reason))
        elif entry.fault is not None:
            result.refused.append((str(path), entry.fault))
        elif not rules.follow_links and entry.path == root / path and leads_out(entry.path, root):
            text = f"{path}: is a link that leads out of the folder. Set follow_links: true to allow it."
            result.refused.append((str(path), ReadError(text, code="E_LINK")))
        else:
            candidates.append(entry)
    series = find_series(candidates, key=key, cache=cache, regularise=rules.regularise, workers=rules.workers)
    images, labels = _by_name(series.others, rules, result)
    paired = _pair(list(images), list(labels), rules.label_suffixes, _folders_of_one(series), result)
    _take_series(series, rules, result, drawn={image: (label, labels[label]) for image, label in paired.items()})
    shared = _shared_folders(list(images))
    is_decathlon = (root / "dataset.json").is_file()
    for path, case_id in _case_ids(list(images), result).items():
        label = paired.get(path)
        lacks = is_decathlon and label is None and path.parts[0] == "imagesTr"
        warnings = (
            "W_NO_LABEL: lies in imagesTr, and labelsTr has no label of its name; taken as unlabelled.",
        ) * lacks
        subject_id, whose = _subject(path, case_id, shared)
        result.found.append(
            Found(str(path), case_id, images[path], labels[label] if label else None, subject_id, whose, warnings)
        )
    taken = {Path(one.item) for one in result.found}
    clashing = [str(label) for image, label in paired.items() if image in images and image not in taken]
    result.ignored += [(label, _NOT_TAKEN) for label in clashing]
    return result


def _by_name(entries: Sequence[Entry], rules: Rules, result: Discovery) -> tuple[dict[Path, Path], dict[Path, Path]]:
    """Images and labels among the files that are no DICOM, their places by their names; the rest is booked."""
    images: dict[Path, Path] = {}
    labels: dict[Path, Path] = {}
    for entry in entries:
        path = entry.item
        if not io.is_image(path):
            result.ignored.append((str(path), _what_it_is(entry)))
        elif is_label(path, rules.label_suffixes):
            labels[path] = entry.path
        elif rules.image_glob is not None and not path.match(rules.image_glob):
            result.ignored.append((str(path), f"does not match {rules.image_glob}"))
        elif "derivatives" in path.parts:
            result.ignored.append((str(path), "derived image, no label by its name"))
        else:
            images[path] = entry.path
    return images, labels


def _take_series(series: Series, rules: Rules, result: Discovery, *, drawn: Mapping[Path, tuple[Path, Path]]) -> None:
    """Make cases of the volumes of DICOM items, and book the files that are none.

    Args:
        series: What the DICOM files are.
        rules: Which of them become cases.
        result: Gets them.
        drawn: Name and place of a label map in another format, by the name of the item that it is of.
    """
    result.ignored += series.ignored
    result.refused += series.refused
    result.duplicates += series.duplicates
    unused = set(series.labels.values())
    for item in series.items:
        name = item_name(item, series.items_of)
        mask, mask_path = drawn.get(Path(name), (None, None))
        if rules.image_glob is not None and not any(
            Path(series.items_of[path]).match(rules.image_glob) for path in item.paths
        ):
            result.ignored.append((name, f"does not match {rules.image_glob}"))
            result.ignored += [(str(mask), _NOT_TAKEN)] if mask is not None else []
            continue
        try:
            numbers, warnings = chosen_stacks(item, rules.volumes)
        except CaseError as error:
            result.refused.append((name, CaseError(f"{name}: {error.message}", code=error.code)))
            continue
        for number in numbers:
            is_one = len(item.stacks) == 1
            label = series.labels.get((item.name, number))
            unused.discard(label)
            if label is not None and mask is not None:
                _refuse_rivals(name, [series.items_of[label], str(mask)], result)
                label = None
            elif mask is not None:
                label = mask_path
            found = Found(
                name if is_one else f"{name}-{number:03d}",
                f"series-{item.name}" if is_one else f"series-{item.name}-{number:03d}",
                Path(f"{item.name}.dicom.json"),
                label,
                f"patient-{item.patient}",
                "told",
                warnings + doubts(item.stacks[number]),
                modality_of(item.modality),
                item,
                None if is_one else number,
            )
            result.found.append(found)
    for path in sorted(unused):
        result.ignored.append((series.items_of[path], _NOT_TAKEN))


def _what_it_is(entry: Entry) -> str:
    return "an archive in an archive, not opened; unpack it" if is_archive(entry.item) else "not an image file"


def _why_ignored(entry: Entry) -> str:
    if entry.is_hidden:
        return "hidden file"
    path = entry.item
    channel = _CHANNEL.search(io.stem(path)) if _is_nnunet(path) else None
    if channel and channel[1] != "0000":
        return "further channel of an image; one file a case is read"
    return ""


def _is_nnunet(path: Path) -> bool:
    """Whether names end in the number of a channel here; elsewhere four digits number the cases."""
    return any(part.lower() in _NNUNET_FOLDERS for part in path.parts[:-1])


def is_label(path: Path, suffixes: Sequence[str] = LABEL_SUFFIXES) -> bool:
    """Whether a name, or the folder, is that of a label map."""
    in_folder = any(part.lower() in _LABEL_FOLDERS for part in path.parts[:-1])
    return in_folder or io.stem(path).lower().endswith(tuple(suffix.lower() for suffix in suffixes))


def _base(path: Path, suffixes: Sequence[str] = ()) -> str:
    """Name that an image and its label share."""
    name = _CHANNEL.sub("", io.stem(path)) if _is_nnunet(path) else io.stem(path)
    for suffix in sorted(suffixes, key=len, reverse=True):
        if name.lower().endswith(suffix.lower()):
            return _ENTITIES.sub("", name[: -len(suffix)])
    return name


def _place(path: Path) -> tuple[str, ...]:
    """Folders of a file, less those that only say what kind of file it is."""
    generic = _LABEL_FOLDERS | _IMAGE_FOLDERS | {"derivatives"}
    return tuple(part for part in path.parts[:-1] if part.lower() not in generic)


def _folders_of_one(series: Series) -> dict[Path, Path]:
    """Folders that hold one DICOM item of one volume and no other, with the name of that item."""
    inside: dict[Path, set[Path]] = defaultdict(set)
    single = set()
    for item in series.items:
        name = Path(item_name(item, series.items_of))
        single |= {name} if len(item.stacks) == 1 else set()
        for folder in name.parents[:-1]:
            inside[folder].add(name)
    return {folder: next(iter(names)) for folder, names in inside.items() if len(names) == 1 and names <= single}


def _pair(
    images: list[Path],
    labels: list[Path],
    suffixes: Sequence[str],
    folders: Mapping[Path, Path],
    result: Discovery,
) -> dict[Path, Path]:
    """Give each label to the one image that it can belong to; refuse the others, and all that claim one image.

    A DICOM image in ``folders`` has the names of its folders; a label that lies in one of these, and has no image of
    its name, is also its label.
    """
    by_name: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        by_name[_base(image)].append(image)
    for folder, item in folders.items():
        if item not in by_name[folder.name]:
            by_name[folder.name].append(item)
    claims: dict[Path, list[Path]] = defaultdict(list)
    for label in labels:
        base = _base(label, suffixes)
        candidates = by_name.get(base, [])
        if not candidates and _SUBJECT.match(base):  # BIDS: sub-01_dseg belongs to sub-01_T1w
            candidates = [image for image in images if _base(image).rsplit("_", 1)[0] == base]
        place = Path(*_place(label))
        if not candidates and place in folders:
            candidates = [folders[place]]
        if len(candidates) > 1:
            same = [image for image in candidates if _place(image) == _place(label)]
            same = same or [image for image in candidates if place in image.parents[:-1]]
            candidates = same or candidates
        if len(candidates) != 1:
            shown = ", ".join(str(image) for image in candidates[:3]) or "none"
            text = f"{label}: a label map with {len(candidates)} images of its name ({shown}); one is needed. "
            text += "Rename it like its image, or list the pairs in a CSV."
            result.refused.append((str(label), CaseError(text, code="E_PAIR")))
        else:
            claims[candidates[0]].append(label)
    for image, several in claims.items():
        if len(several) > 1:
            _refuse_rivals(str(image), [str(label) for label in several], result)
    return {image: several[0] for image, several in claims.items() if len(several) == 1}


def _refuse_rivals(image: str, labels: Sequence[str], result: Discovery) -> None:
    """Refuse all labels that claim one image."""
    for label in labels:
        others = ", ".join(other for other in labels if other is not label)
        text = f"{label}: {others} would be a label map of {image} too; one is needed, so the image has none. "
        text += "Keep one, or list the pairs in a CSV."
        result.refused.append((label, CaseError(text, code="E_PAIR")))


def _case_ids(images: list[Path], result: Discovery) -> dict[Path, str]:
    """A safe id for each image: its name, with its folders where several share it; near-equal names are refused."""
    names = {image: _base(image) for image in images}
    counts: dict[str, int] = defaultdict(int)
    for name in names.values():
        counts[name] += 1
    for image, name in names.items():
        if counts[name] > 1:
            names[image] = "_".join((*_place(image), name))
    alike: dict[str, list[Path]] = defaultdict(list)
    for image, name in names.items():
        alike[unicodedata.normalize("NFC", name).casefold().strip()].append(image)
    ids: dict[Path, str] = {}
    for group in alike.values():
        if len(group) == 1:
            ids[group[0]] = safe_id(names[group[0]])
            continue
        for image in group:
            others = ", ".join(str(other) for other in group if other is not image)
            text = f"{image}: its name equals that of {others} but for case, blanks or accents. Rename one."
            result.refused.append((str(image), CaseError(text, code="E_NAME_CLASH")))
    return dict(sorted(ids.items()))


def _shared_folders(images: list[Path]) -> dict[Path, str]:
    """For each image the outermost folder that may be a person's, where several images share it.

    The outermost, for those below it can be visits of one person, and a person in two splits is worse than two persons
    taken for one. Folders that all images share, or that are named as splits, are no person's.
    """
    places = {image: [part for part in _place(image) if part.lower() not in _NO_PERSON] for image in images}
    levels = zip(*places.values(), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
    outermost = {image: place[common] for image, place in places.items() if len(place) > common}
    counts = Counter(outermost.values())
    return {image: folder for image, folder in outermost.items() if counts[folder] > 1}


def _subject(path: Path, case_id: str, shared: dict[Path, str]) -> tuple[str, Whose]:
    for part in path.parts:
        match = _SUBJECT.match(part)
        if match:
            return match[0], "told"
    return (safe_id(shared[path]), "folder") if path in shared else (case_id, "unknown")

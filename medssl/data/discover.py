"""Which files of a folder are images, which are labels, and whose; from names alone, no voxel is read.

One rule serves the decathlon layout (imagesTr, labelsTr, imagesTs), BIDS-like trees (sub-*/anat, derivatives) and plain
folders: a file is a label map if it lies in a folder of labels or its name ends like one, and it belongs to the image
of the same name.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medssl import io
from medssl.data.walk import walk
from medssl.errors import CaseError, MedSSLError, ReadError

_LABEL_FOLDERS = {"labels", "label", "labelstr", "labelsts", "labelsval", "masks", "mask", "segmentations"}
_IMAGE_FOLDERS = {"images", "image", "imagestr", "imagests", "imagesval"}
_NNUNET_FOLDERS = {"imagestr", "imagests", "imagesval"}
_NO_PERSON = {"train", "training", "val", "validation", "test", "testing", "data", "raw", "scans", "nifti", "anat"}
_CHANNEL = re.compile(r"_(\d{4})$")
_ENTITIES = re.compile(r"_(label|desc|space)-[A-Za-z0-9]+")
_SUBJECT = re.compile(r"^sub-([A-Za-z0-9]+)")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


Whose = Literal["told", "folder", "unknown"]


@dataclass(frozen=True)
class Found:
    """An image that was found, with what its name and place say.

    Args:
        item: Path relative to the folder that was scanned; its name in the ledger.
        case_id: Safe name, unique among the found.
        image: Where it lies.
        label: Its label map, if there is one.
        subject_id: From ``sub-XX``, else the folder that it shares with other images, else the case.
        whose: How the subject is known.
        warnings: ``W_CODE: sentence`` strings.
    """

    item: str
    case_id: str
    image: Path
    label: Path | None = None
    subject_id: str = ""
    whose: Whose = "unknown"
    warnings: tuple[str, ...] = ()


@dataclass
class Discovery:
    """What a folder holds.

    Args:
        found: Images, sorted by path.
        refused: Files that look like images or labels and cannot be used, with the reason.
        ignored: Other files, with the reason; label maps of the found images are in neither list.
    """

    found: list[Found] = field(default_factory=list)
    refused: list[tuple[str, MedSSLError]] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)


def discover(
    root: Path, *, label_suffixes: Sequence[str], image_glob: str | None = None, follow_links: bool = False
) -> Discovery:
    """Look through a folder.

    Args:
        root: Folder to look through, with all below it.
        label_suffixes: How names of label maps end, before the file type.
        image_glob: Only paths, relative to ``root``, that match are images.
        follow_links: Whether links that lead out of ``root`` are followed.

    Raises:
        ReadError: if ``root`` is no folder.
    """
    if not root.is_dir():
        raise ReadError(f"{root}: is no folder. Give a folder of images, or a CSV of cases.", code="E_NO_DATA")
    result = Discovery()
    images: list[Path] = []
    labels: list[Path] = []
    for path, fault in walk(root, follow_links=follow_links):
        if not str(path).isprintable():
            shown = str(path).encode("unicode_escape").decode()
            text = f"{shown}: the name has control characters or is not UTF-8; tables cannot hold it. Rename the file."
            result.refused.append((shown, ReadError(text, code="E_NAME")))
            continue
        reason = _why_ignored(path) if fault is None or _is_hidden(path) else ""
        if fault is not None and not reason:
            result.refused.append((str(path), fault))
        elif reason:
            result.ignored.append((str(path), reason))
        elif not follow_links and _leads_out(root, path):
            text = f"{path}: is a link that leads out of the folder. Set follow_links: true to allow it."
            result.refused.append((str(path), ReadError(text, code="E_LINK")))
        elif _is_label(path, label_suffixes):
            labels.append(path)
        elif image_glob is not None and not path.match(image_glob):
            result.ignored.append((str(path), f"does not match {image_glob}"))
        elif "derivatives" in path.parts:
            result.ignored.append((str(path), "derived image, no label by its name"))
        else:
            images.append(path)
    paired = _pair(images, labels, label_suffixes, result)
    shared = _shared_folders(images)
    is_decathlon = (root / "dataset.json").is_file()
    for path, case_id in _case_ids(images, result).items():
        label = paired.get(path)
        lacks = is_decathlon and label is None and path.parts[0] == "imagesTr"
        warnings = (
            "W_NO_LABEL: lies in imagesTr, and labelsTr has no label of its name; taken as unlabelled.",
        ) * lacks
        subject_id, whose = _subject(path, case_id, shared)
        result.found.append(
            Found(str(path), case_id, root / path, root / label if label else None, subject_id, whose, warnings)
        )
    return result


def safe_id(name: str) -> str:
    """A name of ASCII letters, digits and ``. _ -``; a short hash is added wherever something was replaced."""
    safe = _UNSAFE.sub("_", name).strip("._-")[:150]
    if safe and safe == name:
        return safe
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{safe}-{digest}" if safe else f"case-{digest}"


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _why_ignored(path: Path) -> str:
    if _is_hidden(path):
        return "hidden file"
    if path.suffix.lower() in {".dcm", ".dicom", ".ima"}:
        return "DICOM is not read yet; convert the series to NIfTI"
    if not io.is_image(path):
        return "not an image file"
    channel = _CHANNEL.search(io.stem(path)) if _is_nnunet(path) else None
    if channel and channel[1] != "0000":
        return "further channel of an image; one file a case is read"
    return ""


def _is_nnunet(path: Path) -> bool:
    """Whether names end in the number of a channel here; elsewhere four digits number the cases."""
    return any(part.lower() in _NNUNET_FOLDERS for part in path.parts[:-1])


def _leads_out(root: Path, path: Path) -> bool:
    return not (root / path).resolve().is_relative_to(root.resolve())


def _is_label(path: Path, suffixes: Sequence[str]) -> bool:
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


def _pair(images: list[Path], labels: list[Path], suffixes: Sequence[str], result: Discovery) -> dict[Path, Path]:
    """Give each label to the one image that it can belong to; refuse the others, and all that claim one image."""
    by_name: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        by_name[_base(image)].append(image)
    claims: dict[Path, list[Path]] = defaultdict(list)
    for label in labels:
        base = _base(label, suffixes)
        candidates = by_name.get(base, [])
        if not candidates and _SUBJECT.match(base):  # BIDS: sub-01_dseg belongs to sub-01_T1w
            candidates = [image for image in images if _base(image).rsplit("_", 1)[0] == base]
        if len(candidates) > 1:
            same = [image for image in candidates if _place(image) == _place(label)]
            candidates = same or candidates
        if len(candidates) != 1:
            shown = ", ".join(str(image) for image in candidates[:3]) or "none"
            text = f"{label}: a label map with {len(candidates)} images of its name ({shown}); one is needed. "
            text += "Rename it like its image, or list the pairs in a CSV."
            result.refused.append((str(label), CaseError(text, code="E_PAIR")))
        else:
            claims[candidates[0]].append(label)
    for image, several in claims.items():
        for label in several if len(several) > 1 else ():
            others = ", ".join(str(other) for other in several if other is not label)
            text = f"{label}: {others} would be a label map of {image} too; one is needed, so the image has none. "
            text += "Keep one, or list the pairs in a CSV."
            result.refused.append((str(label), CaseError(text, code="E_PAIR")))
    return {image: several[0] for image, several in claims.items() if len(several) == 1}


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

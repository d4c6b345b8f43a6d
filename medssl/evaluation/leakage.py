"""Is an image of one set, or a copy of it, in the other? Evidence of five kinds, the surest first.

``subject``: the same subject id. ``file``: the same bytes of the image file. ``voxels``: the same prepared or read
voxels. ``picture``: a signature that is far more alike than those of different subjects within a set, whatever flip,
scaling of intensities, noise or compression lies between. ``embedding``: the same of vectors.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float32, Float64
from PIL import Image
from pydantic import Field

from medssl.config import Config
from medssl.data.cohort import Case, Cohort
from medssl.data.reading import read_image
from medssl.data.splits import Split
from medssl.data.store import ArrayStore, StoredCase
from medssl.errors import CaseError, ConfigError, MedSSLError, NoInputError, ReadError
from medssl.evaluation.embeddings import Embeddings, unit_vectors
from medssl.evaluation.signature import signature, similarities, threshold_of
from medssl.ledger import Ledger, Outcome
from medssl.progress import track
from medssl.report.page import Section, write_report
from medssl.report.thumbnails import render
from medssl.runfolder import RunFolder, atomic_write
from medssl.volume import Volume, reoriented_view

_log = logging.getLogger(__name__)

Evidence = Literal["subject", "file", "voxels", "picture", "embedding"]
COLUMNS = ("case_a", "subject_a", "case_b", "subject_b", "evidence", "similarity", "threshold")
BOUNDS: Mapping[str, tuple[float, float]] = {"picture": (0.85, 0.92), "embedding": (0.9, 0.999)}
_GAP = 12


class LeaksConfig(Config):
    """How two sets are compared.

    Args:
        split_a: Only this split of the first set.
        split_b: Only this split of the second set.
        spread: How many deviations beyond the neighbours within a set a copy lies.
        shown: Most pairs with a picture on the page, and of the nearest that are no copies a quarter of that.
    """

    split_a: Split | None = None
    split_b: Split | None = None
    spread: float = Field(5.0, gt=0)
    shown: int = Field(20, ge=0)


@dataclass(frozen=True)
class LeaksResult:
    """What two sets have in common.

    Args:
        ledger: Every case of both; those of the second that are in the first are rejected with E_LEAK.
        sentences: In words.
        table: ``leaks.csv``.
    """

    ledger: Ledger
    sentences: tuple[str, ...]
    table: pd.DataFrame


@dataclass(frozen=True)
class _Item:
    """What is compared of one case."""

    case_id: str
    subject_id: str
    file: str | None = None
    voxels: str | None = None
    picture: Float32[np.ndarray, "*side"] | None = None
    vector: Float32[np.ndarray, " d"] | None = None
    volume: Callable[[], Volume] | None = None


def leaks(
    first: Path, second: Path, *, out: Path, config: LeaksConfig | None = None, dry_run: bool = False
) -> LeaksResult:
    """Compare two sets of images, such as what was pretrained on and what will be tested on.

    Args:
        first: A store, a cohort's table, or what ``embed`` wrote.
        second: Another of the same kind; or the same with two splits.
        out: Gets ``leaks.csv``, ``nearest.csv`` (the nearest image of the first set for each of the second),
            ``refused.csv`` and ``report.html``.
        config: How they are compared.
        dry_run: Say what would be compared, and write nothing.

    Raises:
        ConfigError: E_SAME_SET, if both are the same set; E_KINDS, if one is a table of embeddings and the other not,
            or the embeddings come of two bundles.
        ReadError: if a set cannot be read.
        NoInputError: if a set is empty.
    """
    chosen = config or LeaksConfig.parse({})
    _check_pair(first, second, chosen)
    ledger = Ledger()
    if dry_run:
        return LeaksResult(ledger, (f"would compare {first} with {second}",), pd.DataFrame(columns=[*COLUMNS]))
    a = _items(first, chosen.split_a, "a", ledger)
    b = _items(second, chosen.split_b, "b", ledger)
    found, nearest = _compare(a, b, chosen)
    told = [*_told(found, a, b), *_limits(first, second)]
    accused = {row["case_b"]: row for row in reversed(found.to_dict("records"))}
    for item in a:
        ledger.accept(f"a:{item.case_id}")
    for item in b:
        row = accused.get(item.case_id)
        if row is None:
            ledger.accept(f"b:{item.case_id}")
        else:
            fault = f"case {item.case_id}: is in the first set as {row['case_a']} (by {row['evidence']}). Leave it out."
            ledger.reject(f"b:{item.case_id}", CaseError(fault, code="E_LEAK"))
    ledger.check()
    with RunFolder(out) as run:
        run.write_recipe({"command": "leaks", **chosen.to_dict(), "first": str(first), "second": str(second)})
        atomic_write(out / "leaks.csv", found.to_csv(index=False))
        atomic_write(out / "nearest.csv", nearest.to_csv(index=False))
        atomic_write(out / "refused.csv", ledger.to_csv(Outcome.REJECTED))
        _write_page(out / "report.html", found, nearest, told, sides=(a, b), shown=chosen.shown)
        run.journal.log(command="leaks", pairs=len(found), findings=told, **ledger.counts())
    return LeaksResult(ledger, tuple(told), found)


def _check_pair(first: Path, second: Path, config: LeaksConfig) -> None:
    if first.resolve() == second.resolve() and (config.split_a is None or config.split_a == config.split_b):
        raise ConfigError(
            f"{first}: given twice, so all of it would be found. Give another set, or two splits "
            "(--set split_a=train --set split_b=test).",
            code="E_SAME_SET",
        )
    tables = [path.suffix == ".parquet" for path in (first, second)]
    if tables[0] != tables[1]:
        raise ConfigError(
            f"{first} and {second}: embeddings can be compared with embeddings only. Embed the other set with the same "
            "bundle.",
            code="E_KINDS",
        )
    if not tables[0]:
        return
    about = [Embeddings.read(path).about for path in (first, second)]
    different = [
        key for key in ("bundle_digest", "scratch", "seed", "crop_voxels") if about[0].get(key) != about[1].get(key)
    ]
    if different:
        named = ", ".join(key.replace("_", " ") for key in different)
        raise ConfigError(
            f"{first} and {second}: not embedded alike (different: {named}). Embed both with the same "
            "bundle and options.",
            code="E_KINDS",
        )


def _items(path: Path, split: Split | None, side: str, ledger: Ledger) -> list[_Item]:
    """Every readable case of a set."""
    if path.is_dir():
        cases = ArrayStore.open(path).select(split=split)
        makers = [(case.case_id, partial(_stored, case)) for case in cases]
    elif path.suffix == ".parquet":
        table = Embeddings.read(path).select(split).by_case()
        rows = zip(table.table["case_id"], table.table["subject_id"], table.vectors, strict=True)
        makers = [(str(case), partial(_embedded, (str(case), str(subject), vector))) for case, subject, vector in rows]
    elif path.suffix == ".csv":
        cohort = Cohort.from_csv(path).select(split=split)
        makers = [(case.case_id, partial(_scanned, case)) for case in cohort]
    else:
        raise ReadError(
            f"{path}: is no store, no table of a cohort and no table of embeddings. Give one of these.", code="E_FORMAT"
        )
    if not makers:
        raise NoInputError(f"{path}: no case{f' in the split {split}' if split else ''}. Choose another split or set.")
    items = []
    for case_id, make in track(makers, f"set {side}"):
        ledger.expect(f"{side}:{case_id}")
        try:
            items.append(make())
        except MedSSLError as error:
            _log.warning("%s: %s: %s", case_id, error.code, error.message)
            ledger.reject(f"{side}:{case_id}", error)
    return items


def _stored(case: StoredCase) -> _Item:
    def volume() -> Volume:
        image = case.read("image", (0, 0, 0), case.shape)
        return Volume(image, case.geometry, "HU" if case.unit == "HU" else "arbitrary")

    return _seen(case.case_id, case.subject_id, case.meta.get("image_digest"), volume)


def _scanned(case: Case) -> _Item:
    image, source = read_image(Path(case.image), case.reading)

    def volume() -> Volume:
        return read_image(Path(case.image), case.reading)[0]

    return _seen(case.case_id, case.subject_id, source.digest, volume, image)


def _embedded(given: tuple[str, str, Float32[np.ndarray, " d"]]) -> _Item:
    case_id, subject_id, vector = given
    return _Item(case_id, subject_id, vector=vector)


def _seen(
    case_id: str, subject_id: str, file: str | None, volume: Callable[[], Volume], image: Volume | None = None
) -> _Item:
    image = volume() if image is None else image
    array = np.ascontiguousarray(reoriented_view(image).array)
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode() + array.tobytes()).hexdigest()
    return _Item(case_id, subject_id, file, digest, signature(image), volume=volume)


def _compare(a: Sequence[_Item], b: Sequence[_Item], config: LeaksConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows: list[tuple[object, ...]] = []
    for name in ("subject_id", "file", "voxels"):
        known = {value: item for item in reversed(a) if (value := getattr(item, name)) is not None}
        for item in b:
            other = known.get(getattr(item, name))
            if other is not None:
                rows.append((*_names(other, item), name.removesuffix("_id"), 1.0, 1.0))
    nearest: list[tuple[object, ...]] = []
    for evidence, ours, theirs, scores, limit in _alike(a, b, config):
        best = scores.argmax(axis=0)
        for place, item in enumerate(theirs):
            names = _names(ours[best[place]], item)
            nearest.append((*names, evidence, float(scores[best[place], place]), limit))
            rows += [
                (*_names(ours[k], item), evidence, float(scores[k, place]), limit)
                for k in np.flatnonzero(scores[:, place] >= limit).tolist()
            ]
    return pd.DataFrame(rows, columns=[*COLUMNS]), pd.DataFrame(nearest, columns=[*COLUMNS]).sort_values(
        "similarity", ascending=False, kind="stable", ignore_index=True
    )


def _alike(
    a: Sequence[_Item], b: Sequence[_Item], config: LeaksConfig
) -> Iterator[tuple[Evidence, list[_Item], list[_Item], Float64[np.ndarray, "n m"], float]]:
    """Similarities of what can be compared, and the threshold from neighbours within each set."""
    shapes = sorted({item.picture.shape for item in (*a, *b) if item.picture is not None})
    for shape in shapes:
        sides = [
            [item for item in items if item.picture is not None and item.picture.shape == shape] for items in (a, b)
        ]
        if all(sides):
            pictures = [[item.picture for item in side if item.picture is not None] for side in sides]
            between, *within = similarities(*pictures)
            yield "picture", sides[0], sides[1], between, _limit("picture", within, sides, config)
    sides = [[item for item in items if item.vector is not None] for items in (a, b)]
    if all(sides):
        x, y = (np.stack([item.vector for item in side if item.vector is not None]) for side in sides)
        unit_x, unit_y = unit_vectors(x, others=[y])
        within = [unit_x @ unit_x.T, unit_y @ unit_y.T]
        yield "embedding", sides[0], sides[1], unit_x @ unit_y.T, _limit("embedding", within, sides, config)


def _limit(
    evidence: str, within: Sequence[Float64[np.ndarray, "n n"]], sides: Sequence[Sequence[_Item]], config: LeaksConfig
) -> float:
    subjects = [[item.subject_id for item in side] for side in sides]
    return threshold_of(within, subjects, spread=config.spread, bounds=BOUNDS[evidence])


def _names(first: _Item, second: _Item) -> tuple[str, str, str, str]:
    return first.case_id, first.subject_id, second.case_id, second.subject_id


def _told(found: pd.DataFrame, a: Sequence[_Item], b: Sequence[_Item]) -> Iterator[str]:
    if found.empty:
        yield f"No image of the {len(b)} of the second set was found in the {len(a)} of the first."
        return
    count = found["case_b"].nunique()
    yield f"{count} of the {len(b)} images of the second set share a subject or an image with the first."
    for evidence, rows in found.groupby("evidence", sort=False):
        yield f"By {evidence}: {rows['case_b'].nunique()} images of {rows['subject_b'].nunique()} subjects."


def _limits(first: Path, second: Path) -> Iterator[str]:
    """What this comparison could not see."""
    if first.suffix == ".parquet":
        yield "Embeddings hold no pixels: compare the stores too, which also finds flipped copies."
    elif first.is_dir() != second.is_dir():
        yield "One set is prepared and the other is not: cropped margins hide copies. Better compare two of a kind."
    if first.suffix != ".parquet":
        yield "Crops and turned copies may be missed by picture: compare embeddings too."
    yield "Subject ids match only where both sets were made with one key."


def _write_page(
    path: Path,
    found: pd.DataFrame,
    nearest: pd.DataFrame,
    told: Sequence[str],
    *,
    sides: tuple[Sequence[_Item], Sequence[_Item]],
    shown: int,
) -> None:
    volumes = {(side, item.case_id): item.volume for side, items in zip("ab", sides, strict=True) for item in items}
    pairs = found.drop_duplicates(["case_a", "case_b"])
    apart = nearest[nearest["similarity"] < nearest["threshold"]]
    counted = "leaks.csv: no pairs."
    if len(pairs):
        counted = (
            f"leaks.csv. Pictures of the first {min(shown, len(pairs))} of {len(pairs)} pairs, the first set's left."
        )
    judged = (
        "The 20 most alike of nearest.csv, for the eye to judge the threshold. Pictures of the most alike below it: if "
        "they show one image, copies were missed."
    )
    rows = [{str(key): value for key, value in row.items()} for row in found.to_dict("records")]
    near = [{str(key): value for key, value in row.items()} for row in nearest.head(20).to_dict("records")]
    sections = [
        Section("In words", text=told),
        Section("Pairs", text=[counted], table=rows, pictures=_pictures(pairs.head(shown), volumes)),
        Section(
            "Nearest pairs", text=[judged], table=near, pictures=_pictures(apart.head(math.ceil(shown / 4)), volumes)
        ),
    ]
    write_report(path, "What two sets have in common", sections=sections)


def _pictures(pairs: pd.DataFrame, volumes: Mapping[tuple[str, str], Callable[[], Volume] | None]) -> dict[str, bytes]:
    """Both images of each pair, side by side."""
    pictures: dict[str, bytes] = {}
    for row in pairs.to_dict("records"):
        makers = [volumes[side, row[f"case_{side}"]] for side in ("a", "b")]
        drawn = [Image.open(io.BytesIO(render(make(), size=110))).convert("RGB") for make in makers if make is not None]
        if len(drawn) == len(makers):
            left, right = drawn
            joined = Image.new("RGB", (left.width + _GAP + right.width, max(left.height, right.height)), "white")
            joined.paste(left, (0, 0))
            joined.paste(right, (left.width + _GAP, 0))
            stream = io.BytesIO()
            joined.save(stream, format="PNG")
            pictures[f"{row['case_a']} | {row['case_b']}, {row['evidence']} {row['similarity']:.3f}"] = (
                stream.getvalue()
            )
    return pictures

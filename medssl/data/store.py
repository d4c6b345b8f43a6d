"""The store: prepared cases, compressed in chunks, read by crop, each under the hash of what it was made from.

::

    store/
      store.json                  the truth: version, preparation, one line a case; written last, with its own digest
      index.csv, prepare.yaml     the same for people
      atlas.json                  where cases lie in an atlas, if somebody has registered them; see medssl/data/atlas.py
      facts.csv                   targets and groups of the user's own table, if any; see medssl/data/facts.py
      cases/<key>/
        image.b2nd label.b2nd body.b2nd     (C, X, Y, Z); chunks of 64^3, blocks of 32^3
        source_label.b2nd                   the label as it was drawn, on the source grid, for scoring
        foreground.npz                      sample voxels of each label value, and of the body under "-1"
        case.json                           geometries, unit, box of the body, what preparation did
        digests.json                        SHA-256 of each file above

An entry appears by one rename and is never changed: a kill, a second writer or a full disk leaves only whole entries.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import blosc2
import numpy as np
from jaxtyping import Bool, Float64, Int32, Shaped

from medssl.config import dump_yaml
from medssl.data.atlas import read_atlas
from medssl.data.facts import NAME as FACTS
from medssl.data.facts import Facts, read_facts, write_facts
from medssl.data.splits import Split
from medssl.errors import CheckpointError, ReadError
from medssl.geometry import Geometry
from medssl.runfolder import atomic_path, atomic_write
from medssl.views import BODY

STORE_VERSION = 4
MAX_SAMPLE_VOXELS = 2000
_NO_FACTS = Facts()
_NO_SPACING = ("W_NO_SPACING", "W_SPACING_MISSING", "W_NO_MM")


@dataclass(frozen=True)
class IndexRow:
    """One case of the store's index; ``key`` names its entry."""

    case_id: str
    subject_id: str
    split: Split | None
    modality: str
    key: str
    labelled: bool
    label_values: tuple[int, ...]


class Entry(NamedTuple):
    """What one entry of the store holds.

    Args:
        image: Float or int16 array (C, X, Y, Z).
        label: Integer array (1, X, Y, Z), or None.
        body: Mask of the body, uint8 (1, X, Y, Z).
        meta: JSON-able mapping with ``source_geometry``, ``prepared_geometry``, ``unit`` and ``fill``.
        source_label: The label on the source grid (1, X, Y, Z), where there is one.
    """

    image: Shaped[np.ndarray, "c x y z"]
    label: Shaped[np.ndarray, "1 x y z"] | None
    body: Shaped[np.ndarray, "1 x y z"]
    meta: Mapping[str, Any]
    source_label: Shaped[np.ndarray, "1 i j k"] | None = None


def entry_folder(store: Path, key: str) -> Path:
    """Where the entry ``key`` of ``store`` lies."""
    return store / "cases" / key


def write_entry(store: Path, key: str, entry: Entry) -> Path:
    """Write one entry whole or not at all; where another writer was first, its entry stays.

    Raises:
        EnvironmentFaultError: if the disk is full or the folder may not be written.
    """
    target = entry_folder(store, key)
    foreground = {str(BODY): _sample_voxels(entry.body[0] > 0, key)}
    if entry.label is not None:
        foreground |= {str(value): _sample_voxels(entry.label[0] == value, key) for value in label_values(entry.label)}
    meta = {
        **entry.meta,
        "store_version": STORE_VERSION,
        "body_box": box_of(entry.body[0] > 0),
        "channels": int(entry.image.shape[0]),
        "labelled": entry.label is not None,
        "label_values": label_values(entry.label) if entry.label is not None else [],
    }
    with atomic_path(target, replace=False) as folder:
        folder.mkdir()
        arrays = {"image": entry.image, "label": entry.label, "body": entry.body, "source_label": entry.source_label}
        for name, array in arrays.items():
            if array is not None:
                (folder / f"{name}.b2nd").write_bytes(_frame(array))
        np.savez_compressed(folder / "foreground.npz", **foreground)  # type: ignore[arg-type]
        (folder / "case.json").write_text(json.dumps(meta))
        digests = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
        (folder / "digests.json").write_text(json.dumps(digests))
    return target


def verify_entry(folder: Path) -> None:
    """Compare every file of an entry with its digest.

    Raises:
        CheckpointError: E_DIGEST, if a file is missing or changed.
    """
    try:
        digests: dict[str, str] = json.loads((folder / "digests.json").read_text())
        damaged = [name for name, digest in digests.items() if _sha256(folder / name) != digest]
        whole = {"image.b2nd", "body.b2nd", "foreground.npz", "case.json"} <= digests.keys()
    except (OSError, ValueError, AttributeError):
        damaged, whole = ["digests.json"], True
    if damaged or not whole:
        raise CheckpointError(
            f"{folder}: {', '.join(damaged) or 'digests.json'} is missing or not what was written. "
            "Run medssl prepare again; it rebuilds only damaged entries.",
            code="E_DIGEST",
        )


def label_values(label: Shaped[np.ndarray, "*any"]) -> list[int]:
    """The values other than 0 that occur in ``label``, ascending."""
    return [int(value) for value in np.unique(label) if value != 0]


def write_index(
    store: Path,
    rows: Sequence[IndexRow],
    *,
    prepare: Mapping[str, Any],
    unit: str,
    modality: str,
    facts: Facts = _NO_FACTS,
) -> None:
    """Write the index; it replaces the former one in a single rename. ``facts`` go into a table of their own."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("case_id", "subject_id", "split", "modality", "key", "labelled", "label_values"))
    for row in rows:
        values = " ".join(str(value) for value in row.label_values)
        labelled = str(row.labelled).lower()
        writer.writerow((row.case_id, row.subject_id, row.split or "", row.modality, row.key, labelled, values))
    atomic_write(store / "index.csv", text.getvalue())
    atomic_write(store / "prepare.yaml", dump_yaml(prepare))
    content = {
        "store_version": STORE_VERSION,
        "unit": unit,
        "modality": modality,
        "prepare": dict(prepare),
        "cases": [asdict(row) for row in rows],
    }
    digest = write_facts(store / FACTS, facts, case_ids=[row.case_id for row in rows])
    if digest:
        content["facts_digest"] = digest
    atomic_write(store / "store.json", json.dumps({**content, "digest": _content_digest(content)}))


class Room(Protocol):
    """Memory for decoded arrays; see :mod:`medssl.data.memory`."""

    def take(self, size: int) -> bool:
        """Whether there is room for ``size`` bytes, which are then taken."""


class StoredCase:
    """One prepared case, read by crop; verifies its digests when it is first touched.

    Args:
        row: Its line of the index.
        folder: Its entry.
        atlas_affine: World mm to atlas coordinates, where the case is registered.
        facts: What the user's own table says of it, by column; what it does not state is left out.
    """

    def __init__(
        self,
        row: IndexRow,
        folder: Path,
        *,
        atlas_affine: Float64[np.ndarray, "4 4"] | None = None,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        self.atlas_affine = atlas_affine
        self.facts: Mapping[str, str] = dict(facts or {})
        self.case_id = row.case_id
        self.subject_id = row.subject_id
        self.split = row.split
        self.modality = row.modality
        self.labelled = row.labelled
        self.folder = folder
        self.room: Room | None = None
        self._arrays: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"StoredCase({self.case_id!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Open arrays stay behind in a pickle, and every process opens its own."""
        return {**self.__dict__, "_arrays": {}, "room": None}

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Content of ``case.json``: geometries, unit, the record of preparation."""
        verify_entry(self.folder)
        meta: dict[str, Any] = json.loads((self.folder / "case.json").read_text())
        return meta

    @cached_property
    def geometry(self) -> Geometry:
        """The prepared grid."""
        return Geometry.from_dict(self.meta["prepared_geometry"])

    @cached_property
    def source_geometry(self) -> Geometry:
        """The grid of the source file."""
        return Geometry.from_dict(self.meta["source_geometry"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels of the prepared grid along X, Y, Z."""
        return self.geometry.shape

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size of the prepared grid."""
        x, y, z = (float(value) for value in self.geometry.spacing_mm)
        return x, y, z

    @property
    def channels(self) -> int:
        """Channels of the image."""
        return int(self.meta["channels"])

    @property
    def unit(self) -> str:
        """``HU`` or ``arbitrary``."""
        return str(self.meta["unit"])

    @property
    def fill(self) -> float:
        """Image value outside the grid."""
        return float(self.meta["fill"])

    @property
    def affine(self) -> Float64[np.ndarray, "4 4"]:
        """Voxel index of the prepared grid to world mm, RAS+."""
        return self.geometry.affine

    @property
    def body_box(self) -> Float64[np.ndarray, "2 3"]:
        """Start and size in voxels of the box around the body; the whole grid where no body was found."""
        return np.array(self.meta["body_box"], dtype=np.float64)

    @property
    def is_metric(self) -> bool:
        """Whether the file stated its voxel size; 1 mm was assumed otherwise."""
        return not self._warned(_NO_SPACING)

    @property
    def is_constant(self) -> bool:
        """Whether every channel of the image has one value only, so that there is nothing to learn from it."""
        return self._warned(("W_CONSTANT",)) >= self.channels

    def has(self, name: str) -> bool:
        """Whether the case has this array; every case has an image and a body."""
        return name in {"image", "body"} or (name in {"label", "source_label"} and self.labelled)

    def read(
        self, name: str, start: Sequence[int], shape: Sequence[int]
    ) -> Shaped[np.ndarray, "c {shape[0]} {shape[1]} {shape[2]}"]:
        """Read a box, which may reach beyond the grid.

        Args:
            name: ``image``, ``label`` or ``body``.
            start: First voxel of the box; may be negative.
            shape: Voxels of the box.

        Returns:
            The stored type: int16, float16 or float32 for an image, integers for label and body; not to be written to.
            Outside the grid an image has ``fill``, the others 0.

        Raises:
            CheckpointError: E_DIGEST at the first touch of a damaged entry.
            KeyError: if the case has no such array.
        """
        stored = self._open(name)
        low = [max(0, a) for a in start]
        high = [min(n, a + size) for a, size, n in zip(start, shape, self.shape, strict=True)]
        dtype = stored.dtype
        channels = slice(0, stored.shape[0])
        inside = [slice(a, b) for a, b in zip(low, high, strict=True)]
        if any(piece.start >= piece.stop for piece in inside):
            return np.full((stored.shape[0], *shape), self._outside(name), dtype)
        data: np.ndarray = stored[(channels, *inside)]
        if data.shape[1:] == tuple(shape):
            return data
        result = np.full((stored.shape[0], *shape), self._outside(name), dtype)
        place = [slice(piece.start - a, piece.stop - a) for piece, a in zip(inside, start, strict=True)]
        result[(channels, *place)] = data
        return result

    def source_label(self) -> Shaped[np.ndarray, "i j k"]:
        """The label as it was drawn, on the grid of ``source_geometry``.

        Raises:
            KeyError: if the case has no label.
        """
        label: np.ndarray = self._open("source_label")[0]
        return label

    def foreground_voxels(self, value: int) -> Int32[np.ndarray, "n 3"]:
        """Up to 2000 voxels, drawn evenly, where the label is ``value``, or of the body for -1."""
        voxels = self._foreground.get(value)
        return np.zeros((0, 3), np.int32) if voxels is None else voxels

    @cached_property
    def _foreground(self) -> dict[int, Int32[np.ndarray, "n 3"]]:
        if not self.meta:
            return {}
        with np.load(self.folder / "foreground.npz", allow_pickle=False) as file:
            return {int(name): file[name] for name in file.files}

    def _warned(self, codes: tuple[str, ...]) -> int:
        """How many warnings of preparation have one of the codes."""
        return sum(warning.startswith(codes) for warning in self.meta.get("warnings", ()))

    def _outside(self, name: str) -> float:
        return self.fill if name == "image" else 0.0

    def _open(self, name: str) -> Any:
        if name not in self._arrays:
            if not self.has(name):
                raise KeyError(f"case {self.case_id} has no {name}")
            if self.meta:  # the first touch verifies the whole entry
                path = str(self.folder / f"{name}.b2nd")
                stored = blosc2.open(path, mode="r", dparams={"nthreads": 1})
                is_kept = self.room is not None and self.room.take(stored.nbytes)
                self._arrays[name] = _locked(stored[...]) if is_kept else stored
        return self._arrays[name]


class ArrayStore:
    """The prepared cases of a folder; made with :meth:`open`."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path = path
        self.prepare_config: dict[str, Any] = dict(content["prepare"])
        self.unit: str = content["unit"]
        self.modality: str = content["modality"]
        atlas, atlas_digest = read_atlas(path)
        self.fingerprint: str = f"{content['digest']}{atlas_digest}"
        facts = _facts(path, content)
        self.fact_columns = facts.columns
        rows = (IndexRow(**{**row, "label_values": tuple(row["label_values"])}) for row in content["cases"])
        self._rows = tuple(rows)
        self.cases = tuple(
            StoredCase(
                row,
                entry_folder(path, row.key),
                atlas_affine=atlas.get(row.case_id),
                facts=facts.of(row.case_id),
            )
            for row in self._rows
        )

    @classmethod
    def open(cls, path: Path) -> ArrayStore:
        """Open a store that ``medssl prepare`` has written; digests of its cases are compared at first touch.

        Raises:
            ReadError: if there is no store, or E_ATLAS if its atlas.json is not sound.
            CheckpointError: if its index or its facts are damaged, or of another version of medssl.
        """
        try:
            content = json.loads((path / "store.json").read_bytes())
            digest = content.pop("digest")
            if digest != _content_digest(content):
                raise ValueError("digest")
        except OSError as error:
            raise ReadError(
                f"{path}: holds no store.json. Give a folder that medssl prepare has finished.", code="E_NO_STORE"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}/store.json: is not what was written. Run medssl prepare again; it keeps all good entries.",
                code="E_DIGEST",
            ) from error
        if content["store_version"] != STORE_VERSION:
            raise CheckpointError(
                f"{path}: store version {content['store_version']}; this medssl needs {STORE_VERSION}. "
                "Run medssl prepare again.",
                code="E_VERSION",
            )
        return cls(path, {**content, "digest": digest})

    @property
    def label_values(self) -> tuple[int, ...]:
        """Every label value other than 0 that occurs in the store, ascending."""
        return tuple(sorted({value for row in self._rows for value in row.label_values}))

    def select(self, *, split: Split | None = None, labelled: bool | None = None) -> tuple[StoredCase, ...]:
        """Cases of one split, or with or without a label, in the order of the index."""
        return tuple(
            case
            for case in self.cases
            if (split is None or case.split == split) and (labelled is None or case.labelled == labelled)
        )


def _facts(store: Path, content: Mapping[str, Any]) -> Facts:
    """The facts that were written with the index; none where it was written without."""
    expected = content.get("facts_digest", "")
    if not expected:
        return Facts()
    path = store / FACTS
    if not path.is_file() or _sha256(path) != expected:
        raise CheckpointError(
            f"{path}: is missing or not what was written. Run medssl prepare again; it keeps all good entries.",
            code="E_DIGEST",
        )
    return read_facts(path)


def _locked(array: np.ndarray) -> np.ndarray:
    """The array, which crops are looks into, safe from being written to."""
    array.flags.writeable = False
    return array


def _frame(array: Shaped[np.ndarray, "c x y z"]) -> bytes:
    """The bytes of a .b2nd file; written by Python, so that a full disk is an OSError with its number."""
    side, block = (64, 32) if array.shape[3] >= 16 else (256, 128)
    chunks = (array.shape[0], *(min(side, n) for n in array.shape[1:]))
    blocks = (array.shape[0], *(min(block, n) for n in chunks[1:]))
    cparams = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
    packed = blosc2.asarray(np.ascontiguousarray(array), chunks=chunks, blocks=blocks, cparams=cparams)
    frame: bytes = packed.to_cframe()
    return frame


def _sample_voxels(mask: Shaped[np.ndarray, "x y z"], key: str) -> Int32[np.ndarray, "n 3"]:
    """Up to 2000 voxels of ``mask`` without repetition; the same for the same entry."""
    flat = np.flatnonzero(mask)
    if len(flat) > MAX_SAMPLE_VOXELS:
        rng = np.random.default_rng(int(hashlib.sha256(key.encode()).hexdigest()[:16], 16))
        flat = np.sort(rng.choice(flat, MAX_SAMPLE_VOXELS, replace=False))
    return np.stack(np.unravel_index(flat, mask.shape), axis=1).astype(np.int32)


def box_of(mask: Bool[np.ndarray, "x y z"]) -> list[list[int]]:
    """Start and size of the box around ``mask``, or of the whole grid where it is empty."""
    start, stop = [0, 0, 0], list(mask.shape)
    for axis in range(3):
        found = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        if found.size:
            start[axis], stop[axis] = int(found[0]), int(found[-1]) + 1
    return [start, [b - a for a, b in zip(start, stop, strict=True)]]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

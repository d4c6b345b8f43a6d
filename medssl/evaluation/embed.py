"""Features of every case, slice or patch of a store, once, into one Parquet file that needs no network any more.

Windows of the size that the encoder was trained on are laid over the box of the body, without any draw: side by side
where they cover it, else spread evenly. The vector of a window is the mean of each level of the feature pyramid over
space, finest level first; that of a slice or a volume is the mean over its windows.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float32, Float64
from pydantic import Field
from scipy.stats import qmc
from torch import Tensor

from medssl.augment.build import build_augment
from medssl.augment.resample import resample
from medssl.config import Config
from medssl.data.splits import Split
from medssl.data.store import ArrayStore, StoredCase
from medssl.errors import CaseError, CheckpointError, ConfigError, MedSSLError, NoInputError
from medssl.evaluation.embeddings import COUNTS, NUMBERS, TEXTS, Embeddings
from medssl.io import digest
from medssl.ledger import Ledger
from medssl.methods.base import Method
from medssl.nn.backbone import Backbone, build_backbone
from medssl.nn.bundle import Bundle, Passport, load_bundle
from medssl.nn.heads import pool_pyramid
from medssl.progress import track
from medssl.registry import configure
from medssl.tasks.base import Task
from medssl.views.boxes import Box, Triple
from medssl.views.coordinates import anatomical_axes, body_coordinates
from medssl.views.cutting import Cut
from medssl.views.placing import size_in_voxels

_log = logging.getLogger(__name__)

Level = Literal["volume", "slice", "patch"]
Plane = Literal["axial", "coronal", "sagittal"]
_NORMALS: Mapping[str, int] = {"sagittal": 0, "coronal": 1, "axial": 2}


class EmbedConfig(Config):
    """What is embedded.

    Args:
        level: One vector a case, a slice, or a window.
        crops: Most windows of a case, or of a slice.
        plane: Of the slices.
        every: Step from slice to slice in voxels; by default half of the window's thickness, at least 1.
        split: Only cases of this split.
        scratch: Take fresh weights in place of the bundle's, as a control.
        seed: Of the fresh weights.
        batch: Windows in one pass.
        device: ``auto`` takes a CUDA device if there is one.
    """

    level: Level = "volume"
    crops: int = Field(16, ge=1)
    plane: Plane = "axial"
    every: int | None = Field(None, ge=1)
    split: Split | None = None
    scratch: bool = False
    seed: int = Field(0, ge=0)
    batch: int = Field(8, ge=1)
    device: Literal["auto", "cpu"] = "auto"


@dataclass(frozen=True)
class EmbedResult:
    """What was written.

    Args:
        path: The Parquet file.
        ledger: What became of each case.
        rows: Number of vectors.
        dimensions: Numbers in each.
    """

    path: Path
    ledger: Ledger
    rows: int = 0
    dimensions: int = 0


class _Group(NamedTuple):
    """Windows whose mean is one vector."""

    cuts: tuple[Cut, ...]
    centre: Float64[np.ndarray, " 3"]
    plane: str | None = None
    slice: int | None = None


def embed(
    bundle: Path, *, store: Path, out: Path, config: EmbedConfig | None = None, dry_run: bool = False
) -> EmbedResult:
    """Embed the cases of a store with the encoder of a bundle of any kind.

    Args:
        bundle: An encoder, or what was fine-tuned from one.
        store: What ``prepare`` wrote, with the configuration of the bundle.
        out: The Parquet file, whole or not at all; see :class:`~medssl.evaluation.embeddings.Embeddings`.
        config: What is embedded.
        dry_run: Check everything, and write nothing.

    Raises:
        CheckpointError: E_CONTRACT, if the store was prepared in another way than the bundle's images.
        NoInputError: if there is no case, or none can be embedded.
    """
    chosen = config or EmbedConfig.parse({})
    loaded, opened = load_bundle(bundle), ArrayStore.open(store)
    _check_preparation(loaded, opened)
    cases = opened.select(split=chosen.split)
    if not cases:
        raise NoInputError(f"{store}: no case in the split {chosen.split}. Choose another, or leave split out.")
    reader = Reader(loaded, chosen)
    ledger = Ledger()
    rows: list[dict[str, Any]] = []
    vectors: list[Float32[np.ndarray, "n d"]] = []
    for case in track(cases, "embed"):
        ledger.expect(case.case_id)
        try:
            found = [] if dry_run else list(reader.vectors(case))
        except MedSSLError as error:
            _log.warning("%s: %s: %s", case.case_id, error.code, error.message)
            ledger.reject(case.case_id, error)
            continue
        ledger.accept(case.case_id)
        rows += [row for row, _ in found]
        vectors += [vector for _, vector in found]
    ledger.check()
    if dry_run:
        return EmbedResult(out, ledger)
    if not rows:
        raise NoInputError(f"{store}: none of {len(cases)} cases could be embedded. Mend what the warnings above say.")
    written = Embeddings(
        pd.DataFrame(rows, columns=[*TEXTS, *NUMBERS, *COUNTS]),
        np.stack(vectors),
        {
            **chosen.to_dict(),
            "bundle_digest": digest(bundle / "digests.json"),
            "bundle_kind": loaded.passport.kind,
            "method": "none" if chosen.scratch else loaded.passport.method,
            "data_fingerprint": opened.fingerprint,
            "crop_voxels": list(reader.crop_voxels),
            "medssl": version("medssl"),
        },
    )
    written.write(out)
    return EmbedResult(out, ledger, *written.vectors.shape)


class Reader:
    """Turns stored cases into vectors.

    Args:
        bundle: Gives encoder, window, voxel size and the fixed part of augmentation, such as a HU window.
        config: What is embedded.

    Raises:
        ConfigError: for slices in a plane that a 2D encoder does not see.
    """

    def __init__(self, bundle: Bundle, config: EmbedConfig) -> None:
        passport = bundle.passport
        self._config = config
        self._folder = bundle.folder
        self._channels = passport.image_channels or passport.in_channels
        self._is_flat = passport.spatial_dims == 2
        if self._is_flat and config.level == "slice" and config.plane != "axial":
            raise ConfigError(f"plane {config.plane}: the encoder is 2D and sees axial slices only. Leave plane out.")
        x, y, *z = passport.crop_voxels
        self.crop_voxels: Triple = (x, y, z[0] if z else 1)
        self._spacing_mm = passport.spacing_mm
        self._normalise = _fixed_part(passport)
        self._device = "cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu"
        self._encoder = (_fresh(passport, config.seed) if config.scratch else bundle.build_encoder()).to(self._device)
        self._encoder.eval()

    def vectors(self, case: StoredCase) -> Iterator[tuple[dict[str, Any], Float32[np.ndarray, " d"]]]:
        """Rows of the table with their vectors.

        Raises:
            CaseError: E_CONTRACT for another number of channels, E_SPACING_UNKNOWN where the window has a size in mm
                and the case has none.
            CheckpointError: E_DIGEST, if the case is damaged.
        """
        if case.channels != self._channels:
            raise CaseError(
                f"case {case.case_id}: {case.channels} channels; the bundle takes {self._channels}. Use a bundle for "
                "such images.",
                code="E_CONTRACT",
            )
        names = {name: getattr(case, name) for name in ("case_id", "subject_id", "split", "modality")}
        for group in self._groups(case):
            x_mm, y_mm, z_mm = case.affine[:3, :3] @ group.centre + case.affine[:3, 3]
            lr, ap, si = body_coordinates(case, group.centre)
            world = {"x_mm": x_mm, "y_mm": y_mm, "z_mm": z_mm} if case.is_metric else {}
            place = {**world, "body_lr": lr, "body_ap": ap, "body_si": si, "plane": group.plane, "slice": group.slice}
            yield {**names, **place, "windows": len(group.cuts)}, self._mean(case, group.cuts)

    def _groups(self, case: StoredCase) -> Iterator[_Group]:
        size = size_in_voxels(case, self.crop_voxels, self._crop_mm(case))
        low, length = case.body_box
        if self._config.level == "slice":
            yield from self._slices(case, size)
            return
        cuts = tuple(self._cuts(places(low, length, size, most=self._config.crops), size))
        if self._config.level == "volume":
            yield _Group(cuts, low + length / 2 - 0.5)
        else:
            yield from (_Group((cut,), np.asarray(cut.place.start) + size / 2 - 0.5) for cut in cuts)

    def _slices(self, case: StoredCase, size: Float64[np.ndarray, " 3"]) -> Iterator[_Group]:
        axis = 2 if self._is_flat else anatomical_axes(case)[0][_NORMALS[self._config.plane]]
        low, length = (edge.copy() for edge in case.body_box)
        first, count = int(low[axis]), int(length[axis])
        length[axis] = size[axis]
        for number in range(first, first + count, self._config.every or max(1, int(size[axis]) // 2)):
            low[axis] = number + 0.5 - size[axis] / 2
            centre = low + length / 2 - 0.5
            cuts = tuple(self._cuts(places(low, length, size, most=self._config.crops), size))
            yield _Group(cuts, centre, self._config.plane, number)

    def _crop_mm(self, case: StoredCase) -> tuple[float, ...] | None:
        """Edge lengths of the window, where the case has another voxel size than the encoder's windows."""
        if self._spacing_mm is None:
            return None
        pairs = zip(self.crop_voxels, self._spacing_mm, case.spacing_mm, strict=True)
        if all(n == 1 or math.isclose(wanted, found, abs_tol=1e-4) for n, wanted, found in pairs):
            return None
        return tuple(n * mm for n, mm in zip(self.crop_voxels, self._spacing_mm, strict=True))

    def _cuts(self, starts: Float64[np.ndarray, "n 3"], size: Float64[np.ndarray, " 3"]) -> Iterator[Cut]:
        return (Cut(Box.at(start, size), self.crop_voxels) for start in starts)

    def _mean(self, case: StoredCase, cuts: Sequence[Cut]) -> Float32[np.ndarray, " d"]:
        total, batch = None, self._config.batch
        for first in range(0, len(cuts), batch):
            pooled = self._embedded(case, cuts[first : first + batch]).double().sum(dim=0)
            total = pooled if total is None else total + pooled
        assert total is not None  # noqa: S101  places() gives at least one window
        vector: Float32[np.ndarray, " d"] = (total / len(cuts)).float().cpu().numpy()
        if not np.isfinite(vector).all():
            raise CaseError(f"case {case.case_id}: its features are not finite. Look at it with medssl gallery.")
        return vector

    @torch.inference_mode()
    def _embedded(self, case: StoredCase, cuts: Sequence[Cut]) -> Float32[Tensor, "b d"]:
        shape = np.max([cut.box_shape for cut in cuts], axis=0)
        boxes = torch.from_numpy(np.stack([cut.read(case, "image", shape) for cut in cuts]))
        to_box = torch.from_numpy(np.stack([cut.to_box for cut in cuts]))
        crops = resample(boxes, to_box, shape=self.crop_voxels)[0]
        x = self._normalise(crops[..., 0] if self._is_flat else crops)
        return pool_pyramid(self._encoder(x.to(self._device)))


def places(
    low: Float64[np.ndarray, " 3"], length: Float64[np.ndarray, " 3"], size: Float64[np.ndarray, " 3"], *, most: int
) -> Float64[np.ndarray, "n 3"]:
    """Where windows begin, in whole voxels: side by side over a box, or spread by Halton's sequence if these are many.

    Args:
        low: Start of the box.
        length: Of the box along each axis; along a shorter one the window is centred.
        size: Of the windows.
        most: How many there may be.

    Reference: Halton, On the efficiency of certain quasi-random sequences of points, Numerische Mathematik 1960.
    Deviations: none; the first point of the sequence, the origin, is left out.
    """
    room = length - size
    counts = np.maximum(1, np.ceil(length / size - 1e-6)).astype(int)
    if counts.prod() <= most:
        shares = [np.linspace(0, 1, count) if count > 1 else np.array([0.5]) for count in counts]
        points = np.array(list(itertools.product(*shares)))
    else:
        points = qmc.Halton(3, scramble=False).random(most + 1)[1:]
    starts = low + np.where(room > 0, points, 0.5) * room
    return np.asarray(np.floor(starts + 0.5), np.float64)


def _fixed_part(passport: Passport) -> Callable[[Tensor], Tensor]:
    """What training did to every image that is not random, such as a HU window."""
    recipe = passport.recipe
    if "task" in recipe:
        config = configure("tasks", recipe["task"], Task)[1]  # type: ignore[type-abstract]
    elif "method" in recipe:
        config = configure("methods", recipe["method"], Method)[1]  # type: ignore[type-abstract]
    else:
        return lambda x: x
    return build_augment(cast("Any", config).to_dict()["augment"]).normalise


def _fresh(passport: Passport, seed: int) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone(passport.backbone, in_channels=passport.in_channels, spatial_dims=passport.spatial_dims)


def _check_preparation(bundle: Bundle, store: ArrayStore) -> None:
    wanted = {key: value for key, value in bundle.passport.prepare.items() if key not in {"region", "spacing_mm"}}
    changed = [key for key, value in wanted.items() if store.prepare_config.get(key) != value]
    if changed:
        raise CheckpointError(
            f"{bundle.folder}: its images were prepared with another {', '.join(changed)} than those of {store.path}. "
            "Prepare the images with the configuration of the bundle.",
            code="E_CONTRACT",
        )

"""Where samplers cut: their crops, and the places of these on the planes of the volume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64

from medssl.augment.frame import Frame as CropFrame
from medssl.augment.images import Images
from medssl.augment.pipeline import Pipeline
from medssl.data.loader import fixed_batches
from medssl.data.store import StoredCase
from medssl.geometry import Geometry
from medssl.report.gallery import Picture, Sampler
from medssl.report.planes import COLOURS, Frame, Kind, Plates
from medssl.trainable import Batch
from medssl.views import PLANES, CaseArrays, GridCrops, LabelledCrop, MultiCrop, OverlapPair, SliceViews, ViewSampler

_MAP_PIXELS = {2: 300, 3: 230}
_CROP_PIXELS = {2: 130, 3: 96}
_NUM_CROPS, _NUM_LOCAL = 6, 6
_COLOURS = (*COLOURS, (255, 90, 170), (0, 114, 178))
_MIN_OVERLAP = 0.3
_GRID_COLOUR = (190, 190, 190)
_MOST_CELLS = 3
_FROM = {"R": "left", "L": "right", "A": "back", "P": "front", "S": "foot", "I": "head"}
_HEADINGS: Mapping[type, str] = {
    LabelledCrop: "Crops on structures and at random places",
    GridCrops: "Crops on a grid, and targets between them",
    MultiCrop: "Large and small crops",
    OverlapPair: "Two crops with a drawn overlap",
    SliceViews: "Slices in three planes",
}


@dataclass(frozen=True)
class FirstView:
    """Gives the first crop of a sampler's samples as ``image``, and a label map if it cuts one.

    Args:
        sampler: What cuts.
        crop_voxels: Of its crops.
    """

    sampler: ViewSampler
    crop_voxels: Sequence[int]

    @property
    def cases_per_sample(self) -> int:
        """As the sampler."""
        return self.sampler.cases_per_sample

    def __call__(self, cases: Sequence[CaseArrays], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Cut one sample."""
        cut = self.sampler(cases, rng)
        name = next(iter(_kinds(self.sampler, self.crop_voxels)))
        if name == "image":
            return cut
        kept = {key: value for key, value in cut.items() if key.startswith("note_")}
        fields = [name, *(f"{name}_{field}" for field in ("to_box", "spacing_mm", "affine"))]
        return {**kept, **{key.replace(name, "image", 1): cut[key][0] for key in fields}}


@dataclass(frozen=True)
class Maps:
    """Draws crops of one case and where they lie.

    Args:
        case: The case.
        pipeline: Of which only what is not random is applied, such as a window.
        images: What is known of the images.
        window: Values shown as black and white.
        seed: Of the draws.
    """

    case: StoredCase
    pipeline: Pipeline
    images: Images
    window: tuple[float, float]
    seed: int

    def main(self, sampler: ViewSampler, crop_voxels: Sequence[int], notes: str) -> Sampler:
        """A map of the sampler that training takes, or of crops at random places.

        Args:
            sampler: It.
            crop_voxels: Size of its crops.
            notes: What is known of its draws.
        """
        return self._draw(sampler, crop_voxels, notes)

    def others(self, main: ViewSampler, crop_voxels: Sequence[int], crop_mm: Sequence[float] | None) -> list[Sampler]:
        """A map for each other way to cut views.

        Args:
            main: What is shown already.
            crop_voxels: Size of the crops.
            crop_mm: Their edges in mm.
        """
        x, y, z = crop_voxels
        small = tuple(max(1, n // 2) for n in crop_voxels)
        ways: list[ViewSampler] = [
            MultiCrop(crop_voxels, small, num_local=_NUM_LOCAL, crop_mm=None),
            OverlapPair(crop_voxels, min_overlap=_MIN_OVERLAP, crop_mm=crop_mm),
        ]
        if self._is_volume and z > 1:
            ways.append(SliceViews((x, y), num_slices=_NUM_CROPS, crop_mm=None if crop_mm is None else crop_mm[:2]))
        return [self._draw(way, crop_voxels) for way in ways if not isinstance(main, type(way))]

    def _draw(self, sampler: ViewSampler, crop_voxels: Sequence[int], notes: str = "") -> Sampler:
        kinds = _kinds(sampler, crop_voxels)
        batch = fixed_batches(
            [self.case],
            sampler,
            count=1,
            batch_size=_NUM_CROPS if "image" in kinds else 1,
            seed=self.seed,
            spatial_dims=self.images.spatial_dims,
        )[0]
        frames: list[Frame] = []
        crops: list[Picture] = []
        if isinstance(sampler, GridCrops):
            bases = batch["bases_affine"].double().numpy().reshape(-1, 4, 4)
            frames += [self._frame(affine, crop_voxels, _GRID_COLOUR)._replace(line=1) for affine in bases]
            notes = f"{notes} Cells of the grid are grey, and counted {self._first_cell()}."
        for name, voxels in kinds.items():
            images, affines = self._crops(batch, name, voxels)
            texts = _texts(batch, name, sampler, len(images))
            for image, affine, text in zip(images, affines, texts, strict=True):
                colour = _COLOURS[len(crops) % len(_COLOURS)]
                frames.append(self._frame(affine, image.shape[1:], colour))
                png = self._crop_plates(affine, image.shape[1:]).draw(image, border=colour)
                crops.append(Picture(png, text))
        whole = self._map_plates().draw(self._map_slices(), frames=frames)
        heading = _HEADINGS.get(type(sampler), "Crops at random places")
        return Sampler(heading, notes, Picture(whole, "the volume" if self._is_volume else "the picture"), crops)

    def _crops(
        self, batch: Batch, name: str, voxels: Sequence[int]
    ) -> tuple[list[Float32[np.ndarray, "c x y z"]], Float64[np.ndarray, "n 4 4"]]:
        x = batch[name]
        lead = batch.tensors[f"{name}_to_box"].ndim - 2
        boxes = x.reshape(-1, *x.shape[lead:])
        frame = CropFrame.of(batch.tensors, name, shape=voxels)
        images = self.pipeline.plain(boxes, frame=frame).image.numpy()
        images = images[..., None] if self.images.spatial_dims == 2 else images
        return list(images), batch[f"{name}_affine"].double().numpy().reshape(-1, 4, 4)

    def _frame(self, affine: Float64[np.ndarray, "4 4"], shape: Sequence[int], colour: tuple[int, int, int]) -> Frame:
        """The outline of a crop in voxels of the case, through world mm."""
        to_case = np.linalg.solve(self.case.affine, affine)
        ends = np.stack([np.full(3, -0.5), np.asarray(shape) - 0.5])
        corners = ends @ to_case[:3, :3].T + to_case[:3, 3]
        return Frame(corners.min(axis=0).tolist(), corners.max(axis=0).tolist(), colour)

    def _first_cell(self) -> str:
        if not self._is_volume:
            return "by column and row"
        return "from " + ", ".join(_FROM[letter] for letter in self.case.geometry.orientation)

    @property
    def _is_colour(self) -> bool:
        return self.images.channels == 3

    def _crop_plates(self, affine: Float64[np.ndarray, "4 4"], shape: Sequence[int]) -> Plates:
        geometry = Geometry(_triple(shape), affine)
        pixels = _CROP_PIXELS[self.images.spatial_dims]
        if not self._is_volume:
            return Plates(geometry, self.window, kind="picture", size=pixels, is_colour=self._is_colour)
        if shape[2] == 1:
            return Plates(geometry, self.window, kind="slice", size=_CROP_PIXELS[2], is_colour=self._is_colour)
        return Plates(geometry, self.window, size=pixels, is_colour=self._is_colour)

    def _map_plates(self) -> Plates:
        kind: Kind = "volume" if self._is_volume else "picture"
        size = _MAP_PIXELS[self.images.spatial_dims]
        return Plates(self.case.geometry, self.window, kind=kind, size=size, is_colour=self._is_colour)

    def _map_slices(self) -> list[Float32[np.ndarray, "c x y z"]]:
        """The slice through the middle of the body across each axis; nothing else of a volume is read."""
        start, size = self.case.body_box
        places = np.minimum(np.floor(start + size / 2).astype(int), np.asarray(self.case.shape) - 1)
        slices = []
        for axis in range(3) if self._is_volume else (2, 2, 2):
            first, shape = [0, 0, 0], list(self.case.shape)
            first[axis], shape[axis] = int(places[axis]), 1
            slab = torch.from_numpy(self.case.read("image", first, shape))[None]
            shown = self.pipeline.normalise(slab if self._is_volume else slab[..., 0])[0].numpy()
            slices.append(shown if self._is_volume else shown[..., None])
        return slices

    @property
    def _is_volume(self) -> bool:
        return self.images.spatial_dims == 3


def _kinds(sampler: ViewSampler, crop_voxels: Sequence[int]) -> dict[str, Sequence[int]]:
    """Names of the crops of a sampler, and their sizes."""
    if isinstance(sampler, MultiCrop):
        return {"globals": sampler.global_voxels, "locals": sampler.local_voxels}
    if isinstance(sampler, SliceViews):
        return {"slices": sampler.crop_voxels}
    name = "targets" if isinstance(sampler, GridCrops) else "views" if isinstance(sampler, OverlapPair) else "image"
    return {name: crop_voxels}


def _texts(batch: Batch, name: str, sampler: ViewSampler, count: int) -> list[str]:
    """What to say of each crop."""
    if isinstance(sampler, GridCrops):
        return [_cells(overlap, sampler.grid) for overlap in batch["overlap"][0].tolist()]
    if name == "slices":
        planes, places = batch["slices_plane"].flatten().tolist(), batch["slices_position_mm"].flatten().tolist()
        return [f"{list(PLANES)[plane]}, {place:+.0f} mm" for plane, place in zip(planes, places, strict=True)]
    if name == "locals":
        return [f"small, {share:.0%} in a large one" for share in batch["locals_overlap"].flatten().tolist()]
    if name == "views":
        return [f"{float(batch['overlap'].flatten()[0]):.0%} in common"] * count
    return ["large" if name == "globals" else f"crop {number + 1}" for number in range(count)]


def _cells(overlap: Sequence[float], grid: Sequence[int]) -> str:
    """How much of a target lies in which cells, most first; cells are counted from 1 along each axis."""
    order = sorted(range(len(overlap)), key=lambda base: -overlap[base])[:_MOST_CELLS]
    axes = [axis for axis, cells in enumerate(grid) if cells > 1]
    told = []
    for base in (base for base in order if overlap[base] > 0):
        place = np.unravel_index(base, tuple(grid))
        told.append(f"{overlap[base]:.0%} in cell {' '.join(str(int(place[axis]) + 1) for axis in axes)}")
    return ", ".join(told)


def _triple(values: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (int(value) for value in values)
    return x, y, z

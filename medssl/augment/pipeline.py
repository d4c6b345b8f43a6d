"""A list of augments as one: a single resampling, then intensities, with a plain crop where a view has failed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float32, Int64, Shaped
from torch import Tensor, nn

from medssl.augment.base import Augment, Mixing, Params, Spatial, aligned, compose, rows_of
from medssl.augment.frame import Frame
from medssl.augment.images import HU_RANGE, ONLY_HU
from medssl.augment.resample import resample
from medssl.augment.threads import in_threads
from medssl.errors import CaseError, ConfigError

_MARGIN_DRAWS = 256
_MARGIN_GROUP = 16  # draws at a time; the bends of all take 150 MiB
_MOST_MARGIN = 0.18
_BLANK = 1e-6  # what rounding leaves of a constant
_NOISE_HU = 100.0


class View(NamedTuple):
    """What a pipeline makes of a batch.

    Args:
        image: Float32 crops.
        label: Their labels, or None if there were none.
        frame: Where the crops were read from; a displacement comes on top of its affine map.
        notes: Numbers for the journal, one a sample: ``fallback`` is 1 where augmentation failed (values not finite,
            or a blank view of a crop that is not) and the plain crop is given; ``blank`` is 1 where that has one
            value only too, such as air behind a window of bone; ``hu_clipped`` is the share of voxels
            that augments moved out of the range of HU by more than 100; noise alone moves air by less, and nothing is
            lost with that.
    """

    image: Float32[Tensor, "b c *s"]
    label: Shaped[Tensor, "b k *s"] | None
    frame: Frame
    notes: dict[str, Float32[Tensor, " b"]]


class Pipeline(nn.Module):
    """Augments in order: all spatial ones as a single map and a single resampling, then the intensity ones.

    Args:
        augments: Spatial augments are moved to the front, with their order kept.
        spacing_mm: Voxel size of crops that come without their own.

    Raises:
        ConfigError: if two spatial augments ask for different fills.
    """

    def __init__(self, augments: Sequence[Augment[Any]], *, spacing_mm: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
        super().__init__()
        self.spatial = nn.ModuleList(augment for augment in augments if isinstance(augment, Spatial))
        self.intensity = nn.ModuleList(augment for augment in augments if not isinstance(augment, Spatial))
        self.spacing_mm = tuple(spacing_mm)
        fills = {augment.fill for augment in self._spatial() if augment.fill is not None}
        if len(fills) > 1:
            raise ConfigError(
                f"augment: the spatial augments fill with {sorted(fills)}; there is one resampling. Pick one."
            )
        self.fill = fills.pop() if fills else None

    def draw(self, seeds: Int64[Tensor, " b"]) -> list[Params]:
        """Draw for all augments, the spatial ones first."""
        return [augment.draw(seeds) for augment in (*self._spatial(), *self._intensity())]

    @torch.no_grad()
    def forward(
        self,
        x: Shaped[Tensor, "b c *s"],
        seeds: Int64[Tensor, " b"],
        label: Shaped[Tensor, "b k *s"] | None = None,
        *,
        frame: Frame | None = None,
    ) -> View:
        """Augment ``x``, and ``label`` with it, from one seed a sample; always in float32, also under autocast.

        Args:
            x: Boxes as they are stored, of any numeric type.
            seeds: One number a sample; see :func:`derive_seeds` for several crops a sample.
            label: Label maps on the same grid, whole numbers.
            frame: Where the crops lie in the boxes; None takes the boxes as crops.

        Raises:
            CaseError: if the label is not of a whole-number type.
            ConfigError: if label maps come to an augment that cannot mix them, or the batch does not suit it.
        """
        if label is not None:
            self._check_label(label)
        with torch.autocast(x.device.type, enabled=False):
            return self.apply_to(x, self.draw(seeds), label=label, frame=frame)

    def apply_to(
        self,
        x: Shaped[Tensor, "b c *s"],
        params: Sequence[Params],
        *,
        label: Shaped[Tensor, "b k *s"] | None = None,
        frame: Frame | None = None,
    ) -> View:
        """Apply what :meth:`draw` gave to the boxes and their labels; see :meth:`forward`."""
        frame = Frame.whole(x, self.spacing_mm) if frame is None else frame
        spatial = list(zip(self._spatial(), params, strict=False))
        intensity = list(zip(self._intensity(), params[len(spatial) :], strict=True))
        to_box, moved = compose(spatial, frame)
        window = intensity[0][0].bounds(intensity[0][1]) if intensity else None
        image, target = resample(
            x,
            to_box,
            shape=frame.shape,
            displacement=moved,
            extent=frame.extent,
            fill=self.fill,
            label=label,
            window=window,
        )
        for move, drawn in spatial:
            target = target if target is None else move.relabel(target, drawn)
        left = intensity if window is None else intensity[1:]
        image, target, notes = self._intensify(image, target, left, spacing_mm=frame.spacing_mm, is_ours=image is not x)
        after = Frame(to_box, frame.shape, frame.spacing_mm, frame.extent)
        return self._with_fallback(x, label, frame, View(image, target, after, notes))

    @torch.no_grad()
    def normalise(self, x: Shaped[Tensor, "b c *s"], *, frame: Frame | None = None) -> Float32[Tensor, "b k *s"]:
        """Apply only what is not random, such as a HU window: for prediction and held-out checks.

        Args:
            x: Boxes, or whole images.
            frame: Where the crops lie in the boxes; None takes the boxes as crops.
        """
        image = x.float() if frame is None else resample(x, frame.to_box, shape=frame.shape, extent=frame.extent)[0]
        for augment in self._intensity():
            image = augment.normalise(image)
        return image

    @torch.no_grad()
    def plain(
        self, x: Shaped[Tensor, "b c *s"], label: Shaped[Tensor, "b k *s"] | None = None, *, frame: Frame | None = None
    ) -> View:
        """The crops without any augmentation but with what is not random."""
        if label is not None:
            self._check_label(label)
        frame = Frame.whole(x, self.spacing_mm) if frame is None else frame
        image, target = resample(x, frame.to_box, shape=frame.shape, extent=frame.extent, label=label)
        return View(self.normalise(image), target, frame, {})

    def margin(self, crop_voxels: Sequence[int], spacing_mm: Sequence[float]) -> tuple[float, float, float]:
        """How far beyond a crop its voxels are read from, as a share of each edge, at most 0.18.

        The most that is seen in 256 fixed draws; a sampler that cuts so much more gives rotations real tissue.

        Args:
            crop_voxels: Three numbers; 1 on the last axis for 2D.
            spacing_mm: Voxel size of the crop.
        """
        dims = 2 if crop_voxels[2] == 1 else 3
        if not len(self.spatial):
            return 0.0, 0.0, 0.0
        last = torch.tensor(crop_voxels[:dims], dtype=torch.float64) - 1
        corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * dims) * last
        beyond = bent = torch.zeros(dims, dtype=torch.float64)
        for seeds in torch.split(torch.arange(_MARGIN_DRAWS), _MARGIN_GROUP):
            frame = Frame.whole(torch.empty(len(seeds), 1, *crop_voxels[:dims]), spacing_mm)
            to_box, moved = compose([(augment, augment.draw(seeds)) for augment in self._spatial()], frame)
            places = corners @ to_box[:, :dims, :dims].mT + to_box[:, None, :dims, dims]
            beyond = torch.maximum(beyond, torch.maximum(0.0 - places, places - last).amax(dim=(0, 1)))
            if moved is not None:
                bent = torch.maximum(bent, moved.double().abs().transpose(0, 1).flatten(1).amax(dim=1))
        share = ((beyond + bent) / (last + 1)).clamp(max=_MOST_MARGIN)
        x, y, z = [*share.tolist(), 0.0][:3]
        return x, y, z

    @property
    def fixed(self) -> tuple[tuple[object, ...], ...]:
        """What identifies the part that is not random, such as a window in HU."""
        return tuple(found for augment in self._intensity() if (found := augment.fixed()) is not None)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The list that builds this pipeline again, presets and defaults written out."""
        every = (*self._spatial(), *self._intensity())
        return [{"name": augment.name, **augment.config.to_dict()} for augment in every]

    def channels_out(self, channels: int) -> int:
        """Number of channels that a network gets from images of ``channels``."""
        for augment in self._intensity():
            channels = augment.channels_out(channels)
        return channels

    def _intensify(
        self,
        image: Tensor,
        label: Tensor | None,
        drawn: Sequence[tuple[Augment[Any], Params]],
        *,
        spacing_mm: Tensor,
        is_ours: bool,
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Apply the intensity augments; on the CPU sample by sample, or group by group where some mix.

        ``is_ours`` says that nobody else has the image, so that what is made of it may take its place.
        """
        groups = [change.config.group for change, _ in drawn if isinstance(change, Mixing)]
        size = math.lcm(*groups)
        if image.device.type != "cpu" or len(image) <= size or len(image) % size:
            return _chain(image, label, drawn, spacing_mm)

        channels = self.channels_out(image.shape[1])
        in_place = is_ours and channels == image.shape[1]
        out = image if in_place else image.new_empty((len(image), channels, *image.shape[2:]))
        mixed = label if label is None or not groups else torch.empty_like(label)

        def work(start: int) -> dict[str, Tensor]:
            rows = slice(start, start + size)
            own = [(change, rows_of(params, rows)) for change, params in drawn]
            target = None if label is None or mixed is label else label[rows]
            made, target, notes = _chain(aligned(image[rows]), target, own, spacing_mm[rows])
            out[rows] = made
            if target is not None and mixed is not None:
                mixed[rows] = target
            return notes

        notes = in_threads(work, range(0, len(image), size))
        return out, mixed, {name: torch.cat([note[name] for note in notes]) for name in notes[0]}

    def _check_label(self, label: Tensor) -> None:
        if label.is_floating_point():
            raise CaseError(f"label of type {label.dtype}: a label map holds whole numbers. Convert it first.")
        for augment in self._intensity():
            if isinstance(augment, Mixing) and not augment.moves_labels:
                raise ConfigError(
                    f"augment {augment.name}: mixes images and has no rule for their label maps. Take it out, or "
                    "cutmix in its place.",
                    code="E_MIXED_LABELS",
                )

    def _with_fallback(self, x: Tensor, label: Tensor | None, frame: Frame, view: View) -> View:
        """Give the plain crop where a view is not finite, or blank while the crop is not; ``view`` is our own."""
        low, high = view.image.flatten(1).amin(dim=1), view.image.flatten(1).amax(dim=1)
        is_bad = ~(torch.isfinite(low) & torch.isfinite(high) & (high - low > _BLANK * high.abs().clamp(min=1.0)))
        view.notes["fallback"], view.notes["blank"] = torch.zeros(len(x)), torch.zeros(len(x))
        if not bool(is_bad.any()):
            return view
        rows = is_bad.nonzero()[:, 0]
        on_cpu = rows.cpu()
        plain = self.plain(x[rows], None if label is None else label[rows], frame=frame.rows(on_cpu))
        darkest, brightest = plain.image.flatten(1).aminmax(dim=1)
        varied = brightest - darkest > _BLANK * brightest.abs().clamp(min=1.0)
        finite = torch.isfinite(view.image[rows]).flatten(1).all(dim=1)
        is_taken: Bool[Tensor, " k"] = varied | ~finite
        view.notes["blank"][on_cpu] = (~varied).float().cpu()
        if not bool(is_taken.any()):
            return view
        image, to_box, target = view.image.clone(), view.frame.to_box.clone(), view.label
        image[rows[is_taken]] = plain.image[is_taken]
        to_box[on_cpu[is_taken.cpu()]] = plain.frame.to_box[is_taken.cpu()]
        view.notes["fallback"][on_cpu[is_taken.cpu()]] = 1.0
        if target is not None and plain.label is not None:
            target = target.clone()
            target[rows[is_taken]] = plain.label[is_taken]
        return View(image, target, Frame(to_box, frame.shape, frame.spacing_mm, frame.extent), view.notes)

    def _spatial(self) -> list[Spatial[Any]]:
        return [augment for augment in self.spatial if isinstance(augment, Spatial)]

    def _intensity(self) -> list[Augment[Any]]:
        return [augment for augment in self.intensity if isinstance(augment, Augment)]


def _chain(
    image: Tensor, label: Tensor | None, drawn: Sequence[tuple[Augment[Any], Params]], spacing_mm: Tensor
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Apply augments one after the other; HU are clipped to their range after the last that changes them."""
    notes: dict[str, Tensor] = {}
    in_hu = any(change.takes == ONLY_HU and change.gives("HU") == "HU" for change, _ in drawn)
    for change, params in drawn:
        if in_hu and change.gives("HU") != "HU":
            image, notes["hu_clipped"] = _clip_hu(image)
            in_hu = False
        image = change.apply(image, params, spacing_mm)
        label = label if label is None else change.apply_label(label, params)
    if in_hu:
        image, notes["hu_clipped"] = _clip_hu(image)
    return image, label, notes


def _clip_hu(x: Float32[Tensor, "b c *s"]) -> tuple[Float32[Tensor, "b c *s"], Float32[Tensor, " b"]]:
    """Clip to the range of HU, and the share of voxels of each sample that this changed by more than noise does."""
    out = x.clamp(*HU_RANGE)
    return out, ((out - x).abs() > _NOISE_HU).flatten(1).float().mean(dim=1)

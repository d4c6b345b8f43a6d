"""A page that shows a doctor and an engineer what augments and samplers make of real cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float64
from pydantic import Field, field_validator

from medssl.augment.base import Mixing, Spatial
from medssl.augment.build import build_augment
from medssl.augment.images import Images
from medssl.augment.pipeline import Pipeline
from medssl.config import Config
from medssl.data.loader import fixed_batches
from medssl.data.store import ArrayStore, StoredCase
from medssl.errors import ConfigError, NoInputError
from medssl.geometry import Geometry
from medssl.handover import images_of
from medssl.report.gallery import Page, Picture, Single, write_gallery
from medssl.report.planes import Plates, most_of
from medssl.showcase.bench import Alone, Bench, Shot
from medssl.showcase.maps import FirstView, Maps
from medssl.showcase.measure import DRAWS, WORDS, shares, warnings
from medssl.showcase.plan import Plan, Triple, read_plan
from medssl.showcase.words import fixed_in_words, number, told_options, value_in_words
from medssl.views import LabelledCrop, RandomCrop, ViewSampler

_MOST_VOXELS = {2: 512, 3: 96}
_PIXELS = {2: 260, 3: 132}
_FAR_LESS = 0.25
_FACTORS = (1, 2, 4, 8, 16, 32)
_VISIBLE = 0.5
_SLACK = 0.02
_MANY = 0.05
_MODE_WORDS = {"HU": "HU", "zscore": "z-score", "raw": "as the files held", "unit": "0 to 1"}


class GalleryConfig(Config):
    """How much a gallery shows.

    Args:
        cases: Of the store, spread evenly over it.
        views: Composed views a case.
        crop: Voxels of the crops; those of the recipe, or up to 96 along each axis, by default.
        seed: Of every draw.
    """

    cases: int = Field(3, ge=1, le=12)
    views: int = Field(4, ge=1, le=24)
    crop: tuple[int, int, int] | None = None
    seed: int = Field(0, ge=0)

    @field_validator("crop", mode="before")
    @classmethod
    def _is_three(cls, value: object) -> object:
        if not isinstance(value, list):
            return value
        if len(value) != 3:
            raise ValueError(f"{len(value)} numbers given, and three are needed, as in 64,64,32; 1 last for pictures")
        return tuple(value)


@dataclass(frozen=True)
class GalleryResult:
    """Where the page is, and what it warns of."""

    path: Path
    warnings: tuple[str, ...]


def gallery(
    augment: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    store: Path,
    out: Path,
    config: GalleryConfig | None = None,
    overrides: Iterable[str] = (),
    dry_run: bool = False,
) -> GalleryResult:
    """Write a page of pictures of what augments and samplers make of the cases of a store.

    Args:
        augment: Name of a preset; a YAML file, or its content: a list of augments as in a recipe, or a recipe of
            ``pretrain`` or ``finetune``.
        store: What ``prepare`` wrote; it is only read.
        out: The ``.html`` to write.
        config: How much is shown.
        overrides: ``key=value`` strings on top of ``augment``.
        dry_run: Check everything, but write nothing.

    Raises:
        ConfigError: if the augments do not exist, or do not suit the images.
        NoInputError: if the store has no case to show.
    """
    config = config or GalleryConfig.parse({})
    if out.suffix.lower() not in {".html", ".htm"}:
        raise ConfigError(f"{out}: is to be a web page. Give a name that ends in .html.")
    plan = read_plan(augment, overrides, crop_voxels=config.crop)
    opened = ArrayStore.open(store)
    known = _usable(opened, plan)
    images = images_of(opened, known)
    cases = _chosen(known, config.cases)
    pipeline = build_augment(plan.augment, images=images, position_task=plan.position_task)
    crop = _crop_voxels(config, plan, cases, images)
    own = None if plan.learner is None else plan.learner.sampler(images, opened.label_values)
    show = _Show(opened, cases, images, pipeline, plan, crop, own, config)
    if dry_run:
        return GalleryResult(out, ())
    page = show.page()
    write_gallery(out, page)
    return GalleryResult(out, tuple(page.warnings))


@dataclass(frozen=True)
class _Show:
    """Everything that the page is made of."""

    store: ArrayStore
    cases: Sequence[StoredCase]
    images: Images
    pipeline: Pipeline
    plan: Plan
    crop: Triple
    own: ViewSampler | None
    config: GalleryConfig

    def page(self) -> Page:
        count = len(self.cases)
        is_plain = self.own is None or isinstance(self.own, RandomCrop | LabelledCrop)
        shown = self._sampler(foreground_share=1.0) if is_plain else FirstView(cast("ViewSampler", self.own), self.crop)
        batch = fixed_batches(
            self.cases,
            shown,
            count=1,
            batch_size=2 * count,
            seed=self.config.seed,
            spatial_dims=self.images.spatial_dims,
        )[0]
        bench = Bench(self.pipeline, batch, self.crop)
        plain = [bench.plain(case) for case in range(count)]
        plates = [self._plates(shot) for shot in plain]
        augments = range(len(self.pipeline.spatial) + len(self.pipeline.intensity))
        alone = [bench.alone(place, self.config.seed) for place in augments]
        found = shares(
            self.cases,
            FirstView(self.own or self._sampler(foreground_share=self.plan.foreground_share), self.crop),
            self.pipeline,
            crop_voxels=self.crop,
            images=self.images,
            seed=self.config.seed,
        )
        maps = Maps(self.cases[0], self.pipeline, self.images, plates[0].window, self.config.seed)
        main = self.own or self._sampler()
        return Page(
            title=self.plan.title,
            facts=self._facts(batch["image_spacing_mm"].double().numpy()),
            warnings=warnings(found, self.pipeline, images=self.images, cases=self.cases),
            views=[
                (case.case_id, [self._as_it_is(plates[number], plain[number]), *drawn])
                for number, case in enumerate(self.cases)
                for drawn in [
                    [_drawn(plates[number], shot) for shot in bench.views(number, self.config.views, self.config.seed)]
                ]
            ],
            singles=[self._single(one, plain, plates) for one in alone],
            sampler=maps.main(main, self.crop, self._lies(found)),
            is_recipe=self.own is not None,
            others=maps.others(main, self.crop, self.plan.crop_mm),
            mapped=self.cases[0].case_id,
            shares={WORDS[name]: share for name, share in found.items()},
            draws=DRAWS,
            timings=self._timings(bench, alone),
            is_flat=self.images.spatial_dims == 2,
        )

    def _sampler(self, *, foreground_share: float | None = None) -> RandomCrop | LabelledCrop:
        """Cuts crops as training would; with a share and labels, on structures."""
        plan = self.plan
        spacing = self.images.crop_spacing_mm(self.crop, plan.crop_mm)
        margin = self.pipeline.margin(self.crop, spacing)
        if foreground_share is not None and all(case.labelled for case in self.cases):
            return LabelledCrop(
                self.crop,
                self.store.label_values,
                foreground_share=foreground_share,
                crop_mm=plan.crop_mm,
                margin=margin,
                inside_body=plan.inside_body,
                region=plan.region,
            )
        return RandomCrop(
            self.crop, crop_mm=plan.crop_mm, margin=margin, inside_body=plan.inside_body, region=plan.region
        )

    def _plates(self, shot: Shot) -> Plates:
        """How the pictures of one crop are drawn, with the window of the crop as it is."""
        is_flat = self.images.spatial_dims == 2
        geometry = Geometry(cast("Triple", shot.image.shape[1:]), shot.affine)
        return Plates(
            geometry,
            self._window(shot),
            kind="picture" if is_flat else "volume",
            size=_PIXELS[self.images.spatial_dims],
            places=None if shot.label is None else most_of(shot.label),
            is_colour=self.images.channels == 3,
            is_outlined=True,
        )

    def _window(self, shot: Shot) -> tuple[float, float]:
        if self._ends_in_unit:
            return 0.0, 1.0
        low, high = (float(value) for value in np.percentile(shot.image, (0.5, 99.5)))
        return low, high if high > low else low + 1.0

    @property
    def _ends_in_unit(self) -> bool:
        domain = self.images.domain
        for augment in self.pipeline.intensity:
            domain = cast("Any", augment).gives(domain)
        return domain == "unit"

    def _as_it_is(self, plate: Plates, shot: Shot) -> Picture:
        """A crop without anything random, and what black and white mean in the pictures of its case."""
        found = fixed_in_words(self.pipeline.fixed)
        text = f"black {number(plate.window[0])}, white {number(plate.window[1])}" + (
            f", after {found}" if found else ""
        )
        return Picture(plate.draw(shot.image, label=shot.label), "as it is", text)

    def _lies(self, found: Mapping[str, float]) -> str:
        """What is known of the places that are drawn."""
        shares = {name: f"{number(100 * share)} %" for name, share in found.items()}
        return (
            f"In {DRAWS} draws {shares['padded']} lies outside the volume before anything moves, and "
            f"{shares['outside']} of what views show lies there or beyond what is read; {shares['anywhere']} of the "
            f"crops had no body or structure to be centred on, and {shares['constant']} have one value only."
        )

    def _single(self, alone: Alone, plain: Sequence[Shot], plates: Sequence[Plates]) -> Single:
        name = str(alone.augment.name)
        reasons = self.plan.reasons(name, alone.augment.config.to_dict())
        options = told_options(alone.augment)
        first = [key for key in options if key in reasons or (not reasons and key == "p")]
        others = ", ".join(f"{key} {value_in_words(value)}" for key, value in options.items() if key not in first)
        moves = isinstance(alone.augment, Spatial | Mixing)
        rows: list[tuple[str, list[Picture]]] = []
        for case, before, plate, shots in zip(self.cases, plain, plates, alone.shots, strict=True):
            focused = plate if isinstance(alone.augment, Spatial) else _focused(plate, before, shots[-1])
            if rows:
                focused = focused.showing_most(shots[-1].image - before.image)
            kept = [shot if moves else shot._replace(label=None) for shot in (before, *shots)]
            pictures = [
                _drawn(focused, shot, caption) for shot, caption in zip(kept, ("as it is", *alone.words), strict=True)
            ]
            rows.append((case.case_id, [*pictures, _difference(focused, before, shots[-1])]))
        return Single(name, [(key, value_in_words(options[key]), reasons.get(key, "")) for key in first], others, rows)

    def _timings(self, bench: Bench, alone: Sequence[Alone]) -> list[tuple[str, float, float | None]]:
        in_hu = self.images.domain == "HU"
        rows: list[tuple[str, float, float | None]] = [("cutting alone", bench.cutting_ms(), 0.0 if in_hu else None)]
        return rows + [(str(one.augment.name), one.ms, one.hu_clipped if in_hu else None) for one in alone]

    def _facts(self, spacing_mm: Float64[np.ndarray, "b 3"]) -> list[tuple[str, str]]:
        plan, dims = self.plan, self.images.spatial_dims
        metric = all(case.is_metric for case in self.cases)
        voxel = np.median(spacing_mm, axis=0)
        of_shown = "" if np.allclose(spacing_mm, voxel, rtol=0.01) else ", median of those shown"
        margin = self.pipeline.margin(self.crop, self.images.crop_spacing_mm(self.crop, plan.crop_mm))[:dims]
        facts = [("crop", " × ".join(map(str, self.crop[:dims])) + " voxels")]
        if plan.crop_mm is not None:
            facts.append(("crop_mm", " × ".join(number(mm, 4) for mm in plan.crop_mm[:dims]) + " mm"))
        if plan.region is not None:
            shares = [f"{axis} {low:.0%} to {high:.0%} of the body" for axis, (low, high) in plan.region.items()]
            facts.append(("region of crop centres", ", ".join(shares)))
        size = " × ".join(number(mm, 3) for mm in voxel[:dims].tolist()) + " mm" + of_shown
        return [
            *facts,
            ("voxel", size if metric else "size not known"),
            ("read beyond the crop", " × ".join(f"{abs(share):.0%}" for share in margin) + " on each side"),
            ("modality", self.images.modality),
            ("part of the body", self.images.region or "not said"),
            ("values in the store", _MODE_WORDS[self.images.domain]),
            ("times measured with", f"{torch.get_num_threads()} thread(s) of this machine's processor"),
        ]


def _usable(store: ArrayStore, plan: Plan) -> list[StoredCase]:
    """Cases that training could take, whatever their split."""
    varied = [case for case in store.cases if not case.is_constant]
    if not varied:
        raise NoInputError(f"{store.path}: no case with more than one value to show. Give another store.")
    labelled = [case for case in varied if case.labelled]
    if plan.needs_label and not labelled:
        example = "".join(f", as in medssl gallery {name}" for name in plan.preset_names[:1])
        raise NoInputError(
            f"{store.path}: no labelled case, which {plan.title} needs. Give a store with labels, or the name of a "
            f"preset in place of the recipe{example}; that works without labels."
        )
    return labelled if plan.needs_label else varied


def _chosen(cases: Sequence[StoredCase], count: int) -> list[StoredCase]:
    """Cases spread evenly over those given; only labelled ones where there are any."""
    found = [case for case in cases if case.labelled] or cases
    places = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    return [found[place] for place in places.tolist()]


def _crop_voxels(config: GalleryConfig, plan: Plan, cases: Sequence[StoredCase], images: Images) -> Triple:
    """What is asked for, or what the recipe says, or as much as all cases have, up to a limit."""
    crop = config.crop or plan.crop_voxels
    if crop is None:
        most = _MOST_VOXELS[images.spatial_dims]
        x, y, z = (min(most, *lengths) for lengths in zip(*(case.shape for case in cases), strict=True))
        return x, y, z
    if min(crop) < 1 or (crop[2] == 1) != (images.spatial_dims == 2):
        kind, wanted = ("images of one slice", "1") if images.spatial_dims == 2 else ("volumes", "more than 1")
        raise ConfigError(f"crop {list(crop)}: the store holds {kind}; the last number must be {wanted}. Change it.")
    return crop


def _drawn(plate: Plates, shot: Shot, caption: str = "") -> Picture:
    png = plate.draw(shot.image, label=shot.label, affine=shot.affine)
    small = [shot.text if caption else "", _clipping(plate, shot)]
    return Picture(png, caption or shot.text, "; ".join(text for text in small if text))


def _clipping(plate: Plates, shot: Shot) -> str:
    """What of a view lies outside the values that the display goes through, if it is much."""
    low, high = plate.window
    slack = _SLACK * (high - low)
    is_tissue = shot.image > shot.image.min() + slack  # air that gets darker is no loss
    shares = {"white": (shot.image > high + slack).mean(), "black": ((shot.image < low - slack) & is_tissue).mean()}
    told = [f"{share:.0%} to {name}" for name, share in shares.items() if share > _MANY]
    return f"display clips {' and '.join(told)}" if told else ""


def _difference(plate: Plates, before: Shot, after: Shot) -> Picture:
    """What was added and taken away, enlarged so that it can be seen."""
    change = (after.image - before.image) / (plate.window[1] - plate.window[0])
    much = float(np.percentile(np.abs(change), 99))
    factor = next((factor for factor in _FACTORS if factor * much >= _VISIBLE), _FACTORS[-1])
    return Picture(plate.draw_difference(change, factor=factor), "difference" + (f" × {factor}" if factor > 1 else ""))


def _focused(plate: Plates, before: Shot, after: Shot) -> Plates:
    """Planes through where something changed, if that is elsewhere."""
    change = np.abs(after.image - before.image).mean(axis=0)
    places = list(plate.places or (n // 2 for n in change.shape))
    for axis, others in enumerate(((1, 2), (0, 2), (0, 1))):
        profile = change.mean(axis=others)
        if profile[places[axis]] < _FAR_LESS * profile.max():
            places[axis] = int(profile.argmax())
    x, y, z = places
    return replace(plate, places=(x, y, z))

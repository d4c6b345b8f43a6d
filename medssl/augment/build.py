"""From the lines of a recipe to a pipeline, with guards that refuse what physics or anatomy forbids."""

from __future__ import annotations

import difflib
import importlib
import itertools
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medssl.augment.anatomy import REGIONS, share_anatomy
from medssl.augment.base import Augment, Mixing, Spatial
from medssl.augment.images import EVERY_DOMAIN, ONLY_HU, Domain, Images
from medssl.augment.pipeline import Pipeline
from medssl.augment.presets import Preset, preset
from medssl.errors import ConfigError

_VALUES: Mapping[Domain, str] = {
    "HU": "signed HU",
    "zscore": "z-scores",
    "raw": "what the files held",
    "unit": "in [0, 1]",
}
_PLACES_MIXED = frozenset({"cutmix", "mixup"})
_COLOURS = 3


@dataclass(frozen=True)
class _Line:
    """One augment that is asked for, and the preset that asks for it, if it is one."""

    name: str
    options: Mapping[str, Any]
    preset: Preset | None

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"augment {self.name}" if self.preset is None else f"augment {self.name} of preset {self.preset.name}"

    @property
    def remedy(self) -> str:
        """How it is left out."""
        if self.preset is None:
            return "Take it out."
        return f"Leave it out with {{preset: {self.preset.name}, without: [{self.name}]}}."


def build_augment(
    configs: Sequence[Mapping[str, Any]] | Mapping[str, Any],
    *,
    images: Images | None = None,
    position_task: bool = False,
) -> Pipeline:
    """Build the pipeline that a recipe asks for.

    A preset gives only what suits: in a task that learns positions nothing that moves content, and for images of one
    slice nothing that needs volumes. What is asked for by name is refused instead.

    Args:
        configs: ``[{name: noise, sigma: [0, 0.1], p: 0.2}, {preset: mr_light}, ...]``, or one mapping
            ``{preset: ct_chest, without: [noise]}``; ``preset`` takes a name or a list of names.
        images: What is known of the images; None compares with nothing, and refuses only what contradicts itself.
        position_task: Whether the labels are places in the body, from which augments move content away.

    Raises:
        ConfigError: for an unknown name, a wrong value, two presets that do not go together, or an augment that does
            not suit the images, their anatomy or the task.
    """
    known = augment_classes()
    lines = list(_lines([configs] if isinstance(configs, Mapping) else configs))
    _check_presets(lines, images)
    lines = [line for line in lines if line.preset is None or _suits(known[line.name], images, position_task)]
    augments: list[Augment[Any]] = []
    for place, line in enumerate(lines):
        if line.name not in known:
            near = difflib.get_close_matches(line.name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}."
            raise ConfigError(f"augment {place}: there is no {line.name!r}; {hint}", code="E_UNKNOWN_NAME")
        cls = known[line.name]
        if position_task:
            _check_position(cls)
        source = f"augment {place} {line.name}"
        augments.append(cls(cls.config_class.parse(line.options, source=source), salt=place))
    _check_domains(list(zip(lines, augments, strict=True)), images)
    if images is not None:
        channels = images.channels
        for line, augment in zip(lines, augments, strict=True):
            _check_images(line, augment, images, channels)
            channels = augment.channels_out(channels)
    return Pipeline(augments, spacing_mm=images.spacing_mm if images else (1.0, 1.0, 1.0))


def augment_classes() -> dict[str, type[Augment[Any]]]:
    """Every augment that a file of ``medssl.augment`` defines, by name."""
    package = importlib.import_module("medssl.augment")
    modules = [
        importlib.import_module(f"medssl.augment.{info.name}")
        for info in pkgutil.iter_modules(package.__path__)
        if info.name != "kernels"  # the compiler, which only :func:`medssl.augment.resample.compiled` asks for
    ]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return {cls.name: cls for cls in found if issubclass(cls, Augment) and "name" in vars(cls)}


def _lines(entries: Sequence[Mapping[str, Any]]) -> Iterator[_Line]:
    """Augments in order, with those of a preset in its place."""
    seen: set[str] = set()
    for place, entry in enumerate(entries):
        if ("name" in entry) == ("preset" in entry):
            raise ConfigError(
                f"augment {place}: keys {', '.join(entry) or 'none'}; either name with the options of an augment, or "
                "preset is needed."
            )
        if "name" in entry:
            yield _Line(str(entry["name"]), {key: value for key, value in entry.items() if key != "name"}, None)
            continue
        if unknown := entry.keys() - {"preset", "without"}:
            raise ConfigError(f"augment {place}: unknown key {min(unknown)}; beside preset there may be without.")
        names, without = _texts(entry["preset"]), _texts(entry.get("without", []))
        for name in names:
            if name in seen:
                raise ConfigError(f"augment preset {name}: listed twice. List it once.", code="E_PRESET_CONFLICT")
            seen.add(name)
        chosen = [preset(name) for name in names]
        there = {str(augment["name"]) for one in chosen for augment in one.augments}
        if missing := set(without) - there:
            raise ConfigError(
                f"augment {place}: without {min(missing)}, which is not in {', '.join(names)}; there are "
                f"{', '.join(sorted(there)) or 'none'}.",
                code="E_UNKNOWN_NAME",
            )
        for one in chosen:
            for augment in one.augments:
                options = {key: value for key, value in augment.items() if key != "name"}
                if augment["name"] not in without:
                    yield _Line(str(augment["name"]), options, one)


def _texts(value: object) -> list[str]:
    """One name or a list of names as a list."""
    return [str(name) for name in value] if isinstance(value, list | tuple) else [str(value)]


def _check_presets(lines: Sequence[_Line], images: Images | None) -> None:
    names: dict[str, set[str]] = {}
    for line in lines:
        if line.preset is not None:
            names.setdefault(line.preset.name, set()).add(line.name)
    for one, other in itertools.combinations(names, 2):
        _check_together(preset(one), preset(other))
        if twice := names[one] & names[other]:
            raise ConfigError(
                f"augment presets {one} and {other}: each has {', '.join(sorted(twice))}, which would be applied "
                "twice. Take one of them, or leave it out of one with without.",
                code="E_PRESET_CONFLICT",
            )
    if images is not None:
        for name in names:
            _check_preset(preset(name), images)


def _check_together(one: Preset, other: Preset) -> None:
    """Refuse two presets that are for different images."""
    both = f"augment presets {one.name} and {other.name}"
    if one.modality is not None and other.modality is not None and one.modality != other.modality:
        raise ConfigError(
            f"{both}: one is for {one.modality}, the other for {other.modality}. Take one of them.",
            code="E_PRESET_CONFLICT",
        )
    if one.domain is not None and other.domain is not None and one.domain != other.domain:
        raise ConfigError(
            f"{both}: one needs values that are {_VALUES[one.domain]}, the other {_VALUES[other.domain]}. Take one of "
            "them.",
            code="E_PRESET_CONFLICT",
        )
    if one.region is not None and other.region is not None and not share_anatomy(one.region, other.region):
        raise ConfigError(
            f"{both}: for the {one.region} and the {other.region}. Take one of them.", code="E_PRESET_CONFLICT"
        )


def _check_preset(one: Preset, images: Images) -> None:
    """Refuse a preset that is for other images."""
    label = f"augment preset {one.name}"
    if one.modality is not None:
        _check_modality(label, {one.modality}, images)
    if one.region is not None and images.region is not None and not share_anatomy(one.region, images.region):
        raise ConfigError(
            f"{label}: for the {one.region}, and the images show the {images.region}. Take a preset for that, or "
            "correct region in the preparation.",
            code="E_REGION",
        )
    if images.spatial_dims not in one.spatial_dims:
        raise ConfigError(
            f"{label}: for images of {_or(one.spatial_dims)} dimensions, and these have {images.spatial_dims}. Take "
            "another preset.",
            code="E_SPATIAL_DIMS",
        )
    if one.domain is not None and one.domain != images.domain:
        raise ConfigError(
            f"{label}: for values that are {_VALUES[one.domain]}, and these are {_VALUES[images.domain]}. Take "
            "another preset, or prepare the images with another intensity.mode.",
            code="E_UNIT" if "HU" in {one.domain, images.domain} else "E_DOMAIN",
        )


def _check_modality(label: str, wanted: set[str], images: Images) -> None:
    found = _modality(images)
    if found in wanted:
        return
    if found == "other":
        raise ConfigError(
            f"{label}: for {_or(sorted(wanted))}, and the modality of the images is not known. Set modality in "
            "the preparation.",
            code="E_MODALITY",
        )
    raise ConfigError(
        f"{label}: for {_or(sorted(wanted))}, and the images are {found}. Take another.", code="E_MODALITY"
    )


def _modality(images: Images) -> str:
    """The modality of the images; what has HU is a CT."""
    return "CT" if images.modality == "other" and images.domain == "HU" else images.modality


def _suits(cls: type[Augment[Any]], images: Images | None, position_task: bool) -> bool:
    """Whether a preset gives this augment, for the dimensions of the images and the task."""
    return not (position_task and _moves_content(cls)) and (images is None or images.spatial_dims in cls.spatial_dims)


def _moves_content(cls: type[Augment[Any]]) -> bool:
    """Whether a crop shows afterwards what lay elsewhere."""
    return issubclass(cls, Spatial) or cls.name in _PLACES_MIXED


def _check_position(cls: type[Augment[Any]]) -> None:
    if cls.name == "mirror":
        raise ConfigError(
            "augment mirror: in a task that learns positions; a mirrored left side is no right side. Remove it.",
            code="E_MIRROR",
        )
    if _moves_content(cls):
        why = "a mixed crop shows two places" if issubclass(cls, Mixing) else "a moved crop is not where its label says"
        raise ConfigError(
            f"augment {cls.name}: in a task that learns positions; {why}. Remove it.", code="E_POSITION_AUGMENT"
        )


def _check_domains(lines: Sequence[tuple[_Line, Augment[Any]]], images: Images | None) -> None:
    """Follow what values mean from augment to augment; without images, all that they could mean at first."""
    possible = EVERY_DOMAIN if images is None else frozenset({images.domain})
    for line, augment in lines:
        if not possible & augment.takes:
            is_unit = augment.takes == ONLY_HU
            behind = "Put it behind a window, or take it out." if possible == ONLY_HU else "Move it, or take it out."
            raise ConfigError(
                f"{line.label}: needs values that are {_values(augment.takes)}; at its place they are "
                f"{_values(possible)}. {line.remedy if is_unit else behind}",
                code="E_UNIT" if is_unit else "E_DOMAIN",
            )
        possible = frozenset(augment.gives(domain) for domain in possible & augment.takes)
    if images is not None and possible == ONLY_HU:
        raise ConfigError(
            "augment: the images hold raw HU, from -1024 up to thousands; a window to [0, 1] is needed. Take a preset "
            "for CT, or add window or multi_window.",
            code="E_UNIT",
        )


def _check_images(line: _Line, augment: Augment[Any], images: Images, channels: int) -> None:
    is_vouched = line.preset is not None and line.preset.modality is not None
    if augment.modalities and not is_vouched:
        _check_modality(line.label, set(augment.modalities), images)
    if augment.name == "invert" and _modality(images) == "CT":
        raise ConfigError(
            f"{line.label}: on CT, where dense is bright on every scanner. {line.remedy}", code="E_MODALITY"
        )
    if images.spatial_dims not in augment.spatial_dims:
        raise ConfigError(
            f"{line.label}: works in {_or(sorted(augment.spatial_dims))} dimensions, and the images have "
            f"{images.spatial_dims}. {line.remedy}",
            code="E_SPATIAL_DIMS",
        )
    if augment.colour and channels != _COLOURS:
        raise ConfigError(
            f"{line.label}: needs red, green and blue, and the images have {channels} channel"
            f"{'s' if channels > 1 else ''}. {line.remedy}",
            code="E_CHANNELS",
        )
    if augment.name == "mirror":
        _check_mirror(line, augment.config.axes, images)


def _check_mirror(line: _Line, axes: Sequence[Any], images: Images) -> None:
    region = images.region or (line.preset.region if line.preset else None)
    if region is None:
        raise ConfigError(
            f"{line.label}: nobody said which part of the body the images show, and most may not be mirrored. Set "
            "region in the preparation, or take it out.",
            code="E_MIRROR",
        )
    if images.spatial_dims == 2 and "SI" in axes:
        raise ConfigError(
            f"{line.label}: along SI in images of one slice, which have LR and AP only. Remove SI.",
            code="E_SPATIAL_DIMS",
        )
    for axis in axes:
        if axis not in REGIONS[region].mirrors:
            raise ConfigError(
                f"{line.label}: along {axis} on images of the {region}. {REGIONS[region].reason(axis)} {line.remedy}",
                code="E_MIRROR",
            )


def _values(domains: frozenset[Domain]) -> str:
    return _or([words for domain, words in _VALUES.items() if domain in domains])


def _or(values: Sequence[object]) -> str:
    """The values in a sentence."""
    *most, last = [str(value) for value in values]
    return f"{', '.join(most)} or {last}" if most else last

"""What training leaves behind: a folder with weights and a passport that says what they are for.

``weights.safetensors`` holds tensors named ``<module>.<parameter>``, ``passport.json`` a :class:`Passport`, and
``digests.json`` the SHA-256 of both: one flipped bit is found, since safetensors itself has no checksum. Nothing is
pickled, and no code of the method that trained the weights is needed to load them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import safetensors.torch
import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from medssl.config import Config
from medssl.errors import CheckpointError, ConfigError
from medssl.nn.backbone import Backbone, build_backbone
from medssl.nn.lora import plain_state
from medssl.nn.resize import resize_linear
from medssl.registry import configure
from medssl.runfolder import atomic_path

SCHEMA_VERSION = 1
WEIGHTS, PASSPORT, DIGESTS = "weights.safetensors", "passport.json", "digests.json"
INTENDED_USE = "research use only; not a medical device"


class Passport(Config):
    """What a bundle's weights are, what they were trained on, and what an image must look like for them.

    Args:
        schema_version: Of this table.
        kind: ``encoder`` after pretraining, ``segmenter`` or ``classifier`` after fine-tuning.
        backbone: ``Backbone.config``.
        spatial_dims: 2 or 3.
        in_channels: Channels that the network takes.
        image_channels: Channels of the prepared image, where augmentation gives it others; None for ``in_channels``.
        decoder: ``Decoder.config`` of a segmenter, ``PooledHead.config`` of a classifier.
        label_values: Value of each class in a label map, background included, in the order of the outputs.
        label_names: Name of each class, in the same order.
        target: Of a classifier: what it tells apart and how its scores are read; see ``medssl.verdict.Verdict``.
        prepare: Preparation of the images, as ``medssl.data.prepare`` takes it.
        unit: Of the prepared voxels.
        orientation: Of the prepared grid.
        spacing_mm: Of the grid that the network works on: the prepared one, unless the recipe gives crops in mm. None
            where every image kept its own.
        crop_voxels: Crop that the weights were trained on.
        recipe: The resolved recipe of the run; paths are taken out when the bundle is saved.
        method: Name of the method or task that trained the weights.
        data_fingerprint: Digest of the store that they were trained on.
        metrics: Last measurements.
        licence: Under which the weights may be used.
        versions: Of the libraries that trained them.
        citations: Papers to cite.
        intended_use: What the weights may be used for.
    """

    schema_version: int = SCHEMA_VERSION
    kind: Literal["encoder", "segmenter", "classifier"]
    backbone: dict[str, Any]
    spatial_dims: Literal[2, 3]
    in_channels: int = Field(ge=1)
    image_channels: int | None = Field(None, ge=1)
    decoder: dict[str, Any] | None = None
    label_values: tuple[int, ...] | None = None
    label_names: tuple[str, ...] | None = None
    target: dict[str, Any] | None = None
    prepare: dict[str, Any]
    unit: Literal["HU", "arbitrary"]
    orientation: str = "RAS"
    spacing_mm: tuple[float, float, float] | None = None
    crop_voxels: tuple[int, ...]
    recipe: dict[str, Any]
    method: str
    data_fingerprint: str
    metrics: dict[str, Any] = Field(default_factory=dict)
    licence: str = "not stated"
    versions: dict[str, str] = Field(default_factory=dict)
    citations: tuple[str, ...] = ()
    intended_use: str = INTENDED_USE

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "segmenter" and (self.decoder is None or self.label_values is None):
            raise ValueError("a segmenter needs decoder and label_values")
        if self.kind == "classifier" and (self.decoder is None or self.target is None):
            raise ValueError("a classifier needs decoder and target")
        if self.label_names is not None and len(self.label_names) != len(self.label_values or ()):
            raise ValueError("label_names and label_values differ in length")
        return self

    @property
    def preparation(self) -> dict[str, Any]:
        """How an image is prepared for the network: ``prepare`` at the voxel size that the network works at."""
        return self.prepare if self.spacing_mm is None else {**self.prepare, "spacing_mm": self.spacing_mm}


@dataclass(frozen=True)
class LoadReport:
    """How the tensors of a file fit those of a module.

    Args:
        matched: Names with equal shape and type on both sides.
        missing: Names that the module has and the file lacks.
        unexpected: Names that the file has and the module lacks.
        mis_shaped: Name, shape and type found, shape and type needed.
        adapted: Kernels of the first layer that were fitted to another number of image channels, and tables of
            positions that were fitted to another number of tokens.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mis_shaped: tuple[tuple[str, str, str], ...]
    adapted: tuple[str, ...] = ()

    @property
    def is_full(self) -> bool:
        """Whether every tensor of either side found its partner."""
        return not (self.missing or self.unexpected or self.mis_shaped)

    def describe(self, *, limit: int = 8) -> str:
        """Table of counts, with at most ``limit`` names a row."""
        shapes = tuple(f"{name} (found {found}, needed {needed})" for name, found, needed in self.mis_shaped)
        rows = {
            "matched": (self.matched, False),
            "adapted": (self.adapted, True),
            "missing": (self.missing, True),
            "unexpected": (self.unexpected, True),
            "mis-shaped": (shapes, True),
        }
        lines = []
        for title, (names, listed) in rows.items():
            more = f", and {len(names) - limit} more" if len(names) > limit else ""
            lines.append(f"{title:>10} {len(names):5d}  {', '.join(names[:limit]) + more if listed else ''}".rstrip())
        return "\n".join(lines)


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and found whole.

    Args:
        passport: What the weights are.
        tensors: Name to tensor, ``<module>.<parameter>``, on the CPU.
        folder: Where it was read.
    """

    passport: Passport
    tensors: Mapping[str, Tensor]
    folder: Path

    def build_encoder(self, *, in_channels: int | None = None, adapt_stem: bool = False) -> Backbone:
        """The encoder with its weights.

        Args:
            in_channels: Channels of the images at hand; the passport's own if left out.
            adapt_stem: Fit the first layer to another number of channels rather than refuse.

        Raises:
            CheckpointError: ``E_CONTRACT`` for another number of channels, ``E_WEIGHTS`` if a tensor does not fit.
        """
        channels = in_channels or self.passport.in_channels
        if channels != self.passport.in_channels and not adapt_stem:
            raise CheckpointError(
                f"{self.folder}: made for images of {self.passport.in_channels} channels, found {channels}. Give "
                "images of the same channels, or allow the first layer to be adapted (adapt_stem).",
                code="E_CONTRACT",
            )
        try:
            encoder = build_backbone(
                self.passport.backbone, in_channels=channels, spatial_dims=self.passport.spatial_dims
            )
        except ConfigError as error:
            raise self._unbuildable(error) from error
        load_into(encoder, self.tensors, prefix="encoder", adapt_stem=adapt_stem)
        return encoder

    def load_encoder(self, network: Backbone, *, adapt_stem: bool = False) -> LoadReport:
        """Copy the encoder's weights into a network of the same form: all of them, or none and an error.

        Tables of positions are fitted to the network's, as they are to every crop; the report names them.

        Args:
            network: Changed in place.
            adapt_stem: Fit the first layer to another number of channels rather than refuse.

        Raises:
            CheckpointError: ``E_CONTRACT`` for another architecture, dimension or number of channels, ``E_WEIGHTS``
                if a tensor does not fit.
        """
        self.require_form(network, adapt_stem=adapt_stem)
        return load_into(network, self.tensors, prefix="encoder", adapt_stem=adapt_stem, adapt_positions=True)

    def require_form(self, network: Backbone, *, adapt_stem: bool = False) -> None:
        """Refuse a network that :meth:`load_encoder` cannot fill, without touching it; same arguments and errors."""
        passport = self.passport
        try:
            cls, config = configure("nn", passport.backbone, Backbone)  # type: ignore[type-abstract]
        except ConfigError as error:
            raise self._unbuildable(error) from error
        theirs, mine = {"name": cls.__module__.rpartition(".")[2], **config.to_dict()}, network.config
        different = [key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)]
        if set(different) - network.resizable or passport.spatial_dims != network.spatial_dims:
            pairs = "; ".join(f"{key} {theirs.get(key)} against {mine.get(key)}" for key in different)
            raise CheckpointError(
                f"{self.folder}: its backbone differs from the recipe's ({pairs or 'spatial_dims'}). Give the recipe "
                "the bundle's backbone, so that the run from scratch is its twin.",
                code="E_CONTRACT",
            )
        if passport.in_channels != network.in_channels and not adapt_stem:
            raise CheckpointError(
                f"{self.folder}: made for images of {passport.in_channels} channels, found {network.in_channels}. "
                "Give images of the same channels, or set adapt_stem: true in the recipe to fit the first layer.",
                code="E_CONTRACT",
            )

    def _unbuildable(self, error: ConfigError) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: its backbone cannot be built ({error}). Use the version of medssl that made it, "
            f"{self.passport.versions.get('medssl', 'not stated')}.",
            code="E_CONTRACT",
        )


def save_bundle(folder: Path, modules: Mapping[str, nn.Module], passport: Passport) -> None:
    """Write a bundle, whole or not at all; one that is there already is replaced.

    Args:
        folder: The bundle's folder.
        modules: Name to module; ``encoder`` always, ``decoder`` for a segmenter. Low-rank additions to weights are
            merged into them.
        passport: What the weights are; strings in its recipe that are paths are replaced by ``<path>``.

    Raises:
        CheckpointError: if a weight is not finite.
        EnvironmentFaultError: if the disk is full or the folder may not be written.
    """
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous().clone()
        for name, module in modules.items()
        for key, value in plain_state(module).items()
    }
    broken = [key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{folder}: {len(broken)} of {len(tensors)} tensors hold values that are not finite, first {broken[0]}; "
            "nothing was written. Go back to an earlier checkpoint."
        )
    plain = passport.to_dict()
    plain["recipe"] = _without_paths(plain["recipe"])
    files = {WEIGHTS: safetensors.torch.save(tensors), PASSPORT: json.dumps(plain, indent=2).encode()}
    files[DIGESTS] = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in files.items()}).encode()
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for name, data in files.items():
            (temporary / name).write_bytes(data)


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle and verify every byte of it.

    Raises:
        CheckpointError: if ``folder`` is no bundle, is damaged (``E_DIGEST``), or comes from a newer medssl.
    """
    files = {name: _read(folder, name) for name in (DIGESTS, PASSPORT, WEIGHTS)}
    try:
        digests = json.loads(files.pop(DIGESTS))
    except ValueError:
        digests = None
    found = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    if digests != found:
        known = digests if isinstance(digests, dict) else {}
        damaged = [name for name, digest in found.items() if known.get(name) != digest] or [DIGESTS]
        raise CheckpointError(
            f"{folder}: {' and '.join(damaged)} does not match the digest written with it; the bundle is damaged or "
            "was changed. Copy it again from its source or train again.",
            code="E_DIGEST",
        )
    return Bundle(_parse_passport(folder, files[PASSPORT]), _parse_weights(folder, files[WEIGHTS]), folder)


def load_into(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    prefix: str,
    adapt_stem: bool = False,
    adapt_positions: bool = False,
) -> LoadReport:
    """Copy the tensors under ``prefix`` into ``module``: all of them, or none and an error.

    Args:
        module: Changed in place.
        tensors: As in a bundle, ``<prefix>.<parameter>``.
        prefix: Which module of the bundle.
        adapt_stem: For a backbone: fit kernels over the image's channels to another number of channels. Their mean
            over channels is repeated and scaled so that an image with equal channels gives the same features.
        adapt_positions: For a backbone: interpolate tables of positions to another number of tokens.

    Raises:
        CheckpointError: ``E_WEIGHTS`` with a table of matched, missing, unexpected and mis-shaped tensors, on
            anything but a full match; the module is then unchanged.
    """
    own = module.state_dict()
    given = {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}
    adapted: dict[str, Tensor] = {}
    if isinstance(module, Backbone):
        adapted |= _adapt_stem(module, own, given) if adapt_stem else {}
        adapted |= _adapt_positions(module, own, given) if adapt_positions else {}
    given |= adapted
    shared = [name for name in own if name in given]
    differing = [name for name in shared if _form(own[name]) != _form(given[name])]
    report = LoadReport(
        matched=tuple(name for name in shared if name not in differing and name not in adapted),
        missing=tuple(name for name in own if name not in given),
        unexpected=tuple(name for name in given if name not in own),
        mis_shaped=tuple((name, _form(given[name]), _form(own[name])) for name in differing),
        adapted=tuple(adapted),
    )
    if not report.is_full:
        raise CheckpointError(
            f"weights of {prefix}: {len(report.matched) + len(report.adapted)} of {len(own)} tensors match; all must. "
            f"Use the backbone and the version that the weights were made with.\n{report.describe()}"
        )
    module.load_state_dict(given, strict=True)
    return report


def _adapt_stem(module: Backbone, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kernels that differ from the module's in the number of image channels alone, made to fit."""
    adapted = {}
    for name, kernel in given.items():
        target = own.get(name)
        if target is None or kernel.ndim != module.spatial_dims + 2 or target.ndim != kernel.ndim:
            continue
        differs = kernel.shape[1] != target.shape[1] == module.in_channels
        if differs and kernel.shape[0] == target.shape[0] and kernel.shape[2:] == target.shape[2:]:
            share = kernel.shape[1] / target.shape[1]
            adapted[name] = (kernel.mean(dim=1, keepdim=True) * share).expand_as(target).contiguous()
    return adapted


def _adapt_positions(module: Backbone, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tables that differ from the module's in the number of tokens alone, interpolated."""
    adapted = {}
    for name in module.position_tables():
        table, target = given.get(name), own[name]
        if table is None or table.ndim != target.ndim or table.shape[:2] != target.shape[:2]:
            continue
        if table.shape != target.shape:
            adapted[name] = resize_linear(table, target.shape[2:]).contiguous()
    return adapted


def _form(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {'x'.join(map(str, tensor.shape)) or 'scalar'}"


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{folder}: {name} cannot be read ({error.strerror}). Give the folder of a bundle that medssl wrote."
        ) from error


def _parse_passport(folder: Path, data: bytes) -> Passport:
    try:
        content = json.loads(data)
        version = content["schema_version"]
    except (ValueError, TypeError, KeyError):
        content = version = None
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{folder}: passport of version {version}; this medssl reads up to {SCHEMA_VERSION}. Update medssl.",
            code="E_VERSION",
        )
    try:
        return Passport.parse(content, source=f"{folder}/{PASSPORT}")
    except ConfigError as error:
        raise CheckpointError(f"{error} Use the version of medssl that made the bundle.", code="E_VERSION") from error


def _parse_weights(folder: Path, data: bytes) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: {WEIGHTS} is not a safetensors file ({error}). Train again.") from error


def _without_paths(value: Any) -> Any:
    """The recipe without places on a disk, which name users and sometimes patients."""
    match value:
        case dict():
            return {key: _without_paths(item) for key, item in value.items()}
        case list():
            return [_without_paths(item) for item in value]
        case str() if "/" in value or "\\" in value or value.startswith("~"):
            return "<path>"
        case _:
            return value

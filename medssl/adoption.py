"""Make a bundle of a public checkpoint: read without running any code in it, renamed, counted, described."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import safetensors.torch
import torch
from pydantic import Field, JsonValue
from safetensors import SafetensorError
from torch import Tensor

from medssl.config import Config
from medssl.data.prepare import PrepareConfig
from medssl.errors import CheckpointError, ConfigError
from medssl.nn.backbone import Backbone, build_backbone
from medssl.nn.bundle import PASSPORT, LoadReport, Passport, save_bundle
from medssl.nn.families import family_of
from medssl.nn.keymaps import Family, Renamed, flatten, rename

_CROP = {2: 224, 3: 96}
_PLANES = 2
_scalar = type(np.float64(0)).__reduce__(np.float64(0))[0]
_NUMBERS: list[Any] = [_scalar, (_scalar, "numpy.core.multiarray.scalar"), np.dtype, argparse.Namespace] + [
    type(np.dtype(name)) for name in ("float64", "float32", "float16", "int64", "int32", "bool")
]
"""What trainers put beside the weights and what holds no code: single numbers of numpy, and parsed options."""


class AdoptConfig(Config):
    """How a public checkpoint becomes a bundle.

    Args:
        family: Whose names the tensors have; see :data:`medssl.nn.families.FAMILIES`.
        backbone: Options that the shapes do not tell, on top of those that they do.
        prepare: How images are prepared for it, as a preparation recipe; by default as the family published it.
        crop_voxels: Crop that it was trained on; 96 voxels along each axis, or 224 pixels, if left out.
        prefix: What stands before the names of the encoder, where the file holds several networks.
        min_share: Least share of the encoder's tensors that must be found in the file.
        licence: Of the weights; by default where it can be looked up.
        citations: Papers to cite; by default those of the family.
    """

    family: str
    backbone: dict[str, JsonValue] = Field(default_factory=dict)
    prepare: PrepareConfig | None = None
    crop_voxels: tuple[int, ...] | None = None
    prefix: str | None = None
    min_share: float = Field(0.9, gt=0, le=1)
    licence: str | None = None
    citations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adopted:
    """What became of a checkpoint.

    Args:
        bundle: Where the bundle is.
        report: How the tensors fit those of the encoder.
        share: Of the encoder's tensors, those found in the file.
        backbone: The mapping that a recipe must name to use the bundle.
        sentences: What a user should know.
    """

    bundle: Path
    report: LoadReport
    share: float
    backbone: Mapping[str, Any]
    sentences: tuple[str, ...]


def adopt(checkpoint: Path, *, out: Path, config: AdoptConfig, dry_run: bool = False) -> Adopted:
    """Read the encoder of a public checkpoint and leave it as a bundle that ``finetune`` and ``study`` take.

    Args:
        checkpoint: A ``.pt``, ``.pth``, ``.ckpt`` or ``.safetensors`` file. Nothing in it is run.
        out: The bundle's folder.
        config: Family and what the file does not tell.
        dry_run: Check everything, write nothing.

    Raises:
        CheckpointError: ``E_PICKLE`` if the file can only be read by running code in it; ``E_WEIGHTS`` if it is
            damaged or fewer than ``min_share`` of the encoder's tensors fit, with a table.
        ConfigError: for an unknown family, a preparation that is needed and not given, or an ``out`` that is taken.
    """
    family = family_of(config.family)
    if out.exists() and not (out / PASSPORT).is_file():
        raise ConfigError(f"{out}: is there already and is no bundle. Choose another name.", code="E_OVERWRITE")
    tensors = read_tensors(checkpoint)
    renamed = rename(family, tensors, prefix=config.prefix)
    stem = renamed.tensors.get(family.stem)
    if stem is None or stem.ndim not in {4, 5}:
        raise CheckpointError(f"{checkpoint}: lacks the first layer of {family.name}. Give the file of the encoder.")
    encoder = _fresh({**family.infer(renamed.tensors), **config.backbone}, stem)
    report = _load(encoder, renamed)
    needed = len(report.matched) + len(_fresh_names(report))
    share = len(report.matched) / needed
    if share < config.min_share:
        raise CheckpointError(
            f"{checkpoint}: {len(report.matched)} of {needed} tensors of {family.name} match, a share of {share:.2f}; "
            f"{config.min_share:g} is needed. Choose another family, or give backbone the shape of the weights.\n"
            f"{report.describe()}"
        )
    origin = {
        "family": family.name,
        "checkpoint_sha256": _sha256(checkpoint),
        "prefix": renamed.prefix,
        "fresh": _fresh_names(report),
        "not_used": [*renamed.unused, *report.unexpected],
    }
    metrics = {"tensors_matched": len(report.matched), "tensors_needed": needed, "share_matched": share}
    passport = _passport(family, config, encoder, origin=origin, metrics=metrics)
    if not dry_run:
        save_bundle(out, {"encoder": encoder}, passport)
    return Adopted(out, report, share, encoder.config, _sentences(family, passport))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name, on the CPU, read without running any code in the file.

    Raises:
        CheckpointError: ``E_PICKLE`` if that is impossible, ``E_WEIGHTS`` if the file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file. Give the file with the weights.")
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        with torch.serialization.safe_globals(_NUMBERS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path}: {'holds ' + found[1] if found else 'is no plain checkpoint'}, which cannot be read without "
            "running code in the file. Save model.state_dict() alone with the software that it comes from.",
            code="E_PICKLE",
        ) from None
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is no checkpoint or is damaged ({str(error).splitlines()[0][:120]}). Copy it again from its "
            "source."
        ) from error
    return flatten(content)


def _fresh(mapping: Mapping[str, Any], stem: Tensor) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_backbone(mapping, in_channels=stem.shape[1], spatial_dims=stem.ndim - 2)


def _load(encoder: Backbone, renamed: Renamed) -> LoadReport:
    """Copy every tensor that fits.

    What the shape alone determines, such as tables of indices, stays our own; a neck is no part of what was published.
    """
    neck = {id(parameter) for parameter in encoder.neck_parameters()}
    unneeded = {name for name, parameter in encoder.named_parameters() if id(parameter) in neck}
    own = {
        name: value
        for name, value in encoder.state_dict().items()
        if value.is_floating_point() and name not in unneeded
    }
    given = {name: value.float() for name, value in renamed.tensors.items() if value.is_floating_point()}
    fitting = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    encoder.load_state_dict(fitting, strict=False)
    return LoadReport(
        matched=tuple(fitting),
        missing=tuple(name for name in own if name not in given),
        unexpected=tuple(name for name in given if name not in own),
        mis_shaped=tuple(
            (name, _shape(given[name]), _shape(own[name])) for name in own if name in given and name not in fitting
        ),
    )


def _fresh_names(report: LoadReport) -> list[str]:
    """Tensors of the encoder that the file does not give."""
    return [*report.missing, *(name for name, _, _ in report.mis_shaped)]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _passport(
    family: Family, config: AdoptConfig, encoder: Backbone, *, origin: Mapping[str, Any], metrics: Mapping[str, float]
) -> Passport:
    prepare = _preparation(family, config, spatial_dims=encoder.spatial_dims)
    crop = config.crop_voxels or (_CROP[encoder.spatial_dims],) * encoder.spatial_dims
    if len(crop) != encoder.spatial_dims or min(crop) < 1:
        raise ConfigError(f"crop_voxels is {list(crop)}; {encoder.spatial_dims} numbers of at least 1 are needed.")
    return Passport.parse(
        {
            "kind": "encoder",
            "backbone": encoder.config,
            "spatial_dims": encoder.spatial_dims,
            "in_channels": encoder.in_channels,
            "prepare": prepare.to_dict(),
            "unit": prepare.unit,
            "orientation": prepare.orientation,
            "spacing_mm": prepare.spacing_mm,
            "crop_voxels": list(crop),
            "recipe": {"adopt": dict(origin)},
            "method": family.name,
            "data_fingerprint": "not stated",
            "metrics": dict(metrics),
            "licence": config.licence or f"not stated in the file; see {family.source}",
            "versions": {name: version(name) for name in ("medssl", "torch", "monai")},
            "citations": list(config.citations or family.citations),
        },
        source="passport",
    )


def _preparation(family: Family, config: AdoptConfig, *, spatial_dims: int) -> PrepareConfig:
    if config.prepare is None and not family.prepare:
        raise ConfigError(
            f"adopt: how images are prepared for {family.name} is not known ({family.hint}). Give a preparation "
            "recipe, for example --prepare configs/prepare/mr_whole.yaml, and prepare your images with the same."
        )
    prepare = config.prepare or PrepareConfig.parse(family.prepare, source=f"preparation of {family.name}")
    planes = prepare.spatial_dims
    if planes is not None and planes != spatial_dims:
        raise ConfigError(
            f"adopt: the weights are for {spatial_dims} dimensions and the preparation for {planes}. Give a "
            f"preparation for {'pictures' if spatial_dims == _PLANES else 'volumes'}."
        )
    return prepare


def _sentences(family: Family, passport: Passport) -> tuple[str, ...]:
    found, origin = passport.metrics, passport.recipe["adopt"]
    said = [
        f"{found['tensors_matched']} of {found['tensors_needed']} tensors of the encoder were found "
        f"({found['share_matched']:.1%})"
    ]
    if origin["fresh"]:
        said.append(f"{len(origin['fresh'])} tensors keep random weights, first {origin['fresh'][0]}")
    if origin["not_used"]:
        said.append(f"{len(origin['not_used'])} tensors of the file were left out, first {origin['not_used'][0]}")
    said.append(f"images: {family.hint}")
    said.append(f"licence: {passport.licence}")
    said.append(f"recipes that use it say backbone: {json.dumps(passport.backbone)}")
    return tuple(said)

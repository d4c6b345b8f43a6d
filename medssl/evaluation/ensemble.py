"""Several bundles as one model: the mean of their class probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medssl.errors import CheckpointError
from medssl.evaluation.segment import load_network
from medssl.evaluation.sliding_window import Network, Settings
from medssl.io import digest
from medssl.nn.bundle import DIGESTS, PASSPORT, Bundle, Passport, load_bundle

_SHARED = {
    "kind": "kind",
    "label_values": "label values",
    "preparation": "preparation",
    "orientation": "orientation",
    "crop_voxels": "crop_voxels",
    "image_channels": "image channels",
}


def open_members(bundles: Path | Sequence[Path]) -> list[Bundle]:
    """Read the bundles of an ensemble.

    Args:
        bundles: A bundle; a folder of bundles or of runs with one each, such as ``medssl crossval`` leaves; or several
            of these.

    Raises:
        CheckpointError: if there is none, one is damaged, or they do not belong together.
    """
    given = [bundles] if isinstance(bundles, Path) else list(bundles)
    members = [load_bundle(path) for folder in given for path in member_folders(folder)]
    if not members:
        raise CheckpointError("bundles: none was given; at least one is needed.")
    first = members[0]
    for other in members[1:]:
        for name, words in _SHARED.items():
            mine, theirs = _shared(first.passport, name), _shared(other.passport, name)
            if mine != theirs:
                raise CheckpointError(
                    f"{other.folder}: other {words} ({theirs}) than {first.folder} ({mine}); the members of an "
                    "ensemble must agree. Predict with each alone.",
                    code="E_CONTRACT",
                )
    return members


def member_folders(folder: Path) -> list[Path]:
    """The bundles in a folder, by name: itself, its subfolders, or those that its runs have left."""
    if (folder / PASSPORT).exists() or not folder.is_dir():
        return [folder]
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    found = [place for path in inside for place in (path, path / "bundle") if (place / PASSPORT).exists()]
    return found or [folder]


def load_ensemble(members: Sequence[Bundle], *, settings: Settings) -> Network:
    """The network of one bundle as it is; of several, the mean of their softmax scores, window by window.

    Raises:
        CheckpointError: if a bundle holds no segmentation model.
    """
    networks = [load_network(member, settings=settings) for member in members]
    if len(networks) == 1:
        return networks[0]

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        total = networks[0](x).float().softmax(dim=1)
        for network in networks[1:]:
            total += network(x).float().softmax(dim=1)
        return total / len(networks)

    return run


def weight_digests(members: Sequence[Bundle]) -> list[str]:
    """What tells the weights of an ensemble from others."""
    return sorted(digest(member.folder / DIGESTS) for member in members)


def _shared(passport: Passport, name: str) -> Any:
    return getattr(passport, name) if name != "image_channels" else passport.image_channels or passport.in_channels

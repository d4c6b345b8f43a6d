"""Choice of a loss by name, and signed distances against a search over all voxels."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest
import torch

from medssl.errors import ConfigError
from medssl.tasks.objective import LossConfig, LossName, signed_distance

WEIGHTS = {"overlap_weight": 0.5, "voxel_weight": 2.0, "include_background": True}


def brute_force(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    found = np.zeros(mask.shape)
    if mask.all() or not mask.any():
        return found
    unit = np.divide(spacing, min(spacing))
    places = list(itertools.product(*map(range, mask.shape)))
    for here in places:
        other = [np.linalg.norm(np.subtract(here, there) * unit) for there in places if mask[there] != mask[here]]
        found[here] = min(1 - min(other), 0) if mask[here] else min(other)
    return found


@pytest.mark.parametrize(("shape", "spacing"), [((6, 5), (1.0, 1.0)), ((4, 5, 3), (0.5, 1.0, 2.5))])
def test_signed_distance_is_that_of_a_search_over_all_voxels(shape, spacing):
    rng = np.random.default_rng(0)
    masks = rng.random((2, 3, *shape)) > 0.7
    masks[0, 1], masks[1, 2] = False, True
    found = signed_distance(torch.from_numpy(masks), spacing)
    assert found.dtype == torch.float32
    for place in np.ndindex(2, 3):
        np.testing.assert_allclose(found[place], brute_force(masks[place], spacing), atol=1e-5)


@pytest.mark.parametrize("name", get_args(LossName))
def test_every_name_has_its_terms(name):
    config = LossConfig.parse({"name": name, "power": 0.6, "boundary_weight": 0.2})
    blend = config.blend(**WEIGHTS, fraction=0.5)
    assert (blend.overlap_weight, blend.voxel_weight, blend.include_background) == (0.5, 2.0, True)
    assert blend.overlap == ("tversky" if "tversky" in name else "dice")
    assert blend.power == (0.6 if name.startswith("focal") else 1.0 if "tversky" in name else 0.6)
    assert blend.voxel == {"focal": "focal", "topk": "topk"}.get(name.split("_")[-1], "cross_entropy")
    assert blend.boundary_weight == (pytest.approx(0.1) if name.endswith("boundary") else 0.0)
    assert config.needs_distance == name.endswith("boundary")


def test_an_unknown_loss_is_refused():
    with pytest.raises(ConfigError, match="name"):
        LossConfig.parse({"name": "dice_hinge"})

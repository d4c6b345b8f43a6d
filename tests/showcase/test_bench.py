"""The bench: what one augment alone does, and what training would show."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medssl.augment.build import build_augment
from medssl.augment.images import Images
from medssl.showcase.bench import Bench, group_size, takes_labels
from medssl.trainable import Batch

CASES = 2
EDGE = 12


def batch(values: str = "zscore") -> Batch:
    """Two crops of each of two cases, each a ramp from its own offset, in boxes two voxels wider on each side."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2 * CASES, 1, *[EDGE + 4] * 3, generator=generator)
    ramp = torch.linspace(-2, 2, EDGE + 4)[:, None, None]
    image = ramp + noise + torch.arange(2 * CASES)[:, None, None, None, None]
    if values == "HU":
        image = (100 * image - 100).to(torch.int16)
    label = torch.zeros_like(image, dtype=torch.uint8)
    label[..., 4:9, 5:11, 6:10] = 3
    to_box = torch.eye(4, dtype=torch.float64).repeat(2 * CASES, 1, 1)
    to_box[:, :3, 3] = 2.0
    affine = torch.eye(4, dtype=torch.float64).repeat(2 * CASES, 1, 1)
    tensors = {
        "image": image,
        "label": label,
        "image_to_box": to_box,
        "image_spacing_mm": torch.ones(2 * CASES, 3, dtype=torch.float64),
        "image_affine": affine,
    }
    return Batch(tensors, torch.arange(2 * CASES), tuple("abab"))


def bench(*augments: dict[str, object], values: str = "zscore") -> Bench:
    images = Images(
        domain="HU" if values == "HU" else "zscore", modality="CT" if values == "HU" else "MR", region="brain"
    )
    return Bench(build_augment(list(augments), images=images), batch(values), (EDGE, EDGE, EDGE))


def test_the_plain_crop_is_the_middle_of_its_box() -> None:
    shot = bench({"name": "noise"}).plain(1)
    given = batch()
    assert np.array_equal(shot.image, given["image"][1, :, 2:-2, 2:-2, 2:-2].numpy())
    assert shot.label is not None
    assert np.array_equal(shot.label, given["label"][1, 0, 2:-2, 2:-2, 2:-2].numpy())


def test_an_augment_is_shown_whatever_its_probability_from_the_weakest_draw_to_the_strongest() -> None:
    it = bench({"name": "noise", "p": 0.0, "sigma": [0.1, 0.9]})
    alone = it.alone(0, seed=3)
    change = [[np.abs(shot.image - it.plain(case).image).mean() for shot in alone.shots[case]] for case in range(CASES)]
    assert change[0] == sorted(change[0])
    np.testing.assert_allclose(change[0], change[1], rtol=0.05)
    assert change[0][0] > 0.05
    assert alone.ms > 0
    sigmas = [float(shot.text.removeprefix("sigma ")) for shot in alone.shots[0]]
    assert sigmas == sorted(sigmas)


def test_what_makes_images_darker_or_brighter_is_shown_at_both_ends() -> None:
    alone = bench({"name": "brightness", "shift": [-0.5, 0.5]}).alone(0, seed=0)
    assert alone.words == ("darkest", "middling", "brightest")
    shifts = [float(shot.text.removeprefix("shift ")) for shot in alone.shots[0]]
    assert shifts == sorted(shifts)
    assert shifts[0] < 0 < shifts[2]
    assert bench({"name": "brightness", "shift": [0.1, 0.5]}).alone(0, seed=0).words == ("least", "middling", "most")


def test_only_the_one_augment_is_applied_and_what_is_not_random_of_the_others() -> None:
    it = bench({"name": "hu_shift", "shift_hu": [50, 50]}, {"name": "window", "low_hu": -300, "high_hu": 300},
               {"name": "gamma", "gamma": [2.0, 2.0]}, values="HU")  # fmt: skip
    plain = it.plain(0).image
    assert plain.min() >= 0
    shifted, _, gamma = (it.alone(place, seed=0).shots[0][0].image for place in range(3))
    stored = batch("HU")["image"][0, :, 2:-2, 2:-2, 2:-2].numpy().astype(np.float64)
    np.testing.assert_allclose(shifted, np.clip((stored + 50 + 300) / 600, 0, 1), atol=1e-5)
    assert not np.allclose(gamma, plain, atol=0.05)
    low, high = plain.min(), plain.max()
    np.testing.assert_allclose(gamma, low + (high - low) * ((plain - low) / (high - low)) ** 2, atol=1e-4)


def test_labels_and_letters_move_with_the_content() -> None:
    it = bench({"name": "mirror", "axes": ["LR"]})
    plain, shot = it.plain(0), it.alone(0, seed=0).shots[0][2]
    assert np.array_equal(shot.image, plain.image[:, ::-1])
    assert shot.label is not None
    assert np.array_equal(shot.label, plain.label[::-1])
    np.testing.assert_allclose(shot.affine[:, 0], [-1, 0, 0, 0])
    np.testing.assert_allclose(shot.affine[:, 3], [EDGE - 1, 0, 0, 1])


def test_a_crop_is_mixed_with_others_and_not_with_itself() -> None:
    it = bench({"name": "mixup", "group": 3}, {"name": "cutmix", "group": 2})
    assert group_size(it.pipeline) == 6
    assert not takes_labels(it.pipeline)
    assert it.plain(0).label is None
    assert all(np.abs(shot.image - it.plain(0).image).max() > 0.1 for shot in it.alone(0, seed=1).shots[0][1:])
    assert [shot.label for shot in it.views(0, 3, seed=0)] == [None] * 3


def test_views_say_what_was_drawn_for_them() -> None:
    it = bench({"name": "affine", "p": 1.0}, {"name": "noise", "p": 0.0}, {"name": "blur", "p": 1.0})
    views = it.views(1, 5, seed=0)
    assert [view.text for view in views] == ["affine, blur"] * 5
    assert len({view.image.tobytes() for view in views}) == 5
    assert bench({"name": "noise", "p": 0.0}).views(0, 1, seed=0)[0].text == "nothing drawn"


def test_values_pushed_out_of_hu_are_counted() -> None:
    it = bench({"name": "hu_shift", "shift_hu": [-2000, -2000]}, {"name": "window"}, values="HU")
    assert it.alone(0, seed=0).hu_clipped == pytest.approx(1.0)
    assert it.alone(1, seed=0).hu_clipped == 0.0

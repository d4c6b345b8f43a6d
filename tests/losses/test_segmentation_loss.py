"""Dice and cross-entropy against MONAI's and against plain numpy."""

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss

from medssl.losses.segmentation import deep_dice_ce, dice_ce


def sample(shape=(6, 7, 5), classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((2, classes, *shape), generator=generator)
    target = torch.randint(0, classes, (2, 1, *shape), generator=generator)
    return logits, target


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 5)])
@pytest.mark.parametrize("include_background", [False, True])
def test_terms_equal_those_of_monai(shape, include_background):
    logits, target = sample(shape)
    terms = dice_ce(logits, target, include_background=include_background, weights=(0.7, 1.3))
    options = {"softmax": True, "to_onehot_y": True, "include_background": include_background}
    expected = DiceCELoss(lambda_dice=0.7, lambda_ce=1.3, **options)(logits, target)
    assert float(terms.total) == pytest.approx(float(expected), abs=1e-5)
    assert float(terms.dice) == pytest.approx(float(DiceLoss(**options)(logits, target)), abs=1e-5)


def test_perfect_scores_have_loss_near_zero():
    _, target = sample()
    logits = 50.0 * torch.nn.functional.one_hot(target[:, 0], 3).movedim(-1, 1).float()
    assert float(dice_ce(logits, target).total) < 1e-4


def test_ignored_voxels_change_neither_the_loss_nor_any_gradient():
    logits, target = sample()
    target[:, :, :3] = 255
    logits.requires_grad_()
    terms = dice_ce(logits, target, ignore_value=255)
    terms.total.backward()
    cropped = dice_ce(logits.detach()[:, :, 3:], target[:, :, 3:])
    assert float(terms.total.detach()) == pytest.approx(float(cropped.total), abs=1e-6)
    assert (logits.grad[:, :, :3] == 0).all()
    assert logits.grad[:, :, 3:].abs().sum() > 0


def test_sample_that_is_ignored_throughout_has_cross_entropy_zero_and_a_finite_gradient():
    logits, target = sample()
    logits.requires_grad_()
    terms = dice_ce(logits, torch.full_like(target, 255), ignore_value=255)
    terms.total.backward()
    assert float(terms.total.detach()) == 0.0
    assert (logits.grad == 0).all()


def test_deep_supervision_halves_the_weight_of_each_coarser_output():
    logits, target = sample((8, 8, 8))
    coarse = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(9))
    found = deep_dice_ce([logits, coarse], target)
    # nearest-exact of a factor 2 takes the voxel at odd places
    fine, low = dice_ce(logits, target), dice_ce(coarse, target[:, :, 1::2, 1::2, 1::2])
    for name in ("total", "dice", "cross_entropy"):
        expected = (float(getattr(fine, name)) + 0.5 * float(getattr(low, name))) / 1.5
        assert float(getattr(found, name)) == pytest.approx(expected, abs=1e-6)


def test_deep_supervision_of_one_output_is_the_plain_loss():
    logits, target = sample()
    assert float(deep_dice_ce([logits], target).total) == pytest.approx(float(dice_ce(logits, target).total), abs=1e-7)


def test_coarse_targets_keep_their_class_values():
    _, target = sample((9, 9, 9))
    outputs = [torch.zeros(2, 3, 5, 5, 5)]
    terms = deep_dice_ce(outputs, target)
    assert float(terms.cross_entropy) == pytest.approx(np.log(3), abs=1e-6)


def test_loss_is_float32_for_half_precision_scores_under_autocast():
    logits, target = sample()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = dice_ce(logits.bfloat16(), target).total
    assert mixed.dtype == torch.float32
    assert float(mixed) == pytest.approx(float(dice_ce(logits, target).total), rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y[:, 0]), "needs one channel"),
        (lambda x, y: (x, y + 1), "indices must be 0 to 2"),
        (lambda x, y: (x, y - 1), "target values -1 to 1"),
        (lambda x, y: (x[:, :1], y * 0), "at least one structure"),
    ],
)
def test_targets_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dice_ce(*change(*sample()))


def test_no_output_at_all_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        deep_dice_ce([], sample()[1])

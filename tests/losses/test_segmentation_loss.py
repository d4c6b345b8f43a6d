"""Dice and cross-entropy against MONAI's and against plain numpy."""

import math

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss, FocalLoss, TverskyLoss
from torch.nn import functional as F

from medssl.errors import ConfigError
from medssl.losses.regions import Regions, region_terms
from medssl.losses.segmentation import Blend, deeply, dice_ce, label_terms
from medssl.losses.terms import boundary_loss, dice_loss, focal, tversky_loss, voxel_mean


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


def plain(logits, target, level):
    return label_terms(logits, target, Blend())


def test_deep_supervision_halves_the_weight_of_each_coarser_output():
    logits, target = sample((8, 8, 8))
    coarse = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(9))
    found = deeply([logits, coarse], target, plain)
    # nearest-exact of a factor 2 takes the voxel at odd places
    fine, low = dice_ce(logits, target), dice_ce(coarse, target[:, :, 1::2, 1::2, 1::2])
    assert float(found.total) == pytest.approx((float(fine.total) + 0.5 * float(low.total)) / 1.5, abs=1e-6)
    for name, mine in (("dice", "dice_loss"), ("cross_entropy", "cross_entropy")):
        expected = (float(getattr(fine, name)) + 0.5 * float(getattr(low, name))) / 1.5
        assert float(found.parts[mine]) == pytest.approx(expected, abs=1e-6)


def test_deep_supervision_of_one_output_is_the_plain_loss():
    logits, target = sample()
    assert float(deeply([logits], target, plain).total) == pytest.approx(float(dice_ce(logits, target).total), abs=1e-7)


def test_a_term_of_the_finest_level_alone_is_not_halved():
    logits, target = sample((4, 4, 4))
    distance = torch.rand(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(3))

    def loss(logits, target, level):
        return label_terms(logits, target, Blend(boundary_weight=1.0), distance=None if level else distance)

    found = deeply([logits, logits[:, :, ::2, ::2, ::2]], target, loss)
    expected = boundary_loss(logits.softmax(1), distance, torch.ones(2, 1, 4, 4, 4))[:, 1:].mean()
    assert float(found.parts["boundary_loss"]) == pytest.approx(float(expected), abs=1e-6)
    assert float(found.total) == pytest.approx(sum(float(part) for part in found.parts.values()), abs=1e-6)


def test_coarse_targets_keep_their_class_values_and_ignored_voxels():
    _, target = sample((9, 9, 9))
    target[0] = -1
    terms = deeply([torch.zeros(2, 3, 5, 5, 5)], target, plain)
    assert float(terms.parts["cross_entropy"]) == pytest.approx(np.log(3), abs=1e-6)


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
        deeply([], sample()[1], plain)


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 5)])
def test_tversky_equals_that_of_monai(shape):
    logits, target = sample(shape)
    blend = Blend(overlap="tversky", alpha=0.3, beta=0.7, voxel_weight=0.0, include_background=True)
    options = {"smooth_nr": 1e-5, "smooth_dr": 1e-5, "to_onehot_y": True, "softmax": True}
    expected = TverskyLoss(alpha=0.3, beta=0.7, **options)(logits, target)
    terms = label_terms(logits, target, blend)
    assert float(terms.total) == pytest.approx(float(expected), abs=1e-6)
    assert set(terms.parts) == {"tversky_loss", "cross_entropy"}


def test_tversky_with_halves_is_dice_and_beta_punishes_what_is_missed():
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(2, 3, 5, 5, generator=generator)
    g = (torch.rand(2, 3, 5, 5, generator=generator) > 0.5).float()
    share = torch.ones(2, 1, 5, 5)
    torch.testing.assert_close(tversky_loss(p, g, share, alpha=0.5, beta=0.5), dice_loss(p, g, share))
    much, little = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    little[..., :2, :] = 1
    every = torch.ones(1, 1, 4, 4)
    missed = tversky_loss(little, much, every, alpha=0.3, beta=0.7)
    extra = tversky_loss(much, little, every, alpha=0.3, beta=0.7)
    assert float(missed) == pytest.approx(1 - 8 / (8 + 0.7 * 8), abs=1e-5)
    assert float(extra) == pytest.approx(1 - 8 / (8 + 0.3 * 8), abs=1e-5)


def test_focal_tversky_is_a_power_with_a_finite_gradient_at_the_optimum():
    g = torch.ones(1, 1, 4, 4)
    p = torch.full_like(g, 0.5).requires_grad_()
    loss = tversky_loss(p, g, torch.ones(1, 1, 4, 4), alpha=0.3, beta=0.7, power=0.75)
    assert float(loss.detach()) == pytest.approx((1 - 8 / (8 + 0.7 * 8)) ** 0.75, abs=1e-3)
    perfect = g.clone().requires_grad_()
    tversky_loss(perfect, g, torch.ones(1, 1, 4, 4), alpha=0.3, beta=0.7, power=0.75).sum().backward()
    assert torch.isfinite(perfect.grad).all()


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_equals_that_of_monai(gamma):
    logits, target = sample()
    terms = label_terms(logits, target, Blend(voxel="focal", gamma=gamma, overlap_weight=0.0))
    one_hot = FocalLoss(gamma=gamma, use_softmax=True, to_onehot_y=True, reduction="none")(logits, target)
    assert float(terms.parts["focal_loss"]) == pytest.approx(float(one_hot.sum(dim=1).mean()), abs=1e-6)


def test_focal_of_a_right_voxel_has_a_finite_gradient():
    for gamma in (0.0, 0.5, 1.0, 2.0):
        loss = torch.zeros(3, requires_grad=True)
        focal(loss, gamma=gamma).sum().backward()
        assert torch.isfinite(loss.grad).all()


def test_top_share_is_the_mean_of_the_worst_voxels_that_count():
    loss = torch.tensor([[5.0, 1.0, 4.0, 9.0], [2.0, 3.0, 8.0, 0.0]])
    share = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert float(voxel_mean(loss, share, top_share=0.25)) == (8 + 5) / 2
    assert float(voxel_mean(loss, share, top_share=1.0)) == pytest.approx(23 / 7)
    assert float(voxel_mean(loss, share * 0, top_share=0.5)) == 0.0
    logits, target = sample()
    expected = F.cross_entropy(logits, target[:, 0], reduction="none").flatten().sort(descending=True).values
    kept = math.ceil(0.1 * len(expected))
    terms = label_terms(logits, target, Blend(voxel="topk", top_share=0.1))
    assert float(terms.parts["cross_entropy"]) == pytest.approx(float(expected[:kept].mean()), abs=1e-6)


def test_boundary_loss_is_the_mean_of_probability_times_distance_by_loops():
    generator = torch.Generator().manual_seed(2)
    p, distance = torch.rand(2, 2, 3, 4, generator=generator), torch.randn(2, 2, 3, 4, generator=generator)
    share = torch.ones(2, 1, 3, 4)
    share[0, 0, 1] = 0
    found = boundary_loss(p, distance, share)
    for b in range(2):
        for k in range(2):
            total, count = 0.0, 0
            for i in range(3):
                for j in range(4):
                    if share[b, 0, i, j]:
                        total += float(p[b, k, i, j] * distance[b, k, i, j])
                        count += 1
            assert float(found[b, k]) == pytest.approx(total / count, abs=1e-6)


BLENDS = [
    Blend(),
    Blend(overlap="tversky", power=0.75, voxel="focal"),
    Blend(voxel="topk", top_share=1.0, include_background=True),
]


@pytest.mark.parametrize("blend", BLENDS)
def test_ignored_voxels_take_part_in_no_term(blend):
    logits, target = sample()
    target[:, :, :3] = -1
    logits.requires_grad_()
    terms = label_terms(logits, target, blend)
    terms.total.backward()
    cropped = label_terms(logits.detach()[:, :, 3:], target[:, :, 3:], blend)
    torch.testing.assert_close(terms.total.detach(), cropped.total)
    assert (logits.grad[:, :, :3] == 0).all()
    assert logits.grad[:, :, 3:].abs().sum() > 0


@pytest.mark.parametrize("blend", BLENDS)
def test_classes_that_nobody_drew_are_part_of_background(blend):
    logits, target = sample()
    target[target == 2] = 0
    known = torch.tensor([[True, True, False], [False, True, False]])
    terms = label_terms(logits, target, blend, known=known)
    p = logits.softmax(dim=1)
    merged = torch.stack((p[:, 0] + p[:, 2], p[:, 1]), dim=1).log()  # the same with a softmax of two classes
    expected = label_terms(merged, target, blend)
    torch.testing.assert_close(terms.total, expected.total, rtol=1e-5, atol=1e-6)


def test_a_class_that_nobody_drew_is_learned_from_the_cases_where_somebody_did():
    logits, target = sample()
    known = torch.tensor([[True, True, False], [True, True, True]])
    first, second = (label_terms(logits[i : i + 1], target[i : i + 1], Blend(), known=known[i : i + 1]) for i in (0, 1))
    both = label_terms(logits, target, Blend(), known=known)
    overlap = (float(first.parts["dice_loss"]) + 2 * float(second.parts["dice_loss"])) / 3  # of 1 and of 2 classes
    assert float(both.parts["dice_loss"]) == pytest.approx(overlap, abs=1e-6)
    inside = target[0] == 2  # drawn nowhere: what a map says of it is taken for background
    cleared = target.clone()
    cleared[0][inside] = 0
    torch.testing.assert_close(label_terms(logits, cleared, Blend(), known=known).total, both.total)


TUMOUR = {"active": [4], "whole": [1, 2, 4], "core": [1, 4]}  # edema 2 is in the whole alone
VALUES = (0, 1, 2, 4)


def test_regions_are_written_from_the_largest_to_the_smallest():
    regions = Regions.of(TUMOUR, VALUES)
    assert regions.names == ("whole", "core", "active")
    assert [VALUES[k] for k in regions.writes] == [2, 1, 4]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, 6, 4, generator=generator)
    found = torch.tensor(VALUES)[regions.class_scores(logits).argmax(dim=1)]
    expected = torch.zeros(2, 5, 6, 4, dtype=torch.long)
    for region, value in enumerate((2, 1, 4)):
        expected[logits[:, region] > 0] = value
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ({"a": [1, 3], "b": [2]}, r"region a holds \[3\]"),
        ({"a": []}, r"region a has \[\] to itself"),
        ({"a": [1, 2, 4]}, r"region a has \[1, 2, 4\] to itself"),
        ({"a": [1], "b": [1], "c": [2], "d": [4]}, r"region a has \[\] to itself"),
        ({"a": [1, 2], "b": [1]}, r"label values \[4\] are in no region"),
    ],
)
def test_regions_that_name_no_label_map_are_refused(regions, message):
    with pytest.raises(ConfigError, match=message) as error:
        Regions.of(regions, VALUES)
    assert error.value.code == "E_LABEL_SET"


def region_sample():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, 5, 6, 4, generator=generator), torch.randint(0, 4, (2, 1, 5, 6, 4), generator=generator)


def members(target):
    values = torch.tensor(VALUES)[target]
    sets = ((1, 2, 4), (1, 4), (4,))
    return torch.cat([torch.isin(values, torch.tensor(found)) for found in sets], dim=1).float()


def test_region_terms_equal_those_of_monai_with_sigmoids():
    logits, target = region_sample()
    terms = region_terms(logits, target, Blend(), regions=Regions.of(TUMOUR, VALUES))
    g = members(target)
    assert float(terms.parts["dice_loss"]) == pytest.approx(float(DiceLoss(sigmoid=True)(logits, g)), abs=1e-5)
    expected = F.binary_cross_entropy_with_logits(logits, g)
    assert float(terms.parts["cross_entropy"]) == pytest.approx(float(expected), abs=1e-6)
    focal_terms = region_terms(logits, target, Blend(voxel="focal"), regions=Regions.of(TUMOUR, VALUES))
    expected = FocalLoss(gamma=2.0)(logits, g)
    assert float(focal_terms.parts["focal_loss"]) == pytest.approx(float(expected), abs=1e-6)


def test_a_region_counts_where_all_of_its_values_were_drawn_and_ignored_voxels_never_do():
    logits, target = region_sample()
    regions = Regions.of(TUMOUR, VALUES)
    target[:, :, :2] = -1
    known = torch.tensor([[True, True, False, True]]).repeat(2, 1)  # without 2 the whole is not known
    distance = torch.ones_like(logits)
    terms = region_terms(logits, target, Blend(boundary_weight=2.0), regions=regions, known=known, distance=distance)
    g, cut = members(target.clamp(min=0))[:, 1:, 2:], logits[:, 1:, 2:]
    assert float(terms.parts["dice_loss"]) == pytest.approx(float(DiceLoss(sigmoid=True)(cut, g)), abs=1e-5)
    expected = F.binary_cross_entropy_with_logits(cut, g)
    assert float(terms.parts["cross_entropy"]) == pytest.approx(float(expected), abs=1e-6)
    assert float(terms.parts["boundary_loss"]) == pytest.approx(float(cut.sigmoid().mean()), abs=1e-5)
    total = sum(float(terms.parts[name]) for name in ("dice_loss", "cross_entropy", "boundary_loss"))
    assert float(terms.total) == pytest.approx(total + float(terms.parts["boundary_loss"]), abs=1e-5)

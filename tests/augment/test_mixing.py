from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from phantoms import REAL_DATA
from scipy import stats

from medssl.augment.base import Params
from medssl.augment.mixing import (
    BatchStyles,
    BatchStylesConfig,
    Cutmix,
    CutmixConfig,
    FourierMix,
    FourierMixConfig,
    Mixup,
    MixupConfig,
    partner_rows,
)
from medssl.augment.pipeline import Pipeline
from medssl.errors import ConfigError

SEEDS = torch.arange(40, 44)
SHAPES = [(12, 9, 8), (9, 8, 7), (12, 10), (9, 7)]


def images(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Images that differ in mean and spread, each with one voxel far below and one far above so that nothing clips."""
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    steps = torch.arange(shape[0], dtype=dtype).view(-1, *[1] * (len(shape) - 1))
    x = x * (1 + steps) - steps
    x.reshape(*shape[:2], -1)[..., 3] = -50.0
    x.reshape(*shape[:2], -1)[..., 4] = 50.0
    return x


def centred_window(shape: tuple[int, ...], half: list[int]) -> np.ndarray:
    """A window with an odd number of frequencies along each axis, in the order of a full transform."""
    window = np.zeros(shape, dtype=bool)
    for offset in itertools.product(*[range(-h, h + 1) for h in half]):
        window[tuple(o % n for o, n in zip(offset, shape, strict=True))] = True
    return window


def by_full_transforms(
    image: np.ndarray, other: np.ndarray, *, half: list[int], weight: float = 1.0
) -> tuple[np.ndarray, float]:
    """Amplitude and phase of full complex transforms, and the greatest imaginary part of what comes back."""
    own, their = np.fft.fftn(image), np.fft.fftn(other)
    window = centred_window(image.shape, half)
    window[(0,) * image.ndim] = False
    amplitude = np.where(window, (1 - weight) * np.abs(own) + weight * np.abs(their), np.abs(own))
    spectrum = amplitude * np.exp(1j * np.angle(own))
    spectrum[(0,) * image.ndim] = (1 - weight) * own.flat[0] + weight * their.flat[0]
    back = np.fft.ifftn(spectrum)
    return back.real, float(np.abs(back.imag).max())


def styles(size: float, *, reference: int, group: int = 2, batch: int = 4) -> tuple[BatchStyles, Params]:
    augment = BatchStyles(BatchStylesConfig(size=(size, size), group=group))
    return augment, augment.draw(torch.arange(batch)) | {"reference": torch.full((batch,), reference)}


@pytest.mark.parametrize("shape", SHAPES)
def test_styles_leave_the_reference_itself_bit_for_bit(shape):
    x = images(4, 2, *shape, dtype=torch.float32)
    augment, params = styles(0.5, reference=1)
    out = augment.apply(x, params)
    assert torch.equal(out[1::2], x[1::2])
    assert not torch.equal(out[::2], x[::2])


@pytest.mark.parametrize("shape", SHAPES)
def test_styles_of_the_zero_frequency_alone_move_the_mean_to_that_of_the_reference(shape):
    x = images(4, 1, *shape)
    augment, params = styles(0.0, reference=0, group=4)
    flat, found = x.flatten(1), augment.apply(x, params).flatten(1)
    inside = (flat.abs() < 50).all(dim=0)
    torch.testing.assert_close(
        (found - flat)[:, inside],
        (flat[:1].mean() - flat.mean(dim=1, keepdim=True)).expand_as(flat)[:, inside],
        rtol=0,
        atol=1e-10,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [0.25, 0.6, 1.0])
def test_styles_equal_full_transforms_with_an_odd_window_and_these_come_back_real(shape, size):
    x = images(4, 1, *shape)
    augment, params = styles(size, reference=1)
    found = augment.apply(x, params)
    half = [int(size * n / 2) for n in shape]
    for sample in range(4):
        reference = x[sample - sample % 2 + 1, 0].numpy()
        expected, imaginary = by_full_transforms(x[sample, 0].numpy(), reference, half=half)
        assert imaginary < 1e-10
        inside = np.abs(expected) < 50
        np.testing.assert_allclose(found[sample, 0].numpy()[inside], expected[inside], atol=1e-6)


def test_an_even_window_would_not_come_back_real():
    image, other = images(2, 1, 32, 32)[:, 0].numpy()
    own, their = np.fft.fftn(image), np.fft.fftn(other)
    window = np.fft.ifftshift(np.pad(np.ones((8, 8), dtype=bool), 12))
    spectrum = np.where(window, np.abs(their), np.abs(own)) * np.exp(1j * np.angle(own))
    assert np.abs(np.fft.ifftn(spectrum).imag).max() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_styles_keep_phases_and_take_amplitudes(shape):
    x = images(2, 1, *shape)
    x[1].clamp_(-1, 1)  # only the reference has voxels far out, so nothing of the other is clipped
    augment, params = styles(0.5, reference=0, batch=2)
    out = augment.apply(x, params)[1, 0].numpy()
    assert np.abs(out).max() < 50
    before, after, reference = (np.fft.fftn(found) for found in (x[1, 0].numpy(), out, x[0, 0].numpy()))
    window = centred_window(shape, [int(0.5 * n / 2) for n in shape])
    window[(0,) * len(shape)] = False
    np.testing.assert_allclose(np.abs(after)[window], np.abs(reference)[window], rtol=1e-6)
    turn = np.angle(after * before.conj())
    turn[(0,) * len(shape)] = 0  # the mean may change its sign
    np.testing.assert_allclose(turn[np.abs(before) > 1e-6], 0, atol=1e-8)


def test_all_of_a_group_get_the_style_that_its_first_sample_draws():
    augment = BatchStyles(BatchStylesConfig(group=3))
    x = images(6, 1, 12, 10)
    params = augment.draw(torch.arange(6))
    alike = {key: value.clone() for key, value in params.items()}
    for place in range(6):
        for key in ("reference", "size"):
            alike[key][place] = params[key][place - place % 3]
    assert not torch.equal(alike["size"], params["size"])
    assert torch.equal(augment.apply(x, params), augment.apply(x, alike))
    drawn = BatchStyles(BatchStylesConfig(group=3)).draw(torch.arange(900))["reference"]
    assert stats.chisquare(np.bincount(drawn)).pvalue > 0.01


@pytest.mark.parametrize("augment", [BatchStyles(), FourierMix()])
def test_a_mixed_spectrum_stays_in_the_range_of_both_images_and_leaves_labels(augment):
    x = torch.rand(4, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    x[::2] *= 0.3
    label = (x > 0.2).to(torch.int16)
    view = Pipeline([augment])(x, SEEDS, label)
    assert not torch.equal(view.image, x)
    assert view.image.min() >= 0
    assert view.image.max() <= 1
    assert torch.equal(view.label, label)


def test_a_flat_image_takes_the_mean_and_nothing_else():
    x = torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    x[1] = 0.1
    augment, params = styles(0.5, reference=0, batch=2)
    out = augment.apply(x, params)
    torch.testing.assert_close(out[1], x[0].mean().expand_as(out[1]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_amplitudes_equal_full_transforms(shape):
    x = images(4, 1, *shape)
    mix = FourierMix(FourierMixConfig(weight=(0.3, 0.9), size=(0.4, 0.4)))
    params = mix.draw(SEEDS)
    found = mix.apply(x, params)
    for sample, weight in enumerate(params["weight"].tolist()):
        expected, _ = by_full_transforms(
            x[sample, 0].numpy(), x[sample ^ 1, 0].numpy(), half=[int(0.4 * n / 2) for n in shape], weight=weight
        )
        inside = np.abs(expected) < 50
        np.testing.assert_allclose(found[sample, 0].numpy()[inside], expected[inside], atol=1e-6)


def test_partners_are_others_of_the_group_each_alike():
    partner = Mixup(MixupConfig(group=4)).draw(torch.arange(1200))["partner"]
    rows = partner_rows(partner, 4)
    own = torch.arange(1200)
    assert (rows != own).all()
    assert torch.equal(rows // 4, own // 4)
    assert stats.chisquare(np.bincount(partner, minlength=4)[1:]).pvalue > 0.01


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_averages_by_a_beta_weight(alpha):
    x = images(4, 2, 6, 5, 4, dtype=torch.float32)
    mixup = Mixup(MixupConfig(alpha=alpha, group=4))
    params = mixup.draw(SEEDS)
    found = mixup.apply(x, params)
    for sample, (partner, weight) in enumerate(zip(params["partner"], params["weight"], strict=True)):
        other = x[(sample + int(partner)) % 4]
        np.testing.assert_allclose(found[sample], (1 - weight) * x[sample] + weight * other, atol=1e-5)
    weights = mixup.draw(torch.arange(500))["weight"].double().numpy()
    assert stats.kstest(weights, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_mixup_refuses_label_maps():
    x = images(2, 1, 4, 4, 4, dtype=torch.float32)
    with pytest.raises(ConfigError) as caught:
        Pipeline([Mixup()])(x, SEEDS[:2], torch.ones(2, 1, 4, 4, 4, dtype=torch.uint8))
    assert caught.value.code == "E_MIXED_LABELS"


@pytest.mark.parametrize("augment", [BatchStyles(), FourierMix(), Mixup(), Cutmix()])
def test_a_batch_must_be_made_of_whole_groups(augment):
    with pytest.raises(ConfigError) as caught:
        augment(images(3, 1, 4, 4, 4, dtype=torch.float32), SEEDS[:3])
    assert caught.value.code == "E_GROUP"


@pytest.mark.parametrize("shape", [(16, 12, 10), (16, 12), (16, 12, 1)])
def test_cutmix_takes_one_box_of_image_and_label_from_the_same_place_of_the_partner(shape):
    whose = torch.arange(6).view(6, 1, *[1] * len(shape)).expand(6, 1, *shape)
    cutmix = Cutmix(CutmixConfig(group=3, share=(0.2, 0.5)))
    params = cutmix.draw(torch.arange(6)) | {"on": torch.tensor([True, True, True, True, True, False])}
    rows = partner_rows(params["partner"], 3)
    place = torch.arange(float(whose[0].numel())).reshape(1, 1, *shape)
    image = cutmix.apply(whose * 10_000.0 + place, params)
    label = cutmix.apply_label(whose.to(torch.uint8), params)
    assert label.dtype == torch.uint8
    assert torch.equal(image, label * 10_000.0 + place)
    assert (label[5] == 5).all()
    for sample in range(5):
        taken = label[sample, 0].numpy() == int(rows[sample])
        assert set(np.unique(label[sample])) == {sample, int(rows[sample])}
        sides = [len(np.unique(found)) for found in np.nonzero(taken)]
        assert taken.sum() == np.prod(sides)
        thick = sum(n > 1 for n in shape)
        for side, length in zip(sides, shape, strict=True):
            assert length == 1 or abs(side - length * float(params["weight"][sample]) ** (1 / thick)) <= 0.5


def test_cutmix_in_a_pipeline_moves_the_label_map_with_the_image():
    x = torch.rand(4, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0)) + torch.arange(4.0).view(4, 1, 1, 1, 1)
    label = x.floor().to(torch.uint8)
    view = Pipeline([Cutmix(CutmixConfig(share=(0.3, 0.5)))])(x, SEEDS, label)
    assert not torch.equal(view.label, label)
    assert torch.equal(view.image.floor().to(torch.uint8), view.label)


@pytest.mark.realdata
@pytest.mark.skipif(not REAL_DATA.exists(), reason="the shared folder of real images is not here")
def test_styles_of_real_brain_images_keep_structure_and_take_the_look_of_the_reference():
    files = sorted((REAL_DATA / "hippocampus_msd" / "imagesTr").glob("*.nii.gz"))[:2]
    arrays = [np.asarray(nib.load(file).dataobj, dtype=np.float32)[:32, :40, :24] for file in files]
    x = torch.stack([torch.from_numpy((a - a.min()) / np.ptp(a))[None] for a in arrays])
    x[1] = 0.2 + 0.5 * x[1]  # a scanner of less contrast
    augment, params = styles(0.1, reference=0, batch=2)
    out = augment.apply(x, params)
    assert torch.equal(out[0], x[0])
    assert abs(out[1].mean() - x[0].mean()) < 0.02 < abs(x[1].mean() - x[0].mean())
    detail = [found - torch.nn.functional.avg_pool3d(found, 5, 1, 2) for found in (x[1:], out[1:])]
    assert np.corrcoef(detail[0].flatten(), detail[1].flatten())[0, 1] > 0.9

"""Our CT augments beside their counterparts elsewhere, with the same parameters.

====================  ===============================================  =========================================
medssl                counterpart                                      agreement
====================  ===============================================  =========================================
multi_window          MONAI ScaleIntensityRange, SimpleITK             1e-6
                      IntensityWindowing
hu_shift              MONAI ShiftIntensity                             1e-3 HU (float32 at 3000 HU)
hu_scale              MONAI ScaleIntensity(factor)                     1e-3 HU above water; below it ours keeps air
kernel_sharpness      scipy gaussian_filter and the unsharp formula    0.02 HU
kernel_sharpness      MONAI GaussianSharpen with the first blur off    interior, 0.3 % of the range: its Gaussian is
                                                                       cut at 4 sigma, ours at 3; it pads with zeros
hu_noise, white       TorchIO Noise, MONAI RandGaussianNoise           in distribution (KS): each has its own stream
hu_noise, correlated  scipy gaussian_filter of white noise             spectrum of power, 10 %
streaks               none                                             formula with loops in test_ct.py
====================  ===============================================  =========================================
"""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torchio as tio
from monai import transforms as mt
from scipy import ndimage, stats

from medssl.augment.ct import (
    HuNoise,
    HuNoiseConfig,
    HuScale,
    HuScaleConfig,
    HuShift,
    HuShiftConfig,
    KernelSharpness,
    KernelSharpnessConfig,
    MultiWindow,
    MultiWindowConfig,
)

SEED = torch.tensor([5])


def smooth_hu(*shape: int) -> torch.Tensor:
    white = np.random.default_rng(0).normal(size=shape)
    field = ndimage.gaussian_filter(white, 2.0)
    return torch.from_numpy(field / np.abs(field).max() * 2000 + 500).float()[None, None]


@pytest.mark.parametrize("window", [(-1350.0, 150.0), (-160.0, 240.0), (0.0, 80.0)])
def test_a_window_equals_monais_and_simpleitks(window):
    x = smooth_hu(9, 8, 7)
    found = MultiWindow(MultiWindowConfig(windows=(window,)))(x, SEED)[0]
    monai = mt.ScaleIntensityRange(*window, 0.0, 1.0, clip=True)(x[0])
    itk = sitk.IntensityWindowing(sitk.GetImageFromArray(x[0, 0].numpy()), *window, 0.0, 1.0)
    np.testing.assert_allclose(found, monai, atol=1e-6)
    np.testing.assert_allclose(found[0], sitk.GetArrayFromImage(itk), atol=1e-6)


def test_a_shift_and_a_scale_equal_monais_on_what_is_denser_than_water():
    x = smooth_hu(9, 8, 7).abs()
    shifted = HuShift(HuShiftConfig(shift_hu=(6.0, 6.0)))(x, SEED)[0]
    scaled = HuScale(HuScaleConfig(percent=(4.0, 4.0)))(x, SEED)[0]
    np.testing.assert_allclose(shifted, mt.ShiftIntensity(offset=6.0)(x[0]), atol=1e-3)
    np.testing.assert_allclose(scaled, mt.ScaleIntensity(minv=None, maxv=None, factor=0.04)(x[0]), atol=1e-3)


@pytest.mark.parametrize("amount", [-0.6, 0.6])
@pytest.mark.parametrize("sizes", [(0.7, 0.7, 3.0), (0.5, 1.2, 1.0)])
def test_a_kernel_equals_scipys_blur_in_the_unsharp_formula(amount, sizes):
    x = smooth_hu(20, 18, 6)
    config = KernelSharpnessConfig(amount=(amount, amount), sigma_mm=(1.1, 1.1))
    found = KernelSharpness(config)(x, SEED, torch.tensor([sizes], dtype=torch.float64))[0, 0]
    image = x[0, 0].double().numpy()
    sigma = (1.1 / sizes[0], 1.1 / sizes[1], 0.0)
    blurred = ndimage.gaussian_filter(image, sigma, mode="nearest", truncate=3.0)
    np.testing.assert_allclose(found, image + amount * (image - blurred), atol=0.02)


def test_a_kernel_equals_monais_sharpening_where_its_first_blur_is_off():
    x = smooth_hu(32, 30)
    config = KernelSharpnessConfig(amount=(0.7, 0.7), sigma_mm=(1.5, 1.5))
    found = KernelSharpness(config)(x, SEED)[0, 0]
    monai = mt.GaussianSharpen(sigma1=1e-3, sigma2=1.5, alpha=0.7)(x[0])[0]
    inside = (slice(8, -8), slice(8, -8))
    span = float(x.max() - x.min())
    np.testing.assert_allclose(found[inside], monai[inside], atol=0.003 * span)


def test_white_noise_is_distributed_as_torchios_and_monais():
    sigma = 12.0
    x = torch.zeros(1, 1, 24, 24, 24)
    found = HuNoise(HuNoiseConfig(dose=(0.5, 0.5), sigma_hu=sigma, fwhm_mm=(0.0, 0.0)))(x, SEED).flatten().numpy()
    torchio = tio.Noise(mean=0.0, std=sigma, seed=3)(tio.ScalarImage(tensor=x[0])).data.flatten().numpy()
    monai = mt.RandGaussianNoise(prob=1.0, std=sigma, sample_std=False).set_random_state(4)(x[0]).flatten().numpy()
    for other in (torchio, monai):
        assert stats.ks_2samp(found, np.asarray(other)).pvalue > 0.01


def test_correlated_noise_has_the_power_spectrum_of_blurred_white_noise():
    sizes, fwhm = (0.8, 1.0, 2.0), 2.0
    config = HuNoiseConfig(dose=(0.5, 0.5), sigma_hu=10.0, fwhm_mm=(fwhm, fwhm))
    x = torch.zeros(1, 1, 80, 80, 200)
    found = HuNoise(config)(x, SEED, torch.tensor([sizes], dtype=torch.float64))[0, 0].numpy()
    white = np.random.default_rng(1).normal(size=x.shape[2:])
    other = ndimage.gaussian_filter(white, (fwhm / 2.3548 / 0.8, fwhm / 2.3548, 0), mode="nearest", truncate=3.0)
    other *= 10.0 / other[8:-8, 8:-8].std()

    def spectrum(noise: np.ndarray) -> np.ndarray:
        power = (np.abs(np.fft.rfft2(noise[8:-8, 8:-8], axes=(0, 1))) ** 2).mean(axis=2)
        return power[:32].reshape(8, 4, 33)[..., :32].reshape(8, 4, 8, 4).mean(axis=(1, 3))

    expected = spectrum(other)
    high = expected > 0.05 * expected.max()
    np.testing.assert_allclose(spectrum(found)[high], expected[high], rtol=0.1)

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy import interpolate, stats

from medssl.augment import fields as module
from medssl.augment.fields import add_normal, normal_field, smooth_field, uniform_field
from medssl.errors import ConfigError

MASK = (1 << 64) - 1
SEEDS = torch.tensor([0, 3, -9, 2**62, 2**63 - 1])
FIELDS = [normal_field, uniform_field]


def splitmix(state: int) -> int:
    """The finaliser as published, in Python's whole numbers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def words(seed: int, stream: int, num: int) -> list[int]:
    gamma = 0x9E3779B97F4A7C15
    base = splitmix((splitmix((seed + gamma) & MASK) + stream) & MASK)
    return [splitmix((base + (n + 1) * gamma) & MASK) for n in range(num)]


def test_the_oracle_is_splitmix64():
    # first outputs for the state 1234567, as listed at rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
    found = [splitmix((1234567 + (n + 1) * 0x9E3779B97F4A7C15) & MASK) for n in range(3)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("numba", [True, False])
def test_numbers_are_those_of_the_formula_in_whole_numbers(monkeypatch, numba):
    if not numba:
        monkeypatch.setattr(module, "compiled", lambda: None)
    normal, uniform = normal_field(SEEDS, (2, 3, 5)), uniform_field(SEEDS, (2, 3, 5))
    for row, seed in enumerate(SEEDS.tolist()):
        parts = [word >> shift & 0xFFFF for word in words(seed, 1, 8) for shift in (0, 16, 32, 48)][:30]
        wanted = [NormalDist().inv_cdf((part + 0.5) / 65536) for part in parts]
        np.testing.assert_allclose(normal[row].flatten().numpy(), wanted, rtol=1e-6)
        halves = [word >> shift & 0xFFFFFFFF for word in words(seed, 2, 15) for shift in (0, 32)]
        assert uniform[row].flatten().tolist() == [(half >> 8) / 2**24 for half in halves]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 5, 3), (1, 40, 33), (3, 1025)])
@pytest.mark.parametrize("field", FIELDS)
def test_the_kernel_and_torch_give_the_same_bits(monkeypatch, field, shape):
    fast = field(SEEDS, shape)
    monkeypatch.setattr(module, "compiled", lambda: None)
    assert torch.equal(fast, field(SEEDS, shape))
    assert fast.shape == (len(SEEDS), *shape)
    assert fast.dtype == torch.float32


def test_noise_added_in_one_pass_has_the_bits_of_the_sum(monkeypatch):
    x = torch.randn(5, 2, 9, 11, 13, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.0, 0.1, 0.37, 5.0, 1e-3])
    before, fast = x.clone(), add_normal(x, SEEDS, sigma)
    assert torch.equal(x, before)
    assert torch.equal(fast[0], x[0])
    assert torch.equal(fast, x + sigma[:, None, None, None, None] * normal_field(SEEDS, x.shape[1:]))
    turned = x.transpose(2, 4).contiguous().transpose(2, 4)
    assert torch.equal(add_normal(turned, SEEDS, sigma.double()), fast)
    monkeypatch.setattr(module, "compiled", lambda: None)
    assert torch.equal(add_normal(x, SEEDS, sigma), fast)


@pytest.mark.parametrize("field", FIELDS)
def test_a_number_depends_on_its_place_and_its_seed_alone(field):
    whole = field(SEEDS, (1, 3000)).flatten(1)
    for row in range(len(SEEDS)):
        assert torch.equal(field(SEEDS[row : row + 1], (1, 3000)).flatten(), whole[row])
    assert torch.equal(field(SEEDS, (1, 1777)).flatten(1), whole[:, :1777])
    assert torch.equal(field(SEEDS, (3, 10, 100)).flatten(1), whole)
    assert len(whole.unique(dim=0)) == len(SEEDS)


@pytest.mark.parametrize("field", FIELDS)
def test_threads_change_no_bit(field):
    given = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(field(SEEDS, (1, 50, 50, 30)))
    finally:
        torch.set_num_threads(given)
    assert torch.equal(*results)


def test_normal_numbers_have_the_moments_and_the_distribution_of_a_normal():
    values = normal_field(torch.arange(8), (1, 64, 64, 32)).double()
    num = values.numel()
    assert abs(values.mean()) < 4 / num**0.5
    assert abs(values.var() - 1) < 4 * (2 / num) ** 0.5 + 2e-5
    assert abs(stats.skew(values.flatten().numpy())) < 4 * (6 / num) ** 0.5
    assert abs(stats.kurtosis(values.flatten().numpy())) < 4 * (24 / num) ** 0.5 + 2e-3  # cut off at 4.17
    per_sample = values.flatten(1).numpy()[:, ::13]
    assert min(stats.kstest(row, "norm").pvalue for row in per_sample) > 1e-3


def test_uniform_numbers_are_even_in_the_half_open_interval():
    values = uniform_field(torch.arange(8), (1, 64, 64, 32))
    assert values.min() >= 0
    assert values.max() < 1
    counts = np.histogram(values.numpy(), bins=256, range=(0, 1))[0]
    assert stats.chisquare(counts).pvalue > 1e-3
    assert min(stats.kstest(row, "uniform").pvalue for row in values.flatten(1).numpy()[:, ::13]) > 1e-3


@pytest.mark.parametrize("field", FIELDS)
def test_neighbours_channels_and_samples_of_near_seeds_are_not_correlated(field):
    values = field(torch.arange(40, 46), (2, 32, 32, 32)).double()
    values = (values - values.mean()) / values.std()
    bound = 4.5 / (values.numel() / 2) ** 0.5
    for axis in (0, 1, 2, 3, 4):
        for lag in (1, 2, 3, 4) if axis > 1 else (1,):
            num = values.shape[axis] - lag
            pairs = values.narrow(axis, 0, num) * values.narrow(axis, lag, num)
            assert abs(pairs.mean()) < bound * (values.numel() / pairs.numel()) ** 0.5
    squares = values**2 - 1  # no correlation of strengths either
    assert abs((squares[..., 1:] * squares[..., :-1]).mean()) < 3 * bound
    spectrum = torch.fft.rfft(values.flatten(1)).abs()[:, 1:] ** 2 / values[0].numel()
    assert spectrum.max() < 25  # the maximum of 200 000 exponential numbers is near 12


def test_normal_and_uniform_numbers_of_a_seed_are_not_correlated():
    normal, uniform = normal_field(SEEDS, (1, 100_000)), uniform_field(SEEDS, (1, 100_000))
    both = np.corrcoef(normal.flatten().numpy(), uniform.flatten().numpy())[0, 1]
    assert abs(both) < 4 / normal.numel() ** 0.5


@pytest.mark.parametrize("taps", [False, True])
@pytest.mark.parametrize(
    ("knots", "shape"), [((4, 5, 7), (9, 12, 6)), ((6, 4), (20, 17)), ((4, 5, 4), (8, 1, 2)), ((9, 4, 4), (3, 5, 5))]
)
def test_a_smooth_field_is_the_tensor_product_spline_of_scipy(monkeypatch, knots, shape, taps):
    if taps:
        monkeypatch.setattr(module, "_multiplies", lambda device: False)
    coefficients = torch.randn(2, 3, *knots, generator=torch.Generator().manual_seed(0))
    field = smooth_field(coefficients, shape)
    wanted = coefficients.double().numpy()
    for axis, (count, num) in enumerate(zip(knots, shape, strict=True), start=2):
        place = np.linspace(0, count - 3, num) if num > 1 else np.zeros(1)
        wanted = interpolate.BSpline(np.arange(-3, count + 1.0), wanted, 3, axis=axis)(place)
    np.testing.assert_allclose(field.numpy(), wanted, rtol=0, atol=2e-6)
    assert field.is_contiguous()


def test_a_smooth_field_keeps_constants_and_the_range_of_its_coefficients():
    torch.testing.assert_close(
        smooth_field(torch.full((1, 1, 5, 6, 4), 3.0), (9, 8, 7)), torch.full((1, 1, 9, 8, 7), 3.0)
    )
    field = smooth_field(torch.rand(4, 1, 7, 7, generator=torch.Generator().manual_seed(0)), (64, 64))
    assert field.min() >= 0
    assert field.max() <= 1


def test_too_few_coefficients_are_refused():
    with pytest.raises(ConfigError, match=r"grid of \(4, 3\); a cubic spline needs 4"):
        smooth_field(torch.zeros(1, 1, 4, 3), (8, 8))


@pytest.mark.gpu
def test_the_gpu_has_the_bits_of_the_cpu():
    x = torch.randn(5, 1, 20, 21, generator=torch.Generator().manual_seed(0))
    sigma = torch.linspace(0, 1, 5)
    for field in FIELDS:
        assert torch.equal(field(SEEDS, (2, 33, 9), "cuda").cpu(), field(SEEDS, (2, 33, 9)))
    assert torch.equal(add_normal(x.cuda(), SEEDS, sigma).cpu(), add_normal(x, SEEDS, sigma))
    coefficients = torch.randn(2, 1, 5, 6, 4)
    torch.testing.assert_close(
        smooth_field(coefficients.cuda(), (30, 40, 20)).cpu(),
        smooth_field(coefficients, (30, 40, 20)),
        rtol=0,
        atol=1e-5,
    )

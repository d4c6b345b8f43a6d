"""Reconstruction losses against numpy on the masked voxels alone."""

import numpy as np
import pytest
import torch

from medssl.losses.reconstruction import masked_mse, normalise_blocks, visible_mean


def sample(shape=(2, 2, 4, 6, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(shape, generator=generator)
    mask = torch.rand((shape[0], 1, *shape[2:]), generator=generator) < 0.6
    return image, mask, generator


def test_error_is_the_mean_over_masked_voxels():
    image, mask, generator = sample()
    prediction = torch.randn(image.shape, generator=generator)
    hidden = np.broadcast_to(mask.numpy(), image.shape)
    expected = np.mean((prediction.numpy()[hidden] - image.numpy()[hidden]) ** 2)
    assert float(masked_mse(prediction, image, mask)) == pytest.approx(float(expected), rel=1e-6)


def test_visible_voxels_change_neither_the_loss_nor_any_gradient():  # N1
    image, mask, generator = sample()
    prediction = torch.randn(image.shape, generator=generator, requires_grad=True)
    loss = masked_mse(prediction, image, mask)
    loss.backward()
    wild = torch.where(mask, prediction.detach(), torch.full_like(image, float("nan"))).requires_grad_()
    wild_loss = masked_mse(wild, torch.where(mask, image, torch.full_like(image, float("inf"))), mask)
    wild_loss.backward()
    assert float(wild_loss.detach()) == float(loss.detach())
    assert torch.equal(wild.grad, prediction.grad)
    assert (prediction.grad[~mask.expand_as(image)] == 0).all()


def test_prediction_equal_to_the_target_where_masked_has_loss_zero():  # methods.md 8.14
    image, mask, generator = sample()
    prediction = torch.where(mask, image, torch.randn(image.shape, generator=generator))
    assert float(masked_mse(prediction, image, mask)) == 0.0


def test_loss_is_float32_under_autocast_of_half_precision_predictions():
    image, mask, _ = sample()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = masked_mse(image.bfloat16(), image, mask)
    assert loss.dtype == torch.float32
    assert 0 < float(loss) < 1e-4


def test_empty_mask_and_wrong_shapes_are_refused():
    image, mask, _ = sample()
    with pytest.raises(ValueError, match="no voxel is masked"):
        masked_mse(image, image, torch.zeros_like(mask))
    with pytest.raises(ValueError, match="must be equal in shape"):
        masked_mse(image, image, mask.expand_as(image))
    with pytest.raises(ValueError, match="must be equal in shape"):
        masked_mse(image[:, :1], image, mask)


def test_visible_mean_is_that_of_the_unmasked_voxels_of_each_sample_and_channel():
    image, mask, _ = sample()
    found = visible_mean(image, mask)
    assert found.shape == (2, 2, 1, 1, 1)
    for b in range(2):
        for c in range(2):
            expected = image[b, c].numpy()[~mask[b, 0].numpy()].mean()
            assert float(found[b, c]) == pytest.approx(float(expected), abs=1e-6)


def test_visible_mean_of_nothing_is_zero():
    assert float(visible_mean(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2, dtype=torch.bool))) == 0.0


@pytest.mark.parametrize("shape", [(2, 2, 4, 6), (2, 2, 4, 6, 8)])
def test_blocks_come_out_with_mean_zero_and_variance_one(shape):
    block = (2, 3, 4)[: len(shape) - 2]
    image = sample(shape)[0] * 7 + 3
    found = normalise_blocks(image, block)
    assert found.shape == image.shape
    corner = tuple(slice(0, edge) for edge in block)
    part = image[(1, 1, *corner)].numpy().astype(np.float64)
    expected = (part - part.mean()) / np.sqrt(part.var(ddof=1) + 1e-6)
    np.testing.assert_allclose(found[(1, 1, *corner)].numpy(), expected, atol=1e-5)


def test_flat_blocks_become_zero():
    assert (normalise_blocks(torch.full((1, 1, 4, 4), 5.0), (2, 2)) == 0).all()


def test_predicting_zero_for_normalised_blocks_costs_about_one():  # methods.md 8.14
    image = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0)) * 9 + 4
    target = normalise_blocks(image, (8, 8, 8))
    loss = masked_mse(torch.zeros_like(target), target, torch.ones(1, 1, 32, 32, 32, dtype=torch.bool))
    assert float(loss) == pytest.approx(1.0, abs=0.01)

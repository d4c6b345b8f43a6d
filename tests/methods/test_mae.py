"""MAE: N1 and N2 of methods.md 10, what the network may see, and its guards."""

import numpy as np
import pytest
import torch

from medssl.augment.images import Images
from medssl.errors import ConfigError
from medssl.methods.mae import MAE, Config, block_mask, light_width, num_masked
from medssl.nn.unet import Config as UNetConfig
from medssl.nn.unet import ResidualUNetEncoder
from medssl.trainable import Batch

TINY = {"crop_voxels": [16, 16, 8], "block_voxels": [4, 4, 4]}


def encoder(*, spatial_dims=3, strides=(2, 2), in_channels=1):
    torch.manual_seed(0)
    config = UNetConfig(channels=(4, 8), strides=strides, blocks=(1, 1))
    return ResidualUNetEncoder(config, in_channels=in_channels, spatial_dims=spatial_dims)


def mae(*, net=None, **options):
    return MAE(Config.parse({**TINY, **options}), encoder=net or encoder(), seed=0)


def batch(shape=(2, 1, 16, 16, 8), seed=0):
    image = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return Batch({"image": image}, torch.arange(shape[0]) + 3, tuple(f"case {i}" for i in range(shape[0])))


def losses_of(method, data):
    return method(method.prepare(data, training=method.training))


def test_three_quarters_of_a_thousand_blocks_are_masked():  # N2
    mask = block_mask(torch.tensor([0, 1]), (160, 160, 160), (16, 16, 16), ratio=0.75)
    blocks = mask.view(2, 10, 16, 10, 16, 10, 16).float().mean(dim=(2, 4, 6))
    assert set(blocks.unique().tolist()) == {0.0, 1.0}  # whole blocks
    assert blocks.sum(dim=(1, 2, 3)).tolist() == [750, 750]
    assert num_masked(1000, 0.75) == 750


def test_masks_depend_on_the_seed_alone_and_cover_every_block_evenly():
    seeds = torch.arange(400)
    masks = block_mask(seeds, (8, 8, 8), (4, 4, 4), ratio=0.75)
    assert torch.equal(block_mask(torch.tensor([7, 3]), (8, 8, 8), (4, 4, 4), ratio=0.75)[1], masks[3])
    share = masks[:, 0, ::4, ::4, ::4].float().mean(dim=0)
    assert ((share - 0.75).abs() < 0.1).all()


@pytest.mark.parametrize("strides", [(1, 2), (2, 2)])
@pytest.mark.parametrize("learned_token", [False, True])
def test_prediction_does_not_depend_on_hidden_voxels(strides, learned_token):  # N1
    method = mae(net=encoder(strides=strides), learned_token=learned_token).eval()
    image = batch()["image"]
    mask = block_mask(torch.tensor([1, 2]), (16, 16, 8), (4, 4, 4), ratio=0.75)
    other = torch.where(mask, torch.full_like(image, 99.0), image)
    assert torch.equal(method.reconstruct(image, mask), method.reconstruct(other, mask))
    assert not torch.equal(method.reconstruct(image, mask), method.reconstruct(image + 1, mask))


def test_loss_is_taken_over_hidden_voxels_alone():  # N1
    method = mae().eval()
    data = batch()
    mask = block_mask(data.seeds, (16, 16, 8), (4, 4, 4), ratio=0.75).numpy()
    with torch.no_grad():
        losses = losses_of(method, data)
        prediction = method.reconstruct(data["image"], torch.from_numpy(mask)).numpy()
    image = data["image"].numpy()
    assert float(losses.total) == pytest.approx(float(((prediction - image)[mask] ** 2).mean()), rel=1e-5)
    baseline = [np.square(image[b][mask[b]] - image[b][~mask[b]].mean()) for b in range(2)]
    ratio = float(losses.total) / float(np.concatenate(baseline).mean())
    assert float(losses.monitors["mean_predictor_ratio"]) == pytest.approx(ratio, rel=1e-5)


def test_decoder_that_gives_the_target_has_loss_zero():  # methods.md 8.14
    method = mae().eval()
    data = batch()
    method.reconstruct = lambda image, mask: torch.where(mask, data["image"], torch.full_like(image, 7.0))
    losses = losses_of(method, data)
    assert losses.scalars() == {"loss": 0.0, "reconstruction": 0.0, "mean_predictor_ratio": 0.0}


@pytest.mark.parametrize("flat", [0, 4])
def test_normalised_target_costs_the_chance_level_for_a_network_that_predicts_nothing(flat):  # methods.md 8.14, 11.1
    method = mae(normalise_target=True).eval()
    for parameter in method.decoder.parameters():
        parameter.data.zero_()
    data = batch()
    data["image"][:, :, :flat] = 0.0  # air, which normalises to 0 and lowers the loss itself
    losses = losses_of(method, data)
    assert float(losses.total.detach()) == pytest.approx(1.0 - flat / 16, abs=0.15)
    assert float(losses.monitors[method.chance_monitor]) == pytest.approx(1.0, abs=1e-6)
    assert method.chance_level() == mae().chance_level() == 1.0


def test_constant_encoder_does_no_better_than_the_mean():
    method = mae().eval()
    for parameter in method.parameters():
        parameter.data.zero_()
    assert float(losses_of(method, batch()).monitors["mean_predictor_ratio"]) > 0.99


def test_token_is_learned():
    method = mae(learned_token=True)
    losses_of(method, batch()).total.backward()
    assert method.token.grad.abs().sum() > 0
    assert mae().token is None


def test_augmentation_happens_while_training_alone():
    method = mae(augment=[{"name": "brightness", "shift": [2.0, 3.0]}])
    data = batch()
    assert (method.prepare(data, training=True)["image"] - data["image"]).min() > 1.9
    assert torch.equal(method.prepare(data, training=False)["image"], data["image"])


def test_fixed_part_of_the_augmentation_reaches_held_out_images_and_probes():
    net = encoder()
    method = mae(net=net, augment=[{"name": "window", "low_hu": -100.0, "high_hu": 100.0, "jitter_hu": 20.0}]).eval()
    hu = (100 * batch()["image"]).round()
    expected = ((hu + 100) / 200).clamp(0, 1)
    data = Batch({"image": hu.to(torch.int16)}, torch.tensor([0, 1]), ("a", "b"))
    torch.testing.assert_close(method.prepare(data, training=False)["image"], expected)
    pooled = torch.cat([level.flatten(2).mean(-1) for level in net(expected)], dim=1)
    torch.testing.assert_close(method.embed(hu), pooled)


def test_decoder_is_lighter_than_the_encoder():
    net = ResidualUNetEncoder(UNetConfig(), in_channels=1, spatial_dims=3)
    method = MAE(Config(), encoder=net, seed=0)
    size = lambda module: sum(p.numel() for p in module.parameters())
    assert size(method.decoder) < size(net) / 2
    assert light_width(net) == (8, *(max(8, channels // 2) for channels in net.channels[:-1]))
    assert light_width(encoder(strides=(1, 2))) == (8,)
    assert mae(decoder_width=[8, 8]).decoder.config["width"] == [8, 8]


def test_images_in_two_dimensions_and_of_several_channels_work():
    options = {"crop_voxels": [16, 16, 1], "block_voxels": [4, 4, 1]}
    method = mae(net=encoder(spatial_dims=2, in_channels=3), **options)
    assert torch.isfinite(losses_of(method, batch((2, 3, 16, 16))).total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_voxels": [4, 4, 3]}, "not a multiple"),
        ({"block_voxels": [0, 4, 4]}, "not a multiple"),
        ({"mask_ratio": 0.01}, "none or all"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"mask_ration": 0.5}, "Did you mean mask_ratio"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Config.parse({**TINY, **options}, source="mae")


def test_crop_of_another_size_and_a_thick_crop_in_two_dimensions_are_refused():
    with pytest.raises(ConfigError, match="crop_voxels says"):
        losses_of(mae(), batch((1, 1, 8, 16, 8)))
    with pytest.raises(ConfigError, match="must be 1"):
        mae(net=encoder(spatial_dims=2))


def test_sampler_cuts_the_configured_crop():
    sampler = mae(inside_body=False, region={"SI": [0.3, 0.7]}, crop_mm=[32.0, 32.0, 16.0]).view_sampler()
    assert (sampler.crop_voxels, sampler.crop_mm) == ((16, 16, 8), (32.0, 32.0, 16.0))
    assert (sampler.placing.inside_body, sampler.placing.region) == (False, {"SI": (0.3, 0.7)})
    assert sampler.margin == (0, 0, 0)


def test_sampler_reads_so_far_beyond_the_crop_as_the_augmentation_reaches():
    shifted = [{"name": "affine", "rotation_deg": [0.0] * 3, "scale": [1.0, 1.0], "translation_mm": [6.0] * 3}]
    margins = {
        spacing: MAE(
            Config.parse({**TINY, "crop_mm": crop_mm, "augment": shifted}),
            encoder=encoder(),
            seed=0,
            images=Images(spacing_mm=(spacing,) * 3),
        )
        .view_sampler()
        .margin
        for spacing, crop_mm in ((3.0, None), (6.0, None), (1.0, [96.0, 96.0, 48.0]))
    }
    assert margins[3.0] == (2, 2, 2)
    assert margins[6.0] == margins[1.0] == (1, 1, 1)


def test_a_box_with_a_margin_is_cut_to_the_crop_that_lies_in_it():
    method = mae()
    box = torch.randn(2, 1, 20, 18, 12, generator=torch.Generator().manual_seed(0)).half()
    to_box = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    to_box[:, :3, 3] = torch.tensor([2.0, 1.0, 2.0])
    tensors = {"image": box, "image_to_box": to_box, "image_spacing_mm": torch.ones(2, 3, dtype=torch.float64)}
    made = method.prepare(Batch(tensors, torch.tensor([0, 1]), ("a", "b")), training=False)
    assert torch.equal(made["image"], box[:, :, 2:18, 1:17, 2:10].float())

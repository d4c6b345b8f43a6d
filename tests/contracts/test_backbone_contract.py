"""Every backbone keeps the promises of ``Backbone``, whoever wrote it."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from array_cases import ArrayCase
from tiny import SMALL_BACKBONES
from torch import Tensor

from medssl import registry
from medssl.errors import ConfigError
from medssl.methods.base import Method
from medssl.nn.backbone import Backbone, build_backbone
from medssl.nn.decoder import Decoder
from medssl.trainable import Batch, Progress

NAMES = registry.names("nn", Backbone)
SHAPES = {2: [(32, 48), (17, 22), (5, 1)], 3: [(16, 24, 16), (13, 18, 9), (3, 5, 1)]}

every_backbone = pytest.mark.parametrize("name", NAMES)
every_dimension = pytest.mark.parametrize("spatial_dims", [2, 3])


def build(name: str, spatial_dims: int, in_channels: int = 1) -> Backbone:
    torch.manual_seed(0)
    mapping = {"name": name, **SMALL_BACKBONES.get(name, {})}
    return build_backbone(mapping, in_channels=in_channels, spatial_dims=spatial_dims).eval()


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_the_backbones_of_the_house_are_found_by_file_name() -> None:
    assert set(NAMES) >= {"unet", "swin", "segresnet", "resenc", "vit"}


@every_backbone
@every_dimension
def test_levels_have_the_declared_channels_and_strides_on_odd_sizes_too(name: str, spatial_dims: int) -> None:
    encoder = build(name, spatial_dims, in_channels=2)
    for shape in SHAPES[spatial_dims]:
        with torch.no_grad():
            pyramid = encoder(image(2, 2, *shape))
        assert [level.shape[1] for level in pyramid] == list(encoder.channels)
        assert [tuple(level.shape[2:]) for level in pyramid] == encoder.level_shapes(shape)
        for level, stride in zip(pyramid, encoder.strides, strict=True):
            assert tuple(level.shape[2:]) == tuple(-(-size // stride) for size in shape)
            assert level.isfinite().all()


@every_backbone
@every_dimension
def test_layer_groups_hold_every_parameter_once(name: str, spatial_dims: int) -> None:
    encoder = build(name, spatial_dims)
    groups = encoder.layer_groups()
    grouped = [id(parameter) for group in groups for parameter in group]
    assert all(groups)
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in encoder.parameters()}


@every_backbone
def test_layer_groups_go_from_shallow_to_deep(name: str) -> None:
    encoder = build(name, 2)
    groups = encoder.layer_groups()
    finest = encoder(image(1, 1, 32, 32))[0]
    gradients = torch.autograd.grad(finest.square().sum(), groups[0] + groups[-1], allow_unused=True)
    assert any(gradient is not None for gradient in gradients[: len(groups[0])])
    assert all(gradient is None for gradient in gradients[len(groups[0]) :])


@every_backbone
@every_dimension
def test_every_parameter_gets_a_gradient(name: str, spatial_dims: int) -> None:
    encoder = build(name, spatial_dims).train()
    pyramid = encoder(image(2, 1, *SHAPES[spatial_dims][0]))
    sum((level * image(*level.shape)).sum() for level in pyramid).backward()  # type: ignore[union-attr]
    assert [key for key, parameter in encoder.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters() if parameter.grad is not None)


@every_backbone
@every_dimension
def test_the_neck_shapes_levels_and_nothing_that_other_levels_are_made_of(name: str, spatial_dims: int) -> None:
    encoder = build(name, spatial_dims)
    x = image(1, 1, *SHAPES[spatial_dims][0])
    with torch.no_grad():
        before = encoder(x)
        for parameter in encoder.neck_parameters():
            parameter.zero_()
        after = encoder(x)
    assert torch.equal(before[-1], after[-1])
    assert all(not level.any() for level in after[:-1]) or not encoder.neck_parameters()
    assert all(encoder.get_parameter(table).ndim == spatial_dims + 2 for table in encoder.position_tables())


@pytest.mark.parametrize("name", SMALL_BACKBONES)
def test_the_default_is_built(name: str) -> None:
    with torch.device("meta"):
        assert build_backbone({"name": name}, in_channels=1, spatial_dims=3).channels


@every_backbone
def test_a_sample_does_not_depend_on_its_neighbours(name: str) -> None:
    encoder = build(name, 3).train()
    x = image(3, 1, 12, 16, 12)
    with torch.no_grad():
        together, alone = encoder(x), encoder(x[1:2])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:2], b, atol=1e-4, rtol=1e-4)


@every_backbone
@every_dimension
def test_the_config_rebuilds_the_same_encoder(name: str, spatial_dims: int) -> None:
    encoder = build(name, spatial_dims)
    again = build_backbone(encoder.config, in_channels=1, spatial_dims=spatial_dims).eval()
    again.load_state_dict(encoder.state_dict(), strict=True)
    assert again.config == encoder.config
    assert encoder.config["name"] == name
    x = image(1, 1, *SHAPES[spatial_dims][1])
    with torch.no_grad():
        for a, b in zip(encoder(x), again(x), strict=True):
            assert torch.equal(a, b)


@every_backbone
@every_dimension
def test_a_decoder_takes_any_pyramid_back_to_the_image(name: str, spatial_dims: int) -> None:
    encoder = build(name, spatial_dims)
    decoder = Decoder(encoder.channels, encoder.strides, spatial_dims, 3, skip_image_channels=1)
    for shape in SHAPES[spatial_dims]:
        x = image(2, 1, *shape)
        with torch.no_grad():
            (logits,) = decoder(encoder(x), x)
        assert logits.shape == (2, 3, *shape)


METHODS = {
    "mae": {"crop_voxels": [16, 16, 16], "block_voxels": [8, 8, 8]},
    "voco": {"crop_voxels": [8, 8, 8], "grid": [2, 2, 2], "projector_channels": [32, 16]},
}


@every_backbone
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_every_backbone(name: str, method: str) -> None:
    mapping = {"name": method, "augment": {"preset": "none"}, **METHODS[method]}
    cls, config = registry.configure("methods", mapping, Method)
    model = cls(config, encoder=build(name, 3).train(), seed=0)
    case = ArrayCase({"image": np.random.default_rng(0).normal(size=(1, 20, 20, 20)).astype(np.float32)})
    sampler = model.view_sampler()
    samples = [sampler([case] * sampler.cases_per_sample, np.random.default_rng(i)) for i in range(2)]
    tensors = {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}
    data = model.prepare(Batch(tensors, torch.arange(2), ("a", "b")), training=True)
    model.before_step(Progress(0, 2))
    before = model.encoder.layer_groups()[0][0].detach().clone()
    optimiser = torch.optim.SGD(model.encoder.parameters(), lr=0.1)
    losses = model(data)
    losses.total.backward()
    optimiser.step()
    assert losses.total.isfinite()
    assert not torch.equal(model.encoder.layer_groups()[0][0], before)


@every_backbone
def test_mixed_precision_stays_finite(name: str) -> None:
    encoder = build(name, 3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(level.isfinite().all() for level in encoder(image(2, 1, 12, 16, 12)))


@every_backbone
def test_an_unknown_key_and_impossible_dimensions_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown key chanels"):
        build_backbone({"name": name, "chanels": [1]}, in_channels=1, spatial_dims=3)
    with pytest.raises(ConfigError, match="4 spatial dimensions"):
        build_backbone({"name": name}, in_channels=1, spatial_dims=4)
    with pytest.raises(ConfigError, match="0 channels"):
        build_backbone({"name": name}, in_channels=0, spatial_dims=3)


@every_backbone
def test_the_docstring_names_a_paper(name: str) -> None:
    assert "arXiv:" in (registry.find("nn", name, Backbone).__doc__ or "")
    assert importlib.import_module(f"medssl.nn.{name}").Config.__doc__


def test_an_unknown_backbone_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean unet"):
        build_backbone({"name": "unett"}, in_channels=1, spatial_dims=3)


@pytest.mark.gpu
@every_backbone
def test_a_training_step_on_cuda_has_a_fixed_order_of_sums(name: str) -> None:
    encoder = build(name, 3).train().cuda()
    decoder = Decoder(encoder.channels, encoder.strides, 3, 3, skip_image_channels=1).cuda()
    x = image(2, 1, 24, 32, 24).cuda()
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            encoder.zero_grad()
            decoder(encoder(x), x)[0].square().mean().backward()
            runs.append([parameter.grad.clone() for parameter in encoder.parameters() if parameter.grad is not None])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

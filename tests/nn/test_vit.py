"""The vision transformer beside MONAI's on the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.networks.blocks.pos_embed_utils import build_sincos_position_embedding
from monai.networks.nets import ViT
from torch.nn import functional as F

from medssl.errors import ConfigError
from medssl.nn.vit import Config, ViTEncoder, sincos_table

SMALL: dict[str, Any] = {"patch": 4, "embed": 24, "depth": 4, "heads": 3, "grid": 2, "neck": 4}


def encoder(spatial_dims: int = 3, **options: Any) -> ViTEncoder:
    torch.manual_seed(0)
    net = ViTEncoder(Config.parse({**SMALL, **options}), in_channels=1, spatial_dims=spatial_dims)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2)
    return net.eval()


def monai_twin(net: ViTEncoder, shape: tuple[int, ...], *, qkv_bias: bool) -> ViT:
    twin = ViT(
        1,
        shape,
        4,
        hidden_size=24,
        mlp_dim=96,
        num_layers=4,
        num_heads=3,
        spatial_dims=len(shape),
        qkv_bias=qkv_bias,
    )
    state = net.state_dict()
    renamed = {"patch_embedding.position_embeddings": state["position"].flatten(2).transpose(1, 2)}
    for name, value in state.items():
        theirs = name.replace("patch_embed.", "patch_embedding.patch_embeddings.").replace("qkv", "attn.qkv")
        theirs = theirs.replace("proj.", "attn.out_proj.").replace("fc1", "mlp.linear1").replace("fc2", "mlp.linear2")
        if not name.startswith(("position", "neck")):
            renamed[theirs] = value
    missing, unexpected = twin.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert all("norm_cross_attn" in name for name in missing)
    return twin.eval()


@pytest.mark.parametrize("shape", [(8, 12), (8, 12, 4)])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_tokens_are_those_of_monai_on_the_same_weights(shape: tuple[int, ...], qkv_bias: bool) -> None:
    grid = [size // 4 for size in shape]
    net = encoder(len(shape), grid=grid, qkv_bias=qkv_bias)
    twin = monai_twin(net, shape, qkv_bias=qkv_bias)
    x = torch.randn(2, 1, *shape)
    tapped: list[torch.Tensor] = []
    net.neck[0].register_forward_pre_hook(lambda _, args: tapped.append(args[0]))
    with torch.no_grad():
        pyramid = net(x)
        last, hidden = twin(x)
    torch.testing.assert_close(pyramid[-1].flatten(2).transpose(1, 2), last, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tapped[0].flatten(2).transpose(1, 2), hidden[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [(4, 6), (2, 3, 5)])
def test_fixed_positions_are_the_formula_with_loops(grid: tuple[int, ...]) -> None:
    channels = 4 * 2 * len(grid)
    table = sincos_table(channels, grid)[0]
    for place in torch.cartesian_prod(*[torch.arange(size) for size in grid]).tolist():
        vector = []
        for n in place:
            angles = [n / 10000 ** (k / 4) for k in range(4)]
            vector += [torch.tensor(a).sin() for a in angles] + [torch.tensor(a).cos() for a in angles]
        torch.testing.assert_close(table[(slice(None), *place)], torch.stack(vector), atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize("grid", [(4, 3), (2, 3, 4)])
def test_fixed_positions_are_those_of_monai_but_for_its_order_of_axes(grid: tuple[int, ...]) -> None:
    dims = len(grid)
    theirs = build_sincos_position_embedding(list(grid), 24, dims).detach()[0].T.reshape(24, *grid)
    second, first, *rest = theirs.split(24 // dims)
    torch.testing.assert_close(sincos_table(24, grid)[0], torch.cat([first, second, *rest]), atol=1e-6, rtol=1e-5)


def test_a_learned_table_is_interpolated_to_other_sizes_and_cut_to_odd_ones() -> None:
    net = encoder(3)
    x = torch.randn(1, 1, 10, 12, 8)
    with torch.no_grad():
        pyramid = net(x)
    assert net.position is not None
    table = F.interpolate(net.position, size=(3, 3, 2), mode="trilinear", align_corners=False)
    wide = encoder(3, grid=[3, 3, 2])
    state = {**net.state_dict(), "position": table}
    wide.load_state_dict(state)
    with torch.no_grad():
        expected = wide(F.pad(x, (0, 0, 0, 0, 0, 2)))
    assert [tuple(level.shape[2:]) for level in pyramid] == [(5, 6, 4), (3, 3, 2)]
    for mine, whole in zip(pyramid, expected, strict=True):
        size = mine.shape[2]
        torch.testing.assert_close(mine, whole[:, :, :size], atol=1e-5, rtol=1e-5)


def test_a_class_token_is_seen_by_the_others_and_is_in_no_level() -> None:
    plain, with_token = encoder(2), encoder(2, class_token=True)
    with_token.load_state_dict({**plain.state_dict(), "class_token": with_token.class_token})
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        a, b = plain(x), with_token(x)
    assert a[-1].shape == b[-1].shape
    assert not torch.allclose(a[-1], b[-1])


def test_a_layer_scale_of_zero_leaves_the_embedding() -> None:
    net = encoder(2, layer_scale=1.0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "scale" in name:
                parameter.zero_()
        x = torch.randn(1, 1, 8, 8)
        embedded = net.patch_embed(x) + net.position
        expected = F.layer_norm(embedded.flatten(2).transpose(1, 2), (24,), net.norm.weight, net.norm.bias)
        torch.testing.assert_close(net(x)[-1].flatten(2).transpose(1, 2), expected)


def test_fixed_positions_need_no_table() -> None:
    net = encoder(3, position="sincos")
    assert net.position is None
    assert net.position_tables() == ()
    assert encoder(3).position_tables() == ("position",)


def test_the_default_is_that_of_unetr() -> None:
    with torch.device("meta"):
        net = ViTEncoder(Config(), in_channels=1, spatial_dims=3)
    assert net.channels == (32, 64, 128, 768)
    assert net.strides == (2, 4, 8, 16)
    assert net._taps == [2, 5, 8, 11]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads"),
        ({"depth": 1}, "levels"),
        ({"grid": 0}, "grid"),
        ({"grid": [2, 2]}, "2 numbers"),
        ({"embed": 20, "heads": 4, "position": "sincos"}, "multiple of 6"),
    ],
)
def test_an_impossible_shape_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder(3, **options)

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import UNETR, ResNet, SegResNet, SwinUNETR, ViT
from torch import Tensor, nn

from medssl.errors import CheckpointError, ConfigError
from medssl.nn.backbone import Backbone, build_backbone
from medssl.nn.families import FAMILIES, family_of
from medssl.nn.keymaps import flatten, rename


def adopted(family: str, content: object, *, prefix: str | None = None, **options: object) -> Backbone:
    """The encoder that the shapes tell, with the file's tensors and nothing else."""
    known = family_of(family)
    found = rename(known, flatten(content), prefix=prefix)
    stem = found.tensors[known.stem]
    encoder = build_backbone(
        {**known.infer(found.tensors), **options}, in_channels=stem.shape[1], spatial_dims=stem.ndim - 2
    ).eval()
    own = encoder.state_dict()
    floats = {name: value for name, value in found.tensors.items() if value.is_floating_point()}
    missing = {name for name, value in own.items() if value.is_floating_point()} - floats.keys()
    assert all(name.startswith("neck.") for name in missing)
    encoder.load_state_dict({**own, **floats}, strict=True)
    return encoder


def swin_unetr(use_v2: bool = False, feature_size: int = 12) -> SwinUNETR:
    torch.manual_seed(0)
    return SwinUNETR(
        in_channels=1, out_channels=2, feature_size=feature_size, depths=(1, 2, 1, 1), use_v2=use_v2
    ).eval()


def agree(encoder: Backbone, x: Tensor, expected: list[Tensor]) -> None:
    with torch.no_grad():
        for mine, reference in zip(encoder(x), expected, strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "wrap"),
    [
        ("voco_swin", lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}}),
        ("voco_swin", lambda state: {f"student.backbone.{key}": value for key, value in state.items()}),
        ("monai_swinunetr", lambda state: {"model": state, "epoch": 3}),
        ("monai_swinunetr", lambda state: {"net": {f"module.backbone.{key}": value for key, value in state.items()}}),
    ],
)
def test_a_swinunetr_under_any_prefix_gives_monais_features(family: str, wrap: object) -> None:
    network = swin_unetr(use_v2=family == "voco_swin")
    x = torch.randn(1, 1, 64, 32, 32)
    with torch.no_grad():
        expected = network.swinViT(x, normalize=True)
    encoder = adopted(family, wrap(network.state_dict()))  # type: ignore[operator]
    assert encoder.config["depths"] == [1, 2, 1, 1]
    assert encoder.config["window"] == 7
    assert encoder.config["use_v2"] == (family == "voco_swin")
    agree(encoder, x, expected)


def test_model_swinvit_gives_the_features_of_monais_own_load_from() -> None:
    """Names as MONAI's SwinUNETR.load_from reads them: module., fc1 and fc2, with the heads of the pretext tasks."""
    source, target = swin_unetr(), swin_unetr()
    for parameter in target.parameters():
        nn.init.normal_(parameter, std=0.02)
    published = {
        "module." + key.replace("linear1", "fc1").replace("linear2", "fc2"): value
        for key, value in source.swinViT.state_dict().items()
    }
    published |= {"module.rotation_head.weight": torch.zeros(4, 192), "module.norm.weight": torch.zeros(192)}
    target.load_from({"state_dict": published})
    x = torch.randn(1, 1, 64, 32, 32)
    with torch.no_grad():
        expected = target.swinViT(x, normalize=True)
    found = rename(family_of("swinunetr_ssl"), flatten({"state_dict": published, "optimizer": {"lr": 1}}))
    assert found.prefix == "state_dict.module."
    assert found.unused == ("state_dict.module.rotation_head.weight", "state_dict.module.norm.weight")
    agree(adopted("swinunetr_ssl", {"state_dict": published}), x, expected)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_segresnet_bundle_gives_monais_features(spatial_dims: int) -> None:
    torch.manual_seed(0)
    network = SegResNet(
        spatial_dims=spatial_dims, init_filters=8, in_channels=4, blocks_down=(1, 2, 2), blocks_up=(1, 1)
    ).eval()
    x = torch.randn(2, 4, *(17, 12, 10)[:spatial_dims])
    with torch.no_grad():
        expected = network.encode(x)[1]
    encoder = adopted("monai_segresnet", network.state_dict())
    assert encoder.config == {"name": "segresnet", "channels": [8, 16, 32], "blocks": [1, 2, 2]}
    agree(encoder, x, expected)


@pytest.mark.parametrize(
    ("block", "counts", "spatial_dims", "bias"),
    [("basic", [2, 2, 2, 2], 2, False), ("bottleneck", [1, 2, 1, 1], 2, False), ("basic", [1, 1, 1, 1], 3, True)],
)
def test_a_resnet_as_torchvision_names_it_gives_the_same_features(
    block: str, counts: list[int], spatial_dims: int, bias: bool
) -> None:
    torch.manual_seed(0)
    network = ResNet(
        block,
        counts,
        [16, 32, 64, 128],
        spatial_dims=spatial_dims,
        n_input_channels=3,
        conv1_t_stride=2,
        bias_downsample=bias,
    )
    for _ in range(3):
        network(torch.randn(2, 3, *(65, 65, 65)[:spatial_dims]))
    network.eval()
    x = torch.randn(1, 3, *(41, 38, 33)[:spatial_dims])
    expected = []
    with torch.no_grad():
        h = network.act(network.bn1(network.conv1(x)))
        expected.append(h.clone())
        h = network.maxpool(h)
        for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
            h = stage(h)
            expected.append(h.clone())
    encoder = adopted("resnet", network.state_dict())
    assert encoder.config["blocks"] == counts
    assert encoder.config["shortcut_bias"] == bias
    agree(encoder, x, expected)


class _ConvDropoutNormReLU(nn.Module):
    """Retyped from dynamic-network-architectures, simple_conv_blocks.py: every layer is registered twice."""

    def __init__(self, source: int, target: int, kernel: int, stride: int, *, bias: bool, nonlin: bool) -> None:
        super().__init__()
        self.conv = nn.Conv3d(source, target, kernel, stride, padding=kernel // 2, bias=bias)
        self.norm = nn.InstanceNorm3d(target, eps=1e-5, affine=True)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        layers = [self.conv, self.norm] + [nn.LeakyReLU()] * nonlin
        self.all_modules = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.all_modules(x)


class _BasicBlockD(nn.Module):
    """Retyped from dynamic-network-architectures, residual.py."""

    def __init__(self, source: int, target: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _ConvDropoutNormReLU(source, target, 3, stride, bias=True, nonlin=True)
        self.conv2 = _ConvDropoutNormReLU(target, target, 3, 1, bias=True, nonlin=False)
        ops: list[nn.Module] = [nn.AvgPool3d(stride, stride)] if stride > 1 else []
        if source != target:
            ops.append(_ConvDropoutNormReLU(source, target, 1, 1, bias=False, nonlin=False))
        self.skip = nn.Sequential(*ops)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.conv2(self.conv1(x)) + self.skip(x))


class _Stage(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)


class _Stem(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(_ConvDropoutNormReLU(1, width, 3, 1, bias=True, nonlin=True))


class _ResidualEncoder(nn.Module):
    def __init__(self, channels: tuple[int, ...], counts: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = _Stem(channels[0])
        previous, stages = channels[0], []
        for stage, (width, count) in enumerate(zip(channels, counts, strict=True)):
            first = _BasicBlockD(previous, width, 2 if stage else 1)
            stages.append(_Stage(first, *[_BasicBlockD(width, width, 1) for _ in range(count - 1)]))
            previous = width
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        h, pyramid = self.stem.convs(x), []
        for stage in self.stages:
            h = stage.blocks(h)
            pyramid.append(h)
        return pyramid


def test_an_nnssl_checkpoint_gives_the_features_of_the_authors_encoder() -> None:
    torch.manual_seed(0)
    network = _ResidualEncoder((8, 16, 24, 24), (1, 2, 1, 1)).eval()
    x = torch.randn(1, 1, 16, 24, 16)
    with torch.no_grad():
        expected = network(x)
    own = network.state_dict()
    content = {
        "network_weights": {
            f"{prefix}encoder.{key}": value for key, value in own.items() for prefix in ("", "decoder.")
        },
        "nnssl_adaptation_plan": {"key_to_encoder": "encoder.stages", "key_to_stem": "encoder.stem"},
    }
    encoder = adopted("nnssl_resenc", content)
    assert encoder.config["channels"] == [8, 16, 24, 24]
    agree(encoder, x, expected)


class _LUConv(nn.Module):
    """Retyped from Models Genesis, unet3d.py."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(source, target, kernel_size=3, padding=1)
        self.bn1 = nn.BatchNorm3d(target)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.bn1(self.conv1(x)))


class _Genesis(nn.Module):
    """Down path of Models Genesis, with fewer channels under the same names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        previous = 1
        for depth, name in enumerate((64, 128, 256, 512)):
            inner = width * 2**depth
            stage = nn.Module()
            stage.ops = nn.Sequential(_LUConv(previous, inner), _LUConv(inner, 2 * inner))
            setattr(self, f"down_tr{name}", stage)
            previous = 2 * inner

    def forward(self, x: Tensor) -> list[Tensor]:
        pyramid = []
        for name in (64, 128, 256, 512):
            x = getattr(self, f"down_tr{name}").ops(x)
            pyramid.append(x)
            x = nn.functional.max_pool3d(x, 2)
        return pyramid


def test_models_genesis_and_the_unet_of_suprem_give_the_authors_features() -> None:
    torch.manual_seed(0)
    network = _Genesis(4)
    for _ in range(3):
        network(torch.randn(2, 1, 16, 16, 16))
    network.eval()
    x = torch.randn(1, 1, 16, 24, 16)
    with torch.no_grad():
        expected = network(x)
    own = network.state_dict()
    extra = {"up_tr256.ops.0.conv1.weight": torch.zeros(2), "out_tr.final_conv.weight": torch.zeros(2)}
    for prefix in ("module.", "module.backbone."):
        encoder = adopted("genesis_unet", {"net": {prefix + key: value for key, value in {**own, **extra}.items()}})
        assert encoder.config == {"name": "genesis", "width": 4, "levels": 4, "norm": "frozen_batch"}
        agree(encoder, x, expected)


@pytest.mark.parametrize(("size", "kind"), [((32, 32), "conv"), ((32, 32, 32), "perceptron")])
def test_a_monai_vit_gives_the_same_tokens(size: tuple[int, ...], kind: str) -> None:
    torch.manual_seed(0)
    network = ViT(
        2, size, (16,) * len(size), hidden_size=48, mlp_dim=96, num_layers=4, num_heads=4, proj_type=kind,
        spatial_dims=len(size), qkv_bias=True,
    ).eval()  # fmt: skip
    x = torch.randn(1, 2, *size)
    with torch.no_grad():
        expected = network(x)[0].transpose(1, 2).unflatten(2, [2] * len(size))
    encoder = adopted("monai_vit", {f"vit.{key}": value for key, value in network.state_dict().items()}, heads=4)
    assert encoder.config["grid"] == [2] * len(size)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x)[-1], expected, atol=1e-5, rtol=1e-5)


def test_the_transformer_of_a_unetr_bundle_is_found_beside_its_decoder() -> None:
    network = UNETR(1, 2, (32, 32, 32), hidden_size=48, mlp_dim=96, num_heads=4)
    found = rename(family_of("monai_vit"), network.state_dict())
    assert found.prefix == "vit."
    assert all(not name.startswith("vit.") or "cross" in name for name in found.unused)


class _DinoBlock(nn.Module):
    """Retyped from DINOv2, layers/block.py and attention.py, with layer scale."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls1, self.ls2 = nn.ParameterDict(), nn.ParameterDict()
        self.ls1["gamma"], self.ls2["gamma"] = (nn.Parameter(torch.rand(width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * (d // self.heads) ** -0.5, qkv[1], qkv[2]
        h = ((q @ k.transpose(-2, -1)).softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, d)
        x = x + self.ls1["gamma"] * self.attn["proj"](h)
        return x + self.ls2["gamma"] * self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class _Dino(nn.Module):
    """Retyped from DINOv2, models/vision_transformer.py, in 3D as 3DINO has it, with blocks in chunks."""

    def __init__(self, width: int = 48, heads: int = 4, patch: int = 8, grid: int = 2) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(1, width, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + grid**3, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        chunks = [
            nn.Sequential(*[nn.Identity()] * start, *[_DinoBlock(width, heads) for _ in range(2)]) for start in (0, 2)
        ]
        self.blocks = nn.ModuleList(chunks)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.cls_token.expand(len(x), -1, -1), tokens), dim=1) + self.pos_embed
        for chunk in self.blocks:
            tokens = chunk(tokens)
        return self.norm(tokens)[:, 1:]


def test_a_3dino_teacher_gives_the_tokens_of_the_authors_network() -> None:
    torch.manual_seed(0)
    network = _Dino().eval()
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        expected = network(x).transpose(1, 2).unflatten(2, (2, 2, 2))
    state = {f"backbone.{key}": value for key, value in network.state_dict().items()}
    state["dino_head.mlp.0.weight"] = torch.zeros(2, 2)
    encoder = adopted("dino_vit", {"teacher": state}, heads=4)
    assert encoder.config["depth"] == 4
    assert encoder.config["patch"] == 8
    with torch.no_grad():
        torch.testing.assert_close(encoder(x)[-1], expected, atol=1e-5, rtol=1e-5)
    state["backbone.pos_embed"] = torch.zeros(1, 7, 48)
    with pytest.raises(CheckpointError, match="6 tokens, which are no cube"):
        rename(family_of("dino_vit"), flatten(state))


# written list: ">>> [(k, tuple(v.shape)) for k, v in torchvision.models.resnet18().state_dict().items()]"
RESNET18_START = (
    ("conv1.weight", (64, 3, 7, 7)), ("bn1.weight", (64,)), ("bn1.bias", (64,)), ("bn1.running_mean", (64,)),
    ("bn1.running_var", (64,)), ("bn1.num_batches_tracked", ()), ("layer1.0.conv1.weight", (64, 64, 3, 3)),
    ("layer1.0.bn1.weight", (64,)), ("layer2.0.downsample.0.weight", (128, 64, 1, 1)),
    ("layer2.0.downsample.1.weight", (128,)), ("layer2.0.downsample.1.num_batches_tracked", ()), ("fc.weight", (9, 9)),
)  # fmt: skip


def test_names_of_torchvision_become_ours() -> None:
    found = rename(family_of("resnet"), {name: torch.zeros(shape) for name, shape in RESNET18_START})
    assert set(found.tensors) == {
        "conv1.weight", "norm1.weight", "norm1.bias", "norm1.running_mean", "norm1.running_var",
        "layer1.0.conv1.weight", "layer1.0.norm1.weight", "layer2.0.downsample.0.weight",
        "layer2.0.downsample.1.weight",
    }  # fmt: skip
    assert found.unused == ("bn1.num_batches_tracked", "layer2.0.downsample.1.num_batches_tracked", "fc.weight")


def test_student_and_teacher_that_differ_are_told_apart_by_prefix_only() -> None:
    state = swin_unetr().swinViT.state_dict()
    both = {
        "student": state,
        "teacher": {key: value + 1 if value.is_floating_point() else value for key, value in state.items()},
    }
    with pytest.raises(CheckpointError, match=r"several networks that differ, under 'student\.', 'teacher\.'"):
        adopted("voco_swin", both)
    encoder = adopted("voco_swin", both, prefix="teacher")
    assert torch.equal(encoder.state_dict()["swin.patch_embed.proj.bias"], state["patch_embed.proj.bias"] + 1)
    with pytest.raises(CheckpointError, match="begins with 'ema'"):
        adopted("voco_swin", both, prefix="ema")
    adopted("voco_swin", {"student": state, "a.longer.copy": dict(state)})


def test_names_of_another_network_and_unknown_families_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"none of the 2 tensors .* \(first are a\.w, b\.w\)"):
        rename(family_of("resnet"), {"a.w": torch.zeros(1), "b.w": torch.zeros(1)})
    with pytest.raises(ConfigError, match="no family 'vocoo'"):
        family_of("vocoo")
    partial = {"patch_embed.proj.weight": torch.zeros(12, 1, 2, 2, 2)}
    family = family_of("voco_swin")
    with pytest.raises(CheckpointError, match=r"lacks swin\.layers1"):
        family.infer(rename(family, partial).tensors)


def test_every_family_says_where_it_comes_from_and_whom_to_cite() -> None:
    for name, family in FAMILIES.items():
        assert family.name == name
        assert family.source
        assert family.hint
        assert all("arXiv:" in citation for citation in family.citations)

"""The public checkpoints that ``medssl adopt`` knows: their names, and how shapes tell the configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from medssl.errors import CheckpointError, ConfigError
from medssl.nn.keymaps import Family

_HEAD_CHANNELS = 64
_UNETR_PATCH = 16


def family_of(name: str) -> Family:
    """The family of that name.

    Raises:
        ConfigError: ``E_UNKNOWN_NAME`` for an unknown one.
    """
    if name not in FAMILIES:
        raise ConfigError(
            f"adopt: there is no family {name!r}; known are {', '.join(FAMILIES)}.", code="E_UNKNOWN_NAME"
        )
    return FAMILIES[name]


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(f"adopt: the file lacks {name}, which tells the shape of the network. Choose its family.")
    return tuple(tensors[name].shape)


def _numbers(tensors: Mapping[str, Tensor], pattern: str) -> list[int]:
    """Numbers that a pattern with one group finds in the names, each once, sorted."""
    return sorted({int(match[1]) for name in tensors if (match := re.match(pattern, name))})


def _infer_swin(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    table = "swin.layers{}.0.blocks.0.attn.relative_position_bias_table"
    kernel = _shape(tensors, "swin.patch_embed.proj.weight")
    offsets = _shape(tensors, table.format(1))[0]
    return {
        "name": "swin",
        "embed": kernel[0],
        "window": (round(offsets ** (1 / (len(kernel) - 2))) + 1) // 2,
        "depths": [len(_numbers(tensors, rf"swin\.layers{stage}\.0\.blocks\.(\d+)\.")) for stage in range(1, 5)],
        "heads": [_shape(tensors, table.format(stage))[1] for stage in range(1, 5)],
        "use_v2": any(name.startswith("swin.layers1c.") for name in tensors),
    }


def _infer_segresnet(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    levels = _numbers(tensors, r"levels\.(\d+)\.")
    return {
        "name": "segresnet",
        "channels": [_shape(tensors, f"levels.{level}.1.conv1.weight")[0] for level in levels],
        "blocks": [len(_numbers(tensors, rf"levels\.{level}\.(\d+)\.conv1\.")) for level in levels],
    }


def _infer_resnet(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "name": "resnet",
        "blocks": [len(_numbers(tensors, rf"layer{stage}\.(\d+)\.")) for stage in range(1, 5)],
        "bottleneck": "layer1.0.conv3.weight" in tensors,
        "width": _shape(tensors, "conv1.weight")[0],
        "shortcut_bias": "layer2.0.downsample.0.bias" in tensors,
        "norm": "frozen_batch",
    }


def _infer_resenc(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    stages = _numbers(tensors, r"stages\.(\d+)\.")
    return {
        "name": "resenc",
        "channels": [_shape(tensors, f"stages.{stage}.0.conv1.conv.weight")[0] for stage in stages],
        "strides": [1] + [2] * (len(stages) - 1),
        "blocks": [len(_numbers(tensors, rf"stages\.{stage}\.(\d+)\.conv1\.")) for stage in stages],
        "stem_channels": _shape(tensors, "stem.conv.weight")[0],
        "bias": "stem.conv.bias" in tensors,
    }


def _infer_genesis(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "name": "genesis",
        "width": _shape(tensors, "levels.0.0.conv.weight")[0],
        "levels": len(_numbers(tensors, r"levels\.(\d+)\.")),
        "norm": "frozen_batch",
    }


def _infer_vit(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    kernel = _shape(tensors, "patch_embed.weight")
    has_scale = "blocks.0.scale1" in tensors
    return {
        "name": "vit",
        "patch": kernel[2],
        "embed": kernel[0],
        "depth": len(_numbers(tensors, r"blocks\.(\d+)\.")),
        "heads": max(1, kernel[0] // _HEAD_CHANNELS),
        "mlp_ratio": _shape(tensors, "blocks.0.fc1.weight")[0] / kernel[0],
        "grid": list(_shape(tensors, "position")[2:]),
        "class_token": "class_token" in tensors,
        "qkv_bias": "blocks.0.qkv.bias" in tensors,
        **({"layer_scale": 1.0} if has_scale else {}),
    }


def _infer_dino(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {**_infer_vit(tensors), "norm_eps": 1e-6}


def _vit_tables(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The kernel as a convolution, and the table of positions as a grid.

    A linear layer over the voxels of a patch has them in the order (axes, channel), in patches of 16 as in UNETR.
    """
    kernel, table = tensors.get("patch_embed.weight"), tensors.get("tokens")
    if kernel is None or table is None:
        return tensors
    count, width = table.shape[1:]
    axes = kernel.ndim - 2 if kernel.ndim > 2 else 3 if round(count ** (1 / 3)) ** 3 == count else 2
    size = round(count ** (1 / axes))
    if size**axes != count:
        raise CheckpointError(
            f"adopt: the table of positions has {count} tokens, which are no {'cube' if axes > 2 else 'square'}. "
            "Save the weights with a table for images of equal sides."
        )
    if kernel.ndim == 2:
        kernel = kernel.reshape(width, *[_UNETR_PATCH] * axes, -1).movedim(-1, 1).contiguous()
    found = {name: value for name, value in tensors.items() if name != "tokens"}
    found["patch_embed.weight"] = kernel
    found["position"] = table.transpose(1, 2).reshape(1, width, *[size] * axes)
    return found


def _dino_tables(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first row of the table of positions belongs to the class token and is added to it once and for all."""
    if not {"class_token", "tokens"} <= tensors.keys():
        return _vit_tables(tensors)
    table = tensors["tokens"]
    return _vit_tables({**tensors, "class_token": tensors["class_token"] + table[:, :1], "tokens": table[:, 1:]})


def _genesis_rules() -> tuple[tuple[str, str], ...]:
    rules: list[tuple[str, str]] = []
    for level, channels in enumerate((64, 128, 256, 512)):
        for part, ours in (("conv1", "conv"), ("bn1", "norm")):
            kinds = "(weight|bias|running_mean|running_var)"
            rules.append((rf"down_tr{channels}\.ops\.(\d)\.{part}\.{kinds}", rf"levels.{level}.\1.{ours}.\2"))
    return tuple(rules)


_SWIN_BLOCKS = (
    (r"(patch_embed\.proj\.(?:weight|bias))", r"swin.\1"),
    (r"(layers[1-4]\.0\.blocks\.\d+\.mlp\.)fc([12]\.(?:weight|bias))", r"swin.\1linear\2"),
    (r"(layers[1-4]\.0\.(?:blocks|downsample)\..+)", r"swin.\1"),
    (r"(layers[1-4]c\.0\..+)", r"swin.\1"),
)
_SWINUNETR = (
    "Hatamizadeh et al., Swin UNETR, BrainLes 2021, arXiv:2201.01266",
    "Tang et al., Self-Supervised Pre-Training of Swin Transformers for 3D Medical Image Analysis, CVPR 2022, "
    "arXiv:2111.14791",
)
_TRUNK_CT = {
    "modality": "CT",
    "spacing_mm": [1.5, 1.5, 1.5],
    "intensity": {"mode": "hu"},
    "body_mask": {"mode": "threshold", "threshold": -500.0},
    "crop": {"mode": "foreground", "margin_mm": 5.0},
}

_ALL = (
    Family(
        name="voco_swin",
        title="VoCo: the Swin transformer of SwinUNETR, from CT",
        rules=_SWIN_BLOCKS,
        infer=_infer_swin,
        stem="swin.patch_embed.proj.weight",
        prepare=_TRUNK_CT,
        hint="CT at 1.5 mm under a window of -175 to 250 HU scaled to [0, 1] (augment window with clip)",
        source="github.com/Luffy03/VoCo and github.com/Luffy03/Large-Scale-Medical",
        citations=("Wu, Zhuang, Chen, VoCo, CVPR 2024, arXiv:2402.17300", *_SWINUNETR[:1]),
    ),
    Family(
        name="swinunetr_ssl",
        title="SwinUNETR-SSL: MONAI's model_swinvit, from CT",
        rules=_SWIN_BLOCKS,
        infer=_infer_swin,
        stem="swin.patch_embed.proj.weight",
        prepare=_TRUNK_CT,
        hint="CT at 1.5 mm under a window of -1000 to 1000 HU scaled to [0, 1]",
        source="github.com/Project-MONAI/research-contributions, SwinUNETR/Pretrain",
        citations=_SWINUNETR,
    ),
    Family(
        name="monai_swinunetr",
        title="A SwinUNETR of a MONAI bundle or of SuPreM; its transformer is taken, the decoder is not",
        rules=_SWIN_BLOCKS,
        infer=_infer_swin,
        stem="swin.patch_embed.proj.weight",
        hint="as the inference.json of the bundle says",
        source="the page of the bundle, or github.com/MrGiovanni/SuPreM",
        citations=_SWINUNETR[:1],
    ),
    Family(
        name="monai_segresnet",
        title="A SegResNet of a MONAI bundle; its encoder is taken, the decoder is not",
        rules=(
            (r"convInit\.conv\.weight", "levels.0.0.weight"),
            (r"down_layers\.(\d+)\.0\.conv\.weight", r"levels.\1.0.weight"),
            (r"down_layers\.(\d+)\.(\d+)\.conv([12])\.conv\.weight", r"levels.\1.\2.conv\3.weight"),
            (r"down_layers\.(\d+)\.(\d+)\.(norm[12]\.(?:weight|bias))", r"levels.\1.\2.\3"),
        ),
        infer=_infer_segresnet,
        stem="levels.0.0.weight",
        hint="as the inference.json of the bundle says",
        source="the page of the bundle",
        citations=("Myronenko, 3D MRI brain tumor segmentation, BrainLes 2018, arXiv:1810.11654",),
    ),
    Family(
        name="nnssl_resenc",
        title="nnssl and OpenMind: the ResEnc-L encoder, from head MR",
        rules=(
            (r"stem\.convs\.0\.(conv|norm)\.(weight|bias)", r"stem.\1.\2"),
            (r"stages\.(\d+)\.blocks\.(\d+)\.(conv[12]\.(?:conv|norm)\.(?:weight|bias))", r"stages.\1.\2.\3"),
            (
                r"stages\.(\d+)\.blocks\.(\d+)\.skip\.\d\.((?:conv|norm)\.(?:weight|bias))",
                r"stages.\1.\2.shortcut.\3",
            ),
        ),
        infer=_infer_resenc,
        stem="stem.conv.weight",
        hint="MR of the head at 1 mm, each image with its mean taken off and divided by its deviation",
        source="github.com/MIC-DKFZ/nnssl and huggingface.co/AnonRes",
        citations=(
            "Wald et al., An OpenMind for 3D Medical Vision Self-supervised Learning, 2024, arXiv:2412.17041",
            "Isensee et al., nnU-Net Revisited, MICCAI 2024, arXiv:2404.09556",
        ),
    ),
    Family(
        name="dino_vit",
        title="A vision transformer as DINO, DINOv2, 3DINO, MAE and timm name it (2D or 3D)",
        rules=(
            (r"patch_embed\.proj\.(weight|bias)", r"patch_embed.\1"),
            (r"cls_token", "class_token"),
            (r"pos_embed", "tokens"),
            (r"blocks\.(?:\d+\.)?(\d+)\.(norm[12]\.(?:weight|bias))", r"blocks.\1.\2"),
            (r"blocks\.(?:\d+\.)?(\d+)\.attn\.((?:qkv|proj)\.(?:weight|bias))", r"blocks.\1.\2"),
            (r"blocks\.(?:\d+\.)?(\d+)\.mlp\.(fc[12]\.(?:weight|bias))", r"blocks.\1.\2"),
            (r"blocks\.(?:\d+\.)?(\d+)\.ls([12])\.gamma", r"blocks.\1.scale\2"),
            (r"norm\.(weight|bias)", r"norm.\1"),
        ),
        infer=_infer_dino,
        stem="patch_embed.weight",
        hint="3DINO: CT and MR, percentiles 0.05 and 99.95 brought to -1 and 1; others as their page says. Heads of 64 "
        "channels are assumed (backbone.heads)",
        source="github.com/AICONSlab/3DINO, github.com/facebookresearch/dinov2 or huggingface.co/timm",
        citations=(
            "Xu et al., A generalizable 3D framework and model for self-supervised learning in medical imaging, 2025, "
            "arXiv:2501.11755",
            "Oquab et al., DINOv2, TMLR 2024, arXiv:2304.07193",
        ),
        convert=_dino_tables,
    ),
    Family(
        name="monai_vit",
        title="The vision transformer of a MONAI UNETR or ViT (2D or 3D)",
        rules=(
            (r"patch_embedding\.patch_embeddings\.(?:1\.)?(weight|bias)", r"patch_embed.\1"),
            (r"patch_embedding\.position_embeddings", "tokens"),
            (r"cls_token", "class_token"),
            (r"blocks\.(\d+)\.(norm[12]\.(?:weight|bias))", r"blocks.\1.\2"),
            (r"blocks\.(\d+)\.attn\.(qkv\.(?:weight|bias))", r"blocks.\1.\2"),
            (r"blocks\.(\d+)\.attn\.out_proj\.(weight|bias)", r"blocks.\1.proj.\2"),
            (r"blocks\.(\d+)\.mlp\.linear([12])\.(weight|bias)", r"blocks.\1.fc\2.\3"),
            (r"norm\.(weight|bias)", r"norm.\1"),
        ),
        infer=_infer_vit,
        stem="patch_embed.weight",
        hint="as the inference.json of the bundle says. Heads of 64 channels are assumed (backbone.heads)",
        source="the page of the bundle",
        citations=("Hatamizadeh et al., UNETR, WACV 2022, arXiv:2103.10504",),
        convert=_vit_tables,
    ),
    Family(
        name="genesis_unet",
        title="The U-Net of Models Genesis and of SuPreM, from CT; its encoder is taken, the decoder is not",
        rules=_genesis_rules(),
        infer=_infer_genesis,
        stem="levels.0.0.conv.weight",
        hint="CT under a window of -1000 to 1000 HU (Models Genesis) or -175 to 250 HU (SuPreM) scaled to [0, 1]",
        source="github.com/MrGiovanni/ModelsGenesis and github.com/MrGiovanni/SuPreM",
        citations=(
            "Zhou et al., Models Genesis, MICCAI 2019, arXiv:1908.06912",
            "Li et al., How Well Do Supervised 3D Models Transfer to Medical Imaging Tasks?, ICLR 2024, "
            "arXiv:2501.11253",
        ),
    ),
    Family(
        name="resnet",
        title="A ResNet of torchvision, timm or MONAI (2D or 3D)",
        rules=(
            (r"conv1\.weight", "conv1.weight"),
            (r"bn1\.(weight|bias|running_mean|running_var)", r"norm1.\1"),
            (r"(layer[1-4]\.\d+)\.bn([123])\.(weight|bias|running_mean|running_var)", r"\1.norm\2.\3"),
            (r"(layer[1-4]\.\d+\.(?:conv[123]|downsample\.0)\.(?:weight|bias))", r"\1"),
            (r"(layer[1-4]\.\d+\.downsample\.1\.(?:weight|bias|running_mean|running_var))", r"\1"),
        ),
        infer=_infer_resnet,
        stem="conv1.weight",
        hint="of natural images: three channels, each with its mean taken off and divided by its deviation",
        source="pytorch.org/vision, huggingface.co/timm, or the page of the bundle",
        citations=("He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385",),
    ),
)

FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}
"""Every family, by the name that ``medssl adopt --as`` takes."""

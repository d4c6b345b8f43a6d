"""The Swin transformer of SwinUNETR as a feature pyramid, with MONAI's parameter names so that its weights load."""

from __future__ import annotations

from typing import Self

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from medssl.config import Config as BaseConfig
from medssl.nn.backbone import Backbone, parameters_of

PATCH = 2
STAGES = 4


class Config(BaseConfig):
    """Shape of the transformer; VoCo and SwinUNETR use ``embed: 48, window: 7``."""

    embed: int = Field(24, ge=1, description="channels of the finest level; each level doubles them")
    window: int = Field(4, ge=2, description="voxels of an attention window along each axis")
    depths: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    use_v2: bool = Field(True, description="a residual convolution before each stage")
    drop_path: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not len(self.depths) == len(self.heads) == STAGES:
            raise ValueError(f"{len(self.depths)} depths and {len(self.heads)} heads; {STAGES} of each are needed")
        if min(self.depths) < 1 or min(self.heads) < 1:
            raise ValueError("depths and heads must be at least 1")
        for stage, heads in enumerate(self.heads):
            if self.embed * 2**stage % heads:
                raise ValueError(f"{self.embed * 2**stage} channels of stage {stage} do not divide into {heads} heads")
        return self


class SwinEncoder(Backbone):
    """Swin transformer with shifted windows, five levels at strides 2 to 32.

    Reference: Hatamizadeh et al., Swin UNETR, BrainLes 2021, arXiv:2201.01266; He et al., SwinUNETR-V2, MICCAI 2023
    (``use_v2``).
    Deviations: none; instance norm also accepts a level of one voxel, where it gives zeros.
    """

    def __init__(self, config: Config, *, in_channels: int, spatial_dims: int) -> None:
        super().__init__(
            config,
            in_channels=in_channels,
            spatial_dims=spatial_dims,
            channels=[config.embed * 2**level for level in range(STAGES + 1)],
            strides=[PATCH * 2**level for level in range(STAGES + 1)],
        )
        from monai.networks.nets.swin_unetr import SwinTransformer  # seconds to import, and the registry imports us

        self.swin = SwinTransformer(
            in_chans=in_channels,
            embed_dim=config.embed,
            window_size=(config.window,) * spatial_dims,
            patch_size=(PATCH,) * spatial_dims,
            depths=config.depths,
            num_heads=config.heads,
            drop_path_rate=config.drop_path,
            spatial_dims=spatial_dims,
            use_v2=config.use_v2,
        )
        _replace_instance_norms(self.swin)

    def forward(self, x: Float[Tensor, "b c *s"]) -> list[Tensor]:
        """Feature pyramid of ``x``, finest level first; odd sizes are padded with zeros at the end of an axis."""
        pyramid: list[Tensor] = self.swin(x)
        return pyramid

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Patch embedding, then one group a stage."""
        names = [[f"layers{stage}c", f"layers{stage}"] for stage in range(1, STAGES + 1)]
        stages = [[getattr(self.swin, name) for name in group if hasattr(self.swin, name)] for group in names]
        return [parameters_of(self.swin.patch_embed), *[parameters_of(*stage) for stage in stages]]


class _InstanceNorm(nn.Module):
    """Instance norm without weights, written as a layer norm over voxels: torch's own refuses a single voxel."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        voxels = x.flatten(2)
        return F.layer_norm(voxels, voxels.shape[2:], eps=self.eps).view_as(x)


def _replace_instance_norms(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.InstanceNorm2d | nn.InstanceNorm3d):
                setattr(parent, name, _InstanceNorm(child.eps))

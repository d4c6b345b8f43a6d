"""What every fine-tuning task has: an encoder that it was given, how that is adapted, and logits for an image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, Literal, Self, TypeVar

from jaxtyping import Shaped
from pydantic import Field
from torch import Tensor, nn

from medssl import config as configuration
from medssl.augment.pipeline import Pipeline
from medssl.nn.backbone import Backbone
from medssl.nn.bundle import Bundle
from medssl.nn.lora import LoRAConfig, add_lora
from medssl.trainable import ParamGroup, Progress, Trainable, split_decay
from medssl.views import ViewSampler

Mode = Literal["full", "frozen", "linear", "warmup_then_full", "layer_decay", "lora", "bitfit"]

C = TypeVar("C", bound="AdaptationConfig")


class AdaptationConfig(configuration.Config):
    """How a task trains the encoder that it was given.

    Args:
        mode: ``full`` trains all; ``frozen`` the new layers alone; ``linear`` a norm and one linear map on the frozen
            features; ``warmup_then_full`` the new layers alone at first; ``layer_decay`` all, shallow layers slower;
            ``lora`` the new layers and low-rank additions to the encoder's weights; ``bitfit`` the new layers and the
            encoder's biases and norms.
        warmup_share: Share of the steps for which ``warmup_then_full`` leaves the encoder as it is.
        layer_decay: Factor of the learning rate from a layer group to the next shallower one.
        encoder_lr_scale: Factor on the encoder's learning rate, in every mode.
        lora: The low-rank additions of ``lora``.
    """

    mode: Mode = "full"
    warmup_share: float = Field(0.1, ge=0, le=1)
    layer_decay: float = Field(0.75, gt=0, le=1)
    encoder_lr_scale: float = Field(1.0, gt=0)
    lora: LoRAConfig = LoRAConfig()


class Task(Trainable, Generic[C]):
    """A supervised task on top of an encoder.

    Its ``prepare`` augments for training; for held-out checks it does only what is not random.

    Args:
        config: Options of the task, with those of :class:`AdaptationConfig`.
        encoder: Pretrained, or with fresh weights for the from-scratch twin; trained in place, as ``config.mode`` says.
            Its neck (:meth:`~medssl.nn.backbone.Backbone.neck_parameters`) counts as new layers, but for ``linear``.
        seed: Of the random half of low-rank additions.

    Reference: Bao et al., BEiT, ICLR 2022, arXiv:2106.08254 (layer-wise learning-rate decay); Kumar et al., ICLR 2022,
    arXiv:2202.10054 (new layers first, then all); Hu et al., LoRA, ICLR 2022, arXiv:2106.09685; Ben Zaken et al.,
    BitFit, ACL 2022, arXiv:2106.10199.
    Deviations: ``warmup_then_full`` holds the encoder for a share of one run, where the paper trains twice; ``bitfit``
    trains the scales of norms too.
    """

    augment: Pipeline

    def __init__(self, config: C, *, encoder: Backbone, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.unused_parameters = config.mode == "warmup_then_full"
        self._is_encoder_frozen = False
        match config.mode:
            case "frozen":
                self._freeze_encoder(True)
            case "linear":
                self._freeze_encoder(True)
                encoder.requires_grad_(False)
            case "lora":
                add_lora(encoder, config.lora, seed=seed, skip=encoder.neck_parameters())
            case "bitfit":
                for parameter in self._body():
                    parameter.requires_grad_(parameter.ndim == 1)

    @abstractmethod
    def logits(self, x: Shaped[Tensor, "b c *s"]) -> Tensor:
        """Scores of each class, before softmax, of images as they are stored; without augmentation."""

    @abstractmethod
    def view_sampler(self) -> ViewSampler:
        """What cuts the task's crops from a case."""

    @abstractmethod
    def decoder_config(self) -> dict[str, Any]:
        """What the passport needs beside the encoder's config to build the network again."""

    def take_decoder(self, bundle: Bundle) -> str:  # noqa: ARG002  a task without a decoder takes none
        """Start from the decoder of a pretrained bundle if the configuration asks for it; say what was done."""
        return "none"

    @abstractmethod
    def bundle_modules(self) -> Mapping[str, nn.Module]:
        """Modules that a bundle keeps, by the name that their tensors begin with."""

    def param_groups(self) -> list[ParamGroup]:
        """New layers at the full learning rate; encoder as the mode says, also where it only joins in later."""
        body = {id(parameter) for parameter in self._body()}
        new = [parameter for parameter in self.parameters() if id(parameter) not in body and parameter.requires_grad]
        groups = split_decay("decoder", new)
        mode, scale = self.config.mode, self.config.encoder_lr_scale
        if mode in {"frozen", "linear"}:
            return groups
        if mode != "layer_decay":
            later = mode == "warmup_then_full"
            params = [parameter for parameter in self._body() if parameter.requires_grad or later]
            return [*groups, *split_decay("encoder", params, lr_scale=scale)]
        layers = self.encoder.layer_groups()
        for index, params in enumerate(layers):
            decayed = scale * self.config.layer_decay ** (len(layers) - index)
            groups += split_decay(f"encoder/{index}", [p for p in params if id(p) in body], lr_scale=decayed)
        return groups

    def before_step(self, progress: Progress) -> None:
        """Hold the encoder still for the first share of the steps; a pure function of where the run stands."""
        if self.config.mode == "warmup_then_full":
            self._freeze_encoder(progress.fraction < self.config.warmup_share)

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``, but a frozen encoder stays in eval mode."""
        super().train(mode)
        if self._is_encoder_frozen:
            self.encoder.eval()
        return self

    def features(self, x: Shaped[Tensor, "b c *s"]) -> list[Tensor]:
        """The encoder's pyramid; what is frozen asks for no gradient, and none is kept for it."""
        found: list[Tensor] = self.encoder(x)
        return found

    def _body(self) -> list[nn.Parameter]:
        """Parameters of the encoder without its neck."""
        neck = {id(parameter) for parameter in self.encoder.neck_parameters()}
        return [parameter for parameter in self.encoder.parameters() if id(parameter) not in neck]

    def _freeze_encoder(self, frozen: bool) -> None:
        if frozen == self._is_encoder_frozen:
            return
        self._is_encoder_frozen = frozen
        for parameter in self._body():
            parameter.requires_grad_(not frozen)
        self.encoder.train(self.training and not frozen)

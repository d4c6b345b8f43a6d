"""Fine-tune an encoder to label voxels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, Self

import torch
from jaxtyping import Float, Int64, Integer, Shaped
from pydantic import Field, JsonValue
from torch import Tensor, nn

from medssl import config as configuration
from medssl.augment.build import build_augment
from medssl.augment.frame import Frame
from medssl.augment.images import Images
from medssl.augment.pipeline import Pipeline
from medssl.errors import CaseError, CheckpointError, ConfigError
from medssl.losses.segmentation import deep_dice_ce
from medssl.nn.backbone import Backbone
from medssl.nn.bundle import Bundle, load_into
from medssl.nn.decoder import Decoder
from medssl.tasks.base import Task
from medssl.trainable import Batch, Losses, ParamGroup, Progress, split_decay
from medssl.views import EdgesMm, LabelledCrop

_FREE_DECODER_KEYS = ("out_channels", "deep_supervision")  # these shape the last layers alone

Mode = Literal["full", "frozen", "warmup_then_full", "layer_decay"]


def _light() -> dict[str, JsonValue] | list[dict[str, JsonValue]]:
    return {"preset": "mr_light"}


class DecoderConfig(configuration.Config):
    """The decoder.

    Args:
        width: Channels of each step, finest first; by default those of the encoder's levels.
        skip_image: Concatenate the image at full resolution where the encoder's finest level is coarser.
        pretrained: Start from the bundle's decoder too, all but the last layer; it must have the same form. Without a
            bundle it makes no difference.
    """

    width: tuple[int, ...] | None = None
    skip_image: bool = True
    pretrained: bool = False


class Config(configuration.Config):
    """Segmentation.

    Args:
        crop_voxels: Size of the training crops, and of the windows of prediction.
        crop_mm: Edge lengths of the crops, and so the voxel size that prediction resamples to; None takes the voxels
            of the store as they are.
        augment: ``{preset: name}`` or a list of augmentations.
        foreground_share: Probability that a crop is centred on a voxel of a structure, each structure alike.
        dice_weight: Of the Dice loss.
        ce_weight: Of the cross-entropy.
        include_background: Whether background is in the Dice loss.
        deep_supervision: Whether coarser decoder levels are trained too.
        decoder: The decoder.
        mode: ``full`` trains all; ``frozen`` the decoder alone; ``warmup_then_full`` the decoder alone at first;
            ``layer_decay`` all, shallow layers slower.
        warmup_share: Share of the steps for which ``warmup_then_full`` leaves the encoder as it is.
        layer_decay: Factor of the learning rate from a layer group to the next shallower one.
        encoder_lr_scale: Factor on the encoder's learning rate, in every mode.
    """

    crop_voxels: tuple[int, int, int]
    crop_mm: EdgesMm = None
    augment: dict[str, JsonValue] | list[dict[str, JsonValue]] = Field(default_factory=_light)
    foreground_share: float = Field(0.67, ge=0, le=1)
    dice_weight: float = Field(1.0, ge=0)
    ce_weight: float = Field(1.0, ge=0)
    include_background: bool = False
    deep_supervision: bool = False
    decoder: DecoderConfig = DecoderConfig()
    mode: Mode = "full"
    warmup_share: float = Field(0.1, ge=0, le=1)
    layer_decay: float = Field(0.75, gt=0, le=1)
    encoder_lr_scale: float = Field(1.0, gt=0)


class Segmenter(nn.Module):
    """Encoder and decoder, prepared image to logits: what prediction needs of a fine-tuned bundle.

    Args:
        encoder: Of the bundle.
        decoder: Of the bundle.
        augment: Of the recipe; only what is not random in it, such as a HU window, is applied.
    """

    def __init__(self, encoder: Backbone, decoder: Decoder, *, augment: Pipeline) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.augment = augment

    def forward(self, x: Shaped[Tensor, "b c *s"]) -> Float[Tensor, "b k *s"]:
        """Scores of each class at the image's resolution, before softmax; ``x`` as it comes from the store."""
        x = self.augment.normalise(x)
        logits: Tensor = self.decoder(self.encoder(x), x)[0]
        return logits

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Self:
        """Build the network of a segmentation bundle with its weights, in eval mode.

        Raises:
            CheckpointError: if the bundle holds no segmentation model, or its weights do not fit in full.
        """
        decoder_config, task = bundle.passport.decoder, bundle.passport.recipe.get("task")
        if bundle.passport.kind != "segmenter" or decoder_config is None or not isinstance(task, Mapping):
            raise CheckpointError(
                f"{bundle.folder}: a bundle of kind {bundle.passport.kind}; one that medssl finetune left is needed. "
                "Fine-tune this encoder first.",
                code="E_CONTRACT",
            )
        decoder = Decoder(**decoder_config)
        load_into(decoder, bundle.tensors, prefix="decoder")
        options = {key: value for key, value in task.items() if key != "name"}
        config = Config.parse(options, source=f"{bundle.folder} recipe")
        return cls(bundle.build_encoder(), decoder, augment=build_augment(config.augment)).eval()


class Segmentation(Task):
    """Label every voxel: Dice and cross-entropy on crops that over-represent the structures.

    Args:
        config: See :class:`Config`.
        encoder: Pretrained or fresh; trained in place, as ``config.mode`` says.
        label_values: Values of the structures in the label maps; 0, the background, is added if it is not there.
        seed: Of the decoder's fresh weights, so that arms of a study begin with the same decoder.
        images: What is known of the images, which the augments are checked against; None checks nothing.

    Reference: Isensee et al., nnU-Net, Nature Methods 2021, arXiv:1904.08128 (loss, foreground oversampling); Bao et
        al., BEiT, ICLR 2022, arXiv:2106.08254 (layer-wise learning-rate decay).
    Deviations: two crops in three are centred on a structure, drawn crop by crop, where nnU-Net forces one in three
        per batch; structures are drawn evenly.
    """

    def __init__(
        self,
        config: Config,
        *,
        encoder: Backbone,
        label_values: Sequence[int],
        seed: int,
        images: Images | None = None,
    ) -> None:
        super().__init__(encoder=encoder)
        values = sorted({0, *label_values})
        if len(values) < 2 or values[0] < 0:
            raise ConfigError(
                f"segmentation: label values {tuple(label_values)}; at least one positive value and none below 0 are "
                "needed. Give labelled cases.",
                code="E_LABEL_SET",
            )
        self.config = config
        self.unused_parameters = config.mode == "warmup_then_full"
        self.label_values = tuple(values)
        self.images = images or Images()
        self.augment = build_augment(config.augment, images=images)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.decoder = Decoder(
                encoder.channels,
                encoder.strides,
                encoder.spatial_dims,
                len(values),
                width=config.decoder.width,
                deep_supervision=config.deep_supervision,
                skip_image_channels=encoder.in_channels if config.decoder.skip_image else 0,
            )
        self.register_buffer("_values", torch.tensor(values), persistent=False)
        self._values: Int64[Tensor, " k"]
        self._is_encoder_frozen = False
        if config.mode == "frozen":
            self._freeze_encoder(True)

    def prepare(self, batch: Batch, *, training: bool) -> Batch:
        """Augment images and label maps, and number the classes.

        Args:
            batch: Boxes ``image`` (b, c, *box) and ``label`` (b, 1, *box) with the values of the label maps.
            training: False leaves out what is random.

        Returns:
            ``image`` (b, c, *s) and ``target`` (b, 1, *s), in which class ``i`` is ``label_values[i]``.

        Raises:
            CaseError: if a label map holds a value that is not among the label values.
        """
        image, label = batch["image"], batch["label"]
        frame = Frame.of(batch.tensors, "image", shape=self.config.crop_voxels)
        if training:
            view = self.augment(image, batch.seeds, label, frame=frame)
        else:
            view = self.augment.plain(image, label, frame=frame)
        target = self._class_index(view.label, batch.case_ids)
        return batch.with_tensors({"image": view.image, "target": target}, view.notes)

    def forward(self, batch: Batch) -> Losses:
        """Dice and cross-entropy of one batch."""
        image, target = batch["image"], batch["target"]
        outputs = self.decoder(self._features(image), image)
        terms = deep_dice_ce(
            outputs,
            target,
            include_background=self.config.include_background,
            weights=(self.config.dice_weight, self.config.ce_weight),
        )
        with torch.no_grad():
            hard = _mean_hard_dice(outputs[0].argmax(dim=1, keepdim=True), target, num_classes=len(self.label_values))
        parts = {"dice_loss": terms.dice, "cross_entropy": terms.cross_entropy}
        return Losses(terms.total, parts, {"crop_dice": hard})

    def logits(self, x: Shaped[Tensor, "b c *s"]) -> Float[Tensor, "b k *s"]:
        """Scores of each class at the image's resolution; class ``i`` is ``label_values[i]``."""
        x = self.augment.normalise(x)
        logits: Tensor = self.decoder(self._features(x), x)[0]
        return logits

    def view_sampler(self) -> LabelledCrop:
        """Crops of image and label, often centred on a structure, in boxes that rotations find real tissue in."""
        config = self.config
        spacing_mm = self.images.crop_spacing_mm(config.crop_voxels, config.crop_mm)
        return LabelledCrop(
            config.crop_voxels,
            foreground_share=config.foreground_share,
            label_values=self.label_values[1:],
            crop_mm=config.crop_mm,
            margin=self.augment.margin(config.crop_voxels, spacing_mm),
        )

    def decoder_config(self) -> dict[str, Any]:
        """Arguments that build the decoder again."""
        return dict(self.decoder.config)

    def take_decoder(self, bundle: Bundle) -> str:
        """Start all but the last layer from a pretrained decoder of the same form, if the configuration asks for it.

        Raises:
            CheckpointError: if it is asked for, and the bundle has no decoder or one of another form.
        """
        if not self.config.decoder.pretrained:
            return "random weights"
        theirs, mine = bundle.passport.decoder or {}, self.decoder.config
        different = [key for key in mine if key not in _FREE_DECODER_KEYS and theirs.get(key) != mine[key]]
        if different:
            found = f"one with another {', '.join(different)}" if theirs else "none"
            raise CheckpointError(
                f"{bundle.folder}: task.decoder.pretrained asks for a decoder of the task's form, the bundle has "
                f"{found}. Give method and task the same decoder width, or set task.decoder.pretrained=false.",
                code="E_CONTRACT",
            )
        load_into(self.decoder.steps, bundle.tensors, prefix="decoder.steps")
        return "pretrained, with a new last layer"

    def bundle_modules(self) -> Mapping[str, nn.Module]:
        """``encoder`` and ``decoder``, as :meth:`Segmenter.from_bundle` looks for them."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    def param_groups(self) -> list[ParamGroup]:
        """Decoder at the full learning rate; encoder as the mode says, also where it only joins in later."""
        groups = split_decay("decoder", list(self.decoder.parameters()))
        scale = self.config.encoder_lr_scale
        if self.config.mode == "frozen":
            return groups
        if self.config.mode != "layer_decay":
            return [*groups, *split_decay("encoder", list(self.encoder.parameters()), lr_scale=scale)]
        layers = self.encoder.layer_groups()
        for index, params in enumerate(layers):
            decayed = scale * self.config.layer_decay ** (len(layers) - index)
            groups += split_decay(f"encoder/{index}", params, lr_scale=decayed)
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

    def _freeze_encoder(self, frozen: bool) -> None:
        if frozen == self._is_encoder_frozen:
            return
        self._is_encoder_frozen = frozen
        self.encoder.requires_grad_(not frozen)
        self.encoder.train(self.training and not frozen)

    def _features(self, x: Tensor) -> list[Tensor]:
        with torch.no_grad() if self._is_encoder_frozen else nullcontext():
            features: list[Tensor] = self.encoder(x)
        return features

    def _class_index(self, label: Integer[Tensor, "b 1 *s"], case_ids: tuple[str, ...]) -> Int64[Tensor, "b 1 *s"]:
        """Position of each voxel's value among the label values."""
        index = torch.bucketize(label.long(), self._values).clamp(max=len(self.label_values) - 1)
        unknown = self._values[index] != label
        if unknown.any():
            first = int(unknown.flatten(1).any(dim=1).nonzero()[0])
            found = sorted(set(label[first][unknown[first]].tolist()))
            raise CaseError(
                f"case {case_ids[first]}: label values {found} beside {self.label_values}; the model has a class only "
                "for the latter. Correct the label map or scan and prepare again.",
                code="E_LABEL_SET",
            )
        return index


def _mean_hard_dice(
    prediction: Int64[Tensor, "b 1 *s"], target: Int64[Tensor, "b 1 *s"], *, num_classes: int
) -> Float[Tensor, ""]:
    """Dice of the whole batch, mean over the structures that are in prediction or target; 1 if none is."""
    pairs = (target * num_classes + prediction).float()  # a histogram, for which no step waits as for bincount
    table = torch.histc(pairs, num_classes**2, -0.5, num_classes**2 - 0.5).reshape(num_classes, num_classes)
    size = (table.sum(dim=0) + table.sum(dim=1))[1:]
    seen = (size > 0).sum()
    dice = (2 * table.diagonal()[1:] / size.clamp(min=1)).sum()
    return torch.where(seen > 0, dice / seen.clamp(min=1), 1.0)

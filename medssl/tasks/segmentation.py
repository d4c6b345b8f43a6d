"""Fine-tune an encoder to label voxels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, cast

import torch
from jaxtyping import Bool, Float, Int64, Integer, Shaped
from pydantic import Field, JsonValue, model_validator
from torch import Tensor, nn

from medssl import config as configuration
from medssl.augment.build import build_augment
from medssl.augment.frame import Frame
from medssl.augment.images import Images
from medssl.augment.pipeline import Pipeline
from medssl.errors import CaseError, CheckpointError, ConfigError
from medssl.losses.regions import Regions, region_terms
from medssl.losses.segmentation import IGNORED, Terms, deeply, label_terms
from medssl.nn.backbone import Backbone
from medssl.nn.bundle import Bundle, load_into
from medssl.nn.decoder import Decoder
from medssl.nn.linear import LinearDecoder, build_decoder
from medssl.tasks.base import AdaptationConfig, Task
from medssl.tasks.objective import LossConfig, signed_distance
from medssl.trainable import Batch, Losses, Progress
from medssl.views import EdgesMm, LabelledCrop

LevelLoss = Callable[[Tensor, Tensor, int], Terms]

_FREE_DECODER_KEYS = ("out_channels", "deep_supervision")  # these shape the last layers alone


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


class Config(AdaptationConfig):
    """Segmentation; beside these, how the encoder is adapted (:class:`~medssl.tasks.base.AdaptationConfig`).

    Args:
        crop_voxels: Size of the training crops, and of the windows of prediction.
        crop_mm: Edge lengths of the crops, and so the voxel size that prediction resamples to; None takes the voxels
            of the store as they are.
        augment: ``{preset: name}`` or a list of augmentations.
        foreground_share: Probability that a crop is centred on a voxel of a structure.
        class_balance: Which structure of the case that is: each alike, or the smaller the more often
            (:class:`~medssl.views.crops.LabelledCrop`).
        loss: Which loss.
        dice_weight: Of the overlap term, Dice or Tversky.
        ce_weight: Of the voxel-wise term, cross-entropy or focal.
        include_background: Whether background is in the overlap term.
        ignore_value: Voxels whose label has this value take part in no term, as in scribbles or maps drawn on some
            slices only; it is no class. What lies outside the volume is background.
        regions: Label values of regions that are trained one by one in place of the values, such as
            ``{whole: [1, 2, 3], core: [2, 3], active: [3]}``; see :class:`~medssl.losses.regions.Regions` for how a
            label map comes of them.
        annotated: Column of the store's facts with the label values that were drawn in a case, as in ``1;2``; the
            others may lie anywhere in its background. A case without an entry is drawn in full.
        deep_supervision: Whether coarser decoder levels are trained too.
        decoder: The decoder.
    """

    crop_voxels: tuple[int, int, int]
    crop_mm: EdgesMm = None
    augment: dict[str, JsonValue] | list[dict[str, JsonValue]] = Field(default_factory=_light)
    foreground_share: float = Field(0.67, ge=0, le=1)
    class_balance: Literal["uniform", "inverse_sqrt"] = "uniform"
    loss: LossConfig = LossConfig()
    dice_weight: float = Field(1.0, ge=0)
    ce_weight: float = Field(1.0, ge=0)
    include_background: bool = False
    ignore_value: int | None = Field(None, ge=1)
    regions: dict[str, tuple[int, ...]] | None = Field(None, min_length=1)
    annotated: str | None = None
    deep_supervision: bool = False
    decoder: DecoderConfig = DecoderConfig()

    @model_validator(mode="after")
    def _linear_has_one_map(self) -> Self:
        if self.mode == "linear" and (self.deep_supervision or self.decoder.pretrained):
            raise ValueError(
                "mode linear has one linear map in place of a decoder; set deep_supervision and decoder.pretrained to "
                "false"
            )
        return self


class Segmenter(nn.Module):
    """Encoder and decoder, prepared image to logits: what prediction needs of a fine-tuned bundle.

    Args:
        encoder: Of the bundle.
        decoder: Of the bundle.
        augment: Of the recipe; only what is not random in it, such as a HU window, is applied.
        regions: Which the decoder answers in place of classes, if it does.
    """

    def __init__(
        self, encoder: Backbone, decoder: Decoder | LinearDecoder, *, augment: Pipeline, regions: Regions | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.augment = augment
        self.regions = regions

    def forward(self, x: Shaped[Tensor, "b c *s"]) -> Float[Tensor, "b k *s"]:
        """Scores of each class at the image's resolution, before softmax; ``x`` as it comes from the store."""
        x = self.augment.normalise(x)
        logits: Tensor = self.decoder(self.encoder(x), x)[0]
        return logits if self.regions is None else self.regions.class_scores(logits)

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
        decoder = build_decoder(decoder_config)
        load_into(decoder, bundle.tensors, prefix="decoder")
        options = {key: value for key, value in task.items() if key != "name"}
        config = Config.parse(options, source=f"{bundle.folder} recipe")
        regions = _regions(config, bundle.passport.label_values or ())
        augment = build_augment(config.augment)
        return cls(bundle.build_encoder(), decoder, augment=augment, regions=regions).eval()


class Segmentation(Task[Config]):
    """Label every voxel: an overlap and a voxel-wise loss on crops that over-represent the structures.

    Args:
        config: See :class:`Config`.
        encoder: Pretrained or fresh; trained in place, as ``config.mode`` says.
        label_values: Values of the structures in the label maps; 0, the background, is added if it is not there.
        seed: Of the decoder's fresh weights, so that arms of a study begin with the same decoder.
        images: What is known of the images, which the augments are checked against; None checks nothing.

    Reference: Isensee et al., nnU-Net, Nature Methods 2021, arXiv:1904.08128 (loss, foreground oversampling).
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
        super().__init__(config, encoder=encoder, seed=seed)
        values = sorted({0, *label_values} - {config.ignore_value})
        if len(values) < 2 or values[0] < 0:
            raise ConfigError(
                f"segmentation: label values {tuple(label_values)}; at least one positive value and none below 0 are "
                "needed. Give labelled cases.",
                code="E_LABEL_SET",
            )
        self.label_values = tuple(values)
        self.regions = _regions(config, values)
        self._fraction = 0.0
        self.images = images or Images()
        self.augment = build_augment(config.augment, images=images)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            num_outputs = len(values) if self.regions is None else len(self.regions.names)
            self.decoder = _fresh_decoder(config, encoder, num_outputs)
        self.register_buffer("_values", torch.tensor(values), persistent=False)
        self._values: Int64[Tensor, " k"]

    def prepare(self, batch: Batch, *, training: bool) -> Batch:
        """Augment images and label maps, and number the classes.

        Args:
            batch: Boxes ``image`` (b, c, *box) and ``label`` (b, 1, *box) with the values of the label maps.
            training: False leaves out what is random.

        Returns:
            ``image`` (b, c, *s) and ``target`` (b, 1, *s), in which class ``i`` is ``label_values[i]`` and ignored
            voxels have -1; with them ``known`` (b, k) where cases may be annotated in part, and ``distance`` where the
            loss needs it.

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
        made = {"image": view.image, "target": target}
        if "annotated" in batch:
            drawn = batch["annotated"]
            made["known"] = torch.cat((torch.ones_like(drawn[:, :1]), drawn), dim=1)
        if self.config.loss.needs_distance:
            spacing_mm = self.images.crop_spacing_mm(self.config.crop_voxels, self.config.crop_mm)
            made["distance"] = signed_distance(self._masks(target), spacing_mm[: target.ndim - 2])
        return batch.with_tensors(made, view.notes)

    def before_step(self, progress: Progress) -> None:
        """As every task; and the boundary term grows with the run."""
        super().before_step(progress)
        self._fraction = progress.fraction

    def forward(self, batch: Batch) -> Losses:
        """Loss of one batch, by the names of its terms."""
        image, target = batch["image"], batch["target"]
        known = batch.tensors.get("known")
        outputs = self.decoder(self.features(image), image)
        terms = deeply(outputs, target, self._loss_at_levels(batch, known))
        with torch.no_grad():
            best = self._class_scores(outputs[0]).argmax(dim=1, keepdim=True)
            if known is not None:
                best = best * known.gather(1, best.flatten(1)).reshape(best.shape)
            hard = _mean_hard_dice(best, target, num_classes=len(self.label_values))
        return Losses(terms.total, terms.parts, {"crop_dice": hard})

    def logits(self, x: Shaped[Tensor, "b c *s"]) -> Float[Tensor, "b k *s"]:
        """Scores of each class at the image's resolution; class ``i`` is ``label_values[i]``."""
        x = self.augment.normalise(x)
        return self._class_scores(self.decoder(self.features(x), x)[0])

    def view_sampler(self) -> LabelledCrop:
        """Crops of image and label, often centred on a structure, in boxes that rotations find real tissue in."""
        config = self.config
        spacing_mm = self.images.crop_spacing_mm(config.crop_voxels, config.crop_mm)
        return LabelledCrop(
            config.crop_voxels,
            foreground_share=config.foreground_share,
            label_values=self.label_values[1:],
            class_balance=config.class_balance,
            annotated=config.annotated,
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
        load_into(cast("Decoder", self.decoder).steps, bundle.tensors, prefix="decoder.steps")
        return "pretrained, with a new last layer"

    def bundle_modules(self) -> Mapping[str, nn.Module]:
        """``encoder`` and ``decoder``, as :meth:`Segmenter.from_bundle` looks for them."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    def _loss_at_levels(self, batch: Batch, known: Bool[Tensor, "b k"] | None) -> LevelLoss:
        config, regions = self.config, self.regions
        blend = config.loss.blend(
            overlap_weight=config.dice_weight,
            voxel_weight=config.ce_weight,
            include_background=config.include_background,
            fraction=self._fraction,
        )

        def loss(logits: Tensor, target: Tensor, level: int) -> Terms:
            distance = batch.tensors.get("distance") if level == 0 else None
            if regions is None:
                return label_terms(logits, target, blend, known=known, distance=distance)
            return region_terms(logits, target, blend, regions=regions, known=known, distance=distance)

        return loss

    def _class_scores(self, logits: Float[Tensor, "b r *s"]) -> Float[Tensor, "b k *s"]:
        return logits if self.regions is None else self.regions.class_scores(logits)

    def _masks(self, target: Int64[Tensor, "b 1 *s"]) -> Bool[Tensor, "b r *s"]:
        """Where each class or region is."""
        if self.regions is not None:
            return self.regions.masks(target)
        return torch.cat([target == k for k in range(len(self.label_values))], dim=1)

    def _class_index(self, label: Integer[Tensor, "b 1 *s"], case_ids: tuple[str, ...]) -> Int64[Tensor, "b 1 *s"]:
        """Position of each voxel's value among the label values; -1 where it is ignored."""
        index = torch.bucketize(label.long(), self._values).clamp(max=len(self.label_values) - 1)
        unknown = self._values[index] != label
        if self.config.ignore_value is not None:
            ignored = label == self.config.ignore_value
            unknown, index = unknown & ~ignored, index.masked_fill(ignored, IGNORED)
        if unknown.any():
            first = int(unknown.flatten(1).any(dim=1).nonzero()[0])
            found = sorted(set(label[first][unknown[first]].tolist()))
            raise CaseError(
                f"case {case_ids[first]}: label values {found} beside {self.label_values}; the model has a class only "
                "for the latter. Correct the label map or scan and prepare again.",
                code="E_LABEL_SET",
            )
        return index


def _regions(config: Config, label_values: Sequence[int]) -> Regions | None:
    return None if config.regions is None else Regions.of(config.regions, label_values)


def _fresh_decoder(config: Config, encoder: Backbone, out_channels: int) -> Decoder | LinearDecoder:
    if config.mode == "linear":
        return LinearDecoder(encoder.channels, encoder.strides, encoder.spatial_dims, out_channels)
    return Decoder(
        encoder.channels,
        encoder.strides,
        encoder.spatial_dims,
        out_channels,
        width=config.decoder.width,
        deep_supervision=config.deep_supervision,
        skip_image_channels=encoder.in_channels if config.decoder.skip_image else 0,
    )


def _mean_hard_dice(
    prediction: Int64[Tensor, "b 1 *s"], target: Int64[Tensor, "b 1 *s"], *, num_classes: int
) -> Float[Tensor, ""]:
    """Dice of the whole batch, mean over the structures that are in prediction or target; 1 if none is.

    Ignored voxels, of target -1, fall below the histogram.
    """
    pairs = (target * num_classes + prediction).float()  # a histogram, for which no step waits as for bincount
    table = torch.histc(pairs, num_classes**2, -0.5, num_classes**2 - 0.5).reshape(num_classes, num_classes)
    size = (table.sum(dim=0) + table.sum(dim=1))[1:]
    seen = (size > 0).sum()
    dice = (2 * table.diagonal()[1:] / size.clamp(min=1)).sum()
    return torch.where(seen > 0, dice / seen.clamp(min=1), 1.0)

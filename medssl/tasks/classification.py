"""Fine-tune an encoder to tell whole images, or bags of images, apart: classes, labels, grades or numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from pydantic import Field, JsonValue, model_validator
from torch import Tensor, nn

from medssl import config as configuration
from medssl.augment.base import Mixing, derive_seeds
from medssl.augment.build import build_augment
from medssl.augment.frame import Frame
from medssl.augment.images import Images
from medssl.augment.pipeline import Pipeline
from medssl.errors import CheckpointError, ConfigError
from medssl.losses.classification import class_loss, grade_loss, label_loss, number_loss
from medssl.nn.backbone import Backbone
from medssl.nn.bundle import Bundle, load_into
from medssl.nn.pooling import BagPoolName, PooledHead, PoolName
from medssl.tasks.base import AdaptationConfig, Task
from medssl.tasks.targets import Kind, Targets
from medssl.trainable import Batch, Losses
from medssl.views import CaseArrays, EdgesMm, RandomCrop, ViewSampler
from medssl.views.whole import Fit, WholeImage, middle_crops

_CHUNK = 8  # images in one forward pass of prediction


def _light() -> dict[str, JsonValue] | list[dict[str, JsonValue]]:
    return {"preset": "mr_light"}


class HeadConfig(configuration.Config):
    """From features to scores; see :class:`~medssl.nn.pooling.PooledHead`.

    Args:
        pool: Over space: ``mean``, ``max``, ``gem`` or ``attention``.
        levels: ``last`` takes the coarsest level of the pyramid, ``all`` the mean of every level.
        bag_pool: Over the images of a bag.
        hidden: Width of the attentions.
        dropout: On the embedding.
    """

    pool: PoolName = "mean"
    levels: Literal["last", "all"] = "last"
    bag_pool: BagPoolName = "attention"
    hidden: int = Field(64, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)


class Config(AdaptationConfig):
    """Classification and regression; beside these, how the encoder is adapted.

    Args:
        target: Column of the user's table, kept by ``medssl scan --columns``.
        kind: ``binary``; ``multiclass``, one of several; ``multilabel``, any of several, with ``;`` between them and
            ``none`` for none; ``ordinal``, grades in order; ``regression``, a number.
        classes: Names in the order of the outputs; of a binary target the second is the positive one. By default those
            of the training cases, sorted, numbers by size.
        level: ``image`` judges an image; ``bag`` all images of a subject together; ``slices`` a volume by its axial
            slices, with a 2D backbone.
        view: ``whole`` brings the image to ``crop_voxels``; ``crops`` trains on crops and averages their scores at
            prediction, which is for ``level: image`` alone.
        crop_voxels: Voxels of the image or crop.
        crop_mm: Edge lengths of crops; of whole images what is shown around the middle. None takes all of it, or the
            voxels of the store for crops.
        fit: Whether a whole image is stretched to ``crop_voxels`` or keeps its ratio of edges.
        instances: Images of a bag in a training sample.
        most_instances: Images of a bag, or crops of an image, at prediction; of more, so many are spread evenly.
        augment: ``{preset: name}`` or a list of augmentations.
        head: From features to scores.
        balance: What is done about rare classes: ``weights`` gives each class the same say in the loss; ``sampling``
            shows rare ones more often; ``logits`` adds the log of each class's share while training.
        focal_gamma: Focal exponent; 0 is cross-entropy.
        label_smoothing: Share of a target that is spread over all classes.
        huber_delta: Of regression, in standard deviations: where the loss turns from squares to lines.
        threshold: How the threshold on the positive class, or on each label, is chosen on the validation split:
            ``youden`` for the largest sum of sensitivity and specificity, or ``half`` for 0.5.
        calibrate: Fit a temperature on the validation split.
    """

    target: str = Field(min_length=1)
    kind: Kind
    classes: tuple[str, ...] | None = None
    level: Literal["image", "bag", "slices"] = "image"
    view: Literal["whole", "crops"] = "whole"
    crop_voxels: tuple[int, int, int]
    crop_mm: EdgesMm = None
    fit: Fit = "stretch"
    instances: int = Field(8, ge=1)
    most_instances: int = Field(64, ge=1)
    augment: dict[str, JsonValue] | list[dict[str, JsonValue]] = Field(default_factory=_light)
    head: HeadConfig = HeadConfig()
    balance: Literal["none", "weights", "sampling", "logits"] = "none"
    focal_gamma: float = Field(0.0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    huber_delta: float = Field(1.0, gt=0)
    threshold: Literal["youden", "half"] = "youden"
    calibrate: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.view == "crops" and self.level != "image":
            raise ValueError(f"view crops is for level image; level {self.level} takes whole images or slices")
        if self.level == "slices" and self.crop_voxels[2] != 1:
            raise ValueError("level slices needs crop_voxels that end in 1")
        if self.kind == "regression" and (self.classes is not None or self.balance != "none"):
            raise ValueError("regression has no classes, and so none to balance")
        if self.kind == "ordinal" and self.balance == "logits":
            raise ValueError("ordinal takes balance weights or sampling; logits is for classes without an order")
        plain = self.focal_gamma == 0 and self.label_smoothing == 0
        if self.kind in {"ordinal", "regression"} and not plain:
            raise ValueError("focal_gamma and label_smoothing are for binary, multiclass and multilabel")
        return self

    @property
    def in_bags(self) -> bool:
        """Whether a sample holds several images."""
        return self.level != "image"


def make_sampler(
    config: Config, *, bags: Mapping[str, Sequence[CaseArrays]] | None = None, margin: Sequence[float] = (0.0, 0.0, 0.0)
) -> WholeImage | RandomCrop:
    """What cuts the task's images; ``bags`` are those of level bag, ``margin`` is for crops."""
    if config.view == "crops":
        return RandomCrop(config.crop_voxels, crop_mm=config.crop_mm, margin=margin)
    return WholeImage(
        config.crop_voxels,
        fit=config.fit,
        crop_mm=config.crop_mm,
        is_sliced=config.level == "slices",
        bags=bags if config.level == "bag" else None,
        instances=config.instances,
    )


class Classifier(nn.Module):
    """Encoder and head, and how a case is looked at: what prediction needs of a fine-tuned bundle.

    Args:
        encoder: Of the bundle.
        head: Of the bundle.
        config: Of the recipe's task.
        augment: Of the recipe; only what is not random in it, such as a HU window, is applied.
    """

    def __init__(self, encoder: Backbone, head: PooledHead, *, config: Config, augment: Pipeline) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.config = config
        self.augment = augment

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Self:
        """Build the network of a classifier's bundle with its weights, in eval mode.

        Raises:
            CheckpointError: if the bundle holds no classifier, or its weights do not fit in full.
        """
        head_config, task = bundle.passport.decoder, bundle.passport.recipe.get("task")
        if bundle.passport.kind != "classifier" or head_config is None or not isinstance(task, Mapping):
            raise CheckpointError(
                f"{bundle.folder}: a bundle of kind {bundle.passport.kind}; a classifier that medssl finetune left is "
                "needed. Fine-tune this encoder first.",
                code="E_CONTRACT",
            )
        head = PooledHead(**head_config)
        load_into(head, bundle.tensors, prefix="head")
        options = {key: value for key, value in task.items() if key != "name"}
        config = Config.parse(options, source=f"{bundle.folder} recipe")
        return cls(bundle.build_encoder(), head, config=config, augment=build_augment(config.augment)).eval()

    @torch.inference_mode()
    def scores(self, members: Sequence[CaseArrays]) -> Float[np.ndarray, " k"]:
        """Scores before softmax of an image, or of a bag; of several crops the mean.

        Args:
            members: The image; or all images of the bag.
        """
        device = next(self.parameters()).device
        embeddings = self._embed(self._views(members), device)
        if self.config.in_bags:
            embeddings = self.head.of_bags(embeddings[None])
        found: Float[np.ndarray, " k"] = self.head(embeddings).double().mean(dim=0).cpu().numpy()
        return found

    def _views(self, members: Sequence[CaseArrays]) -> dict[str, np.ndarray]:
        first, most = members[0], self.config.most_instances
        sampler = make_sampler(self.config, bags={first.case_id: members})
        if isinstance(sampler, WholeImage):
            return sampler.every(first, most=most)
        return middle_crops(first, sampler.crop_voxels, sampler.size(first), most=most)

    def _embed(self, arrays: Mapping[str, np.ndarray], device: torch.device) -> Float[Tensor, "n d"]:
        """One embedding an image, a few at a time."""
        names = ("image", "image_to_box", "image_spacing_mm")
        every = {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in names}
        if self.encoder.spatial_dims == 2:
            every["image"] = every["image"][..., 0]
        found = []
        for start in range(0, len(every["image"]), _CHUNK):
            part = {name: tensor[start : start + _CHUNK] for name, tensor in every.items()}
            frame = Frame.of(part, "image", shape=self.config.crop_voxels)
            image = self.augment.normalise(part["image"].to(device), frame=frame)
            found.append(self.head.embed(self.encoder(image)))
        return torch.cat(found)


class Classification(Task[Config]):
    """Tell images apart, or measure them, by the pooled features of an encoder.

    Args:
        config: See :class:`Config`.
        encoder: Pretrained or fresh; trained in place, as ``config.mode`` says.
        targets: Of the training and held-out cases, by case id; of bags by the id of their first case.
        seed: Of the head's fresh weights, so that arms of a study begin with the same head.
        images: What is known of the images, which the augments are checked against; None checks nothing.
        bags: For each case id all cases of its bag, for ``level: bag``.

    Losses: ``classification``, or ``regression`` in squared standard deviations of the training set. Monitors:
    ``accuracy`` (of labels the share that is right), or ``absolute_error`` in the target's unit.

    Reference: Ilse, Tomczak, Welling, ICML 2018, arXiv:1802.04712 (bags).
    Deviations: of a large bag a sample holds a part.
    """

    def __init__(
        self,
        config: Config,
        *,
        encoder: Backbone,
        targets: Targets,
        seed: int,
        images: Images | None = None,
        bags: Mapping[str, Sequence[CaseArrays]] | None = None,
    ) -> None:
        super().__init__(config, encoder=encoder, seed=seed)
        if config.mode == "linear" and (config.head.pool not in {"mean", "max"}):
            raise ConfigError(
                f"mode linear with head.pool {config.head.pool}: a linear probe learns no pooling. Take mean or max."
            )
        self.targets = targets
        self.images = images or Images()
        self.augment = build_augment(config.augment, images=images)
        mixing = [augment.name for augment in self.augment.intensity if isinstance(augment, Mixing)]
        if mixing:
            raise ConfigError(
                f"augment {mixing[0]}: mixes images of several cases, and a class has no rule for that. Take it out.",
                code="E_MIXED_LABELS",
            )
        self._bags = bags
        is_ordinal = targets.kind == "ordinal"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            options = config.head.to_dict()
            self.head = PooledHead(
                encoder.channels,
                targets.outputs,
                **options,
                is_normed=config.mode == "linear",
                is_ordinal=is_ordinal,
            )
        rarity = _rarity(config, targets)
        self._rarity = tuple(rarity)
        for name, tensor in rarity.items():
            self.register_buffer(f"_{name}", tensor, persistent=False)

    def prepare(self, batch: Batch, *, training: bool) -> Batch:
        """Augment the images, and look up the targets.

        Args:
            batch: Boxes ``image`` (b, c, *box), or (b, n, c, *box) and ``members`` (b, n) of bags.
            training: False leaves out what is random.

        Returns:
            ``image`` (b, n, c, *s) with n = 1 for images, ``members`` (b, n), and ``target`` (b, k).
        """
        image = batch["image"]
        count = image.shape[1] if self.config.in_bags else 1
        boxes = image.flatten(0, 1) if self.config.in_bags else image
        frame = Frame.of(batch.tensors, "image", shape=self.config.crop_voxels)
        if training:
            seeds = derive_seeds(batch.seeds, count).flatten() if self.config.in_bags else batch.seeds
            view = self.augment(boxes, seeds, frame=frame)
        else:
            view = self.augment.plain(boxes, frame=frame)
        found = [torch.from_numpy(self.targets.values[case_id]) for case_id in batch.case_ids]
        members = batch["members"] if "members" in batch else torch.ones(len(batch), count, dtype=torch.bool)
        tensors = {
            "image": view.image.unflatten(0, (len(batch), count)),
            "members": members.to(image.device),
            "target": torch.stack(found).to(image.device),
        }
        notes = {name: note.reshape(len(batch), count).float().mean(dim=1) for name, note in view.notes.items()}
        return batch.with_tensors(tensors, notes)

    def forward(self, batch: Batch) -> Losses:
        """Loss of one batch."""
        image, target = batch["image"], batch["target"]
        embeddings = self.head.embed(self.features(image.flatten(0, 1)))
        pooled = self._pooled(embeddings.reshape(*image.shape[:2], -1), batch["members"])
        return self._losses(self.head(pooled), target)

    def logits(self, x: Shaped[Tensor, "b c *s"]) -> Float[Tensor, "b k"]:
        """Scores of each image."""
        embeddings = self.head.embed(self.features(self.augment.normalise(x)))
        scores: Tensor = self.head(self._pooled(embeddings[:, None], None))
        return scores

    def view_sampler(self) -> ViewSampler:
        """Whole images, bags of them, or crops in boxes that rotations find real tissue in."""
        config = self.config
        if config.view == "whole":
            return make_sampler(config, bags=self._bags)
        spacing_mm = self.images.crop_spacing_mm(config.crop_voxels, config.crop_mm)
        return make_sampler(config, margin=self.augment.margin(config.crop_voxels, spacing_mm))

    def decoder_config(self) -> dict[str, Any]:
        """Arguments that build the head again."""
        return self.head.config

    def bundle_modules(self) -> Mapping[str, nn.Module]:
        """``encoder`` and ``head``, as :meth:`Classifier.from_bundle` looks for them."""
        return {"encoder": self.encoder, "head": self.head}

    def classifier(self) -> Classifier:
        """The network as it is now, for prediction; it shares the weights."""
        return Classifier(self.encoder, self.head, config=self.config, augment=self.augment).eval()

    def _pooled(self, embeddings: Float[Tensor, "b n d"], members: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b d"]:
        return self.head.of_bags(embeddings, members) if self.config.in_bags else embeddings[:, 0]

    def _losses(self, logits: Float[Tensor, "b k"], target: Float[Tensor, "b k"]) -> Losses:
        config, kind = self.config, self.targets.kind
        options: dict[str, Any] = {name: getattr(self, f"_{name}") for name in self._rarity}
        if kind != "ordinal":
            options |= {"gamma": config.focal_gamma, "smoothing": config.label_smoothing}
        if kind == "regression":
            loss = number_loss(logits, target, delta=config.huber_delta)
            error = (logits.detach().float() - target).abs().mean() * self.targets.spread
            return Losses(loss, {"regression": loss}, {"absolute_error": error})
        if kind == "multilabel":
            loss = label_loss(logits, target, **options)
            right = (logits.detach() > 0) == (target > 0.5)
        elif kind == "ordinal":
            index = target[:, 0].long()
            loss = grade_loss(logits, index, **options)
            right = (logits.detach() > 0).sum(dim=1) == index
        else:
            index = target[:, 0].long()
            loss = class_loss(logits, index, **options)
            right = logits.detach().argmax(dim=1) == index
        return Losses(loss, {"classification": loss}, {"accuracy": right.float().mean()})


def _rarity(config: Config, targets: Targets) -> dict[str, Tensor]:
    """What the loss is told of how rare classes are, by the names of its options."""
    if config.balance not in {"weights", "logits"}:
        return {}
    counts = np.array(targets.counts, np.float64)
    held = np.maximum(counts, 1.0)
    if targets.kind == "multilabel":
        odds = np.maximum(targets.trained - counts, 1.0) / held
        if config.balance == "weights":
            return {"positive_weights": torch.from_numpy(odds).float()}
        return {"log_odds": torch.from_numpy(-np.log(odds)).float()}
    if targets.kind == "ordinal":
        above = counts[::-1].cumsum()[::-1][1:]
        rarer = np.maximum(np.minimum(above, targets.trained - above), 1.0)
        weights = (1 / rarer) * len(rarer) / (1 / rarer).sum()
        return {"weights": torch.from_numpy(weights).float()}
    if config.balance == "weights":
        return {"weights": torch.from_numpy(targets.trained / (len(counts) * held)).float()}
    return {"log_prior": torch.from_numpy(np.log(held / held.sum())).float()}

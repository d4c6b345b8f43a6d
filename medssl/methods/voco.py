"""VoCo: learn where a crop lies by how much of it lies in each cell of a grid over the volume."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from medssl.augment.base import derive_seeds
from medssl.augment.frame import Frame
from medssl.augment.images import Images
from medssl.config import Config as BaseConfig
from medssl.errors import ConfigError
from medssl.losses.overlap import (
    NegForm,
    PosWeight,
    base_regulariser,
    consistency_terms,
    overlap_terms,
    rectified_cosine,
)
from medssl.methods.base import AugmentOption, Method, draw_subsets, spatial_size, weight_seed
from medssl.nn.backbone import Backbone
from medssl.nn.ema import cosine_momentum, make_teacher
from medssl.nn.heads import Projector, pool_pyramid
from medssl.trainable import Batch, Losses, Progress
from medssl.views import EdgesMm, GridCrops, overlap_fractions

Preset = Literal["paper", "released", "v1", "v2", "nnssl", "medssl"]
Grid = tuple[int, int, int]

_CHANCE_LABELS = 20_000
_AUGMENT: AugmentOption = {"preset": "mr_light"}


@dataclass(frozen=True)
class Objective:
    """Everything in which the published VoCos differ; a preset fills it in, an option of :class:`Config` overrides.

    Args:
        grid: Base crops along each axis.
        num_targets: Target crops a volume.
        pos_weight: Weight of a pair in the positive term, see :func:`~medssl.losses.overlap.overlap_terms`.
        neg_form: Form of the negative term.
        reg_power: Power of the cosine between bases in the regulariser.
        reg_symmetric: Whether both bases of a pair get the regulariser's gradient.
        teacher: ``none``; ``head``, a momentum copy of the projector; or ``full``, one of encoder and projector.
        detach_bases: Whether the prediction loss leaves the bases alone. With a full teacher, False adds the half
            where the teacher's targets meet the student's bases.
        inter: Add the consistency with the bases of the next volume in the batch.
        features: Pool ``all`` levels of the encoder, or the ``last``.
        momentum: Of the teacher at the start and at the end of the run, joined by half a cosine.
        projector_norm: Normalisation in the projector.
        projector_channels: Hidden and output channels of the projector.
        feature_dropout: Share of the pooled features dropped, element by element, before the student's projector.
    """

    grid: Grid = (4, 4, 1)
    num_targets: int = 2
    pos_weight: PosWeight = "overlap"
    neg_form: NegForm = "square"
    reg_power: Literal[1, 2] = 2
    reg_symmetric: bool = True
    teacher: Literal["none", "head", "full"] = "none"
    detach_bases: bool = True
    inter: bool = False
    features: Literal["all", "last"] = "all"
    momentum: tuple[float, float] = (0.9, 0.9)
    projector_norm: Literal["layer", "batch"] = "batch"
    projector_channels: tuple[int, int] = (2048, 2048)
    feature_dropout: float = 0.0


PRESETS: dict[Preset, Objective] = {
    "paper": Objective(pos_weight="all", neg_form="paper", reg_power=1, features="last"),
    "released": Objective(pos_weight="indicator", features="last"),
    "v1": Objective(reg_symmetric=False, teacher="full", detach_bases=False),
    "v2": Objective(
        grid=(3, 3, 1),
        neg_form="log",
        reg_symmetric=False,
        teacher="head",
        inter=True,
        projector_channels=(1024, 1024),
        feature_dropout=0.2,
    ),
    "nnssl": Objective(num_targets=4, reg_power=1, projector_norm="layer"),
    "medssl": Objective(
        grid=(3, 3, 3),
        num_targets=4,
        teacher="full",
        detach_bases=False,
        momentum=(0.99, 1.0),
        projector_norm="layer",
        projector_channels=(512, 256),
    ),
}


class Config(BaseConfig):
    """Options of VoCo; those of :class:`Objective` are None by default, which takes the preset's.

    Args:
        preset: ``medssl`` is what we recommend; ``paper``, ``released`` (first code), ``v1`` (present code), ``v2``
            (Large-Scale-Medical) and ``nnssl`` are the published variants.
        crop_voxels: Size of every base and target crop; 1 on the last axis for 2D.
        position_mode: ``resize`` lays the grid over the whole volume, ``crop`` over a random window of true size.
        cell_mm: Size of a cell in ``crop`` mode; None takes ``crop_voxels`` as they are.
        augment: ``{preset: ...}``, of which the intensity part is taken, or a list of intensity augments; drawn anew
            for every crop. Crops are not moved: a moved crop would need another label.
        reg_bases: Run only so many bases a volume, drawn at random, through the student with gradient, and estimate
            the regulariser from them, without bias. Needs ``detach_bases``. Saves most of a step's time and memory.
        inter_min_similarity: A target takes part in ``inter`` when its teacher finds it that similar to a base.
    """

    preset: Preset = "medssl"
    crop_voxels: tuple[int, int, int] = (32, 32, 32)
    position_mode: Literal["resize", "crop"] = "resize"
    cell_mm: EdgesMm = None
    augment: AugmentOption = Field(_AUGMENT)
    reg_bases: int | None = Field(None, ge=2)
    inter_min_similarity: float = Field(0.1, ge=0.0, lt=1.0)
    grid: Grid | None = None
    num_targets: int | None = Field(None, ge=1)
    pos_weight: PosWeight | None = None
    neg_form: NegForm | None = None
    reg_power: Literal[1, 2] | None = None
    reg_symmetric: bool | None = None
    teacher: Literal["none", "head", "full"] | None = None
    detach_bases: bool | None = None
    inter: bool | None = None
    features: Literal["all", "last"] | None = None
    momentum: tuple[float, float] | None = None
    projector_norm: Literal["layer", "batch"] | None = None
    projector_channels: tuple[int, int] | None = None
    feature_dropout: float | None = Field(None, ge=0.0, lt=1.0)

    @property
    def objective(self) -> Objective:
        """The preset with the given options in place of its own."""
        given = {name: getattr(self, name) for name in Objective.__dataclass_fields__}
        return replace(PRESETS[self.preset], **{name: value for name, value in given.items() if value is not None})

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        for applies, sentence in _conflicts(self, self.objective):
            if applies:
                raise ValueError(sentence)
        return self


class VoCo(Method):
    """Make the similarity of a random crop to each cell of a grid equal to the share of it that lies there.

    ``loss = pos + neg + reg (+ inter)``; see :func:`~medssl.losses.overlap.overlap_terms` and
    :func:`~medssl.losses.overlap.base_regulariser`. With a full teacher the similarity is
    ``s = ½ [relu cos(x_student, b_teacher) + relu cos(x_teacher, b_student)]``, of which ``detach_bases`` keeps the
    first half alone.

    A network that ignores content has the same similarity for every pair; the best it can do is ``chance_level()``,
    computed at construction for the configured grid and loss. A constant encoder has at least that loss. Monitors:
    ``pearson`` of similarity and overlap (0 on that plateau), ``top1``, the share of targets whose most similar base is
    one that they overlap most, and with ``inter`` the share of targets that took part and their mean label mass.

    Reference: Wu, Zhuang, Chen, VoCo, CVPR 2024, arXiv:2402.17300, section 3; Wu et al., Large-Scale 3D Medical Image
    Pre-training with Geometric Context Priors, arXiv:2410.09890.
    Deviations: 3D overlaps; the regulariser is symmetric; layer norm in the projector, so that the loss does not depend
    on batch neighbours; the teacher starts as a copy of the student, follows with momentum 0.99 to 1 and sees the
    batch in eval mode; no flips or rotations of single crops, which the label would not follow; feature dropout drops
    elements, where the released v2 drops whole samples; ``inter`` leaves out targets without a similar base. The
    historical presets keep their own loss, teacher, grid and projector, and share the rest.
    """

    citations = ("Wu et al., CVPR 2024, arXiv:2402.17300", "Wu et al., 2024, arXiv:2410.09890")
    position_task = True

    def __init__(self, config: Config, *, encoder: Backbone, seed: int, images: Images | None = None) -> None:
        super().__init__(config, encoder=encoder, seed=seed, images=images)
        self.config = config
        self.objective = config.objective
        self.crop = spatial_size("crop_voxels", config.crop_voxels, spatial_dims=encoder.spatial_dims)
        spatial_size("grid", self.objective.grid, spatial_dims=encoder.spatial_dims)
        channels = encoder.channels if self.objective.features == "all" else encoder.channels[-1:]
        hidden, out = self.objective.projector_channels
        with weight_seed(seed):
            self.projector = Projector(sum(channels), hidden, out, norm=self.objective.projector_norm)
        self.dropout = nn.Dropout(self.objective.feature_dropout)
        self.teacher_encoder = make_teacher(encoder) if self.objective.teacher == "full" else None
        self.teacher_projector = make_teacher(self.projector) if self.objective.teacher != "none" else None
        self.train()
        self.chance, self.chance_similarity = chance_level(self.view_sampler(), self.objective)

    def view_sampler(self) -> GridCrops:
        """All bases of the grid and some targets of one case."""
        return GridCrops(
            self.objective.grid,
            self.config.crop_voxels,
            num_targets=self.objective.num_targets,
            position_mode=self.config.position_mode,
            cell_mm=self.config.cell_mm,
        )

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Encoder and projector with their teachers, as far as there are any."""
        pairs = ((self.encoder, self.teacher_encoder), (self.projector, self.teacher_projector))
        return [(student, teacher) for student, teacher in pairs if teacher is not None]

    def momentum(self, progress: Progress) -> float:
        """Half a cosine from the first to the second ``momentum``."""
        return cosine_momentum(*self.objective.momentum, progress.fraction)

    def chance_level(self) -> float:
        """Loss of the best constant similarity, by Monte Carlo over the configured sampler."""
        return self.chance

    def prepare(self, batch: Batch, *, training: bool) -> Batch:
        """Give each crop an intensity of its own.

        Raises:
            ConfigError: if crops are not those of the view sampler.
        """
        counts = [batch[name].shape[1] for name in _Pair._fields]
        seeds = torch.split(derive_seeds(batch.seeds, sum(counts)), counts, dim=1)
        made, notes = {}, []
        for name, count, own in zip(_Pair._fields, counts, seeds, strict=True):
            frame = Frame.of(batch.tensors, name, shape=self.config.crop_voxels)
            view = self.vary(batch[name].flatten(0, 1), own.flatten(), frame=frame, training=training)
            made[name] = view.image.reshape(len(batch), count, *view.image.shape[1:])
            notes.append({key: note.view(len(batch), count) for key, note in view.notes.items()})
        self._check(_Pair(**made))
        shown = {key: torch.cat([note[key] for note in notes], dim=1).mean(dim=1) for key in notes[0]}
        return batch.with_tensors({**made, "overlap": batch["overlap"].float()}, shown)

    def forward(self, batch: Batch) -> Losses:
        """Compare the similarities of all targets and bases of each volume with their overlaps.

        Raises:
            CaseError: if a target overlaps no base.
            ConfigError: if ``inter`` meets a batch of one volume.
        """
        crops = seen = _Pair(batch["targets"], batch["bases"])
        if self.config.reg_bases is not None:
            chosen = draw_subsets(batch.seeds, crops.bases.shape[1], size=self.config.reg_bases)
            volume = torch.arange(len(chosen))[:, None]
            seen = _Pair(crops.targets, crops.bases[volume.to(crops.bases.device), chosen.to(crops.bases.device)])
        pooled = self._pool(self.encoder, seen)
        student = _project(self.projector, _Pair(self.dropout(pooled.targets), self.dropout(pooled.bases)))
        reference = self._reference(crops, pooled, student)
        similarity = self._similarity(student, reference)
        overlap = batch["overlap"]
        pos, neg = overlap_terms(
            similarity, overlap, pos_weight=self.objective.pos_weight, neg_form=self.objective.neg_form
        )
        reg = base_regulariser(student.bases, power=self.objective.reg_power, symmetric=self.objective.reg_symmetric)
        parts = {"pos": pos, "neg": neg, "reg": reg}
        monitors = {"pearson": pearson(similarity.detach(), overlap), "top1": top1(similarity.detach(), overlap)}
        if self.objective.inter:
            parts["inter"], shown = self._inter(student, reference)
            monitors |= shown
        return Losses(torch.stack(list(parts.values())).sum(), parts, monitors)

    def _check(self, crops: _Pair) -> None:
        """Refuse crops that are not those of the view sampler."""
        num_bases = math.prod(self.objective.grid)
        found = (tuple(crops.targets.shape[3:]), tuple(crops.bases.shape[3:]), crops.bases.shape[1])
        if found != (self.crop, self.crop, num_bases):
            raise ConfigError(
                f"{found[2]} bases of {list(found[1])} and targets of {list(found[0])} voxels, where grid and "
                f"crop_voxels ask for {num_bases} of {list(self.crop)}. Take the views of view_sampler()."
            )

    def _pool(self, encoder: Backbone, crops: _Pair) -> _Pair:
        """Pooled features of all crops of all volumes, in one batch."""
        images = torch.cat([crops.targets.flatten(0, 1), crops.bases.flatten(0, 1)])
        pyramid = encoder(images)
        return _split(pool_pyramid(pyramid if self.objective.features == "all" else pyramid[-1:]), crops)

    def _reference(self, crops: _Pair, pooled: _Pair, student: _Pair) -> _Pair:
        """Embeddings that the student's are compared with: the teacher's, or its own."""
        if self.teacher_projector is None and self.config.reg_bases is None:
            return _Pair(student.targets, student.bases.detach()) if self.objective.detach_bases else student
        with torch.no_grad():
            if self.config.reg_bases is not None:
                crops = _Pair(crops.targets[:, :0], crops.bases)  # its targets are needed only without reg_bases
            if self.teacher_encoder is not None:
                pooled = self._pool(self.teacher_encoder, crops)
            elif self.config.reg_bases is not None:
                pooled = self._pool(self.encoder, crops)
            projector = self.projector if self.teacher_projector is None else self.teacher_projector
            return _project(projector, pooled)

    def _similarity(self, student: _Pair, reference: _Pair) -> Float[Tensor, "b t n"]:
        similarity = rectified_cosine(student.targets, reference.bases)
        if self.teacher_encoder is None or self.objective.detach_bases:
            return similarity
        return (similarity + rectified_cosine(reference.targets, student.bases)) / 2

    def _inter(self, student: _Pair, teacher: _Pair) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Consistency with the bases of the next volume in the batch."""
        if len(student.bases) < 2:
            raise ConfigError("inter compares volumes, and the batch has 1; set train.batch_size to 2 or more.")
        label = rectified_cosine(teacher.targets, teacher.bases.roll(-1, dims=0))
        similarity = rectified_cosine(student.targets, student.bases.roll(-1, dims=0))
        (pos, neg), counts = consistency_terms(similarity, label, min_label=self.config.inter_min_similarity)
        return pos + neg, {"inter_label_mass": label.sum(dim=-1).mean(), "inter_share": counts.float().mean()}


def chance_level(sampler: GridCrops, objective: Objective) -> tuple[float, float]:
    """Loss of the best network that ignores content, and the similarity ``c`` that it has for every pair.

    The minimum over ``c`` of ``pos + neg + c^reg_power`` for the labels that ``sampler`` draws; ``inter`` adds nothing,
    since such a network agrees with its teacher.

    Args:
        sampler: Gives target boxes, without reading a case.
        objective: Grid and form of the loss.

    Returns:
        Loss to about 0.003, and ``c`` to 0.02.
    """
    rng = np.random.default_rng(0)
    boxes = np.stack([sampler.draw_targets(rng) for _ in range(_CHANCE_LABELS // objective.num_targets)])
    labels = overlap_fractions(boxes.reshape(-1, 2, 3), sampler.base_boxes)
    overlap = torch.from_numpy(labels).float().view(len(boxes), objective.num_targets, -1)
    levels = []
    for c in np.arange(50) / 50:
        similarity = torch.full_like(overlap, float(c))
        terms = overlap_terms(similarity, overlap, pos_weight=objective.pos_weight, neg_form=objective.neg_form)
        levels.append((float(terms.pos + terms.neg) + float(c) ** objective.reg_power, float(c)))
    return min(levels)


def pearson(similarity: Float[Tensor, "b t n"], overlap: Float[Tensor, "b t n"]) -> Float[Tensor, ""]:
    """Correlation over all pairs of the batch; 0 where one side is constant."""
    s, y = similarity.flatten() - similarity.mean(), overlap.flatten() - overlap.mean()
    return (s * y).sum() / (s.square().sum() * y.square().sum()).sqrt().clamp(min=1e-12)


def top1(similarity: Float[Tensor, "b t n"], overlap: Float[Tensor, "b t n"]) -> Float[Tensor, ""]:
    """Share of targets whose most similar base is one of those that they overlap most."""
    reached = overlap.gather(-1, similarity.argmax(dim=-1, keepdim=True))[..., 0]
    return (reached >= overlap.amax(dim=-1) - 1e-6).float().mean()


class _Pair(NamedTuple):
    """Crops, pooled features or embeddings of the targets and of the bases of each volume."""

    targets: Tensor
    bases: Tensor


def _split(rows: Float[Tensor, "m d"], like: _Pair) -> _Pair:
    """Take apart what was computed for all targets and then all bases."""
    volumes, num_targets, num_bases = len(like.targets), like.targets.shape[1], like.bases.shape[1]
    size, targets, bases = rows.shape[1], rows[: volumes * num_targets], rows[volumes * num_targets :]
    return _Pair(targets.view(volumes, num_targets, size), bases.view(volumes, num_bases, size))


def _project(projector: nn.Module, pooled: _Pair) -> _Pair:
    """Embeddings in float32, all targets and bases in one batch."""
    with torch.autocast(pooled.bases.device.type, enabled=False):
        rows = torch.cat([pooled.targets.flatten(0, 1), pooled.bases.flatten(0, 1)]).float()
        return _split(projector(rows), pooled)


def _conflicts(config: Config, objective: Objective) -> list[tuple[bool, str]]:
    """Combinations that make no sense, each with the sentence that says so."""
    num_bases, (_, out) = math.prod(objective.grid), objective.projector_channels
    reg_bases = config.reg_bases
    return [
        (min(objective.grid) < 1 or num_bases < 2, f"grid {list(objective.grid)} has fewer than two bases"),
        (
            config.cell_mm is not None and config.position_mode == "resize",
            "cell_mm has no effect where the grid is laid over the whole volume; set position_mode to crop",
        ),
        (min(config.crop_voxels) < 1, f"crop_voxels {list(config.crop_voxels)} must be at least 1"),
        (
            (objective.pos_weight == "all") != (objective.neg_form == "paper"),
            "pos_weight all and neg_form paper go together: the paper's form runs over all pairs at once",
        ),
        (
            out <= num_bases,
            f"{out} output channels of the projector cannot hold {num_bases} orthogonal bases and a rest; "
            "raise projector_channels",
        ),
        (
            objective.teacher == "head" and not objective.detach_bases,
            "teacher head goes with detach_bases: its bases come from the teacher alone; set detach_bases to true",
        ),
        (objective.inter and objective.teacher == "none", "inter needs a teacher; set teacher to head or full"),
        (
            not all(0.0 <= value <= 1.0 for value in objective.momentum),
            f"momentum {list(objective.momentum)} must lie in 0 to 1",
        ),
        (
            reg_bases is not None and (not objective.detach_bases or objective.inter),
            "reg_bases needs detach_bases and no inter, which send all bases through the student",
        ),
        (
            reg_bases is not None and objective.projector_norm == "batch",
            "reg_bases needs projector_norm layer: statistics of a batch would change with the subset",
        ),
        (reg_bases is not None and reg_bases > num_bases, f"reg_bases {reg_bases} is more than {num_bases} bases"),
    ]

"""A whole experiment as one typed value; builds the parts, trains them and leaves a bundle.

``pretrain`` and ``finetune`` are the two commands that train. Both write the resolved recipe before training, a
journal while training, and a bundle at the end. Killed and called again, they go on where they stood.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, JsonValue
from torch import nn

from medssl.augment.images import Images
from medssl.checks import FrozenFeatures, HeldOut
from medssl.config import Config, apply_overrides, load_yaml
from medssl.data.loader import batches, fixed_batches
from medssl.data.memory import keep_decoded
from medssl.data.splits import Split
from medssl.data.store import ArrayStore, StoredCase
from medssl.engine.device import ranks
from medssl.engine.optim import TrainConfig
from medssl.engine.trainer import Check, FitResult, fit
from medssl.errors import CheckpointError
from medssl.handover import crop_warnings, fresh_encoder, images_of, load_encoder, make_passport, window_warnings
from medssl.methods.base import Method
from medssl.nn.bundle import Passport, load_bundle, save_bundle
from medssl.registry import configure
from medssl.runfolder import RunFolder
from medssl.selection import Taught, held_out_cases, pretraining_cases, taught
from medssl.tasks.base import Task
from medssl.tasks.classification import Classification
from medssl.trainable import Batch, Trainable
from medssl.verdict import choose
from medssl.views import ViewSampler

_FREE_TRAIN_KEYS = {
    "num_workers",
    "keep_mib",
    "prefetch",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "check_every",
    "tensorboard",
    "stop_on_collapse",
}

Resume = Literal["auto", "never", "must"]


class ChecksConfig(Config):
    """What is measured on held-out cases every ``train.check_every`` steps.

    Args:
        split: Cases that are never trained on; where there are none, nothing is measured, and the journal says so.
        batches: Number of fixed batches for the held-out loss.
        crop_voxels: Crops that the probes of frozen features embed; those of the method by default.
        crops_per_case: Number of these a case.
        cases: At most so many cases on each side of a probe.
    """

    split: Split = "val"
    batches: int = Field(8, ge=1)
    crop_voxels: tuple[int, int, int] | None = None
    crops_per_case: int = Field(16, ge=1)
    cases: int = Field(40, ge=2)


class PretrainRecipe(Config):
    """A pretraining run.

    Args:
        seed: Of every random draw; the same recipe, store and seed give the same run.
        backbone: ``name`` of a file in ``medssl/nn`` and its options.
        method: ``name`` of a file in ``medssl/methods`` and its options.
        train: The loop: steps, batch size, optimiser, precision.
        checks: Held-out measurements.
        splits: Which cases are trained on, beside those without a split; a subject that also has a case in another
            split is left out. Labels are never read.
        licence: Under which the weights may be used; goes into the passport.
    """

    seed: int = Field(0, ge=0)
    backbone: dict[str, JsonValue]
    method: dict[str, JsonValue]
    train: TrainConfig = TrainConfig()
    checks: ChecksConfig = ChecksConfig()
    splits: tuple[Split, ...] = ("train",)
    licence: str = "not stated"


class FinetuneRecipe(Config):
    """A fine-tuning run.

    Args:
        seed: Of every random draw.
        backbone: Architecture of the encoder; a pretrained bundle must have the same, so that a run from scratch is
            its twin.
        task: ``name`` of a file in ``medssl/tasks`` and its options; ``classification`` learns a column of facts.
        train: The loop.
        checks: Held-out measurements.
        num_labelled: Use only so many labelled subjects of the training split; all by default.
        label_draw: Which random order of subjects ``num_labelled`` is taken from.
        adapt_stem: Fit the bundle's first layer to images of another number of channels rather than refuse.
        licence: Goes into the passport.
    """

    seed: int = Field(0, ge=0)
    backbone: dict[str, JsonValue]
    task: dict[str, JsonValue]
    train: TrainConfig = TrainConfig()
    checks: ChecksConfig = ChecksConfig()
    num_labelled: int | None = Field(None, ge=1)
    label_draw: int = Field(0, ge=0)
    adapt_stem: bool = False
    licence: str = "not stated"


@dataclass(frozen=True)
class TrainingResult:
    """Where a run left its bundle, what it measured last, and what its monitors warned of."""

    bundle: Path
    step: int
    metrics: Mapping[str, float]
    alarms: tuple[str, ...]


def pretrain(
    recipe: Path | Mapping[str, Any],
    *,
    store: Path,
    out: Path,
    overrides: Iterable[str] = (),
    resume: Resume = "auto",
    dry_run: bool = False,
) -> TrainingResult:
    """Pretrain an encoder on the images of a store.

    Args:
        recipe: YAML file or mapping of a :class:`PretrainRecipe`.
        store: What ``prepare`` wrote.
        out: Run folder; gets ``recipe.yaml``, ``journal.jsonl``, ``checkpoints/`` and ``bundle/``.
        overrides: ``key=value`` strings on top of the recipe.
        resume: ``auto`` goes on where a stopped run stood, ``must`` insists on it, ``never`` refuses a folder
            that has a checkpoint.
        dry_run: Build and check everything, but write nothing.

    Raises:
        ConfigError: if the recipe is wrong.
        NoInputError: if the store has no case in the chosen splits.
        StoppedError: if a signal ended the run; the same command goes on.
    """
    plan = PretrainRecipe.parse(_mapping(recipe, overrides), source=_source(recipe))
    opened = ArrayStore.open(store)
    cases, constant = pretraining_cases(opened, plan.splits)
    cls, config = configure("methods", plan.method, Method)  # type: ignore[type-abstract]
    images = images_of(opened, cases)
    encoder = fresh_encoder(plan.backbone, images, augment=config.to_dict()["augment"], seed=plan.seed)
    method = cls(config, encoder=encoder, seed=plan.seed, images=images)
    warnings = crop_warnings(method.view_sampler(), cases)
    crop = _crop_voxels(config)
    held_out = held_out_cases(opened, split=plan.checks.split, trained_on=cases)
    checks = _checks(method, held_out, plan.checks, batch_size=plan.train.batch_size, seed=plan.seed)
    if held_out:
        features = FrozenFeatures(
            cases[: plan.checks.cases],
            held_out[: plan.checks.cases],
            crop_voxels=plan.checks.crop_voxels or crop,
            crop_mm=_probed_mm(plan.checks.crop_voxels or crop, images, crop, config.to_dict().get("crop_mm")),
            crops_per_case=plan.checks.crops_per_case,
            label_values=opened.label_values,
            seed=plan.seed,
            spatial_dims=images.spatial_dims,
        )
        checks.append(features)
    if dry_run:
        return TrainingResult(out / "bundle", 0, {}, ())
    with _run_folder(out) as run:
        notes = {"constant_left_out": constant}
        result = _train(
            method,
            cases,
            plan,
            opened=opened,
            run=run,
            checks=checks,
            resume=resume,
            notes=notes,
            warnings=warnings,
        )
        kept = _kept(out, result, plan.train)
        if kept is not None:
            return kept
        chance = method.chance_level()
        metrics = {**result.checks, **({} if chance is None else {"chance": chance})}
        passport = make_passport(
            opened,
            method.encoder,
            kind="encoder",
            recipe=_resolved(plan, method),
            method=str(plan.method["name"]),
            images=images,
            crop_voxels=crop,
            crop_mm=config.to_dict().get("crop_mm"),
            metrics=metrics,
            citations=method.citations,
            licence=plan.licence,
            decoder=method.decoder_config(),
        )
        _save(out, method.bundle_modules(), passport, run, step=result.step)
    return TrainingResult(out / "bundle", result.step, metrics, result.alarms)


def finetune(
    recipe: Path | Mapping[str, Any],
    *,
    store: Path,
    out: Path,
    encoder: Path | None = None,
    overrides: Iterable[str] = (),
    resume: Resume = "auto",
    dry_run: bool = False,
) -> TrainingResult:
    """Train a task on the labelled cases of a store: with label maps, or with a column of its facts for a classifier.

    Args:
        recipe: YAML file or mapping of a :class:`FinetuneRecipe`.
        store: What ``prepare`` wrote, with labels or facts.
        out: Run folder, as for :func:`pretrain`.
        encoder: Bundle of a pretrained encoder; None starts from random weights.
        overrides: ``key=value`` strings on top of the recipe.
        resume: As for :func:`pretrain`.
        dry_run: Build and check everything, but write nothing.

    Raises:
        CheckpointError: if the bundle has another architecture, or its images were prepared in another way.
        ConfigError: if the recipe is wrong, or asks for more labelled subjects than there are; E_TARGET, if a column is
            missing or tells nothing apart.
        CaseError: E_TARGET, if a case has a value that the task cannot learn.
        NoInputError: if the store has no labelled case in the training split.
        StoppedError: if a signal ended the run; the same command goes on.
    """
    plan = FinetuneRecipe.parse(_mapping(recipe, overrides), source=_source(recipe))
    opened = ArrayStore.open(store)
    cls, config = configure("tasks", plan.task, Task)  # type: ignore[type-abstract]
    told = taught(opened, config, num_labelled=plan.num_labelled, draw=plan.label_draw, held_out=plan.checks.split)
    cases, held_out = told.cases, told.held_out
    images = images_of(opened, told.members)
    if told.is_sliced:
        images = replace(images, spatial_dims=2)
    network = fresh_encoder(plan.backbone, images, augment=config.to_dict()["augment"], seed=plan.seed)
    bundle = None if encoder is None else load_bundle(encoder)
    origin: dict[str, Any] = {"encoder": "random weights", "decoder": "random weights"}
    if bundle is not None:
        origin |= load_encoder(network, bundle, opened, adapt_stem=plan.adapt_stem)
    task = cast("Any", cls)(config, encoder=network, seed=plan.seed, images=images, **told.arguments)
    warnings = crop_warnings(task.view_sampler(), cases)
    if bundle is not None:
        origin["decoder"] = task.take_decoder(bundle)
        warnings += window_warnings(bundle, task.augment)
    checks = _checks(task, held_out, plan.checks, batch_size=plan.train.batch_size, seed=plan.seed)
    if dry_run:
        return TrainingResult(out / "bundle", 0, {}, ())
    with _run_folder(out) as run:
        result = _train(
            task,
            cases,
            plan,
            opened=opened,
            run=run,
            checks=checks,
            resume=resume,
            origin=origin,
            notes=told.notes,
            warnings=warnings,
            read=told.members,
        )
        kept = _kept(out, result, plan.train)
        if kept is not None:
            return kept
        said: list[str] = []
        passport = make_passport(
            opened,
            network,
            recipe={**_resolved(plan, task), **origin},
            method=str(plan.task["name"]),
            images=images,
            crop_voxels=_crop_voxels(config),
            crop_mm=None if isinstance(task, Classification) else config.to_dict().get("crop_mm"),
            metrics=result.checks,
            citations=(),
            licence=plan.licence,
            decoder=task.decoder_config(),
            **_answers(task, told, plan, run, said),
        )
        _save(out, task.bundle_modules(), passport, run, step=result.step)
    return TrainingResult(out / "bundle", result.step, result.checks, (*result.alarms, *said))


def _answers(task: Task[Any], told: Taught, plan: FinetuneRecipe, run: RunFolder, said: list[str]) -> dict[str, Any]:
    """What the passport tells of the outputs; of a classifier also what is chosen on validation, and what is not."""
    if not isinstance(task, Classification):
        return {"kind": "segmenter", "label_values": cast("Any", task).label_values}
    verdict, unchosen = choose(task, told.held_out, split=plan.checks.split, bags=told.bags)
    said += unchosen
    if _is_first_process():
        for sentence in unchosen:
            run.journal.log(plan.train.steps, alarm=sentence)
        run.journal.log(plan.train.steps, verdict=verdict.to_dict())
    return {"kind": "classifier", "target": verdict.to_dict()}


def _train(
    trainable: Method | Task[Any],
    cases: Sequence[StoredCase],
    plan: PretrainRecipe | FinetuneRecipe,
    *,
    opened: ArrayStore,
    run: RunFolder,
    checks: Sequence[Check],
    resume: Resume,
    origin: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    read: Sequence[StoredCase] | None = None,
) -> FitResult:
    """Run the loop, and leave the averaged weights in the trainable where there are any.

    The recipe and the first lines of the journal are written once it is sure that the run goes on. ``origin`` is part
    of what makes the run, ``notes`` are for the journal alone; ``read`` are the cases behind those that are drawn from.
    """
    recipe = _resolved(plan, trainable)

    def begin(start_step: int) -> None:
        if not _is_first_process():
            return
        run.write_recipe(recipe)
        subjects = {case.subject_id for case in read or cases}
        first = {"cases": len(read or cases), "subjects": len(subjects), **(origin or {}), **(notes or {})}
        if not checks:
            first["note"] = f"no case in split {plan.checks.split}: nothing is measured on held-out cases"
        run.journal.log(start_step, **first)
        for sentence in warnings:
            run.journal.log(start_step, alarm=sentence)

    if plan.train.num_workers == 0:
        keep_decoded(read or cases, limit_mib=plan.train.keep_mib)
    sampler: ViewSampler = trainable.view_sampler()
    spatial_dims = trainable.encoder.spatial_dims

    def factory(start_step: int) -> Iterator[Batch]:
        rank, world = ranks()
        return batches(
            cases,
            sampler,
            batch_size=plan.train.batch_size * world,
            seed=plan.seed,
            start_step=start_step * plan.train.accumulate,
            steps=plan.train.steps * plan.train.accumulate,
            spatial_dims=spatial_dims,
            num_workers=plan.train.num_workers,
            rank=rank,
            world_size=world,
        )

    result = fit(
        cast("Trainable", trainable),
        factory,
        plan.train,
        run=run,
        seed=plan.seed,
        resume=resume,
        checks=checks,
        fingerprint={"recipe": _identity(recipe, origin or {}), "data": opened.fingerprint},
        on_start=begin,
    )
    if result.average is not None:
        trainable.load_state_dict(result.average, strict=True)
    return replace(result, alarms=(*warnings, *result.alarms))


def _resolved(plan: PretrainRecipe | FinetuneRecipe, trainable: Method | Task[Any]) -> dict[str, Any]:
    """The recipe with its augments written out: no bundle and no resumed run depends on a preset's file."""
    part = "method" if isinstance(plan, PretrainRecipe) else "task"
    recipe = plan.to_dict()
    return {**recipe, part: {**recipe[part], "augment": trainable.augment.entries}}


def _identity(recipe: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    """Digest of all that the trained weights depend on; what is only watched or written may change in a resumed run."""
    kept = {key: value for key, value in recipe.items() if key != "checks"}
    kept["train"] = {key: value for key, value in kept["train"].items() if key not in _FREE_TRAIN_KEYS}
    return hashlib.sha256(json.dumps({**kept, **origin}, sort_keys=True).encode()).hexdigest()


def _is_first_process() -> bool:
    """Whether this process writes; the others of a run on several devices only compute."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _run_folder(out: Path) -> AbstractContextManager[RunFolder]:
    """The run's folder, locked by the first process alone."""
    return RunFolder(out) if _is_first_process() else nullcontext(RunFolder(out))


def _kept(out: Path, result: FitResult, config: TrainConfig) -> TrainingResult | None:
    """What an earlier call left of a run that was finished; a sound bundle stays as others may have built on it."""
    if result.resumed_from < config.steps or not (out / "bundle").exists():
        return None
    try:
        passport = load_bundle(out / "bundle").passport
    except CheckpointError:
        return None
    return TrainingResult(out / "bundle", result.step, passport.metrics, result.alarms)


def _save(out: Path, modules: Mapping[str, nn.Module], passport: Passport, run: RunFolder, *, step: int) -> None:
    if _is_first_process():
        save_bundle(out / "bundle", modules, passport)
        run.journal.log(step, bundle=out / "bundle")


def _checks(
    trainable: Method | Task[Any], held_out: Sequence[StoredCase], config: ChecksConfig, *, batch_size: int, seed: int
) -> list[Check]:
    if not held_out:
        return []
    fixed = fixed_batches(
        held_out,
        trainable.view_sampler(),
        count=config.batches,
        batch_size=batch_size,
        seed=seed,
        spatial_dims=trainable.encoder.spatial_dims,
    )
    return [HeldOut(fixed)]


def _crop_voxels(config: Config) -> tuple[int, int, int]:
    return cast("tuple[int, int, int]", cast("Any", config).crop_voxels)


def _probed_mm(
    probed: Sequence[int], images: Images, crop: Sequence[int], crop_mm: Sequence[float] | None
) -> list[float] | None:
    """Edge lengths of the crops that probes embed, whose voxels are those that the method trains on."""
    if crop_mm is None:
        return None
    return [n * size for n, size in zip(probed, images.crop_spacing_mm(crop, crop_mm), strict=True)]


def _mapping(recipe: Path | Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    return apply_overrides(load_yaml(recipe) if isinstance(recipe, Path) else recipe, overrides)


def _source(recipe: Path | Mapping[str, Any]) -> str:
    return str(recipe) if isinstance(recipe, Path) else "recipe"

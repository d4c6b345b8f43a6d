"""Plan a fine-tuning recipe for the labelled cases of a store, this machine and a budget of time and memory."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl.augment.images import Images
from medssl.blueprint.choose import Choice, crop_of, preset_for, sampling, step_range
from medssl.blueprint.fingerprint import Fingerprint, fingerprint
from medssl.blueprint.fit import Fit, PlanConfig, Planner, steps_within
from medssl.blueprint.text import commented, nested
from medssl.data.store import ArrayStore
from medssl.engine.optim import TrainConfig
from medssl.handover import crop_warnings, images_of
from medssl.nn.bundle import Bundle, load_bundle
from medssl.runfolder import atomic_write

_VARIED = 1.1
_ANISOTROPIC = 3.0
_FEW_SUBJECTS = 20


@dataclass(frozen=True)
class Blueprint:
    """A planned recipe.

    Args:
        path: Where it is, or would be.
        choices: Every value and its reason, in the order of the recipe.
        remarks: What is to be known of the labelled cases.
        recipe: As :func:`medssl.finetune` takes it.
    """

    path: Path
    choices: tuple[Choice, ...]
    remarks: tuple[str, ...]
    recipe: Mapping[str, Any]


def plan(
    store: Path,
    *,
    out: Path,
    encoder: Path | None = None,
    config: PlanConfig | None = None,
    dry_run: bool = False,
) -> Blueprint:
    """Plan a segmentation of the labelled training cases of a store, and write it as a commented recipe.

    Training steps are measured on real crops at two sizes, for up to four networks, the most accurate first; the first
    that gets enough steps within the budget is taken. Crops are as large as the images, sensible limits and the memory
    allow.

    Args:
        store: What ``prepare`` wrote, with labels.
        out: The .yaml to write.
        encoder: Bundle that will be fine-tuned; its backbone, and the voxel size that it works at, are kept.
        config: Budget and what is given.
        dry_run: Plan and write nothing.

    Raises:
        CheckpointError: if the bundle does not fit the store.
        ConfigError: E_LABEL_SET, if no training case has one of the structures; or if an option does not fit.
        EnvironmentFaultError: E_MEMORY, if not even the smallest crop fits.
        NoInputError: if no training case is labelled.
    """
    given = config or PlanConfig()
    opened = ArrayStore.open(store)
    found = fingerprint(opened, ignore_value=given.ignore_value)
    cases = opened.select(split="train", labelled=True)
    images = images_of(opened, cases)
    bundle = None if encoder is None else load_bundle(encoder)
    spacing_mm, spacing_reason = _spacing(found, images, bundle)
    shape = _shape_at(found, spacing_mm)
    preset_name, preset_reason = preset_for(images)
    template = {"augment": {"preset": preset_name}, "ignore_value": given.ignore_value}
    planner = Planner(opened, images=images, given=given, bundle=bundle, spacing_mm=spacing_mm, template=template)
    fit = planner.fit(given.crop_voxels or crop_of(shape), shape)
    choices = [
        Choice("seed", given.seed, "the same recipe, store and seed give the same run"),
        *(Choice(f"backbone.{key}", value, "") for key, value in fit.network.backbone.items()),
        Choice("task.name", "segmentation", ""),
        Choice("task.crop_voxels", list(fit.crop), _crop_reason(fit, shape)),
        *([Choice("task.crop_mm", planner.crop_mm(fit.crop), spacing_reason)] if spacing_mm else []),
        Choice("task.augment", {"preset": preset_name}, preset_reason),
        *sampling(found),
        *_learning(found, fit, given, bundle),
    ]
    choices = [_reasoned(choice, fit.network.reason) for choice in choices]
    recipe = nested(choices)
    TrainConfig.parse(recipe["train"], source="plan train")
    task = planner.task(fit.network, fit.crop)
    remarks = (*_busy(), *_remarks(found, opened, spacing_mm), *crop_warnings(task.view_sampler(), cases))
    if not dry_run:
        atomic_write(out, commented(choices, remarks, found=found, fit=fit, given=given, encoder=bundle))
    return Blueprint(out, tuple(choices), remarks, recipe)


def _spacing(
    found: Fingerprint, images: Images, bundle: Bundle | None
) -> tuple[tuple[float, float, float] | None, str]:
    """Voxel size of the crops where the store's does not do, and why."""
    theirs = None if bundle is None else bundle.passport.spacing_mm
    if theirs is not None and not all(math.isclose(a, b, rel_tol=0.01) for a, b in zip(theirs, images.spacing_mm)):  # noqa: B905
        return theirs, "the voxel size that the encoder works at"
    if bundle is None and found.spacing_ratio > _VARIED and found.is_metric:
        reason = f"voxel sizes differ by a factor of {found.spacing_ratio:.2g}; crops are brought to their median"
        return found.spacing_mm, reason
    return None, ""


def _shape_at(found: Fingerprint, spacing_mm: Sequence[float] | None) -> list[int]:
    """Median voxels of an image at the voxel size of the crops."""
    if spacing_mm is None:
        return list(found.shape)
    sizes = zip(found.shape, found.spacing_mm, spacing_mm, strict=True)
    return [n if n == 1 else max(1, round(n * old / new)) for n, old, new in sizes]


def _learning(found: Fingerprint, fit: Fit, given: PlanConfig, bundle: Bundle | None) -> list[Choice]:
    possible = steps_within(fit, given.minutes)
    _, most = step_range(found.cases, fit.batch_size)
    steps = min(possible, most)
    depth = len(fit.network.backbone.get("strides", ()))
    is_deep = depth >= 4 and min(n for n in fit.crop if n > 1) >= 64
    few = bundle is not None and found.subjects < _FEW_SUBJECTS
    lr = 3e-3 if bundle is None else 1e-3
    choices = [
        Choice("task.loss", {"name": "dice_ce"}, "Dice counts structures alike, cross-entropy makes them learnable"),
        Choice("task.deep_supervision", is_deep, "pays for deep networks on large crops" if is_deep else "small crops"),
    ]
    if given.ignore_value is not None:
        choices.append(Choice("task.ignore_value", given.ignore_value, "as asked for"))
    if few:
        reason = f"{found.subjects} labelled subjects: the new layers first, so that they do not spoil the encoder"
        choices.append(Choice("task.mode", "warmup_then_full", reason))
    limit = "what the time allows" if steps == possible else "400 crops of each case; more would only repeat them"
    average = 0.999 if steps >= 5000 else 0.99
    return [
        *choices,
        Choice("train.steps", steps, f"{limit}; a step takes {fit.seconds:.2g} s here"),
        Choice("train.batch_size", fit.batch_size, _batch_reason(fit, given)),
        Choice("train.lr", lr, "AdamW from random weights" if bundle is None else "AdamW from pretrained weights"),
        Choice(
            "train.warmup_steps",
            min(steps // 2, max(20, steps // 50)),
            "a fiftieth of the run, or 20 steps; at most half",
        ),
        Choice("train.average_weights", average, "the average of the last weights is checked and kept"),
        Choice("train.channels_last", True, "quicker convolutions, the same numbers"),
        Choice("train.check_every", max(1, steps // 10), "ten looks at held-out cases"),
        Choice("train.checkpoint_every", max(1, steps // 10), "a kill costs a tenth of the run at most"),
        Choice("train.log_every", max(1, min(50, steps // 20)), ""),
    ]


def _batch_reason(fit: Fit, given: PlanConfig) -> str:
    return f"{'as asked for' if given.batch_size else 'suits the crop'}; about {fit.gib:.2g} GiB in all"


def _crop_reason(fit: Fit, shape: Sequence[int]) -> str:
    covered = math.prod(min(1.0, n / size) for n, size in zip(fit.crop, shape, strict=True))
    return f"the median image has {' x '.join(map(str, shape))} voxels, of which a crop shows {covered:.0%}"


def _reasoned(choice: Choice, reason: str) -> Choice:
    """The reason for the network goes to its name."""
    return choice._replace(reason=reason) if choice.key == "backbone.name" else choice


def _busy() -> list[str]:
    """What is to be said if other work slows down what was measured."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores + 1:
        return []
    return [
        f"the machine was busy (load {load:.1f} on {cores} cores), so that steps looked slow and the plan is too "
        "small; plan again when it is free"
    ]


def _remarks(found: Fingerprint, store: ArrayStore, spacing_mm: Sequence[float] | None) -> list[str]:
    said: list[str] = []
    for split, values in found.absent.items():
        said.append(f"no labelled case of the split {split} has the values {list(values)}: nothing is measured there")
    if found.empty:
        said.append(f"{found.empty} of {found.cases} labelled training cases have no structure at all")
    if not store.select(split="val", labelled=True):
        said.append("no labelled case in the split val: nothing is measured on held-out cases while training")
    said += [
        f"value {structure.value} is in {structure.cases} of {found.cases} training cases only"
        for structure in found.structures
        if structure.cases * 10 < found.cases
    ]
    spacing = spacing_mm or found.spacing_mm
    if found.shape[2] > 1 and max(spacing) > _ANISOTROPIC * min(spacing):
        said.append(
            f"voxels of {[round(size, 2) for size in spacing]} mm are far from cubes, and networks halve all axes "
            "alike; a spacing_mm nearer to cubes in prepare may serve better"
        )
    return said

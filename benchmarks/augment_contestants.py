"""The loaders that ``augment_speed.py`` lets run against each other, each in a process of its own.

A process is told on its standard input how long its turn is and answers with one line of JSON. Every loader gives the
same: batches of augmented crops in float32 with their label maps, from the same volumes, by the same list of changes.

    python benchmarks/augment_contestants.py medssl --changes "with elastic" --edge 96 --folder FOLDER
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

BATCH = 4
LOW_HU, HIGH_HU = -175.0, 250.0
TURN_DEG, SCALE, SIGMA, GAMMA, CONTRAST, SHIFT = 15.0, (0.9, 1.1), 0.1, (0.7, 1.5), (0.9, 1.1), 0.1
BEND_MM, CONTROL_MM = 6.0, 32.0
ENDLESS = 10**7
PATCHES = 8  # that TorchIO's queue cuts from a volume once it is augmented

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Job:
    """What a contestant is to do.

    Args:
        folder: Holds ``store`` and, for the others, ``NAME_image.nii`` and ``NAME_label.nii``.
        edge: Of the crops, in voxels of 1 mm.
        elastic: Whether content is bent too.
        workers: Processes beside its own.
    """

    folder: Path
    edge: int
    elastic: bool
    workers: int

    @property
    def files(self) -> list[tuple[Path, Path]]:
        """Image and label of each volume."""
        images = sorted(self.folder.glob("*_image.nii"))
        return [(path, path.with_name(path.name.replace("_image", "_label"))) for path in images]

    def arrays(self) -> list[tuple[Tensor, Tensor]]:
        """Each volume under its window as float32, and its label as uint8."""
        import nibabel as nib

        volumes = []
        for image, label in self.files:
            hu = np.asarray(nib.load(image).dataobj, dtype=np.float32)[None]
            unit = np.clip((hu - LOW_HU) / (HIGH_HU - LOW_HU), 0, 1)
            volumes.append((torch.from_numpy(unit), torch.from_numpy(np.asarray(nib.load(label).dataobj)[None])))
        return volumes


def medssl(job: Job) -> Generator[Batch]:
    """The store, the loader, the prefetcher and a pipeline, as training puts them together."""
    from medssl.augment.build import build_augment
    from medssl.augment.frame import Frame
    from medssl.data.loader import batches
    from medssl.data.memory import keep_decoded
    from medssl.data.store import ArrayStore
    from medssl.engine.prefetch import open_feed
    from medssl.trainable import Batch as Samples
    from medssl.views import LabelledCrop

    crop = (job.edge,) * 3
    changes: list[dict[str, Any]] = [
        {"name": "mirror", "p": 7 / 8, "axes": ["LR", "AP", "SI"]},  # of all non-empty sets: half on each axis
        {"name": "affine", "rotation_deg": [TURN_DEG] * 3, "scale": list(SCALE)},
        {"name": "window", "low_hu": LOW_HU, "high_hu": HIGH_HU},
        {"name": "noise", "sigma": [0.0, SIGMA]},
        {"name": "contrast", "factor": list(CONTRAST)},
        {"name": "brightness", "shift": [-SHIFT, SHIFT]},
        {"name": "gamma", "gamma": list(GAMMA)},
    ]
    if job.elastic:
        changes.insert(2, {"name": "elastic", "amplitude_mm": [0.0, BEND_MM], "control_mm": CONTROL_MM})
    augment = build_augment(changes)  # nothing is said of the images, or mirrors would be refused
    store = ArrayStore.open(job.folder / "store")
    if job.workers == 0:
        keep_decoded(store.cases)
    sampler = LabelledCrop(crop, store.label_values, foreground_share=0.0, margin=augment.margin(crop, (1, 1, 1)))

    def prepare(batch: Samples) -> Samples:
        frame = Frame.of(batch.tensors, "image", shape=crop)
        view = augment(batch["image"], batch.seeds, batch["label"], frame=frame)
        assert view.label is not None
        return batch.with_tensors({"image": view.image, "label": view.label}, view.notes)

    data = batches(store.cases, sampler, batch_size=BATCH, seed=0, steps=ENDLESS, num_workers=job.workers)
    with closing(open_feed(data, prepare, device=torch.device("cpu"), prefetch=True)) as feed:
        for batch in feed:
            yield batch["image"], batch["label"]


def monai(job: Job) -> Generator[Batch]:
    """Dictionary transforms; everything up to the window is in the cache, which is not copied; no metadata."""
    from monai import data, transforms

    data.set_track_meta(False)
    both, modes, turn = ("image", "label"), ("bilinear", "nearest"), [math.radians(TURN_DEG)] * 3
    grow = [SCALE[1] - 1] * 3
    move: Any = transforms.RandAffined(
        both, prob=1.0, rotate_range=turn, scale_range=grow, mode=modes, padding_mode="border"
    )
    if job.elastic:
        move = transforms.Rand3DElasticd(
            both, (8, 8), (0, 530), prob=1.0, rotate_range=turn, scale_range=grow, mode=modes, padding_mode="border"
        )
    steps = [
        transforms.LoadImaged(both),
        transforms.EnsureChannelFirstd(both, channel_dim="no_channel"),
        transforms.ScaleIntensityRanged("image", LOW_HU, HIGH_HU, 0.0, 1.0, clip=True),
        transforms.EnsureTyped(both, dtype=[torch.float32, torch.uint8]),
        transforms.RandSpatialCropd(both, (job.edge,) * 3, random_size=False),
        *[transforms.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)],
        move,
        transforms.RandGaussianNoised("image", prob=1.0, std=SIGMA),
        transforms.RandScaleIntensityd("image", CONTRAST[1] - 1, prob=1.0),
        transforms.RandShiftIntensityd("image", SHIFT, prob=1.0),
        transforms.RandAdjustContrastd("image", prob=1.0, gamma=GAMMA),
    ]
    items = [{"image": str(image), "label": str(label)} for image, label in job.files]
    dataset = data.CacheDataset(items, transforms.Compose(steps), copy_cache=False, progress=False)
    order = RandomSampler(dataset, replacement=True, num_samples=ENDLESS)
    for batch in data.DataLoader(dataset, batch_size=BATCH, sampler=order, num_workers=job.workers):
        yield batch["image"], batch["label"]


def batchgeneratorsv2(job: Job) -> Generator[Batch]:
    """Crops 1.3 times as large of arrays in memory, moved with nearest labels: nnU-Net's way, less its file format."""
    from batchgeneratorsv2.transforms.intensity.brightness import BrightnessAdditiveTransform
    from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

    turn = math.radians(TURN_DEG)
    change = ComposeTransforms(
        [
            SpatialTransform(
                (job.edge,) * 3,
                0,
                random_crop=False,
                p_rotation=1.0,
                rotation=(-turn, turn),
                p_scaling=1.0,
                scaling=SCALE,
                p_synchronize_scaling_across_axes=1.0,
                p_elastic_deform=float(job.elastic),
                elastic_deform_scale=CONTROL_MM / 2 / job.edge,
                elastic_deform_magnitude=(0.0, BEND_MM),
                mode_seg="nearest",
            ),
            MirrorTransform((0, 1, 2)),
            GaussianNoiseTransform((0.0, SIGMA), synchronize_channels=True),
            ContrastTransform(CONTRAST, preserve_range=True, synchronize_channels=True),
            BrightnessAdditiveTransform(0.0, SHIFT / 2),
            GammaTransform(GAMMA, 0.0, synchronize_channels=True, p_per_channel=1.0, p_retain_stats=0.0),
        ]
    )
    volumes, size = job.arrays(), round(1.3 * job.edge)

    def make(rng: np.random.Generator) -> Batch:
        image, label = volumes[rng.integers(len(volumes))]
        cut = (slice(None), *(slice(a, a + size) for a in (rng.integers(0, n - size + 1) for n in image.shape[1:])))
        made = change(image=image[cut], segmentation=label[cut])
        return made["image"], made["segmentation"]

    yield from _loaded(make, job.workers)


def torchio_crops(job: Job) -> Generator[Batch]:
    """TorchIO's transforms on crops of its sampler from subjects in memory, so that only crops are augmented."""
    import torchio as tio

    subjects = [
        tio.Subject(image=tio.ScalarImage(tensor=image), label=tio.LabelMap(tensor=label))
        for image, label in job.arrays()
    ]
    change = tio.Compose(_torchio_changes(job, (job.edge,) * 3))
    sampler = tio.UniformSampler(job.edge)

    def make(rng: np.random.Generator) -> Batch:
        crop = next(sampler(subjects[rng.integers(len(subjects))], 1))
        changed = change(crop)
        return changed["image"].data, changed["label"].data

    yield from _loaded(make, job.workers)


def torchio_queue(job: Job) -> Generator[Batch]:
    """TorchIO's queue: a volume is read and augmented as a whole, then cut into eight crops."""
    import torchio as tio

    subjects = [tio.Subject(image=tio.ScalarImage(image), label=tio.LabelMap(label)) for image, label in job.files]
    window = [tio.Clamp(LOW_HU, HIGH_HU), tio.RescaleIntensity((0, 1), in_min_max=(LOW_HU, HIGH_HU))]
    change = tio.Compose([*window, *_torchio_changes(job, subjects[0].spatial_shape)])
    queue = tio.Queue(
        tio.SubjectsDataset(subjects * 1000, transform=change),
        max_length=PATCHES * max(1, job.workers),
        samples_per_volume=PATCHES,
        sampler=tio.UniformSampler(job.edge),
        num_workers=job.workers,
    )
    for batch in tio.SubjectsLoader(queue, batch_size=BATCH, num_workers=0):
        yield batch["image"][tio.DATA], batch["label"][tio.DATA]


def _torchio_changes(job: Job, shape: tuple[int, ...]) -> list[Any]:
    import torchio as tio

    affine = {"scales": SCALE, "degrees": TURN_DEG, "isotropic": True}
    points = tuple(max(4, math.ceil(edge / CONTROL_MM) + 3) for edge in shape)  # a spline of order 3 needs 3 more
    bend = {"num_control_points": points, "max_displacement": BEND_MM, "locked_borders": 0}
    log_gamma = (math.log(GAMMA[0]), math.log(GAMMA[1]))
    return [
        tio.RandomFlip(axes=(0, 1, 2), flip_probability=0.5, copy=False),
        tio.RandomAffineElasticDeformation(affine_kwargs=affine, elastic_kwargs=bend, copy=False)
        if job.elastic
        else tio.RandomAffine(**affine, copy=False),
        tio.RandomNoise(std=(0, SIGMA), copy=False),
        tio.Lambda(_contrast_and_brightness, types_to_apply=[tio.INTENSITY], copy=False),
        tio.RandomGamma(log_gamma=log_gamma, copy=False),
    ]


def _contrast_and_brightness(x: Tensor) -> Tensor:
    """What TorchIO lacks, in one pass."""
    factor, shift = np.random.default_rng().uniform((CONTRAST[0], -SHIFT), (CONTRAST[1], SHIFT))
    return torch.add(x.mul(float(factor)), float(shift))


class _Endless(Dataset[Batch]):
    """Crop after crop by one function."""

    def __init__(self, make: Callable[[np.random.Generator], Batch]) -> None:
        self._make = make

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Batch:
        image, label = self._make(np.random.default_rng(index))
        return image.contiguous(), label.contiguous()


def _loaded(make: Callable[[np.random.Generator], Batch], workers: int) -> Generator[Batch]:
    def seed_numpy(_: int) -> None:
        np.random.seed(torch.initial_seed() % 2**32)  # noqa: NPY002  batchgeneratorsv2 draws from it

    loader = DataLoader(_Endless(make), batch_size=BATCH, num_workers=workers, worker_init_fn=seed_numpy)
    yield from ((image, label) for image, label in loader)


CONTESTANTS: dict[str, Callable[[Job], Generator[Batch]]] = {
    "medssl": medssl,
    "MONAI": monai,
    "batchgeneratorsv2": batchgeneratorsv2,
    "TorchIO crops": torchio_crops,
    "TorchIO queue": torchio_queue,
}
PACKAGES = {"MONAI": "monai", "TorchIO crops": "torchio", "TorchIO queue": "torchio"}


def serve(data: Generator[Batch], job: Job, *, cycle: int, answers: TextIO) -> None:
    """Answer each line ``SECONDS`` of standard input with the crops that were made, and in how many seconds.

    Args:
        data: What is measured.
        job: What it should give.
        cycle: Batches that come of one filling of a queue; only whole ones are counted, and nothing lies between them.
        answers: Where to answer.
    """
    ahead = 0 if cycle > 1 else job.workers + 1
    for _ in range(max(cycle, 2 * ahead)):
        _check(next(data), job)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        for _ in range(ahead):
            next(data)
        began, made, elapsed = time.perf_counter(), 0, 0.0
        while elapsed < float(line) or made < 2 * ahead or made % cycle:
            next(data)
            made += 1
            elapsed = time.perf_counter() - began
        print(json.dumps({"crops": made * BATCH, "seconds": elapsed}), file=answers, flush=True)


def _check(batch: Batch, job: Job) -> None:
    image, label = batch
    wanted = (BATCH, 1, *(job.edge,) * 3)
    if tuple(image.shape) != wanted or tuple(label.shape) != wanted or image.dtype != torch.float32:
        raise RuntimeError(f"{tuple(image.shape)} {image.dtype} and {tuple(label.shape)}; {wanted} float32 is needed")
    if not bool(torch.isfinite(image).all()) or float(image.std()) == 0:
        raise RuntimeError("an image is blank or not finite")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--edge", type=int, required=True)
    parser.add_argument("--elastic", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    job = Job(options.folder, options.edge, options.elastic, options.workers)
    try:
        with closing(CONTESTANTS[options.name](job)) as data:
            serve(
                data,
                job,
                cycle=PATCHES * max(1, job.workers) // BATCH if options.name == "TorchIO queue" else 1,
                answers=answers,
            )
    except ImportError as error:
        package = PACKAGES.get(options.name, options.name)
        sys.exit(f"{options.name}: {error}. It is no dependency of medssl; pip install {package}, or leave it out.")


if __name__ == "__main__":
    main()

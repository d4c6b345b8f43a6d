"""What each augment costs on one thread, beside its counterpart in MONAI and TorchIO where there is one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medssl.augment.build import augment_classes
from medssl.augment.images import ONLY_HU

EDGE, PICTURE, SAMPLES = 96, 512, 2
ROUNDS, SECONDS = 9, 2.0
RULES = {"multi_window", "rescale", "window"}
OPTIONS: dict[str, dict[str, Any]] = {"window": {"jitter_hu": 5.0}, "multi_window": {"jitter_hu": 5.0}}

Call = Callable[[], Any]


def costs() -> list[dict[str, Any]]:
    """A row an augment: milliseconds a sample of medssl and, where they have one, of the others."""
    torch.set_num_threads(1)
    theirs, rows = _counterparts(), []
    for name, cls in sorted(augment_classes().items()):
        is_flat = cls.spatial_dims == frozenset({2}) or cls.colour
        shape = (SAMPLES, 3 if cls.colour else 1, *([PICTURE] * 2 if is_flat else [EDGE] * 3))
        x = _image(shape, in_hu=cls.takes == ONLY_HU)
        augment = cls(cls.config_class.parse(OPTIONS.get(name, {})))
        calls: dict[str, Call] = {"medssl": lambda augment=augment, x=x: augment(x, torch.randint(2**62, (SAMPLES,)))}
        calls |= {peer: lambda made=made, x=x: made(x[0].clone()) for peer, made in theirs.get(name, {}).items()}
        found = _in_turns(calls)
        found["medssl"] /= SAMPLES
        image = f"{PICTURE}²{' RGB' * cls.colour}" if is_flat else f"{EDGE}³"
        rows.append({"name": name, "image": image, **{key: found.get(key) for key in ("medssl", "MONAI", "TorchIO")}})
    return rows


def _image(shape: tuple[int, ...], *, in_hu: bool) -> Tensor:
    """A smooth structure with noise, in [0, 1] or in HU."""
    rng = np.random.default_rng(0)
    line = [np.sin(np.linspace(0, 6, n, dtype=np.float32)) for n in shape[2:]]
    smooth = 0.5 + 0.2 * sum(np.meshgrid(*line, indexing="ij"), start=np.float32(0)) / len(line)
    x = torch.from_numpy(smooth.astype(np.float32)).expand(shape).clone()
    x += 0.05 * torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    return x.clamp(0, 1) * 1000 - 500 if in_hu else x.clamp(0, 1)


def _in_turns(calls: dict[str, Call]) -> dict[str, float]:
    """Median milliseconds of each; as many rounds as fit in the time, at least three."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    began = time.perf_counter()
    while len(times["medssl"]) < 3 or (len(times["medssl"]) < ROUNDS and time.perf_counter() - began < SECONDS):
        for name, call in calls.items():
            before = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - before))
    return {name: statistics.median(values) for name, values in times.items()}


def _counterparts() -> dict[str, dict[str, Callable[[Tensor], Any]]]:
    """What the others have for an augment, on one image (1, X, Y, Z); nothing where they are not installed."""
    found: dict[str, dict[str, Callable[[Tensor], Any]]] = {}
    for peer, make in (("MONAI", _monai), ("TorchIO", _torchio)):
        try:
            made = make()
        except ImportError:
            continue
        for name, call in made.items():
            found.setdefault(name, {})[peer] = call
    return found


def _monai() -> dict[str, Callable[[Tensor], Any]]:
    from monai import transforms as t
    from monai.data import set_track_meta

    set_track_meta(False)
    turn, grow = [np.deg2rad(10.0)] * 3, [0.1] * 3
    return {
        "affine": t.RandAffine(prob=1, rotate_range=turn, scale_range=grow, padding_mode="border"),
        "bias_field": t.RandBiasField(prob=1),
        "blur": t.RandGaussianSmooth((0.4, 1.0), (0.4, 1.0), (0.4, 1.0), prob=1),
        "brightness": t.RandShiftIntensity(0.2, prob=1),
        "contrast": t.RandScaleIntensity(0.2, prob=1),
        "cutout": t.RandCoarseDropout(holes=5, spatial_size=24, prob=1),
        "elastic": t.Rand3DElastic((8, 8), (0, 530), prob=1, padding_mode="border"),
        "gamma": t.RandAdjustContrast(prob=1, gamma=(0.7, 1.5)),
        "histogram_warp": t.RandHistogramShift(prob=1),
        "kernel_sharpness": t.RandGaussianSharpen(prob=1),
        "local_shuffle": t.RandCoarseShuffle(holes=5, spatial_size=24, prob=1),
        "low_resolution": t.RandSimulateLowResolution(prob=1),
        "mirror": t.RandAxisFlip(prob=1),
        "noise": t.RandGaussianNoise(prob=1),
        "rician_noise": t.RandRicianNoise(prob=1),
        "ringing": t.RandGibbsNoise(prob=1),
        "spikes": t.RandKSpaceSpikeNoise(prob=1),
        "window": t.ScaleIntensityRange(-175, 250, 0, 1, clip=True),
    }


def _torchio() -> dict[str, Callable[[Tensor], Any]]:
    import torchio as tio

    return {
        "affine": tio.RandomAffine(),
        "bias_field": tio.RandomBiasField(),
        "blur": tio.RandomBlur((0.4, 1.0)),
        "elastic": tio.RandomElasticDeformation(num_control_points=6, max_displacement=6.0, locked_borders=0),
        "gamma": tio.RandomGamma(),
        "ghosting": tio.RandomGhosting(),
        "local_shuffle": tio.RandomSwap(),
        "low_resolution": tio.RandomAnisotropy(),
        "mirror": tio.RandomFlip(axes=(0, 1, 2), flip_probability=1.0),
        "motion": tio.RandomMotion(),
        "noise": tio.RandomNoise(),
        "spikes": tio.RandomSpike(),
        "window": tio.RescaleIntensity((0, 1), in_min_max=(-175, 250)),
    }

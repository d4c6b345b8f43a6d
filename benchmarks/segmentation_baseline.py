"""A plain nnU-Net-style baseline of MONAI parts, trained for a stated time on the same split as ``medssl finetune``.

``dynunet`` is as nnU-Net plans it (instance norm, leaky ReLU, deep supervision, full width at full resolution),
``unet`` is MONAI's residual UNet, several times cheaper a step. Dice and cross-entropy, a polynomial schedule, flips,
rotation, scaling, noise, brightness, contrast and gamma, 2 windows in 3 on a structure. The time is all that ends it:
the schedule is a function of the time that has gone. Label maps of the split are written on the scans' own grids, for
``medssl evaluate`` to score beside medssl's own.

    python benchmarks/segmentation_baseline.py --cohort COHORT.csv --minutes 10 --crop 40 56 40 --out FOLDER
    medssl evaluate FOLDER COHORT.csv -o FOLDER/metrics --set split=test
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import monai
import nibabel as nib
import numpy as np
import torch
from monai import transforms as mt
from monai.data import CacheDataset, DataLoader, list_data_collate
from monai.inferers import sliding_window_inference
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.networks.nets import DynUNet, UNet
from torch import nn

from medssl.data.cohort import Cohort

_ADAM_BELOW = 5e-3  # a rate that SGD would not be given
FILTERS = {"small": (16, 32, 64, 128), "full": (32, 64, 128, 256)}


def items(cohort: Cohort, split: str) -> list[dict[str, str]]:
    """Labelled cases of a split, as MONAI's dictionaries."""
    chosen = cohort.select(split=split, labelled=True)  # type: ignore[arg-type]
    return [{"image": case.image, "label": str(case.label), "name": case.case_id} for case in chosen]


def training_transforms(crop: Sequence[int]) -> Any:
    """What is done to each training case; everything up to the padding is cached."""
    both, modes = ("image", "label"), ("bilinear", "nearest")
    return mt.Compose(
        [
            *_reading(),
            mt.SpatialPadd(both, crop),
            mt.RandCropByPosNegLabeld(both, "label", crop, pos=2, neg=1, num_samples=1),
            mt.RandAffined(
                both,
                prob=0.3,
                rotate_range=[0.26] * 3,
                scale_range=[0.2] * 3,
                mode=modes,
                padding_mode=("border", "zeros"),
            ),
            *[mt.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in (1, 2)],
            mt.RandGaussianNoised("image", prob=0.15, std=0.1),
            mt.RandScaleIntensityd("image", 0.25, prob=0.15),
            mt.RandShiftIntensityd("image", 0.1, prob=0.15),
            mt.RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
        ]
    )


def _reading() -> list[Any]:
    return [
        mt.LoadImaged(("image", "label")),
        mt.EnsureChannelFirstd(("image", "label")),
        mt.Orientationd(("image", "label"), "RAS", labels=None),
        mt.NormalizeIntensityd("image", nonzero=False),
        mt.EnsureTyped(("image", "label"), dtype=[torch.float32, torch.uint8], track_meta=False),
    ]


def build(network: str, filters: Sequence[int], classes: int) -> nn.Module:
    """The network, with one stride a level; a DynUNet is supervised at all levels but the coarsest two."""
    levels = len(filters)
    if network == "unet":
        return UNet(3, 1, classes, channels=filters, strides=[2] * (levels - 1), num_res_units=2, norm="instance")
    return DynUNet(
        3, 1, classes,
        kernel_size=[3] * levels, strides=[1] + [2] * (levels - 1), upsample_kernel_size=[2] * (levels - 1),
        filters=filters, norm_name="instance", deep_supervision=True, deep_supr_num=levels - 2, res_block=True,
    )  # fmt: skip


def train(
    net: nn.Module, cases: list[dict[str, str]], *, crop: Sequence[int], minutes: float, batch: int, lr: float
) -> int:
    """Train until the time is over; gives the number of steps."""
    data = CacheDataset(cases, training_transforms(crop), progress=False)
    loader = DataLoader(data, batch_size=batch, shuffle=True, drop_last=True, collate_fn=list_data_collate)
    loss = DeepSupervisionLoss(DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True))
    if lr < _ADAM_BELOW:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=1e-2)
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.99, nesterov=True, weight_decay=3e-5)
    began, steps = time.monotonic(), 0
    net.train()
    for sample in itertools.chain.from_iterable(itertools.repeat(loader)):
        share = (time.monotonic() - began) / (60 * minutes)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - share) ** 0.9
        with torch.autocast("cpu", torch.bfloat16):
            found = net(sample["image"])
        heads = found.unbind(1) if found.ndim == 6 else (found,)
        value = loss([head.float() for head in heads], sample["label"])
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 12.0)
        optimizer.step()
        steps += 1
        if steps % 100 == 0:
            print(f"step {steps}, {share:.0%} of the time, loss {float(value):.4f}", flush=True)
    return steps


@torch.inference_mode()
def predict(net: nn.Module, case: dict[str, str], crop: Sequence[int], values: Sequence[int], out: Path) -> None:
    """Write the label map of one case on its own grid; the orientation is the file's, so that nothing is resampled."""
    source = nib.load(case["image"])
    image = nib.as_closest_canonical(source)
    x = np.asarray(image.dataobj, dtype=np.float32)
    x = (x - x.mean()) / x.std()
    scores = sliding_window_inference(torch.from_numpy(x)[None, None], crop, 2, net, overlap=0.5, mode="gaussian")
    found = np.asarray(values, np.uint8)[scores.argmax(1)[0].numpy()]
    back = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.io_orientation(source.affine))
    labels = nib.orientations.apply_orientation(found, back)
    nib.save(nib.Nifti1Image(labels, source.affine, source.header), out / f"{case['name']}.nii.gz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--crop", type=int, nargs=3, default=(40, 56, 40))
    parser.add_argument("--network", choices=("dynunet", "unet"), default="dynunet")
    parser.add_argument("--filters", choices=FILTERS, default="small")
    parser.add_argument("--classes", type=int, nargs="+", default=(0, 1, 2), help="label values, 0 first")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-2, help="SGD as in nnU-Net; AdamW below 5e-3")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    monai.utils.set_determinism(options.seed)
    cohort = Cohort.from_csv(options.cohort)
    net = build(options.network, FILTERS[options.filters], len(options.classes))
    steps = train(
        net, items(cohort, "train"), crop=options.crop, minutes=options.minutes, batch=options.batch, lr=options.lr
    )
    options.out.mkdir(parents=True, exist_ok=True)
    net.eval()
    for case in items(cohort, "test"):
        predict(net, case, options.crop, options.classes, options.out)
    told = {"steps": steps, "minutes": options.minutes, "parameters": sum(p.numel() for p in net.parameters())}
    (options.out / "run.json").write_text(json.dumps({**told, "monai": monai.__version__, "seed": options.seed}))


if __name__ == "__main__":
    main()

"""From file to label map: medssl against MONAI, same network, same windows; one run, in turns.

Run:  python benchmarks/inference_speed.py -o benchmarks/results
A CT-like volume is written as .nii.gz. A small U-Net is trained on it for some steps, so that its scores are those of a
network and not of chance, and saved as a bundle. Then, in turns:

* windows alone: medssl's sliding window against MONAI's, equal windows, largest difference of any score;
* the whole way: LoadImage, Orientation, Spacing, sliding window, Invert, argmax, SaveImage of MONAI; read, prepare,
  windows, carry, write of medssl; and medssl again with windows outside the body left out, and with bfloat16;
* peak memory with 100 classes, each side in a process of its own: from a volume in memory to its label map.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import provenance
import torch
from monai.inferers import sliding_window_inference
from monai.transforms import (
    AsDiscreted,
    Compose,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    Orientationd,
    SaveImaged,
    Spacingd,
)
from scipy import ndimage

from medssl.data.prepare import PrepareConfig
from medssl.evaluation.carry import carry
from medssl.evaluation.segment import load_network, segment_volume
from medssl.evaluation.sliding_window import Network, Settings, score_slabs, sliding_window
from medssl.geometry import Geometry
from medssl.io import read_volume, write_volume
from medssl.nn.backbone import build_backbone
from medssl.nn.bundle import Bundle, Passport, load_bundle, save_bundle
from medssl.tasks.segmentation import Config, Segmentation
from medssl.volume import Volume

SPACING_MM = (1.5, 1.5, 1.5)
CLASSES = 14
MANY = 100
WINDOW = 96
BODY_SHARE = 0.42  # half axes of the body, as a share of the edges of the image
GOALS = {"the whole way": 1.5, "the whole way, bfloat16": 2.0, "windows alone": 1.0}


def phantom(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A body of noise with 13 balls of their own brightness, in units of about 1, and the label map."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.linspace(-0.5, 0.5, n, dtype=np.float32) for n in shape), indexing="ij"))
    body = (grid**2).sum(axis=0, where=np.array([True, True, False])[:, None, None, None]) < BODY_SHARE**2
    image = np.where(body, 0.0, -3.0).astype(np.float32)
    labels = np.zeros(shape, np.uint8)
    for value in range(1, CLASSES):
        centre = rng.uniform(-0.25, 0.25, 3).astype(np.float32)
        inside = ((grid - centre[:, None, None, None]) ** 2).sum(axis=0) < rng.uniform(0.05, 0.1) ** 2
        image[inside], labels[inside] = value / 3, value
    image += ndimage.gaussian_filter(rng.normal(size=shape).astype(np.float32), 1)
    return image, labels


def make_bundle(folder: Path, image: np.ndarray, labels: np.ndarray, *, steps: int) -> Path:
    """A U-Net that has seen the phantom for some steps."""
    torch.manual_seed(0)
    backbone = {"name": "unet", "channels": [16, 32, 64, 128, 256], "strides": [1, 2, 2, 2, 2], "blocks": [2] * 5}
    encoder = build_backbone(backbone, in_channels=1, spatial_dims=3)
    config = Config.parse({"crop_voxels": [WINDOW] * 3, "augment": {"preset": "none"}})
    task = Segmentation(config, encoder=encoder, label_values=tuple(range(1, CLASSES)), seed=0)
    optimiser = torch.optim.Adam(task.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    places = np.argwhere(labels[::4, ::4, ::4] > 0) * 4
    for _ in range(steps):
        centres = places[rng.integers(len(places), size=2)]
        boxes = [tuple(slice(a, a + 48) for a in np.clip(c - 24, 0, np.subtract(image.shape, 48))) for c in centres]
        x = torch.from_numpy(np.stack([image[box] for box in boxes]))[:, None]
        y = torch.from_numpy(np.stack([labels[box] for box in boxes])).long()
        loss = torch.nn.functional.cross_entropy(task.decoder(task.encoder(x), x)[0], y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    prepare = PrepareConfig.parse(
        {
            "spacing_mm": list(SPACING_MM),
            "intensity": {"mode": "none"},
            "body_mask": {"mode": "threshold", "threshold": -1.5},
            "crop": {"mode": "none"},
        }
    )
    fields = {
        "kind": "segmenter",
        "backbone": encoder.config,
        "spatial_dims": 3,
        "in_channels": 1,
        "decoder": task.decoder_config(),
        "label_values": list(task.label_values),
        "prepare": prepare.to_dict(),
        "unit": "arbitrary",
        "crop_voxels": [WINDOW] * 3,
        "recipe": {"task": {"name": "segmentation", **config.to_dict()}},
        "method": "segmentation",
        "data_fingerprint": "0",
    }
    save_bundle(folder, task.bundle_modules(), Passport.parse(fields))
    return folder


def monai_way(scan: Path, network: Network, out: Path) -> None:
    """MONAI's transforms as its own inference scripts chain them."""
    before = Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="RAS", labels=None),
            Spacingd("image", pixdim=SPACING_MM, mode="bilinear"),
        ]
    )
    after = Compose(
        [
            Invertd("pred", transform=before, orig_keys="image", nearest_interp=False, to_tensor=True),
            AsDiscreted("pred", argmax=True),
            SaveImaged(
                "pred", output_dir=out, output_postfix="", separate_folder=False, print_log=False, output_dtype=np.uint8
            ),
        ]
    )
    data = before({"image": scan})
    with torch.inference_mode():
        data["pred"] = sliding_window_inference(
            data["image"][None], (WINDOW,) * 3, 2, network, overlap=0.5, mode="gaussian", sigma_scale=0.125
        )[0]
    after(data)


def medssl_way(scan: Path, network: Network, out: Path, *, bundle: Bundle, settings: Settings) -> None:
    """What ``medssl predict`` does with one scan."""
    volume, source = read_volume(scan)
    segmented = segment_volume(volume, network, passport=bundle.passport, settings=settings)
    out.mkdir(exist_ok=True)
    write_volume(segmented.labels, out / scan.name, like=source)


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def agreement(first: Path, second: Path) -> tuple[float, float]:
    """Share of voxels with equal labels, and the mean Dice over the structures of either map."""
    a, b = (np.asarray(nib.load(path).dataobj) for path in (first, second))
    dice = [2 * ((a == v) & (b == v)).sum() / ((a == v).sum() + (b == v).sum()) for v in range(1, CLASSES) if v in a]
    return float((a == b).mean()), float(np.mean(dice))


def many_classes(x: torch.Tensor) -> torch.Tensor:
    """A network of 100 classes that itself takes no memory beside its scores."""
    scores = torch.empty(len(x), MANY, *x.shape[2:])
    for c in range(MANY):
        torch.mul(x[:, 0], (c - MANY / 2) / MANY, out=scores[:, c])
    return scores


def memory(side: str, edge: int) -> None:
    """Print the MiB that one side takes above what the process has before; run in a process of its own."""
    image = np.random.default_rng(0).normal(size=(1, edge, edge, edge)).astype(np.float32)
    grid = Geometry((edge, edge, edge), np.eye(4))
    many_classes(torch.zeros(1, 1, 8, 8, 8))
    carry(iter(()), grid, grid, num_classes=MANY)
    from medssl.evaluation import carry_loop  # noqa: F401  loaded before memory is counted

    Path("/proc/self/clear_refs").write_text("5")
    start = status("VmRSS")
    with torch.inference_mode():
        if side == "monai":
            scores = sliding_window_inference(
                torch.from_numpy(image)[None], (64,) * 3, 2, many_classes, overlap=0.5, mode="gaussian"
            )
            labels = scores.argmax(dim=1)[0].numpy()
        else:
            settings = Settings(layout="monai")
            slabs = score_slabs(many_classes, image, window=(64,) * 3, num_classes=MANY, settings=settings)
            labels = carry(slabs, grid, grid, num_classes=MANY)
    print(json.dumps([(status("VmHWM") - start) / 1024, int(labels.astype(np.int64).sum())]))


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def measure_memory(side: str, edge: int) -> tuple[float, int]:
    command = [sys.executable, __file__, "--memory", side, "--edge", str(edge)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    mib, labels = json.loads(done.stdout.splitlines()[-1])
    return mib, labels


def page(facts: dict[str, Any]) -> Iterator[str]:
    yield from provenance.head("Inference, against MONAI", "torch", "monai", "numpy", "SimpleITK", "numba")
    yield f"A scan of {facts['shape']} voxels of {facts['spacing']} mm, prepared at 1.5 mm to {facts['prepared']};"
    yield f"windows of {WINDOW}^3, overlap 0.5, two a pass, {facts['windows']} of them; U-Net 16 to 256, {CLASSES}"
    yield f"classes. Medians of {facts['rounds']} rounds in turns. bfloat16 in hardware here: {facts['has_bf16']}."
    yield ""
    yield "| what | MONAI s | medssl s | times quicker | goal |"
    yield "|---|---|---|---|---|"
    for name, theirs, mine in facts["rows"]:
        yield f"| {name} | {theirs:.2f} | {mine:.2f} | **{theirs / mine:.2f}** | {GOALS.get(name, '')} |"
    yield ""
    yield f"Windows alone: no score differs by more than {facts['largest']:.1e} (scores up to {facts['score']:.1f})."
    yield ""
    yield "| label map | equal voxels | mean Dice of the structures |"
    yield "|---|---|---|"
    for name, equal, dice in facts["agreements"]:
        yield f"| {name} | {equal:.6f} | {dice:.5f} |"
    yield ""
    yield f"{facts['skipped']} of {facts['windows']} windows lie outside the body of this phantom."
    yield ""
    yield f"Peak memory with {MANY} classes, {facts['edge']}^3 voxels, windows of 64^3, to a label map, above what the"
    yield f"process had before: MONAI {facts['monai_mib']:.0f} MiB, medssl {facts['medssl_mib']:.0f} MiB,"
    yield f"**{facts['medssl_mib'] / facts['monai_mib']:.2f}** of it (goal 0.5); label maps equal: {facts['same']}."


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    shape, spacing = tuple(args.shape), (0.8, 0.8, 2.0)
    image, labels = phantom(shape)
    scan = folder / "scan.nii.gz"
    nib.save(nib.Nifti1Image(image, np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])), scan)
    bundle = load_bundle(make_bundle(folder / "bundle", image, labels, steps=args.steps))
    whole = Settings(layout="monai", skip_empty=False)
    skip, short = replace(whole, skip_empty=True), replace(whole, precision="bf16")
    networks = {settings: load_network(bundle, settings=settings) for settings in (whole, short)}

    def way(settings: Settings, name: str) -> Callable[[], None]:
        network = networks[short if settings.precision == "bf16" else whole]
        return lambda: medssl_way(scan, network, folder / name, bundle=bundle, settings=settings)

    ways: dict[str, Callable[[], Any]] = {
        "monai": lambda: monai_way(scan, networks[whole], folder / "monai"),
        "plain": way(whole, "plain"),
        "skip": way(skip, "skip"),
        "bf16": way(short, "bf16"),
        "both": way(replace(short, skip_empty=True), "both"),
    }
    part = np.ascontiguousarray(image[None, : WINDOW + 48, : WINDOW + 48, :WINDOW])
    options = {"window": (WINDOW,) * 3, "num_classes": CLASSES, "layout": "monai"}
    peers: dict[str, Callable[[], Any]] = {
        "monai": lambda: peer_windows(part, networks[whole]),
        "medssl": lambda: sliding_window(networks[whole], part, **options),
    }
    theirs, mine = peers["monai"](), peers["medssl"]()
    alone = {name: statistics.median(found) for name, found in in_turns(peers, args.rounds).items()}
    way(whole, "warm")()
    taken = {name: statistics.median(found) for name, found in in_turns(ways, args.rounds).items()}
    counted = [count_windows(scan, bundle, settings) for settings in (whole, skip)]
    prepared = Geometry(shape, np.diag([*spacing, 1.0])).respaced(SPACING_MM)
    maps = {name: folder / name / "scan.nii.gz" for name in ways}
    (monai_mib, monai_sum), (medssl_mib, medssl_sum) = (measure_memory(side, args.edge) for side in ("monai", "medssl"))
    whole_way = {
        "the whole way": "plain",
        "the whole way, windows outside the body left out": "skip",
        "the whole way, bfloat16": "bf16",
        "the whole way, both": "both",
    }
    return {
        "shape": shape,
        "spacing": spacing,
        "prepared": prepared.shape,
        "rounds": args.rounds,
        "windows": counted[0],
        "skipped": counted[0] - counted[1],
        "has_bf16": "bf16" in Path("/proc/cpuinfo").read_text(),
        "rows": [
            ("windows alone", alone["monai"], alone["medssl"]),
            *((name, taken["monai"], taken[key]) for name, key in whole_way.items()),
        ],
        "largest": float(np.abs(theirs - mine).max()),
        "score": float(np.abs(theirs).max()),
        "agreements": [
            ("medssl against MONAI", *agreement(maps["plain"], maps["monai"])),
            ("windows left out against none", *agreement(maps["skip"], maps["plain"])),
            ("bfloat16 against float32", *agreement(maps["bf16"], maps["plain"])),
        ],
        "edge": args.edge,
        "monai_mib": monai_mib,
        "medssl_mib": medssl_mib,
        "same": monai_sum == medssl_sum,
    }


def peer_windows(image: np.ndarray, network: Network) -> np.ndarray:
    """MONAI's scores of a volume in memory."""
    with torch.inference_mode():
        x = torch.from_numpy(image)[None]
        return sliding_window_inference(x, (WINDOW,) * 3, 2, network, overlap=0.5, mode="gaussian")[0].numpy()


def count_windows(scan: Path, bundle: Bundle, settings: Settings) -> int:
    """How many windows the network would see."""
    seen: list[int] = []

    def count(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return torch.zeros(len(x), CLASSES, *x.shape[2:])

    volume, _ = read_volume(scan)
    segment_volume(
        Volume(volume.array, volume.geometry, "arbitrary"), count, passport=bundle.passport, settings=settings
    )
    return sum(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 120))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--edge", type=int, default=192)
    parser.add_argument("--memory", choices=("monai", "medssl"))
    args = parser.parse_args()
    if args.memory:
        memory(args.memory, args.edge)
        return
    with tempfile.TemporaryDirectory() as folder:
        text = "\n".join(page(run(args, Path(folder)))) + "\n"
    print(text)
    if args.out:
        (args.out / "inference_speed.md").write_text(text)


if __name__ == "__main__":
    main()

"""How quick are the metrics of label maps? HD95, NSD and Dice against MONAI; one run, in turns, values equal.

Run:  python benchmarks/metrics_speed.py -o benchmarks/results
Two CT-sized label maps hold 13 organ-like structures and differ by a shift and a rough surface. MONAI gets one-hot
tensors (making them is not counted), and both sides run on one thread: HD95 and surface Dice of 13 labels by
`compute_hausdorff_distance` and `compute_surface_dice`, label by label; Dice of 14 classes by `DiceMetric`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import provenance
import torch
from monai.metrics import DiceMetric, compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice

from medssl.evaluation.metrics import score_labels
from medssl.evaluation.tally import tally
from medssl.geometry import Geometry

SPACING_MM = (0.8, 0.8, 2.0)
LABELS = tuple(range(1, 14))
TOLERANCE_MM = 1.5


def organs(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and reference: ellipsoids with waves on them, the second moved by one and a half voxels."""
    rng = np.random.default_rng(0)
    maps = np.zeros((2, *shape), dtype=np.uint8)
    x, y, z = (np.arange(size, dtype=np.float32) for size in shape)
    for value in LABELS:
        centre = rng.uniform(0.2, 0.8, 3) * shape
        radius = rng.uniform(0.04, 0.18, 3) * shape
        for labels, shift in zip(maps, (0.0, 1.5), strict=True):
            squares = ((x - centre[0] - shift) / radius[0]) ** 2
            squares = squares[:, None] + ((y - centre[1] + shift) / radius[1]) ** 2
            waves = 0.06 * np.sin(x / 3 + shift)[:, None] * np.sin(y / 3)
            labels[(squares + waves)[..., None] + ((z - centre[2]) / radius[2]) ** 2 < 1] = value
    return maps[0], maps[1]


def _monai_surface(prediction: torch.Tensor, reference: torch.Tensor) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"hd95_mm": [], "nsd": []}
    options: dict[str, Any] = {"include_background": True, "spacing": SPACING_MM}
    for value in LABELS:
        p, r = prediction[:, value : value + 1], reference[:, value : value + 1]
        found["hd95_mm"].append(float(compute_hausdorff_distance(p, r, percentile=95, **options)))
        found["nsd"].append(float(compute_surface_dice(p, r, [TOLERANCE_MM], **options)))
    return found


def _medssl_surface(
    prediction: np.ndarray, reference: np.ndarray, *, geometry: Geometry, with_area: bool = False
) -> dict[str, list[float]]:
    scores = score_labels(
        prediction,
        reference,
        geometry=geometry,
        label_values=LABELS,
        nsd_tolerance_mm=TOLERANCE_MM,
        with_area=with_area,
    )
    return {name: [getattr(scores[value], name) for value in LABELS] for name in ("hd95_mm", "nsd")}


def _monai_dice(prediction: torch.Tensor, reference: torch.Tensor) -> dict[str, list[float]]:
    metric = DiceMetric(include_background=True, reduction="none")
    return {"dice": metric(prediction, reference)[0].tolist()}


def _medssl_dice(prediction: np.ndarray, reference: np.ndarray) -> dict[str, list[float]]:
    counts = tally(prediction, reference, label_values=(0, *LABELS)).values()
    return {"dice": [2 * one.both / (one.prediction + one.reference) for one in counts]}


def in_turns(sides: dict[str, Callable[[], dict[str, list[float]]]], *, rounds: int) -> dict[str, float]:
    """Median seconds of each side; all values must be equal within 1e-4."""
    results = [measure() for measure in sides.values()]  # also compiles and warms up
    for name, expected in results[0].items():
        for other in results[1:]:
            np.testing.assert_allclose(other[name], expected, atol=1e-4)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sorted(sides, reverse=bool(number % 2)):
            began = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(*, shape: tuple[int, int, int], rounds: int) -> list[dict[str, Any]]:
    """One row a measure, with the seconds of both sides and their ratio."""
    prediction, reference = organs(shape)
    geometry = Geometry(shape, np.diag((*SPACING_MM, 1.0)))
    hot = [
        torch.stack([torch.from_numpy(labels == value) for value in range(len(LABELS) + 1)])[None]
        for labels in (prediction, reference)
    ]
    rows = []
    surface = {
        "MONAI": lambda: _monai_surface(*hot),
        "medssl": lambda: _medssl_surface(prediction, reference, geometry=geometry),
        "medssl with nsd_area": lambda: _medssl_surface(prediction, reference, geometry=geometry, with_area=True),
    }
    seconds = in_turns(surface, rounds=rounds)
    what = "HD95 and NSD of 13 labels (medssl also HD, ASSD, Dice, volumes)"
    rows.append({"what": what, "monai_s": seconds["MONAI"], "medssl_s": seconds["medssl"], "goal": 20})
    rows.append(
        {
            "what": "the same and NSD by area",
            "monai_s": seconds["MONAI"],
            "medssl_s": seconds["medssl with nsd_area"],
            "goal": "-",
        }
    )
    hot = [labels.float() for labels in hot]
    dice = {"MONAI": lambda: _monai_dice(*hot), "medssl": lambda: _medssl_dice(prediction, reference)}
    seconds = in_turns(dice, rounds=rounds)
    rows.append({"what": "Dice of 14 classes", "monai_s": seconds["MONAI"], "medssl_s": seconds["medssl"], "goal": 100})
    for row in rows:
        row["ratio"] = row["monai_s"] / row["medssl_s"]
        print(f"{row['what']}: {row['ratio']:.1f} x", file=sys.stderr)
    return rows


def _page(rows: list[dict[str, Any]], *, shape: tuple[int, int, int], rounds: int) -> Iterator[str]:
    yield from provenance.head("Metrics of label maps, against MONAI", "numpy", "scipy", "numba", "torch", "monai")
    size = " x ".join(map(str, shape))
    yield f"Label maps of {size} voxels, 13 structures, one thread, medians of {rounds} rounds in"
    yield "turns, values equal within 1e-4. MONAI's input is one-hot, bool for surfaces and float32 for Dice; making it"
    yield "is not counted. medssl's input is the label maps. The first call, which compiles, is not counted either."
    yield ""
    yield "| what | MONAI ms | medssl ms | times quicker | goal |"
    yield "|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row['what']} | {1e3 * row['monai_s']:.0f} | {1e3 * row['medssl_s']:.0f} | **{row['ratio']:.1f}** "
            f"| {row['goal']} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=150)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--out", type=Path, help="folder for metrics_speed.md; JSON is printed in any case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = (options.size, options.size, options.slices)
    rows = measure(shape=shape, rounds=options.rounds)
    print(json.dumps(rows, indent=1))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        page = _page(rows, shape=shape, rounds=options.rounds)
        (options.out / "metrics_speed.md").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()

"""How much quicker is a 64^3 crop from the store than from the .nii.gz with nibabel? Same machine, same run.

Run:  python benchmarks/store_crop.py
A CT-like volume of 512 x 512 x 150 int16 is made, written with nibabel and prepared into a store; then both crops are
read in turns, at the same random places, page cache warm. Prints JSON with the median seconds and their ratio.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from medssl.data.cohort import Case, Cohort
from medssl.data.prepare import PrepareConfig, prepare

SHAPE, CROP, ROUNDS = (512, 512, 150), 64, 9


def ct_like() -> np.ndarray:
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.linspace(-1, 1, SHAPE[0]), np.linspace(-1, 1, SHAPE[1]), indexing="ij")
    body = (x**2 / 0.6 + y**2 / 0.4 < 1)[..., None]
    texture = ndimage.gaussian_filter(rng.normal(size=SHAPE).astype(np.float32), 4) * 1500
    noise = rng.normal(0, 15, SHAPE)
    return np.where(body, 40 + texture + noise, -1000 + noise / 3).astype(np.int16)


def main() -> None:
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "ct.nii.gz"
        nib.save(nib.Nifti1Image(ct_like(), np.diag([0.8, 0.8, 2.0, 1.0])), path)
        Cohort([Case(case_id="ct", subject_id="ct", image=str(path), modality="CT", split="train")]).to_csv(
            folder / "c.csv"
        )
        config = PrepareConfig.parse({"modality": "CT", "intensity": {"mode": "hu"}})
        result = prepare(config, cohort=folder / "c.csv", out=folder / "store", workers=1)
        assert result.store is not None
        case = result.store.cases[0]
        case.read("image", (0, 0, 0), (8, 8, 8))  # opens and verifies, as the first crop of a run does
        times: dict[str, list[float]] = {"store": [], "nibabel": []}
        for _ in range(ROUNDS):
            start = [int(rng.integers(0, n - CROP)) for n in SHAPE]
            began = time.perf_counter()
            ours = case.read("image", start, (CROP,) * 3)[0]
            times["store"].append(time.perf_counter() - began)
            box = tuple(slice(a, a + CROP) for a in start)
            began = time.perf_counter()
            theirs = np.asarray(nib.load(path).dataobj)[box].astype(np.float32)
            times["nibabel"].append(time.perf_counter() - began)
            assert np.array_equal(ours, theirs)
        medians = {key: statistics.median(values) for key, values in times.items()}
        files = {"nii_gz_mib": path.stat().st_size / 2**20}
        files["store_mib"] = sum(p.stat().st_size for p in (folder / "store").rglob("*.b2nd")) / 2**20
        print(json.dumps({**medians, "ratio": medians["nibabel"] / medians["store"], **files}, indent=1))


if __name__ == "__main__":
    main()

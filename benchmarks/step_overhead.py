"""Time of a training step in the engine over a bare forward + backward + optimiser step, on the same tensors.

The bare step runs inside the engine's own source of batches, so that the two alternate one by one: step k of the
engine, step k of the bare loop, and so on. What the engine adds (Fabric, seeding, gradient norm, clipping, finite
check, learning rate, journal) lies between two requests for a batch. Prints one line of JSON.

    python benchmarks/step_overhead.py [--steps 120] [--width 12] [--precision 32 bf16]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from medssl.engine.device import resolve_precision
from medssl.engine.optim import TrainConfig, build_optimizer
from medssl.engine.trainer import fit
from medssl.runfolder import RunFolder
from medssl.trainable import Batch, Losses, Trainable

WARM_UP = 5


class Autoencoder(Trainable):
    """Small residual 3D network with a reconstruction loss."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(width, width, 3, padding=1, bias=False), nn.InstanceNorm3d(width, affine=True), nn.LeakyReLU()
            )
            for _ in range(4)
        )
        self.deep = nn.Sequential(nn.Conv3d(width, 8 * width, 3, stride=4), nn.LeakyReLU(), nn.Conv3d(8 * width, 64, 3))
        self.out = nn.Conv3d(width, 1, 1)

    def forward(self, batch: Batch) -> Losses:
        x = batch["image"]
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        reconstruction = F.mse_loss(self.out(h).float(), x)
        spread = self.deep(h).float().var(0).mean()
        return Losses(reconstruction + spread, {"reconstruction": reconstruction, "spread": spread})


def measure(*, steps: int, width: int, precision: str, size: int, device: str) -> dict[str, object]:
    """Seconds of both loops over ``steps`` alternating steps, after a warm-up."""
    torch.manual_seed(0)
    config = TrainConfig(
        steps=steps + WARM_UP + 1, precision=precision, log_every=10, checkpoint_every=10**6, prefetch=False
    )
    resolved = resolve_precision(precision, device=device)
    engine_model = Autoencoder(width)
    bare_model = copy.deepcopy(engine_model).to(device)
    bare_optimizer = build_optimizer(bare_model.param_groups(), config, fused=resolved != "16")
    batch = Batch({"image": torch.randn(2, 1, *(size,) * 3)}, torch.arange(2), ("a", "b")).to(device)
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(resolved)
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    engine_seconds: list[float] = []
    bare_seconds: list[float] = []

    def bare_step() -> None:
        with torch.autocast(device, dtype=dtype) if dtype else nullcontext():
            total = bare_model(batch).total
        total.backward()
        bare_optimizer.step()
        bare_optimizer.zero_grad()

    def batches(_start: int) -> Iterator[Batch]:
        while True:
            synchronise()
            before = time.perf_counter()
            yield batch
            synchronise()
            between = time.perf_counter()
            bare_step()
            synchronise()
            engine_seconds.append(between - before)
            bare_seconds.append(time.perf_counter() - between)

    with tempfile.TemporaryDirectory() as folder, RunFolder(Path(folder)) as run:
        fit(engine_model, batches, config, run=run, seed=0)
    engine, bare = engine_seconds[WARM_UP:], bare_seconds[WARM_UP:]
    return {
        "precision": resolved,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "steps": len(bare),
        "bare_ms": 1e3 * statistics.median(bare),
        "engine_ms": 1e3 * statistics.median(engine),
        "ratio_of_medians": statistics.median(engine) / statistics.median(bare),
        "median_of_ratios": statistics.median(e / b for e, b in zip(engine, bare, strict=True)),
        "ratio_of_sums": sum(engine) / sum(bare),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--width", type=int, default=12)
    parser.add_argument("--size", type=int, default=24)
    parser.add_argument("--precision", nargs="+", default=["32", "bf16"])
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for precision in options.precision:
        result = measure(
            steps=options.steps, width=options.width, precision=precision, size=options.size, device=device
        )
        print(json.dumps(result))


if __name__ == "__main__":
    main()

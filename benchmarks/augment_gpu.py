"""On a GPU: what augmenting a VoCo batch costs beside the step that it is for, and how long the step waits for data."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

import torch

from medssl.data.loader import batches
from medssl.data.store import ArrayStore
from medssl.engine.prefetch import open_feed
from medssl.methods.voco import Config, VoCo
from medssl.nn.backbone import build_backbone
from medssl.trainable import Batch

BATCH, STEPS, WARM_UP = 4, 30, 5


def measure(store: Path) -> dict[str, Any]:
    """Milliseconds of augmentation and of the step of SwinUNETR-48's encoder, and the share of time spent waiting."""
    if not torch.cuda.is_available():
        return {"skipped": "no CUDA device"}
    device = torch.device("cuda")
    cases = ArrayStore.open(store).cases
    config = Config.parse(
        {"crop_voxels": [64, 64, 64], "augment": [{"name": "window"}, {"name": "noise"}, {"name": "gamma"}]}
    )
    encoder = build_backbone({"name": "swin", "embed": 48}, in_channels=1, spatial_dims=3)
    model = VoCo(config, encoder=encoder, seed=0).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    workers = max(1, min(16, os.cpu_count() or 1) - 2)

    def prepare(batch: Batch) -> Batch:
        return model.prepare(batch, training=True)

    def step(batch: Batch) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            total = model(batch).total
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def feed(steps: int) -> Any:
        data = batches(cases, model.view_sampler(), batch_size=BATCH, seed=0, steps=steps, num_workers=workers)
        return open_feed(data, prepare, device=device, prefetch=True)

    raw = next(iter(batches(cases, model.view_sampler(), batch_size=BATCH, seed=0, steps=1))).to(device)
    prepared = prepare(raw)
    augment_ms, step_ms = _timed(lambda: prepare(raw)), _timed(lambda: step(prepared))
    waited_from, begin, end = 0.0, torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    source = feed(WARM_UP + STEPS)
    for number, batch in enumerate(source):
        if number == WARM_UP:
            waited_from = source.waited
            begin.record()
        step(batch)
    end.record()
    torch.cuda.synchronize()
    stall = 1e5 * (source.waited - waited_from) / begin.elapsed_time(end)
    source.close()
    return {
        "device": torch.cuda.get_device_name(),
        "workers": workers,
        "augment_ms": augment_ms,
        "step_ms": step_ms,
        "augment_percent": 100 * augment_ms / step_ms,
        "stall_percent": stall,
    }


def _timed(work: Any) -> float:
    """Median milliseconds on the device."""
    times = []
    for number in range(WARM_UP + STEPS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if number >= WARM_UP:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)

"""Phantoms, and what the commands make of them: built once a process, shared, and never changed by a test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny


@dataclass(frozen=True)
class Phantoms:
    """A folder of twelve phantom scans (six to train on, two of them without a label), its cohort, and the store."""

    scans: Path
    cohort: Path
    store: Path


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Phantoms:
    from medssl.data.phantom import write_phantoms
    from medssl.data.prepare import PrepareConfig, prepare
    from medssl.data.scan import ScanConfig, scan

    root = tmp_path_factory.mktemp("phantoms")
    scans = write_phantoms(root / "scans", num_subjects=12, num_labelled=10, shape=(24, 28, 20), spacing_mm=(2, 2, 3))
    cohort = scan(scans, root / "cohort.csv", config=ScanConfig.parse(tiny.SCAN)).path
    prepare(PrepareConfig.parse(tiny.PREPARE), cohort=cohort, out=root / "store", workers=1)
    return Phantoms(scans, cohort, root / "store")


@pytest.fixture(scope="session")
def encoder_bundle(phantoms: Phantoms, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What VoCo leaves after 20 steps."""
    from medssl.recipe import pretrain

    return pretrain(tiny.VOCO, store=phantoms.store, out=tmp_path_factory.mktemp("runs") / "voco").bundle


@pytest.fixture(scope="session")
def model_bundle(phantoms: Phantoms, encoder_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What fine-tuning leaves after 20 steps."""
    from medssl.recipe import finetune

    out = tmp_path_factory.mktemp("runs") / "segment"
    return finetune(tiny.SEGMENT, store=phantoms.store, out=out, encoder=encoder_bundle).bundle

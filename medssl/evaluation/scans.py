"""Scans as a bundle wants to see them: read, and held against what the bundle was made for."""

from __future__ import annotations

from collections.abc import Sequence

from medssl.data.prepare import PrepareConfig, reading_of
from medssl.data.reading import nameless, read_image
from medssl.data.series import modality_of
from medssl.errors import CaseError
from medssl.evaluation.inputs import Job
from medssl.io.dicom.series_list import write_list
from medssl.io.source import Source
from medssl.volume import Volume


def read_scan(job: Job, reading: PrepareConfig) -> tuple[Volume, Source]:
    """Read one scan.

    Args:
        job: The scan.
        reading: Preparation of the bundle.

    Raises:
        CaseError: E_MODALITY for a scan of another modality than the bundle's, E_NO_SPACING for one without a voxel
            size where the bundle needs it.
        ReadError: if it cannot be read.
    """
    with nameless(str(job.path), job.item):
        volume, source = read_image(job.path, reading_of(reading, job.reading), unit=reading.unit)
    modality = job.modality if job.modality != "other" else modality_of(str(source.facts.get("modality", "")))
    if "other" not in {modality, reading.modality} and modality != reading.modality:
        raise CaseError(
            f"{job.item}: an image of {modality}; the bundle was made for {reading.modality}. Take a bundle for it.",
            code="E_MODALITY",
        )
    if reading.spacing_mm is not None and not source.has_spacing:
        raise CaseError(
            f"{job.item}: states no spacing; the bundle works at {reading.spacing_mm} mm. "
            "Give the true spacing with assume_spacing_mm.",
            code="E_NO_SPACING",
        )
    return volume, source


def write_lists(jobs: Sequence[Job]) -> None:
    """Write the series list of each DICOM image, so that it can be read like a file."""
    for path, series in {job.path: job.series for job in jobs}.items():
        if series is not None:
            write_list(series, path)

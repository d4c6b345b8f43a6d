"""Every family of the shared DICOM, NIfTI, NRRD and MetaImage folders through medssl and its peers.

Run:  python benchmarks/dicom_families.py ../shared/data -o benchmarks/results
Each tool reads each input in a process of its own; what comes back is compared with the truth of families_truth.py:
corners of every slice in world mm, and values. A silent error is a volume off by more than 1e-3 mm, of another shape,
or with other values, that came without an exception; a volume out of data that cannot make one is one too. Writes
families.md and families.csv. Beside the development install it needs, in an environment of its own,
``pip install dicom2nifti pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg pylibjpeg-rle itk pynrrd``: peers, MONAI's
readers, and the plugins without which pydicom cannot give the truth of lossless JPEG (libjpeg's is under the GPL).
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import families_dicom
import families_tools
import families_truth
import provenance
import pydicom
from families_truth import Image, Truth, Verdict

from medssl import pool

TIMEOUT_S = 120
NOT_DICOM = {".gz", ".nii", ".md", ".csv"}
MUST_REFUSE = {
    "slice_increment_ge/failing/sliceincrement/001": "slices 5 and 10 mm apart",
    "slice_missing_siemens/failing/sliceincrement/002": "a missing slice and a tilt of 15.5 degrees",
    "prostatex_0000/calc_bval_missing_slice": "a missing slice",
    "mr_small/MR_truncated.dcm": "cut off",
    "dicomdir_seg/DICOMDIR": "no image",
    "elastix_2d/fixed.raw": "voxels without their header",
    "elastix_2d/mask_fixed.raw": "voxels without their header",
}
MOSAICS = {
    "bits12/dicom/12bitUnsigned.dcm": "bits12/ref_2.nii",
    "bits12/dicom/12bitUnsigned_0x0F0F.dcm": "bits12/ref_3.nii",
    "bits12/dicom/12bitSigned_0x0F0F.dcm": "bits12/ref_4.nii",
    "nih_siemens_epi/ap": "nih_siemens_epi/ref_ap.nii",
    "nih_siemens_epi/pa": "nih_siemens_epi/ref_pa.nii",
    "siemens_fmri_mosaic/siemens/fmri/001": "siemens_fmri_mosaic/siemens_fmri_001_ground_truth.nii.gz",
}
LOSSY_FOR_ITK = {
    "nm1/JPEG-lossy.dcm",
    *(
        f"ct_all_syntaxes/CTImage.dcm_JPEGProcess{name}TransferSyntax_1.2.840.10008.1.2.4.{end}.dcm"
        for name, end in (("10_12", 55), ("6_8", 53))
    ),
}
DOWNWARD = {"siemens_fmri_mosaic/siemens/fmri/001"}
"""Where the conversion beside the data is wrong: the protocol in the header counts slices from the top (ucImageNumbTra
is 1), so that the position in the header, that of the first tile, is the highest (asSlice[49] in the protocol).
dicom2nifti turns the slices round, and then begins with the lowest at that position, 148 mm above what was scanned."""

STRUCTURES = {
    "rtss.dcm": ("ct.0.dcm",),
    "rt.dcm": ("ct_1.dcm", "ct_2.dcm"),
    "invalid_reference_rt.dcm": ("ct_1.dcm", "ct_2.dcm"),
}

_LEGEND = """\
**right**: every volume, every corner within 1e-3 mm, equal values. **part**: what came is right, but not all volumes
came, without a word. **refused**: by an error (of medssl: by one of its own; any other is a **crash**). **SILENT**: a
wrong grid, shape or value without an error, or a volume out of data that cannot make one. **read**: there is no
reference to compare with (contours; a file that is not sound).

The truth is the standards' formulas on values decoded by pydicom, highdicom, nibabel or SimpleITK; for mosaics it is a
conversion by dcm2niix or dicom2nifti (that of siemens_fmri_mosaic moved down to where its protocol has the slices).
Padding is not compared, MONOCHROME1 counts in either sense, frames of a clip may come as slices, and where a file has
no position only its pixel spacing is compared. DICOM-SEG is compared with the label map that it stands for. "-": not a
format of that tool."""

_CONVERSIONS = (
    "",
    "## The truth used here against the conversions beside the data",
    "",
    "A conversion is right where geometry and values are those of the formulas. The others: dicom2nifti's of the",
    "tilted series was resampled to another grid, that of the RGB series has a fourth channel, in that of the Philips",
    "DTI three of four volumes are empty; dcm2niix gives the Philips field map other units (e1) or six digits (e2).",
    "",
    "| conversion | volumes right | corner mm | values off |",
    "|---|---|---|---|",
)


@dataclass(frozen=True)
class Input:
    """One file or series: ``paths`` are its files, for RTSTRUCT followed by those of its image."""

    folder: str
    name: str
    kind: str
    paths: tuple[Path, ...]
    truth: Path | None = None
    refuse: str = ""


@dataclass(frozen=True)
class Row:
    """What one tool made of one input."""

    folder: str
    name: str
    tool: str
    outcome: str
    detail: str = ""
    shapes: str = ""
    spacing_mm: str = ""
    corner_mm: float | None = None
    value_error: float | None = None


def inputs(root: Path) -> Iterator[Input]:
    """All of the four folders, by name."""
    yield from _series(root / "dicom_series")
    yield from _files(root / "dicom_files")
    for folder, kind in (("nifti_geometry", "nifti"), ("nrrd_mha", "itk")):
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and path.suffix not in {".md", ".csv"}:
                name = str(path.relative_to(root / folder))
                yield Input(folder, name, kind, (path,), refuse=MUST_REFUSE.get(name, ""))


def _series(root: Path) -> Iterator[Input]:
    for folder in sorted(path for path in root.rglob("*") if path.is_dir()):
        paths = tuple(sorted(path for path in folder.iterdir() if path.is_file() and path.suffix not in NOT_DICOM))
        name = str(folder.relative_to(root))
        if name.startswith("bits12"):
            for path in paths:
                one = str(path.relative_to(root))
                yield Input(root.name, one, "file", (path,), truth=root / MOSAICS[one])
        elif paths:
            beside = root / MOSAICS[name] if name in MOSAICS else None
            yield Input(root.name, name, "series", paths, truth=beside, refuse=MUST_REFUSE.get(name, ""))


def _files(root: Path) -> Iterator[Input]:
    for folder in sorted(path for path in root.rglob("*") if path.is_dir()):
        paths = sorted(path for path in folder.iterdir() if path.is_file())
        name = str(folder.relative_to(root))
        if paths and all(not path.suffix for path in paths) and name != "dicomdir_seg":
            yield Input(root.name, name, "series", tuple(paths))
            continue
        for path in paths:
            one = str(path.relative_to(root))
            dataset = pydicom.dcmread(path, force=True, specific_tags=["Modality", "Rows"])
            kind = {"SEG": "seg", "RTSTRUCT": "rtstruct"}.get(dataset.get("Modality", ""), "file")
            image = tuple(folder / other for other in STRUCTURES.get(path.name, ()))
            no_pixels = "Rows" not in dataset and kind == "file"
            why = MUST_REFUSE.get(one, "no image" if no_pixels or "no-pixel-data" in path.name else "")
            yield Input(root.name, one, kind, (path, *image), refuse=why)


def truths(item: Input) -> list[Truth]:
    """Truth of an input; empty where the tools of the truth cannot read it either."""
    if item.kind == "nifti":
        return families_truth.nifti_truths(item.paths[0])
    if item.kind == "rtstruct" or item.refuse in {"cut off", "no image", "voxels without their header"}:
        return []
    try:
        if item.truth is not None:
            found = families_truth.nifti_truths(item.truth)
            return [families_truth.downward(truth) for truth in found] if item.name in DOWNWARD else found
        if item.kind == "itk":
            return families_truth.itk_truths(item.paths[0])
        if item.kind == "seg":
            return families_truth.segmentation_truths(item.paths[0])
        return families_dicom.dicom_truths(item.paths)
    except (AttributeError, OSError, RuntimeError, ValueError):  # no truth, and the row says so
        return families_dicom.itk_dicom_truths(item.paths[0]) if item.name in LOSSY_FOR_ITK else []


def conversions(root: Path) -> Iterator[str]:
    """Lines of a table: how far each conversion that lies beside a series is from the truth used here."""
    for item in _series(root / "dicom_series"):
        family, _, rest = item.name.partition("/")
        beside = sorted((root / "dicom_series" / family).glob(f"{rest.replace('/', '_')}_ground_truth.nii.gz"))
        beside += sorted((root / "dicom_series" / family).glob("ref_e*.nii"))
        if item.truth is None and beside:
            known = truths(item)
            for path in beside:
                images = [Image(truth.array, truth.affines[0]) for truth in families_truth.nifti_truths(path)]
                verdicts = families_truth.compare(images, known)
                right = sum(verdict.is_right for verdict in verdicts)
                corner = max(verdict.corner_mm for verdict in verdicts)
                error = max(verdict.value_error for verdict in verdicts)
                yield f"| {path.name} | {right} of {len(verdicts)} | {corner:.2g} | {error:.3g} |"


def judge(job: tuple[Input, str]) -> Row:
    """Read one input with one tool, in this process, and compare."""
    item, tool = job
    refused = ""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        try:
            images = families_tools.read(tool, item.paths, item.kind)
        except families_tools.RefusedError as error:
            refused, images = str(error), error.images
        except Exception as error:
            if tool == "medssl":
                return Row(item.folder, item.name, tool, "crash", type(error).__name__)
            refused, images = type(error).__name__, []
    if not images:
        return Row(item.folder, item.name, tool, "refused", refused or "nothing returned")
    facts = {
        "shapes": " ".join("x".join(map(str, image.array.shape)) for image in images[:4]),
        "spacing_mm": "x".join(f"{step:.4g}" for step in (images[0].affine[:3, :3] ** 2).sum(axis=0) ** 0.5),
    }
    known = truths(item)
    if not known:
        outcome = "silent error" if item.refuse else "read"
        detail = f"a volume out of data that is {item.refuse}" if item.refuse else "no reference"
        return Row(item.folder, item.name, tool, outcome, detail, **facts)
    verdicts = families_truth.compare(images, known)
    worst = max(verdicts, key=lambda v: (not v.is_right, v.corner_mm, v.value_error))
    outcome, detail = _outcome(verdicts, worst, count=len(known))
    if refused:
        detail = f"{detail}; beside it refused: {refused}".strip("; ")
    return Row(
        item.folder, item.name, tool, outcome, detail, **facts, corner_mm=worst.corner_mm, value_error=worst.value_error
    )  # fmt: skip


def _outcome(verdicts: Sequence[Verdict], worst: Verdict, *, count: int) -> tuple[str, str]:
    right = sum(verdict.is_right for verdict in verdicts)
    if right == len(verdicts):
        return ("right", "") if right == count else ("part", f"{right} of {count} volumes")
    if worst.corner_mm == float("inf"):
        return "silent error", "other shape"
    parts = []
    if worst.corner_mm > families_truth.NEAR_MM:
        parts.append(f"{worst.corner_mm:.3g} mm off")
    if worst.value_error:
        parts.append(f"values {worst.value_error:.3g} off" if worst.value_error < float("inf") else "other channels")
    return "silent error", ", ".join(parts)


def run(root: Path, *, tools: Sequence[str], only: str, workers: int) -> list[Row]:
    """All rows, in the order of inputs and tools."""
    jobs = [
        (item, tool)
        for item in inputs(root)
        if only in f"{item.folder}/{item.name}"
        for tool in tools
        if families_tools.applies(tool, item.kind)
    ]
    rows = {}
    for (item, tool), answer in pool.run(judge, jobs, name=_name, workers=workers, timeout_s=TIMEOUT_S):
        row = answer if isinstance(answer, Row) else Row(item.folder, item.name, tool, "crash", answer.code)
        rows[item.name, tool] = row
        print(f"{row.tool}: {row.folder}/{row.name}: {row.outcome} {row.detail}", file=sys.stderr)
    return [rows[item.name, tool] for item, tool in jobs]


def _name(job: tuple[Input, str]) -> str:
    return f"{job[1]} on {job[0].name}"


def write(rows: Sequence[Row], out: Path, *, root: Path) -> None:
    """families.csv with a line for each input and tool, families.md with a line for each input."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "families.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row.__dataclass_fields__)
        writer.writerows([getattr(row, name) for name in Row.__dataclass_fields__] for row in rows)
    (out / "families.md").write_text("\n".join([*_page(rows), *_CONVERSIONS, *conversions(root)]) + "\n")


def _page(rows: Sequence[Row]) -> Iterator[str]:
    tools = [tool for tool in families_tools.TOOLS if any(row.tool == tool for row in rows)]
    yield from provenance.head("Every family of files, in medssl and its peers", *families_tools.PACKAGES)
    yield _LEGEND
    yield ""
    yield f"| | {' | '.join(tools)} |"
    yield f"|---|{'---|' * len(tools)}"
    for outcome in ("right", "part", "refused", "silent error", "read", "crash"):
        counts = [Counter(row.outcome for row in rows if row.tool == tool)[outcome] for tool in tools]
        yield f"| **{outcome}** | {' | '.join(map(str, counts))} |"
    for folder in dict.fromkeys(row.folder for row in rows):
        yield ""
        yield f"## {folder}"
        yield ""
        yield f"| input | {' | '.join(tools)} |"
        yield f"|---|{'---|' * len(tools)}"
        names = dict.fromkeys(row.name for row in rows if row.folder == folder)
        for name in names:
            cells = {row.tool: _cell(row) for row in rows if row.folder == folder and row.name == name}
            yield f"| {_wrapped(name)} | {' | '.join(cells.get(tool, '-') for tool in tools)} |"


def _cell(row: Row) -> str:
    if row.outcome == "silent error":
        return f"**SILENT**: {row.detail}"
    return f"{row.outcome}: {row.detail}" if row.detail else row.outcome


def _wrapped(name: str) -> str:
    return name if len(name) < 70 else f"{name[:33]}...{name[-33:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that holds dicom_series, dicom_files, nifti_geometry, nrrd_mha")
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--tools", nargs="+", choices=families_tools.TOOLS, default=list(families_tools.TOOLS))
    parser.add_argument("--only", default="", help="inputs whose path holds this text")
    parser.add_argument("--workers", type=int, default=2, help="processes, at least 2 so that a crash costs one input")
    options = parser.parse_args()
    rows = run(options.data, tools=options.tools, only=options.only, workers=options.workers)
    write(rows, options.out, root=options.data)


if __name__ == "__main__":
    main()

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from phantoms import REAL_DATA
from scipy import ndimage

from medssl.data.cohort import Case, Cohort
from medssl.data.prepare import PrepareConfig, prepare, prepare_volume
from medssl.data.reading import matched_label
from medssl.data.scan import ScanConfig, scan
from medssl.data.store import ArrayStore, verify_entry
from medssl.errors import CaseError, ConfigError, EnvironmentFaultError, ExitCode, GeometryError
from medssl.geometry import Geometry
from medssl.io import read_volume
from medssl.ledger import Outcome
from medssl.runfolder import read_journal
from medssl.volume import Volume

HIPPOCAMPUS = REAL_DATA / "hippocampus_msd"
OPEN_MS = REAL_DATA / "open_ms_raw"
CT = REAL_DATA / "nifti_geometry" / "ts_ct"
PLAIN = PrepareConfig()

MakeCase = Callable[..., tuple[Path, Path]]
WriteNifti = Callable[..., Path]

needs_data = pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="shared data is not here")


def _ball(shape: tuple[int, int, int] = (40, 44, 36), *, radius: float = 12) -> np.ndarray:
    points = np.indices(shape) - np.reshape([(n - 1) / 2 for n in shape], (3, 1, 1, 1))
    return (points**2).sum(axis=0) <= radius**2


def _head(seed: int = 0) -> Volume:
    """A bright noisy ball with a dark hole, in dark noisy air."""
    rng = np.random.default_rng(seed)
    array = rng.normal(5, 2, (40, 44, 36)).clip(0)
    array[_ball()] = rng.normal(100, 20, (40, 44, 36))[_ball()]
    array[18:22, 20:24, 16:20] = 0
    return Volume(array[None].astype(np.float32), Geometry((40, 44, 36), np.eye(4)), "arbitrary")


def _cohort(root: Path, make_case: MakeCase, count: int) -> Path:
    cases = []
    for index in range(count):
        image, label = make_case(root, f"case_{index}")
        cases.append(Case(case_id=f"case_{index}", subject_id=f"s{index}", image=str(image), label=str(label)))
    Cohort(cases).split_by_subject().to_csv(root / "cohort.csv")
    return root / "cohort.csv"


def test_robust_scaling_follows_its_formula() -> None:
    volume = _head()
    prepared = prepare_volume(volume, PLAIN)
    values = np.sort(volume.array.ravel().astype(np.float64))

    def percentile(q: float) -> float:
        place = q / 100 * (len(values) - 1)
        low = int(place)
        return values[low] + (place - low) * (values[low + 1] - values[low])

    scale = (percentile(95) - percentile(5)) / 3.2897072539  # 2 * 1.6448536, the 95 % point of a normal distribution
    expected = np.clip((volume.array - percentile(50)) / scale, -5, 5)
    np.testing.assert_allclose(prepared.volume.array, expected, atol=5e-3)
    assert prepared.record["intensity"]["channels"][0]["scale"] == pytest.approx(scale, rel=1e-5)
    assert prepared.volume.array.dtype == np.float32
    np.testing.assert_array_equal(prepared.volume.array, prepared.volume.array.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("gain", [0.02, 1.0, 17000.0])
def test_scaled_values_do_not_depend_on_the_unit_of_the_scanner(gain: float) -> None:
    volume = _head()
    scaled = Volume(volume.array * np.float32(gain) + np.float32(3 * gain), volume.geometry, "arbitrary")
    one, other = prepare_volume(volume, PLAIN), prepare_volume(scaled, PLAIN)
    np.testing.assert_allclose(other.volume.array, one.volume.array, atol=8e-3)


def test_a_normal_distribution_gets_variance_one() -> None:
    array = np.random.default_rng(0).normal(40, 9, (1, 30, 30, 30)).astype(np.float32)
    prepared = prepare_volume(Volume(array, Geometry((30, 30, 30), np.eye(4)), "arbitrary"), PLAIN)
    assert prepared.volume.array.std() == pytest.approx(1, abs=0.02)


def test_ct_is_kept_as_whole_hu() -> None:
    array = np.array([-1024.4, -500.5, 0.2, 3071.6, 99999.0], np.float32).reshape(1, 5, 1, 1)
    config = PrepareConfig.parse({"modality": "CT", "intensity": {"mode": "hu"}})
    prepared = prepare_volume(Volume(array, Geometry((5, 1, 1), np.eye(4)), "HU"), config)
    assert prepared.volume.array.ravel().tolist() == [-1024, -500, 0, 3072, 32767]
    assert prepared.volume.unit == "HU"
    assert config.dtype == np.int16
    assert prepared.fill == -1024


def test_around_an_image_lies_its_darkest_value() -> None:
    prepared = prepare_volume(_head(), PrepareConfig.parse({"modality": "MR"}))
    assert prepared.fill == prepared.volume.array.min() < 0


def test_mode_none_keeps_every_value() -> None:
    volume = _head()
    config = PrepareConfig.parse({"intensity": {"mode": "none"}})
    np.testing.assert_array_equal(prepare_volume(volume, config).volume.array, volume.array)


def test_the_body_mask_is_the_filled_ball_and_statistics_stay_inside_it() -> None:
    prepared = prepare_volume(_head(), PrepareConfig.parse({"body_mask": {"mode": "otsu"}}))
    mask = prepared.body_mask.array[0] > 0
    ball = _ball()
    assert 2 * (mask & ball).sum() / (mask.sum() + ball.sum()) > 0.97
    assert mask[20, 22, 18]  # the hole is inside the body
    inside = prepared.volume.array[0][mask]
    assert abs(np.median(inside)) < 0.01
    assert prepared.warnings == ()


def test_the_foreground_crop_keeps_the_ball_with_its_margin() -> None:
    config = PrepareConfig.parse({"body_mask": {"mode": "otsu"}, "crop": {"mode": "foreground", "margin_mm": 3}})
    prepared = prepare_volume(_head(), config)
    where = np.argwhere(_ball())
    start, stop = where.min(axis=0) - 3, where.max(axis=0) + 4
    assert prepared.record["crop"]["start"] == start.tolist()
    assert prepared.volume.geometry.shape == tuple((stop - start).tolist())
    np.testing.assert_allclose(prepared.volume.geometry.origin_mm, start)


def test_labelled_voxels_are_never_cut() -> None:
    volume = _head()
    label = np.zeros(volume.array.shape, np.uint8)
    label[0, 0, 0, 0] = 1
    config = PrepareConfig.parse({"body_mask": {"mode": "otsu"}, "crop": {"mode": "foreground"}})
    with_label = prepare_volume(volume, config, label=Volume(label, volume.geometry, "label"))
    assert with_label.volume.geometry.shape == volume.geometry.shape
    assert with_label.label is not None
    assert with_label.label.array.sum() == 1
    assert with_label.warnings[0].startswith("W_CROP_LABEL")
    without = prepare_volume(volume, config)
    assert with_label.record["intensity"] == without.record["intensity"]


def test_a_label_never_changes_how_a_case_that_is_scored_is_prepared(tmp_path: Path, write_nifti: WriteNifti) -> None:
    volume = _head()
    label = np.zeros(volume.array.shape[1:], np.uint8)
    label[0:2, 0, 0] = 1
    label[20, 22, 18] = 1
    image_path = write_nifti(tmp_path / "image.nii.gz", volume.array[0])
    label_path = write_nifti(tmp_path / "label.nii.gz", label)
    splits = ("train", "val", "test", None)
    cases = [
        Case(case_id=f"c{i}", subject_id=f"s{i}", image=str(image_path), label=str(label_path), split=split)
        for i, split in enumerate(splits)
    ]
    Cohort([*cases, Case(case_id="bare", subject_id="x", image=str(image_path))]).to_csv(tmp_path / "cohort.csv")
    config = PrepareConfig.parse({"body_mask": {"mode": "otsu"}, "crop": {"mode": "foreground"}})
    result = prepare(config, cohort=tmp_path / "cohort.csv", out=tmp_path / "store", workers=1)
    assert result.store is not None
    train, *others, bare = result.store.cases
    assert train.shape == volume.geometry.shape
    for case in others:
        assert case.shape == bare.shape != train.shape
        assert np.array_equal(case.read("image", (0, 0, 0), case.shape), bare.read("image", (0, 0, 0), bare.shape))
        assert case.read("label", (0, 0, 0), case.shape).sum() == 1
        assert case.source_label().sum() == 3
        assert "W_CROP_LABEL" in " ".join(case.meta["warnings"])


@pytest.mark.parametrize(("low", "high", "warned"), [(0, 1, True), (-160, 240, True), (-1000, 3000, False)])
def test_values_that_are_no_hounsfield_units_are_said(low: float, high: float, warned: bool) -> None:
    array = np.linspace(low, high, 1000, dtype=np.float32).reshape(1, 10, 10, 10)
    config = PrepareConfig.parse({"modality": "CT", "intensity": {"mode": "hu"}})
    prepared = prepare_volume(Volume(array, Geometry((10, 10, 10), np.eye(4)), "HU"), config)
    assert [note.startswith(f"W_NOT_HU: values from {low} to {high}") for note in prepared.warnings] == [True] * warned


@pytest.mark.parametrize("mode", ["robust_zscore", "hu", "none"])
def test_a_stored_image_of_one_value_says_so(
    tmp_path: Path, make_case: MakeCase, write_nifti: WriteNifti, mode: str
) -> None:
    make_case(tmp_path, "a")
    write_nifti(tmp_path / "imagesTr/b.nii.gz", np.full((6, 7, 8), -900, np.int16))
    cases = [
        Case(case_id=name, subject_id=name, image=str(tmp_path / f"imagesTr/{name}.nii.gz")) for name in ("a", "b")
    ]
    Cohort(cases).to_csv(tmp_path / "cohort.csv")
    config = PrepareConfig.parse({"intensity": {"mode": mode}})
    store = prepare(config, cohort=tmp_path / "cohort.csv", out=tmp_path / "store", workers=1).store
    assert store is not None
    assert [case.is_constant for case in store.cases] == [False, True]


def test_a_crop_full_of_tissue_has_no_background_to_cut() -> None:
    array = np.random.default_rng(0).normal(100, 20, (1, 20, 20, 20)).astype(np.float32)
    volume = Volume(array, Geometry((20, 20, 20), np.eye(4)), "arbitrary")
    prepared = prepare_volume(
        volume, PrepareConfig.parse({"body_mask": {"mode": "otsu"}, "crop": {"mode": "foreground"}})
    )
    assert prepared.body_mask.array.all()
    assert prepared.volume.geometry.shape == (20, 20, 20)
    assert prepared.warnings[0].startswith("W_NO_BACKGROUND")


def test_a_threshold_mask_drops_the_table_and_keeps_the_lungs() -> None:
    array = np.full((40, 44, 36), -1000, np.int16)
    array[_ball()] = 40
    array[16:24, 18:26, 14:22] = -850
    array[5:35, 42, :] = 200
    config = PrepareConfig.parse({"modality": "CT", "intensity": {"mode": "hu"}, "body_mask": {"mode": "threshold"}})
    mask = prepare_volume(Volume(array[None], Geometry(array.shape, np.eye(4)), "HU"), config).body_mask.array[0]
    assert mask[20, 22, 18]
    np.testing.assert_array_equal(mask[:, :40] > 0, _ball()[:, :40])
    air = PrepareConfig.parse(
        {"modality": "CT", "intensity": {"mode": "hu"}, "body_mask": {"mode": "threshold", "threshold": 5000}}
    )
    nothing = prepare_volume(Volume(array[None], Geometry(array.shape, np.eye(4)), "HU"), air)
    assert nothing.warnings[0].startswith("W_NO_BODY")
    assert nothing.body_mask.array.all()


def test_a_constant_image_becomes_zero_and_is_named() -> None:
    volume = Volume(np.full((1, 6, 6, 6), 7, np.uint8), Geometry((6, 6, 6), np.eye(4)), "arbitrary")
    prepared = prepare_volume(volume, PrepareConfig.parse({"body_mask": {"mode": "otsu"}}))
    assert not prepared.volume.array.any()
    assert any(note.startswith("W_CONSTANT") for note in prepared.warnings)


def test_an_image_of_mostly_one_value_is_scaled_by_its_whole_spread() -> None:
    array = np.zeros((1, 10, 10, 10), np.float32)
    array[0, 0, 0, :20] = 100
    prepared = prepare_volume(Volume(array, Geometry((10, 10, 10), np.eye(4)), "arbitrary"), PLAIN)
    assert prepared.record["intensity"]["channels"][0]["scale"] == pytest.approx(array.std())


def test_orientation_and_spacing_are_those_asked_for() -> None:
    volume = _head()
    flipped = Volume(
        np.ascontiguousarray(volume.array.transpose(0, 3, 1, 2)[:, ::-1]),
        Geometry((36, 40, 44), np.array([[0, 1.0, 0, 0], [0, 0, 1.0, 0], [-1.0, 0, 0, 35], [0, 0, 0, 1]])),
        "arbitrary",
    )
    straight = prepare_volume(volume, PLAIN)
    turned = prepare_volume(flipped, PLAIN)
    np.testing.assert_array_equal(turned.volume.array, straight.volume.array)
    coarse = prepare_volume(flipped, PrepareConfig(spacing_mm=(2.0, 2.0, 3.0)))
    assert coarse.volume.geometry.spacing_mm == pytest.approx((2, 2, 3))
    assert coarse.volume.geometry.orientation == "RAS"
    assert coarse.volume.geometry.shape == (20, 22, 12)


def test_a_sheared_grid_gets_right_angles_and_a_warning_with_the_angle() -> None:
    affine = np.eye(4)
    affine[1, 2] = np.tan(np.radians(15))
    ball = _ball()
    volume = Volume(ball[None].astype(np.float32) * 100, Geometry(ball.shape, affine), "arbitrary")
    label = Volume(ball[None].astype(np.uint8), volume.geometry, "label")
    prepared = prepare_volume(volume, PrepareConfig.parse({"intensity": {"mode": "none"}}), label=label)
    assert prepared.warnings[0].startswith("W_SHEAR: axes are 15.00 degrees")
    assert prepared.volume.geometry.shear_deg < 1e-6
    assert prepared.label is not None
    centre = ndimage.center_of_mass(prepared.label.array[0])
    expected = volume.geometry.to_world([(n - 1) / 2 for n in ball.shape])
    np.testing.assert_allclose(prepared.volume.geometry.to_world(centre), expected, atol=0.1)
    assert prepared.record["source_geometry"] == volume.geometry.to_dict()


def test_a_structure_that_vanishes_on_the_new_grid_is_named() -> None:
    volume = _head()
    label = np.zeros(volume.array.shape, np.uint8)
    label[0, 10, 10, 10] = 4
    prepared = prepare_volume(
        volume, PrepareConfig(spacing_mm=(5.0, 5.0, 5.0)), label=Volume(label, volume.geometry, "label")
    )
    assert any(note.startswith("W_LABEL_LOST: label values [4]") for note in prepared.warnings)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"spacing_mm": [1, 0, 1]}, "spacings must be above 0 mm"),
        ({"modality": "MR", "intensity": {"mode": "hu"}}, "hu is for CT, not for MR"),
        ({"orientation": "RAR"}, "one letter each"),
        ({"orientation": "RA"}, "one letter each"),
        ({"intensity": {"percentiles": [95, 5]}}, "ascend"),
        ({"intensity": {"clip": 0}}, "greater than 0"),
        ({"spacing": [1, 1, 1]}, "Did you mean spacing_mm"),
        ({"modality": "XX"}, "modality"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(mapping: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrepareConfig.parse(mapping)


def test_a_label_on_another_grid_is_refused() -> None:
    image = _head()
    label = Volume(np.zeros((1, 40, 44, 36), np.uint8), image.geometry, "label")
    assert matched_label(image, label, item="x").geometry is image.geometry
    affine = np.eye(4)
    affine[0, 3] = 0.5
    moved = Volume(label.array, Geometry((40, 44, 36), affine), "label")
    with pytest.raises(GeometryError, match=r"x: label lies 0\.50 mm off"):
        matched_label(image, moved, item="x")
    small = Volume(label.array[:, 1:], Geometry((39, 44, 36), np.eye(4)), "label")
    with pytest.raises(CaseError, match=r"\(1, 39, 44, 36\)") as caught:
        matched_label(image, small, item="x")
    assert caught.value.code == "E_SHAPE"


def test_prepare_makes_a_store_and_a_second_run_keeps_it(tmp_path: Path, make_case: MakeCase) -> None:
    cohort = _cohort(tmp_path, make_case, 4)
    first = prepare(PLAIN, cohort=cohort, out=tmp_path / "store", workers=2)
    assert first.ledger.exit_code() is ExitCode.OK
    assert first.store is not None
    assert [case.case_id for case in first.store.cases] == [f"case_{i}" for i in range(4)]
    assert first.store.label_values == (1, 2)
    case = first.store.cases[2]
    direct = prepare_volume(read_volume(tmp_path / "imagesTr/case_2.nii.gz")[0], PLAIN)
    np.testing.assert_array_equal(case.read("image", (0, 0, 0), case.shape), direct.volume.array)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store/cases").rglob("*")}
    second = prepare(PLAIN, cohort=cohort, out=tmp_path / "store", workers=1)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store/cases").rglob("*")} == before
    assert second.store is not None
    assert second.store.fingerprint == first.store.fingerprint
    lines = read_journal(tmp_path / "store/journal.jsonl")
    assert [(line["made"], line["kept"]) for line in lines] == [(4, 0), (0, 4)]
    assert "orientation: RAS" in (tmp_path / "store/prepare.yaml").read_text()


def test_a_changed_option_or_source_makes_a_new_entry(tmp_path: Path, make_case: MakeCase) -> None:
    cohort = _cohort(tmp_path, make_case, 1)
    prepare(PLAIN, cohort=cohort, out=tmp_path / "store", workers=1)
    prepare(PrepareConfig(orientation="LPS"), cohort=cohort, out=tmp_path / "store", workers=1)
    make_case(tmp_path, "case_0", seed=9)
    last = prepare(PLAIN, cohort=cohort, out=tmp_path / "store", workers=1)
    assert len(list((tmp_path / "store/cases").iterdir())) == 3
    assert last.store is not None
    image = read_volume(tmp_path / "imagesTr/case_0.nii.gz")[0]
    np.testing.assert_array_equal(
        last.store.cases[0].read("image", (0, 0, 0), (12, 14, 10)), prepare_volume(image, PLAIN).volume.array
    )


def test_a_flipped_bit_in_an_entry_is_rebuilt_by_a_rerun(tmp_path: Path, make_case: MakeCase) -> None:
    cohort = _cohort(tmp_path, make_case, 2)
    first = prepare(PLAIN, cohort=cohort, out=tmp_path / "store", workers=1)
    assert first.store is not None
    file = first.store.cases[1].folder / "image.b2nd"
    good = file.read_bytes()
    file.write_bytes(good[:-40] + bytes([good[-40] ^ 1]) + good[-39:])
    second = prepare(PLAIN, cohort=cohort, out=tmp_path / "store", workers=1)
    assert file.read_bytes() == good
    line = read_journal(tmp_path / "store/journal.jsonl")[-1]
    assert (line["made"], line["kept"], line["rebuilt"]) == (0, 1, 1)
    assert second.ledger.exit_code() is ExitCode.OK


def test_bad_cases_are_named_and_the_others_go_on(tmp_path: Path, make_case: MakeCase, write_nifti: WriteNifti) -> None:
    cohort = _cohort(tmp_path, make_case, 6)
    images, labels = tmp_path / "imagesTr", tmp_path / "labelsTr"
    whole = (images / "case_0.nii.gz").read_bytes()
    (images / "case_0.nii.gz").write_bytes(whole[: len(whole) // 2])
    write_nifti(labels / "case_1.nii.gz", np.zeros((3, 3, 3), np.uint8))
    (images / "case_2.nii.gz").unlink()
    write_nifti(images / "case_3.nii.gz", np.full((12, 14, 10), np.nan, np.float32))
    write_nifti(labels / "case_4.nii.gz", np.zeros((12, 14, 10), np.uint8), np.diag([1.0, 1, 2, 1]))
    unclipped = PrepareConfig.parse({**PLAIN.to_dict(), "intensity": {"clip": 1000.0}})
    result = prepare(unclipped, cohort=cohort, out=tmp_path / "store", workers=2)
    outcomes = {entry.item: (entry.outcome, entry.code) for entry in result.ledger}
    assert outcomes["case_0"] == (Outcome.REJECTED, "E_TRUNCATED")
    assert outcomes["case_1"] == (Outcome.REJECTED, "E_SHAPE")
    assert outcomes["case_2"][0] is Outcome.REJECTED
    assert outcomes["case_3"] == (Outcome.REJECTED, "E_NONFINITE")
    assert outcomes["case_4"] == (Outcome.WARNED, "W_EMPTY_LABEL")
    assert outcomes["case_5"] == (Outcome.ACCEPTED, "")
    assert result.ledger.exit_code() is ExitCode.SOME_REJECTED
    assert result.store is not None
    assert [case.case_id for case in result.store.cases] == ["case_4", "case_5"]
    assert "E_TRUNCATED" in (tmp_path / "store/refused.csv").read_text()


def test_when_no_case_is_usable_there_is_no_store(tmp_path: Path, make_case: MakeCase) -> None:
    cohort = _cohort(tmp_path, make_case, 1)
    (tmp_path / "imagesTr/case_0.nii.gz").unlink()
    result = prepare(PLAIN, cohort=cohort, out=tmp_path / "store", workers=1)
    assert result.store is None
    assert result.ledger.exit_code() is ExitCode.NO_INPUT


@pytest.mark.parametrize(("value", "dtype"), [(254, np.uint8), (257, np.int16), (65537, np.int32)])
def test_large_label_values_do_not_wrap(
    tmp_path: Path, make_case: MakeCase, write_nifti: WriteNifti, value: int, dtype: type[np.generic]
) -> None:
    cohort = _cohort(tmp_path, make_case, 1)
    label = np.zeros((12, 14, 10), np.int32)
    label[3:6, 3:6, 3:6] = value
    write_nifti(tmp_path / "labelsTr/case_0.nii.gz", label, np.diag([1.0, 1.0, 2.0, 1.0]))
    store = prepare(PLAIN, cohort=cohort, out=tmp_path / "store", workers=1).store
    assert store is not None
    stored = store.cases[0].read("label", (0, 0, 0), (12, 14, 10))
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored[0], label)
    assert store.label_values == (value,)


def test_another_modality_is_refused(tmp_path: Path, make_case: MakeCase) -> None:
    image, _ = make_case(tmp_path, "a")
    Cohort([Case(case_id="a", subject_id="a", image=str(image), modality="MR")]).to_csv(tmp_path / "c.csv")
    result = prepare(PrepareConfig(modality="CT"), cohort=tmp_path / "c.csv", out=tmp_path / "store", workers=1)
    assert [entry.code for entry in result.ledger] == ["E_MODALITY"]


def test_a_dry_run_books_every_case_and_writes_nothing(tmp_path: Path, make_case: MakeCase) -> None:
    cohort = _cohort(tmp_path, make_case, 3)
    (tmp_path / "imagesTr/case_1.nii.gz").unlink()
    result = prepare(PLAIN, cohort=cohort, out=tmp_path / "store", dry_run=True)
    assert not (tmp_path / "store").exists()
    assert result.store is None
    assert result.ledger.counts()["rejected"] == 1
    assert result.ledger.counts()["accepted"] == 2


def test_stored_files_hold_no_path_and_no_case_id(tmp_path: Path, make_case: MakeCase) -> None:
    image, label = make_case(tmp_path, "JOHN_DOE")
    Cohort([Case(case_id="p1", subject_id="s1", image=str(image), label=str(label))]).to_csv(tmp_path / "c.csv")
    prepare(PLAIN, cohort=tmp_path / "c.csv", out=tmp_path / "store", workers=1)
    for path in (tmp_path / "store").rglob("*"):
        if path.is_file():
            assert b"JOHN_DOE" not in path.read_bytes()


def test_a_refusal_in_a_store_names_the_case_and_no_file(tmp_path: Path, make_case: MakeCase) -> None:
    cases = []
    folder = tmp_path / "DOE_JOHN 1970"
    for name in ("cut_image", "cut_label", "lost_image", "lost_voxels", "good"):
        image, label = make_case(folder, name)
        if name.startswith("cut"):
            spoiled = image if name == "cut_image" else label
            spoiled.write_bytes(spoiled.read_bytes()[:90])
        if name == "lost_voxels":
            image = image.with_name("lost_voxels.mhd")
            lines = ("ObjectType = Image", "NDims = 3", "DimSize = 2 2 2", "ElementType = MET_SHORT")
            image.write_text("\n".join((*lines, "ElementDataFile = DOE JOHN.raw\n")))
        cases.append(Case(case_id=name, subject_id=name, image=str(image), label=str(label)))
    Cohort(cases).to_csv(tmp_path / "cohort.csv")
    (folder / "imagesTr/lost_image.nii.gz").unlink()
    result = prepare(PLAIN, cohort=tmp_path / "cohort.csv", out=tmp_path / "store", workers=1)
    reasons = {entry.item: entry.reason for entry in result.ledger if entry.code}
    assert reasons["cut_image"].startswith("case cut_image: image: ")
    assert reasons["cut_label"].startswith("case cut_label: label: ")
    assert reasons["lost_voxels"].startswith("case lost_voxels: image, second file: there is no such file")
    text = (tmp_path / "store/refused.csv").read_text()
    assert text.count("rejected") == 4
    assert not [word for word in ("DOE", "1970", ".nii", ".raw", str(tmp_path)) if word in text]


def test_an_output_in_the_place_of_a_file_is_found_before_the_work(tmp_path: Path, make_case: MakeCase) -> None:
    cohort = _cohort(tmp_path, make_case, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFaultError, match="a file lies where a folder is needed") as error:
        prepare(PLAIN, cohort=cohort, out=tmp_path / "file", workers=1)
    assert error.value.exit_code is ExitCode.ENVIRONMENT


def test_a_full_disk_ends_with_one_sentence_and_leaves_no_half_entry(
    tmp_path: Path, make_case: MakeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = _cohort(tmp_path, make_case, 3)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("medssl.data.store.np.savez_compressed", full)
    with pytest.raises(EnvironmentFaultError, match="no space left") as caught:
        prepare(PLAIN, cohort=cohort, out=tmp_path / "store", workers=1)
    assert caught.value.exit_code is ExitCode.ENVIRONMENT
    assert list((tmp_path / "store/cases").iterdir()) == []
    monkeypatch.undo()
    assert prepare(PLAIN, cohort=cohort, out=tmp_path / "store", workers=1).store is not None


_RUN = """
import resource, sys
from pathlib import Path
from medssl.data.prepare import PrepareConfig, prepare
from medssl.errors import MedSSLError
if __name__ == "__main__":
    cohort, out, workers, limit = sys.argv[1:]
    if int(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    try:
        result = prepare(PrepareConfig(), cohort=Path(cohort), out=Path(out), workers=int(workers))
    except MedSSLError as error:
        sys.exit(int(error.exit_code))
    sys.exit(int(result.ledger.exit_code()))
"""


def _start(tmp_path: Path, cohort: Path, *, workers: int = 1, limit: int = 0) -> subprocess.Popen[bytes]:
    script = tmp_path / "run_prepare.py"
    script.write_text(_RUN)
    command = [sys.executable, str(script), str(cohort), str(tmp_path / "store"), str(workers), str(limit)]
    return subprocess.Popen(command, start_new_session=True)


def _check_whole(store: Path, count: int) -> None:
    opened = ArrayStore.open(store)
    assert len(opened.cases) == count
    for case in opened.cases:
        verify_entry(case.folder)
    assert len(list((store / "cases").glob("[!.]*"))) == count


def test_two_processes_may_write_one_store_at_once(tmp_path: Path, make_case: MakeCase) -> None:
    cohort = _cohort(tmp_path, make_case, 12)
    both = [_start(tmp_path, cohort) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    _check_whole(tmp_path / "store", 12)


def test_a_kill_in_the_middle_costs_nothing_but_time(tmp_path: Path, make_case: MakeCase) -> None:
    cohort = _cohort(tmp_path, make_case, 30)
    process = _start(tmp_path, cohort, workers=2)
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline and len(list((tmp_path / "store/cases").glob("[!.]*"))) < 3:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for entry in (tmp_path / "store/cases").glob("[!.]*"):
        verify_entry(entry)
    assert _start(tmp_path, cohort).wait(60) == 0
    _check_whole(tmp_path / "store", 30)


def test_a_file_size_limit_is_a_full_disk_in_a_worker_too(tmp_path: Path, make_case: MakeCase) -> None:
    cohort = _cohort(tmp_path, make_case, 3)
    assert _start(tmp_path, cohort, workers=2, limit=600).wait(60) == ExitCode.ENVIRONMENT
    assert not (tmp_path / "store/store.json").exists()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@needs_data
@pytest.mark.realdata
def test_the_three_intensity_regimes_of_the_hippocampus_come_out_alike(tmp_path: Path) -> None:
    started = time.monotonic()
    found = scan(HIPPOCAMPUS, tmp_path / "cohort.csv", config=ScanConfig(modality="MR", table="manifest.csv"))
    assert {split: len(found.cohort.select(split=split)) for split in ("train", "val", "test")} == {
        "train": 140,
        "val": 20,
        "test": 40,
    }
    config = PrepareConfig.parse({"modality": "MR", "body_mask": {"mode": "otsu"}, "crop": {"mode": "foreground"}})
    result = prepare(config, cohort=found.path, out=tmp_path / "store")
    assert time.monotonic() - started < 60
    assert result.store is not None
    assert len(result.store.cases) == 200
    regimes: dict[str, list[np.ndarray]] = {"uint8": [], "thousands": [], "millions": []}
    for case in result.store.cases:
        assert case.shape == case.source_geometry.shape  # a mask inside solid tissue must not cut it
        raw = sitk.ReadImage(HIPPOCAMPUS / f"imagesTr/{case.case_id}.nii.gz")
        largest = sitk.GetArrayViewFromImage(raw).max()
        name = "uint8" if raw.GetPixelID() == sitk.sitkUInt8 else "thousands" if largest < 1e5 else "millions"
        values = case.read("image", (0, 0, 0), case.shape)[case.read("label", (0, 0, 0), case.shape) > 0]
        regimes[name].append(np.percentile(values, (5, 25, 50, 75, 95)))
    assert min(len(cases) for cases in regimes.values()) >= 30
    means = {name: np.mean(cases, axis=0) for name, cases in regimes.items()}
    for name in ("uint8", "millions"):
        np.testing.assert_allclose(means[name], means["thousands"], atol=0.15)
    assert all(np.std(cases, axis=0).max() < 0.4 for cases in regimes.values())


@needs_data
@pytest.mark.realdata
def test_oblique_thick_slices_come_to_one_orientation_inside_the_head() -> None:
    config = PrepareConfig.parse(
        {
            "modality": "MR",
            "spacing_mm": [1.5, 1.5, 3.0],
            "body_mask": {"mode": "otsu"},
            "crop": {"mode": "foreground", "margin_mm": 4},
        }
    )
    volume, _ = read_volume(OPEN_MS / "patient20_study2_T1W.nii.gz")
    prepared = prepare_volume(volume, config)
    assert prepared.volume.geometry.orientation == "RAS"
    assert prepared.warnings == ()
    assert 0.4 < prepared.body_mask.array.mean() < 0.9
    raw = sitk.ReadImage(OPEN_MS / "patient20_study2_T1W.nii.gz", sitk.sitkFloat32)
    scaling = prepared.record["intensity"]["channels"][0]
    for index in np.argwhere(prepared.body_mask.array[0])[::5001]:
        x, y, z = prepared.volume.geometry.to_world(index)
        truth = raw.EvaluateAtPhysicalPoint((-x, -y, z), sitk.sitkLinear)
        value = prepared.volume.array[0][tuple(index)]
        if abs(value) < 4.9:
            assert value * scaling["scale"] + scaling["centre"] == pytest.approx(truth, abs=2)


@needs_data
@pytest.mark.realdata
def test_a_real_ct_keeps_its_hu(tmp_path: Path) -> None:
    case = Case(
        case_id="ct",
        subject_id="ct",
        image=str(CT / "example_ct_sm.nii.gz"),
        label=str(CT / "example_seg.nii.gz"),
        modality="CT",
    )
    Cohort([case]).to_csv(tmp_path / "cohort.csv")
    config = PrepareConfig.parse(
        {
            "modality": "CT",
            "intensity": {"mode": "hu"},
            "body_mask": {"mode": "threshold"},
            "crop": {"mode": "foreground"},
        }
    )
    result = prepare(config, cohort=tmp_path / "cohort.csv", out=tmp_path / "store")
    assert result.store is not None
    stored = result.store.cases[0]
    raw = np.moveaxis(sitk.GetArrayFromImage(sitk.ReadImage(CT / "example_ct_sm.nii.gz")), 0, 2)  # (y, x, z), LPS
    raw = raw.transpose(1, 0, 2)
    start = np.rint(stored.source_geometry.to_index(stored.geometry.origin_mm)).astype(int)
    x, y, z = (slice(a, a + n) for a, n in zip(start, stored.shape, strict=True))
    np.testing.assert_array_equal(stored.read("image", (0, 0, 0), stored.shape)[0], raw[x, y, z])
    assert len(result.store.label_values) > 20
    assert result.store.unit == "HU"
    meta = json.loads((stored.folder / "case.json").read_text())
    assert meta["fill"] == -1024


@pytest.mark.parametrize(
    ("spatial_dims", "slices", "is_taken"), [(2, 1, True), (2, 3, False), (3, 1, False), (3, 3, True)]
)
def test_one_kind_of_image_is_taken_where_one_is_asked_for(spatial_dims: int, slices: int, is_taken: bool) -> None:
    array = np.random.default_rng(0).normal(100, 20, (1, 8, 8, slices)).astype(np.float32)
    volume = Volume(array, Geometry((8, 8, slices), np.eye(4)), "arbitrary")
    config = PrepareConfig.parse({**PLAIN.to_dict(), "spatial_dims": spatial_dims})
    if is_taken:
        assert prepare_volume(volume, config).volume.array.shape == array.shape
    else:
        with pytest.raises(CaseError, match=f"of {slices} slices?; this preparation is for {spatial_dims}D"):
            prepare_volume(volume, config)


def test_an_image_of_one_slice_keeps_its_plane_and_its_thickness() -> None:
    array = np.random.default_rng(0).normal(100, 20, (1, 12, 10, 1)).astype(np.float32)
    sagittal = np.array([[0, 0, 10.0, 3], [-1, 0, 0, 40], [0, -1, 0, 20], [0, 0, 0, 1]])
    volume = Volume(array, Geometry((12, 10, 1), sagittal), "arbitrary")
    prepared = prepare_volume(volume, PLAIN)
    assert prepared.volume.array.shape == array.shape
    config = PrepareConfig.parse({**PLAIN.to_dict(), "spacing_mm": (2.0, 2.0, 1.0), "spatial_dims": 2})
    halved = prepare_volume(volume, config).volume
    assert halved.geometry.shape == (6, 5, 1)
    np.testing.assert_allclose(halved.geometry.spacing_mm, (2, 2, 10))
    np.testing.assert_allclose(halved.geometry.centre_mm, volume.geometry.centre_mm, atol=1e-9)


def test_around_a_colour_picture_lies_what_its_border_shows() -> None:
    array = np.full((3, 20, 16, 1), 230.0, np.float32)
    array[:, 5:15, 4:12] = 20.0
    config = PrepareConfig.parse({"intensity": {"mode": "none"}, "spatial_dims": 2})
    prepared = prepare_volume(Volume(array, Geometry((20, 16, 1), np.eye(4)), "arbitrary"), config)
    assert prepared.fill == 230.0


def test_images_of_another_number_of_channels_are_refused() -> None:
    grey = Volume(np.zeros((1, 4, 4, 1), np.float32), Geometry((4, 4, 1), np.eye(4)), "arbitrary")
    with pytest.raises(CaseError, match="image of 1 channels; this preparation is for 3") as caught:
        prepare_volume(grey, PrepareConfig.parse({"channels": 3}))
    assert caught.value.code == "E_CHANNELS"


def test_bright_cells_on_black_are_told_of_when_they_become_one_value() -> None:
    array = np.random.default_rng(0).normal(10, 1, (1, 40, 40, 1)).astype(np.float32)
    array[:, :8, :8] += 100 * np.random.default_rng(1).random((8, 8, 1))
    volume = Volume(array, Geometry((40, 40, 1), np.eye(4)), "arbitrary")
    warnings = prepare_volume(volume, PrepareConfig.parse({"modality": "US"})).warnings
    assert [warning.split(":")[0] for warning in warnings] == ["W_CLIPPED"]
    assert "4% of channel 0" in warnings[0]

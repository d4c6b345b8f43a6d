from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from verdicts import booked

from medssl.config import Config
from medssl.data.cohort import Case, Cohort
from medssl.data.prepare import PrepareConfig, prepare
from medssl.data.reading import Reading, read_image, read_label
from medssl.data.scan import ScanConfig, ScanResult, scan
from medssl.errors import CaseError, ConfigError, MedSSLError
from medssl.ledger import Outcome

WriteNifti = Callable[..., Path]
SHAPE = (8, 9, 10)


def _image(seed: int = 0, *, volumes: int = 0) -> np.ndarray:
    shape = (*SHAPE, volumes) if volumes else SHAPE
    return np.random.default_rng(seed).integers(0, 100, shape).astype(np.int16)


def _label() -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    label[2:5, 2:6, 3:7] = 1
    return label


def _scan(root: Path, **options: object) -> ScanResult:
    config = ScanConfig.parse({"workers": 1, "names": "keep", "thumbnails": False, **options})
    return scan(root / "d", root / f"out-{config.label_grid}", config=config)


def _codes(result: ScanResult) -> list[str]:
    return list(booked(result).values())


def test_choices_survive_a_table(tmp_path: Path) -> None:
    readings = [
        Reading(),
        Reading(volume=3, regularise=True, assume_spacing_mm=(1.0, 2.0, 3.0)),
        Reading(volume="channels", xform="qform", pages="stack", label_grid="trust", fix_signedness=True),
    ]
    cohort = Cohort(
        Case(case_id=f"c{number}", subject_id="s", image=str(tmp_path / "x"), reading=reading)
        for number, reading in enumerate(readings)
    )
    cohort.to_csv(tmp_path / "c.csv")
    cohort.to_parquet(tmp_path / "c.parquet")
    assert [case.reading for case in Cohort.from_csv(tmp_path / "c.csv")] == readings
    assert readings[0].to_text() == ""
    assert readings[1].to_text() == '{"assume_spacing_mm": [1.0, 2.0, 3.0], "regularise": true, "volume": 3}'
    assert readings[0].is_plain
    assert not readings[1].is_plain


@pytest.mark.parametrize(
    "cell", ['"{"', '"[1]"', '"{""volumes"": 3}"', '"{""volume"": ""x""}"', '"{""volume"": true}"']
)
def test_a_wrong_choice_in_a_table_is_named_with_its_line(tmp_path: Path, cell: str) -> None:
    (tmp_path / "c.csv").write_text(f"case_id,image,reading\na,a.nii,\nb,b.nii,{cell}\n")
    with pytest.raises(CaseError, match="line 3") as error:
        Cohort.from_csv(tmp_path / "c.csv")
    assert error.value.code == "E_TABLE"


def test_the_case_goes_before_the_preparation() -> None:
    own = Reading(xform="qform")
    assert own.completed(xform="sform", assume_spacing_mm=(1.0, 1.0, 1.0)) == Reading(
        xform="qform", assume_spacing_mm=(1.0, 1.0, 1.0)
    )
    assert issubclass(Reading, Config)
    with pytest.raises(ConfigError):
        Reading.parse({"volume": 1.5})


def test_volumes_of_a_nifti_become_cases_as_told(tmp_path: Path, write_nifti: WriteNifti) -> None:
    write_nifti(tmp_path / "d/time.nii.gz", _image(1, volumes=5))
    write_nifti(tmp_path / "d/one.nii.gz", _image(2))
    assert _codes(_scan(tmp_path)) == ["E_NDIM"]
    for volumes, expected in (("first", [0]), ("middle", [2]), ("all", [0, 1, 2, 3, 4])):
        result = _scan(tmp_path, volumes=volumes)
        assert [case.reading.volume for case in result.cohort] == [None, *expected]
        for case in result.cohort[1:]:
            number = case.reading.volume
            assert isinstance(number, int)
            found = read_image(Path(case.image), case.reading)[0].array[0]
            np.testing.assert_array_equal(found, _image(1, volumes=5)[..., number])
        warned = [entry.code for entry in result.ledger if entry.outcome is Outcome.WARNED]
        assert warned == ([] if volumes == "all" else ["W_VOLUMES"])
    result = _scan(tmp_path, volumes="channels")
    assert [case.reading.volume for case in result.cohort] == ["channels", "channels"]
    assert read_image(Path(result.cohort[1].image), result.cohort[1].reading)[0].array.shape == (5, *SHAPE)
    made = prepare(PrepareConfig(), cohort=result.path, out=tmp_path / "store", workers=1)
    assert made.store is not None
    assert sorted(case.channels for case in made.store.cases) == [1, 5]


def test_a_file_that_cannot_be_counted_is_refused_once(tmp_path: Path, write_nifti: WriteNifti) -> None:
    path = write_nifti(tmp_path / "d/a.nii.gz", _image())
    path.write_bytes(path.read_bytes()[:200])
    assert _codes(_scan(tmp_path, volumes="all")) == ["E_TRUNCATED"]


def test_each_volume_is_an_entry_of_its_own_in_a_store(tmp_path: Path, write_nifti: WriteNifti) -> None:
    write_nifti(tmp_path / "d/time.nii.gz", _image(1, volumes=3))
    result = _scan(tmp_path, volumes="all")
    made = prepare(PrepareConfig(), cohort=result.path, out=tmp_path / "store", workers=1)
    assert made.store is not None
    first, second, _ = made.store.cases
    assert not np.array_equal(first.read("image", (0, 0, 0), SHAPE), second.read("image", (0, 0, 0), SHAPE))
    again = prepare(PrepareConfig(), cohort=result.path, out=tmp_path / "store", workers=1)
    assert again.store is not None
    assert again.store.fingerprint == made.store.fingerprint


def test_a_label_on_another_grid_is_refused_resampled_or_trusted(tmp_path: Path, write_nifti: WriteNifti) -> None:
    moved, fine = np.eye(4), np.diag([0.5, 0.5, 0.5, 1.0])
    moved[0, 3] = 2.0
    fine[:3, 3] = -0.25
    write_nifti(tmp_path / "d/a.nii.gz", _image(1))
    write_nifti(tmp_path / "d/a_seg.nii.gz", _label(), moved)
    write_nifti(tmp_path / "d/b.nii.gz", _image(2))
    write_nifti(tmp_path / "d/b_seg.nii.gz", _label().repeat(2, 0).repeat(2, 1).repeat(2, 2), fine)
    write_nifti(tmp_path / "d/c.nii.gz", _image(3))
    write_nifti(tmp_path / "d/c_seg.nii.gz", _label())
    assert _codes(_scan(tmp_path)) == ["E_GEOMETRY", "E_SHAPE"]
    resampled = _scan(tmp_path, label_grid="resample")
    assert booked(resampled, Outcome.WARNED) == {
        "a.nii.gz": "W_LABEL_RESAMPLED",
        "b.nii.gz": "W_LABEL_RESAMPLED",
    }
    trusted = _scan(tmp_path, label_grid="trust")
    assert _codes(trusted) == ["E_SHAPE"]
    assert "W_LABEL_TRUSTED" in next(entry.reason for entry in trusted.ledger if entry.item == "a.nii.gz")
    found = {}
    for name, result in (("resample", resampled), ("trust", trusted)):
        case = result.cohort[0]
        assert case.label is not None
        image, _ = read_image(Path(case.image), case.reading)
        label, _ = read_label(Path(case.label), case.reading, image=image, item="a")
        assert label.geometry is image.geometry
        found[name] = label.array[0]
    np.testing.assert_array_equal(found["trust"], _label())
    np.testing.assert_array_equal(found["resample"], np.roll(_label(), 2, axis=0))
    case = resampled.cohort[1]
    image, _ = read_image(Path(case.image), case.reading)
    label, _ = read_label(Path(str(case.label)), case.reading, image=image, item="b")
    np.testing.assert_array_equal(label.array[0], _label())
    store = prepare(PrepareConfig(), cohort=resampled.path, out=tmp_path / "store", workers=1).store
    assert store is not None
    np.testing.assert_array_equal(
        {case.case_id: case for case in store.cases}["a"].source_label(), np.roll(_label(), 2, axis=0)
    )


def test_channels_of_a_label_pass_the_scan_and_are_refused_with_a_reason_by_the_preparation(
    tmp_path: Path, write_nifti: WriteNifti
) -> None:
    both = np.stack([_label(), np.roll(_label(), 1, axis=0), np.zeros_like(_label())], axis=3)
    write_nifti(tmp_path / "d/a.nii.gz", _image(1, volumes=2))
    write_nifti(tmp_path / "d/a_seg.nii.gz", both)
    result = _scan(tmp_path, volumes="channels", label_values=[1, 2])
    assert [case.label is not None for case in result.cohort] == [True]
    assert _codes(_scan(tmp_path, volumes="channels", label_values=[1])) == ["E_LABEL_SET"]
    result = _scan(tmp_path, volumes="channels")
    made = prepare(PrepareConfig(), cohort=result.path, out=tmp_path / "store", workers=1)
    assert [(entry.code, "has 3 channels" in entry.reason) for entry in made.ledger] == [("E_MULTI_LABEL", True)]
    write_nifti(tmp_path / "d/a_seg.nii.gz", both * 2)
    assert _codes(_scan(tmp_path, volumes="channels")) == ["E_NDIM"]


def test_a_missing_label_is_an_error_of_the_case(tmp_path: Path, write_nifti: WriteNifti) -> None:
    image, _ = read_image(write_nifti(tmp_path / "a.nii.gz", _image()), Reading())
    with pytest.raises(MedSSLError, match="no such file"):
        read_label(tmp_path / "none.nii.gz", Reading(), image=image, item="a")

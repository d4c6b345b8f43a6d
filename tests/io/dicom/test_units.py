from __future__ import annotations

from pathlib import Path

import pytest

from medssl.io.dicom.dataset import Elements
from medssl.io.dicom.model import Frame, Item
from medssl.io.dicom.units import suv_factor, unit_of


def pet(*, tracer=(), **changes):
    """A PET whose injection of 400 MBq was an hour before the scan; F-18 decays to half in 6586.2 s."""
    dose = {
        "RadionuclideTotalDose": "4.0e8",
        "RadionuclideHalfLife": "6586.2",
        "RadiopharmaceuticalStartTime": "110000.00",
        **dict(tracer),
    }
    values = {
        "Units": "BQML",
        "CorrectedImage": "NORM\\DTIM\\ATTN\\SCAT\\DECY",
        "DecayCorrection": "START",
        "PatientWeight": "80",
        "SeriesDate": "20200229",
        "SeriesTime": "120000",
        "AcquisitionDate": "20200229",
        "AcquisitionTime": "120005.5",
        "RadiopharmaceuticalInformationSequence": [Elements(Path("a"), dose)],
        **changes,
    }
    return Elements(Path("a"), {name: value for name, value in values.items() if value is not None})


def test_suv_is_activity_times_weight_over_the_decayed_dose():
    assert suv_factor(pet()) == pytest.approx(80_000 / (4e8 * 2 ** (-3600 / 6586.2)), rel=1e-12)


def test_a_date_with_the_injection_reaches_over_midnight():
    night = pet(
        tracer={"RadiopharmaceuticalStartDateTime": "20200228233000.250000+0100"},
        SeriesTime="003000",
        AcquisitionTime="003000",
    )
    assert suv_factor(night) == pytest.approx(80_000 / (4e8 * 2 ** (-3599.75 / 6586.2)), rel=1e-9)


def test_values_decayed_to_the_injection_take_the_whole_dose():
    assert suv_factor(pet(DecayCorrection="ADMIN")) == pytest.approx(2e-4)


def test_grams_per_millilitre_are_suv_already():
    assert suv_factor(pet(Units="GML")) == 1.0
    assert suv_factor(pet(Units="GML", SUVType="BW")) == 1.0
    assert "another kind" in suv_factor(pet(Units="GML", SUVType="LBM"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"Units": "CNTS"}, "not Bq/ml"),
        ({"Units": None}, "not Bq/ml"),
        ({"CorrectedImage": "DECY"}, "attenuation"),
        ({"CorrectedImage": None}, "attenuation"),
        ({"PatientWeight": None}, "weight"),
        ({"PatientWeight": "0"}, "weight"),
        ({"PatientWeight": "80000"}, "weight"),
        ({"RadiopharmaceuticalInformationSequence": []}, "dose"),
        ({"tracer": {"RadionuclideTotalDose": "400"}}, "dose"),
        ({"tracer": {"RadionuclideTotalDose": ""}}, "dose"),
        ({"tracer": {"RadionuclideHalfLife": "0"}}, "half-life"),
        ({"tracer": {"RadiopharmaceuticalStartTime": ""}}, "time of the injection"),
        ({"tracer": {"RadiopharmaceuticalStartTime": "130000"}}, "shortly before"),
        ({"tracer": {"RadionuclideHalfLife": "10"}}, "shortly before"),
        ({"DecayCorrection": "NONE"}, "decay was corrected to"),
        ({"SeriesTime": "120100"}, "after the scan"),
        ({"SeriesTime": "noon"}, "time of the scan"),
        ({"SeriesDate": "20200230"}, "time of the scan"),
        ({"AcquisitionTime": None}, "time of the scan"),
    ],
)
def test_each_condition_that_fails_is_named_without_its_value(changes, words):
    reason = suv_factor(pet(**changes))
    assert words in reason
    assert not any(character.isdigit() for character in reason)


def frame(**options):
    return Frame(Path("a"), 0, 4, 4, **{"has_rescale": True, "rescale_type": "HU", **options})


def item(modality="CT", **facts):
    return Item("s", "p", (), modality, facts, "n")


@pytest.mark.parametrize(
    ("image", "frames", "unit"),
    [
        (item(), [frame(), frame()], "HU"),
        (item(), [frame(rescale_type="")], "HU"),
        (item(image_type="ORIGINAL\\PRIMARY\\LOCALIZER"), [frame()], "arbitrary"),
        (item("MR"), [frame()], "arbitrary"),
        (item("PT"), [frame()], "arbitrary"),
    ],
)
def test_only_ct_rescaled_to_it_is_hu(image, frames, unit):
    assert unit_of(image, frames) == (unit, ())


def test_ct_in_another_unit_says_so():
    unit, [warning] = unit_of(item(), [frame(), frame(rescale_type="US")])
    assert (unit, warning.split(":")[0]) == ("arbitrary", "W_NOT_HU")


def test_ct_without_a_rescale_says_so():
    unit, [warning] = unit_of(item(), [frame(), frame(has_rescale=False)])
    assert unit == "arbitrary"
    assert warning.startswith("W_NO_RESCALE: ")

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

import dicoms
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Polygon
from phantoms import REAL_DATA, damaged
from pydicom import uid
from verdicts import warned

from medssl.errors import MedSSLError
from medssl.geometry import Geometry
from medssl.io.dicom import contours
from medssl.io.dicom.contours import read_contours

SHAPE = (60, 50, 5)  # rows, columns, slices
SPACING = (0.8, 0.5, 2.0)
REAL = REAL_DATA / "dicom_files"
GRID = dicoms.series_geometry(SHAPE, spacing=SPACING)


def in_patient(points, k, *, on=GRID):
    """LPS mm of points (column, row) on slice ``k``."""
    points = np.asarray(points, dtype=float)
    return on.to_world(np.column_stack([points, np.full(len(points), float(k))])) * (-1, -1, 1)


def contour(points_lps, kind="CLOSED_PLANAR"):
    item = pydicom.Dataset()
    item.ContourGeometricType = kind
    item.NumberOfContourPoints = len(points_lps)
    item.ContourData = [f"{value:.4f}" for value in np.ravel(points_lps)]
    return item


def structures(regions, *, kinds=()):
    """An RTSTRUCT data set: ROI number to contours."""
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = uid.RTStructureSetStorage, uid.generate_uid()
    dataset.Modality, dataset.PatientName, dataset.PatientID = "RTSTRUCT", "Zzcanary^A", "Zzcanary"
    rois, lists, observations = [], [], []
    for number, drawn in regions.items():
        roi, listed, observed = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        roi.ROINumber, roi.ROIName = number, "Zzcanary name"
        listed.ReferencedROINumber = number
        listed.ContourSequence = pydicom.Sequence(drawn)
        observed.ReferencedROINumber = number
        observed.RTROIInterpretedType = dict(kinds).get(number, "")
        rois.append(roi)
        lists.append(listed)
        observations.append(observed)
    dataset.StructureSetROISequence, dataset.ROIContourSequence = pydicom.Sequence(rois), pydicom.Sequence(lists)
    dataset.RTROIObservationsSequence = pydicom.Sequence(observations)
    return dataset


@pytest.fixture
def write(tmp_path):
    def save(regions, *, alter=None, syntax=uid.ImplicitVRLittleEndian, **options):
        dataset = structures(regions, **options)
        if alter is not None:
            alter(dataset)
        return dicoms.write(dataset, tmp_path / "rt.dcm", syntax=syntax)

    return save


def refusal(path, *, on=GRID):
    with pytest.raises(MedSSLError) as caught:
        read_contours(path, on=on)
    assert str(path) in caught.value.message
    assert "canary" not in caught.value.message.lower()
    return caught.value.code


def circle(centre, radius, *, points=400):
    angles = np.arange(points) * 2 * np.pi / points
    return np.asarray(centre) + radius * np.column_stack([np.cos(angles), np.sin(angles)])


def square(low, high):
    return [(low, low), (high, low), (high, high), (low, high)]


def test_a_disc_is_the_voxels_whose_centres_lie_inside(write):
    path = write({1: [contour(in_patient(circle((22.3, 31.6), 11.27), k)) for k in (1, 2)]}, kinds={1: "ORGAN"})
    decoded = read_contours(path, on=GRID)
    columns, rows = np.mgrid[:50, :60]
    disc = (columns - 22.3) ** 2 + (rows - 31.6) ** 2 < 11.27**2
    for k in range(5):
        assert np.array_equal(decoded.array[0, :, :, k], disc if k in {1, 2} else 0 * disc)
    assert decoded.facts == {"region_1": "ORGAN"}
    assert (decoded.unit, decoded.warnings, decoded.array.dtype) == ("label", (), np.uint8)
    assert decoded.geometry is GRID


def test_a_square_inside_a_square_cuts_a_hole(write):
    path = write({4: [contour(in_patient(square(5.5, 20.5), 0)), contour(in_patient(square(9.5, 12.5), 0))]})
    found = read_contours(path, on=GRID).array[0, :, :, 0]
    wanted = np.zeros((50, 60))
    wanted[6:21, 6:21] = 4
    wanted[10:13, 10:13] = 0
    assert np.array_equal(found, wanted)


def test_a_keyhole_cuts_the_same_hole(write):
    outer, inner = square(5.5, 20.5), square(9.5, 12.5)
    keyhole = [*outer, outer[0], *inner[::-1], inner[-1], outer[0]]
    two = read_contours(write({1: [contour(in_patient(s, 0)) for s in (outer, inner)]}), on=GRID).array
    one = read_contours(write({1: [contour(in_patient(keyhole, 0))]}), on=GRID).array
    assert np.array_equal(one, two)


def test_neighbours_that_share_a_border_through_centres_share_no_voxel(write):
    left = [(5, 5), (12, 5), (17, 25), (5, 25)]
    right = [(12, 5), (30, 5), (30, 25), (17, 25)]
    decoded = read_contours(write({1: [contour(in_patient(left, 0))], 2: [contour(in_patient(right, 0))]}), on=GRID)
    assert decoded.array.shape[0] == 1
    assert np.count_nonzero(decoded.array) == 25 * 20
    assert (decoded.array[0, 5:30, 5:25, 0] > 0).all()


def test_overlaps_become_channels(write):
    path = write({7: [contour(in_patient(square(1.5, 9.5), 0))], 2: [contour(in_patient(square(5.5, 20.5), 0))]})
    decoded = read_contours(path, on=GRID)
    assert decoded.array.sum(axis=(1, 2, 3)).tolist() == [15 * 15, 8 * 8]
    assert warned(decoded) == ["W_OVERLAP"]
    assert "2, 7" in decoded.warnings[0]


CENTRES = np.stack(np.mgrid[:30, :25], axis=-1).reshape(-1, 2)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_polygon_is_filled_by_the_even_odd_rule(data):
    number = st.integers(-40, 240)
    corners = data.draw(st.lists(st.tuples(number, number), min_size=3, max_size=9))
    polygon = np.array(corners) / 7
    crossings = np.zeros(len(CENTRES), dtype=int)
    for a, b in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if a[1] != b[1]:
            low, high = sorted((a, b), key=lambda end: end[1])
            is_spanned = (low[1] <= CENTRES[:, 1]) & (CENTRES[:, 1] < high[1])
            at = low[0] + (CENTRES[:, 1] - low[1]) * (high[0] - low[0]) / (high[1] - low[1])
            crossings += is_spanned & (np.round(at, 6) <= CENTRES[:, 0])
    assert np.array_equal(contours._filled([polygon], (30, 25)).ravel(), crossings % 2 == 1)


@pytest.mark.parametrize("seed", range(20))
def test_stars_are_filled_as_matplotlib_fills_them(seed):
    draw = np.random.default_rng(seed)
    angles = np.sort(draw.random(17)) * 2 * np.pi
    star = (14, 12) + (draw.random((17, 1)) * 9 + 3) * np.column_stack([np.cos(angles), np.sin(angles)])
    inside = Polygon(star).contains_points(CENTRES).reshape(30, 25)
    assert np.array_equal(contours._filled([star], (30, 25)), inside)


def test_sides_are_taken_in_parts(monkeypatch):
    whole = contours._filled([circle((20, 20), 15.3)], (50, 60))
    monkeypatch.setattr(contours, "_EDGES_AT_ONCE", 7)
    assert np.array_equal(contours._filled([circle((20, 20), 15.3)], (50, 60)), whole)


@pytest.mark.parametrize("orientation", [dicoms.CORONAL, dicoms.SAGITTAL, dicoms.rotated(dicoms.AXIAL, (1, 2, 3), 25)])
def test_slices_may_be_oblique(write, orientation):
    on = dicoms.series_geometry(SHAPE, spacing=SPACING, orientation=orientation)
    plain = read_contours(write({1: [contour(in_patient(circle((20, 31), 9.3), 2))]}), on=GRID).array
    turned = read_contours(write({1: [contour(in_patient(circle((20, 31), 9.3), 2, on=on))]}), on=on).array
    assert np.array_equal(turned, plain)


def test_a_tilted_gantry_leans_the_slices(write):
    on = dicoms.series_geometry(SHAPE, spacing=SPACING, tilt_deg=18.0)
    drawn = [contour(in_patient(circle((20, 31), 9.3), k, on=on)) for k in range(5)]
    array = read_contours(write({1: drawn}), on=on).array[0]
    assert (array == array[:, :, :1]).all()
    assert array.any()


@pytest.mark.parametrize("orientation", ["RAS", "PIR", "SAL"])
def test_the_image_may_lie_in_memory_in_another_order(write, orientation):
    path = write({1: [contour(in_patient(circle((20.2, 31.3), 9.3), k)) for k in (1, 2)]})
    plain, turned = read_contours(path, on=GRID), read_contours(path, on=GRID.reoriented(orientation))
    for index in np.argwhere(plain.array[0]):
        found = np.rint(turned.geometry.to_index(GRID.to_world(index))).astype(int)
        assert turned.array[0][tuple(found)] == 1
    assert turned.array.sum() == plain.array.sum()


def test_contours_beyond_the_slices_are_left_out_with_a_warning(write):
    path = write({1: [contour(in_patient(square(5.5, 20.5), k)) for k in (3, 4, 5, 6)]})
    decoded = read_contours(path, on=GRID)
    assert [int(n) for n in decoded.array.sum(axis=(0, 1, 2))] == [0, 0, 0, 225, 225]
    assert warned(decoded) == ["W_CONTOUR_OFF"]
    assert "2 contours beyond" in decoded.warnings[0]


def test_contours_that_lie_on_no_slice_are_refused(write):
    assert refusal(write({1: [contour(in_patient(square(5.5, 20.5), 5.6))]})) == "E_GEOMETRY"


def test_contours_across_slices_are_refused(write):
    points = np.array(in_patient(square(5.5, 20.5), 1))
    points[0, 2] += 2.0
    flat = [contour(in_patient(square(5.5, 20.5), k)) for k in range(5)]
    assert refusal(write({1: [contour(points), *flat]})) == "E_GEOMETRY"


def test_the_nearest_of_several_planes_counts(write):
    drawn = [contour(in_patient(square(1.5, 9.5), 2.0)), contour(in_patient(square(1.5, 12.5), 2.4))]
    drawn.append(contour(in_patient(square(1.5, 7.5), 2.49)))
    decoded = read_contours(write({1: drawn}), on=GRID)
    assert decoded.array.sum() == 64
    assert warned(decoded) == ["W_CONTOUR_OFF"]
    assert "2 contours were left out" in decoded.warnings[0]


def test_contours_halfway_between_slices_go_to_the_same_side(write):
    drawn = [contour(in_patient(square(1.5, 9.5), k + 0.5)) for k in range(4)]
    decoded = read_contours(write({1: drawn}), on=GRID)
    assert [int(n) for n in decoded.array.sum(axis=(0, 1, 2))] == [0, 64, 64, 64, 64]
    assert warned(decoded) == ["W_CONTOUR_OFF"]
    assert "1 mm" in decoded.warnings[0]


def test_slices_without_contour_are_named(write):
    decoded = read_contours(write({1: [contour(in_patient(square(1.5, 9.5), k)) for k in (0, 2, 4)]}), on=GRID)
    assert warned(decoded) == ["W_CONTOUR_GAP"]
    assert "2 slices" in decoded.warnings[0]


def test_contours_beyond_the_edge_are_cut(write):
    decoded = read_contours(write({1: [contour(in_patient(square(-10.5, 200.5), 0))]}), on=GRID)
    assert decoded.array[..., 0].all()
    assert warned(decoded) == ["W_CONTOUR_CUT"]


def test_points_lines_and_short_contours_are_left_out(write):
    drawn = [
        contour(in_patient(square(1.5, 9.5), 0)),
        contour(in_patient([(1, 1)], 0), "POINT"),
        contour(in_patient(square(1.5, 9.5), 1), "OPEN_PLANAR"),
        contour(in_patient([(1, 1), (5, 5)], 0)),
    ]
    decoded = read_contours(write({1: drawn, 2: []}), on=GRID)
    assert decoded.array.sum() == 64
    assert warned(decoded) == ["W_CONTOUR_KIND"]
    assert refusal(write({1: drawn[1:], 2: []})) == "E_NO_REGION"


def test_roi_numbers_that_are_no_labels_are_counted_from_one(write):
    path = write(
        {0: [contour(in_patient(square(1.5, 9.5), 0))], 90_000: [contour(in_patient(square(1.5, 9.5), 1))]},
        kinds={0: "GTV", 90_000: "ZZCANARY"},
    )
    decoded = read_contours(path, on=GRID)
    assert np.unique(decoded.array).tolist() == [0, 1, 2]
    assert warned(decoded) == ["W_ROI_NUMBER"]
    assert decoded.facts == {"region_1": "GTV"}


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian])
def test_contours_of_more_than_64_kilobytes_in_other_syntaxes(write, syntax):
    drawn = {1: [contour(in_patient(circle((22.3, 31.6), 11.27, points=4000), 1))]}
    plain = read_contours(write(drawn), on=GRID).array
    assert np.array_equal(read_contours(write(drawn, syntax=syntax), on=GRID).array, plain)


def _first(dataset):
    return dataset.ROIContourSequence[0].ContourSequence[0]


@pytest.mark.parametrize(
    ("alter", "code"),
    [
        (lambda ds: setattr(_first(ds), "NumberOfContourPoints", 5), "E_TAG"),
        (lambda ds: setattr(_first(ds), "ContourData", ["1", "2", "3", "4"]), "E_TAG"),
        (lambda ds: setattr(_first(ds), "ContourData", ["1e9"] * 12), "E_TAG"),
        (lambda ds: delattr(_first(ds), "ContourData"), "E_TAG"),
        (lambda ds: setattr(ds.ROIContourSequence[1], "ReferencedROINumber", 1), "E_TAG"),
        (lambda ds: delattr(ds.ROIContourSequence[1], "ReferencedROINumber"), "E_TAG"),
        (lambda ds: delattr(ds, "ROIContourSequence"), "E_NO_REGION"),
        (lambda ds: setattr(ds, "SOPClassUID", uid.CTImageStorage), "E_FORMAT"),
    ],
)
def test_faults_are_refused(write, alter, code):
    drawn = contour(in_patient(square(1.5, 9.5), 0))
    assert refusal(write({1: [drawn], 2: [contour(in_patient(square(1.5, 9.5), 1))]}, alter=alter)) == code


def test_contour_text_that_is_no_number_is_refused(write):
    path = write({1: [contour(in_patient(square(1.5, 9.5), 0))]})
    text = "\\".join(f"{v:.4f}" for v in in_patient(square(1.5, 9.5), 0).ravel())[:12].encode()
    raw = path.read_bytes()
    assert raw.count(text) == 1
    for bad in (b"nan", b"-x1", b"1,5"):
        path.write_bytes(raw.replace(text, bad + text[3:]))
        assert refusal(path) == "E_TAG"


def test_an_image_is_needed(write):
    assert refusal(write({1: [contour(in_patient(square(1.5, 9.5), 0))]}), on=None) == "E_NEEDS_IMAGE"


def test_damage_ends_in_a_refusal(write):
    path = write({1: [contour(in_patient(circle((20, 30), 9), k)) for k in range(3)]})
    for data in damaged(path.read_bytes(), seed=2):
        path.write_bytes(data)
        with contextlib.suppress(MedSSLError):
            read_contours(path, on=GRID)


def ct_grid(path: Path, slices: int, step: float) -> Geometry:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ct = pydicom.dcmread(path, stop_before_pixels=True)
    rows, columns = map(float, ct.PixelSpacing)
    x, y, z = map(float, ct.ImagePositionPatient)
    affine = np.array([[-columns, 0, 0, -x], [0, -rows, 0, -y], [0, 0, step, z], [0, 0, 0, 1]])
    return Geometry((int(ct.Columns), int(ct.Rows), slices), affine)


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.exists(), reason="no real data here")
@pytest.mark.parametrize("name", ["rt_struct_phantom/rt.dcm", "rt_struct_phantom/invalid_reference_rt.dcm"])
def test_real_contours_agree_with_matplotlib(name):
    grid = ct_grid(REAL / "rt_struct_phantom" / "ct_1.dcm", 2, 5.0)
    decoded = read_contours(REAL / name, on=grid)
    centres = np.stack(np.mgrid[:512, :512], axis=-1).reshape(-1, 2)
    wanted = np.zeros(grid.shape, dtype=int)
    near = np.zeros(grid.shape, dtype=bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(REAL / name)
    for roi in dataset.ROIContourSequence:
        inside = np.zeros(grid.shape, dtype=bool)
        for item in roi.ContourSequence:
            index = grid.to_index(np.reshape(item.ContourData, (-1, 3)).astype(float) * (-1, -1, 1))
            k = round(index[0, 2])
            if k > 1:
                continue
            polygon = Polygon(np.vstack([index[:, :2], index[:1, :2]]), closed=True)
            inside[:, :, k] ^= polygon.contains_points(centres).reshape(512, 512)
            for a, b in zip(index[:, :2], np.roll(index[:, :2], -1, axis=0), strict=True):
                for share in np.linspace(0, 1, 2 + int(4 * np.abs(b - a).max())):
                    i, j = np.rint(a + share * (b - a)).astype(int)
                    near[i - 1 : i + 2, j - 1 : j + 2, k] = True
        wanted[inside] = int(roi.ReferencedROINumber)
    assert wanted.any()
    differs = decoded.array[0] != wanted
    assert not (differs & ~near).any()
    assert differs.sum() < 0.02 * (wanted > 0).sum()


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.exists(), reason="no real data here")
def test_areas_of_a_real_plan_are_those_of_its_polygons():
    grid = ct_grid(REAL / "rt_struct_breast" / "ct.0.dcm", 1, 3.0)
    decoded = read_contours(REAL / "rt_struct_breast" / "rtss.dcm", on=grid)
    assert decoded.array.shape[0] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(REAL / "rt_struct_breast" / "rtss.dcm")
    for roi in dataset.ROIContourSequence:
        polygons = [np.reshape(c.ContourData, (-1, 3)).astype(float) for c in roi.get("ContourSequence", [])]
        here = [p for p in polygons if abs(p[0, 2] - 168.5593) < 1.5]
        area = sum(abs(p[:, 0] @ (np.roll(p[:, 1], -1) - np.roll(p[:, 1], 1))) / 2 for p in here)
        found = np.count_nonzero(decoded.array == int(roi.ReferencedROINumber)) * 1.074219**2
        assert area == pytest.approx(found, rel=0.02)

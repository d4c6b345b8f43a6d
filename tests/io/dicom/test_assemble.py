"""Headers written by hand become images, or refusals that name the fault; geometry is compared with closed forms."""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import dicoms
import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phantoms import REAL_DATA

from medssl.errors import GeometryError
from medssl.geometry import Geometry
from medssl.io.dicom.assemble import assemble
from medssl.io.dicom.header import read_header
from medssl.io.dicom.model import Assembly, Frame, Header, Kind, Pixels
from medssl.io.dicom.proof import axes, prove, single
from medssl.io.dicom.repeats import equal_pixels

SPACING = (0.8, 0.5)
STEP = 2.0


def frame(k: float = 0.0, *, name: str | None = None, number: int | None = None, **changes: object) -> Frame:
    """Axial frame of 8 x 10 pixels at height ``k`` steps."""
    base = Frame(
        path=Path(name or f"s{k:g}"),
        index=0,
        rows=8,
        columns=10,
        position_mm=(-12.0, 7.0, 30.0 + STEP * k),
        orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
        spacing_mm=SPACING,
        thickness_mm=STEP,
        number=number,
        instance=f"i{name or k}",
        series="aa",
        patient="pp",
        frame_of_reference="ff",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def header(*frames: Frame, modality: str = "MR", kind: Kind = "image", **changes: object) -> Header:
    first = frames[0]
    pixels = Pixels("1.2.840.10008.1.2.1", first.rows, first.columns, len(frames), length=160 * len(frames))
    base = Header(first.path, 1000, kind, modality, first.series, first.patient, pixels, frames)
    return replace(base, **changes)  # type: ignore[arg-type]


def headers(frames: Sequence[Frame], *, modality: str = "MR", **changes: object) -> list[Header]:
    return [header(frame, modality=modality, **changes) for frame in frames]


def always(_first: Header, _second: Header) -> bool:
    return True


def never(_first: Header, _second: Header) -> bool:
    return False


def codes(found: Assembly) -> list[str]:
    return [error.code for _, error in found.refused]


def whats(found: Assembly) -> list[list[str]]:
    return [[stack.what for stack in item.stacks] for item in found.items]


def echo(value: float, k: float, **traits: float | str) -> Frame:
    return frame(k, name=f"{value}-{k}-{sorted(traits.items())}", traits={"echo": value, **traits})


def test_slices_are_ordered_by_place_and_axes_are_column_row_slice() -> None:
    found = assemble(headers([frame(k) for k in (3, 0, 2, 1)]))
    (stack,) = found.items[0].stacks
    assert [f.path.name for f in stack.frames] == ["s0", "s1", "s2", "s3"]
    expected = np.array([[-0.5, 0, 0, 12], [0, -0.8, 0, -7], [0, 0, 2, 30], [0, 0, 0, 1]])
    assert stack.geometry.shape == (10, 8, 4)
    assert np.abs(stack.geometry.affine - expected).max() < 1e-12
    assert found.refused == found.duplicates == found.notes == ()


def test_result_does_not_depend_on_the_order_of_the_headers() -> None:
    made = headers([echo(e, k) for e in (1, 2) for k in range(5)])
    shuffled = made.copy()
    random.Random(3).shuffle(shuffled)
    one, other = assemble(made), assemble(shuffled)
    assert [item.name for item in one.items] == [item.name for item in other.items]
    assert whats(one) == whats(other) == [["echo 1", "echo 2"]]


def test_missing_slice_names_its_place() -> None:
    found = assemble(headers([frame(k) for k in (0, 1, 3, 4)]))
    assert codes(found) == ["E_MISSING_SLICE"]
    assert "1 of 5 slices missing, at 34.00 mm" in found.refused[0][1].message


def test_regularise_puts_a_gap_on_a_regular_grid() -> None:
    (item,) = assemble(headers([frame(k) for k in (0, 1, 3, 4)]), regularise=True).items
    (stack,) = item.stacks
    assert stack.geometry.shape == (10, 8, 5)
    assert stack.gaps == (2,)
    assert stack.places == pytest.approx((0, 1, 3, 4))
    assert stack.warnings[0].startswith("W_REGULARISED")


def test_regularise_keeps_true_places_of_uneven_slices() -> None:
    heights = (0, 1, 2, 3.25, 4.5)
    (item,) = assemble(headers([frame(k) for k in heights]), regularise=True).items
    (stack,) = item.stacks
    assert stack.places is not None
    world = stack.geometry.to_world([(0, 0, place) for place in stack.places])[:, 2]
    assert world == pytest.approx([30 + STEP * k for k in heights])
    assert stack.geometry.spacing_mm[2] == pytest.approx(4.5 * STEP / (stack.geometry.shape[2] - 1))


def test_regularise_does_not_stretch_to_any_length() -> None:
    found = assemble(headers([frame(k) for k in (0, 1, 100, 200)]), regularise=True)
    assert codes(found) == ["E_NONUNIFORM"]


def test_regularise_reads_a_short_volume_as_it_is() -> None:
    frames = [echo(1, k) for k in range(6)] + [echo(2, k) for k in (0, 1, 3, 4, 5)]
    assert codes(assemble(headers(frames))) == ["E_MISSING_SLICE"]
    assert whats(assemble(headers(frames), regularise=True)) == [["echo 1", "echo 2"]]


@pytest.mark.parametrize(
    ("traits", "words"),
    [
        ({"b_value": (0.0, 1000.0)}, ["b-value 0", "b-value 1000"]),
        ({"time_point": (2.0, 1.0)}, ["time point 1", "time point 2"]),
        ({"trigger_ms": (33.5, 0.0)}, ["trigger 0 ms", "trigger 33.5 ms"]),
        ({"image_type": ("ORIGINAL\\M", "ORIGINAL\\P")}, ["type ORIGINAL\\M", "type ORIGINAL\\P"]),
        ({"stack": ("SECRET NAME", "OTHER NAME")}, ["stack 1", "stack 2"]),
        ({"b_value": (None, 500.0)}, ["no b value", "b-value 500"]),
        ({"acquisition": (1, 2), "b_value": (0.0, 800.0)}, ["b-value 0", "b-value 800"]),
    ],
)
def test_volumes_are_told_apart_by_a_trait(traits: dict[str, tuple[str | float | None, ...]], words: list[str]) -> None:
    frames = [
        frame(k, name=f"{v}-{k}", traits={n: pair[v] for n, pair in traits.items() if pair[v] is not None})
        for v in (0, 1)
        for k in range(4)
    ]
    assert whats(assemble(headers(frames))) == [words]


def test_traits_that_vary_within_a_volume_do_not_tell_volumes_apart() -> None:
    frames = [echo(e, k, trigger_ms=10.0 * k + e, acquisition=k) for e in (1, 2) for k in range(4)]
    assert whats(assemble(headers(frames))) == [["echo 1", "echo 2"]]


def test_two_traits_are_used_where_one_is_not_enough() -> None:
    frames = [echo(e, k, time_point=t) for e in (1, 2) for t in (1, 2) for k in range(4)]
    assert whats(assemble(headers(frames))) == [
        [f"echo {e}, time point {t}" for e, t in itertools.product((1, 2), (1, 2))]
    ]


def test_rescale_tells_volumes_apart_when_nothing_else_does() -> None:
    frames = [frame(k, name=f"{v}-{k}", slope=1.0 + v) for v in (0, 1) for k in range(4)]
    assert whats(assemble(headers(frames))) == [["scale 1", "scale 2"]]


def test_files_of_several_frames_are_volumes_of_their_own() -> None:
    made = [header(*(frame(k, name=f"f{v}", index=k, tile=k, instance=f"f{v}") for k in range(4))) for v in range(3)]
    assert whats(assemble(made)) == [["volume 1", "volume 2", "volume 3"]]


def test_diffusion_directions_follow_the_instance_numbers() -> None:
    directions = ("1 0 0", "0 1 0", "0 0 1")
    frames = [
        frame(k, name=f"{v}-{k}", number=10 * v + k, traits={"b_value": 1000.0, "direction": direction})
        for v, direction in enumerate(directions)
        for k in range(3)
    ]
    (item,) = assemble(headers(frames)).items
    assert [stack.frames[0].traits["direction"] for stack in item.stacks] == list(directions)
    assert [stack.what for stack in item.stacks] == ["direction 1", "direction 2", "direction 3"]


def test_instance_numbers_in_disorder_tell_nothing_apart() -> None:
    numbers = random.Random(1).sample(range(100), 12)
    frames = [frame(k, name=f"{v}-{k}", number=numbers[6 * v + k]) for v in (0, 1) for k in range(6)]
    found = assemble(headers(frames), same_pixels=never)
    assert codes(found) == ["E_AMBIGUOUS_STACK"]
    assert "no trait varies" in found.refused[0][1].message


def test_ambiguous_stack_lists_the_traits() -> None:
    frames = [frame(k, name=f"{v}-{k}", traits={"phase": (v * k) % 3}) for v in (0, 1) for k in range(6)]
    found = assemble(headers(frames), same_pixels=never)
    assert codes(found) == ["E_AMBIGUOUS_STACK"]
    assert "phase varies" in found.refused[0][1].message


def test_boxes_in_the_same_planes_are_images_of_their_own() -> None:
    frames = [frame(k, name=f"{x}-{k}", position_mm=(x, 7.0, 30.0 + STEP * k)) for x in (0.0, 60.0) for k in range(4)]
    found = assemble(headers(frames))
    assert whats(found) == [["box 1"], ["box 2"]]
    assert all("W_SPLIT" in item.stacks[0].warnings[-1] for item in found.items)


def test_too_many_boxes_are_refused() -> None:
    frames = [frame(0, name=f"{x}-{k}", position_mm=(5.0 * x, 7.0, 30.0)) for x in range(20) for k in (0, 1)]
    assert codes(assemble(headers(frames), same_pixels=never)) == ["E_AMBIGUOUS_STACK"]


def test_acquisitions_of_other_step_are_two_images() -> None:
    lower = [frame(k, traits={"acquisition": 1}) for k in range(5)]
    upper = [frame(10 + 1.5 * k, traits={"acquisition": 2}) for k in range(5)]
    found = assemble(headers([*lower, *upper]))
    assert [item.stacks[0].geometry.spacing_mm[2] for item in found.items] == pytest.approx([2.0, 3.0])


def test_overlapping_acquisitions_are_two_images() -> None:
    first = [frame(k, name=f"a{k}", traits={"acquisition": 1}) for k in range(6)]
    second = [frame(k, name=f"b{k}", traits={"acquisition": 2}) for k in range(3, 8)]
    found = assemble(headers([*first, *second]))
    assert [item.stacks[0].geometry.shape[2] for item in found.items] == [6, 5]


def test_contrasts_that_do_not_interleave_are_one_volume_with_a_warning() -> None:
    frames = [frame(k, traits={"image_type": "ORIGINAL" if k < 3 else "DERIVED"}) for k in range(6)]
    (item,) = assemble(headers(frames)).items
    assert item.stacks[0].warnings == ("W_MIXED_TRAITS: slices of this volume differ in image_type.",)


def test_copies_of_an_instance_are_reported_and_differing_ones_refused() -> None:
    made = headers([frame(k) for k in range(4)])
    copy = replace(made[1], path=Path("z"), frames=(replace(made[1].frames[0], path=Path("z")),))
    found = assemble([*made, copy], same_pixels=always)
    assert found.duplicates == ((Path("z"), Path("s1")),)
    assert len(found.items[0].paths) == 4
    assert codes(assemble([*made, copy], same_pixels=never)) == ["E_DUP_SOP"]
    moved = replace(copy, frames=(replace(copy.frames[0], slope=2.0),))
    assert codes(assemble([*made, moved], same_pixels=always)) == ["E_DUP_SOP"]


def test_pixels_are_compared_over_codings(tmp_path: Path) -> None:
    plain = dicoms.write_series(tmp_path / "a", modality="MR")
    packed = dicoms.write_series(tmp_path / "b", modality="MR", syntax="1.2.840.10008.1.2.5")
    one, other = read_header(plain[0]), read_header(packed[0])
    assert equal_pixels(one, other)
    assert equal_pixels(one, one)
    assert not equal_pixels(one, read_header(packed[1]))
    assert not equal_pixels(one, read_header(plain[1]))
    assert not equal_pixels(one, replace(one, path=tmp_path / "absent"))
    assert not equal_pixels(one, replace(one, pixels=None))
    found = assemble([read_header(path) for path in (*plain, *packed)])
    assert len(found.duplicates) == len(plain)
    assert len(found.items) == 1


def test_labels_and_other_kinds_stand_apart() -> None:
    seg = header(frame(9), kind="seg")
    found = assemble([*headers([frame(0), frame(1)]), seg])
    assert found.labels == (seg,)
    assert len(found.items) == 1


def test_modalities_of_one_series_are_split() -> None:
    ct = headers([frame(k) for k in range(3)], modality="CT")
    pet = headers([frame(k, name=f"p{k}") for k in range(3)], modality="PT")
    assert [item.modality for item in assemble([*ct, *pet]).items] == ["PT", "CT"]


def test_facts_are_those_that_all_files_share() -> None:
    made = [header(frame(k), facts={"kvp": 120.0, "echo_time_ms": float(k)}) for k in range(3)]
    assert assemble(made).items[0].facts == {"kvp": 120.0}


def test_warnings_of_files_reach_the_stack_once_per_code() -> None:
    made = [header(frame(k), warnings=(f"W_UID: file {k}.", "W_NO_META: none.")) for k in range(3)]
    assert assemble(made).items[0].stacks[0].warnings == ("W_UID: file 0.", "W_NO_META: none.")


def test_broken_neighbours_are_said() -> None:
    made = headers([frame(k) for k in range(3)])
    (item,) = assemble(made, broken=[Path("unreadable")]).items
    assert item.stacks[0].warnings[-1].startswith("W_BROKEN_NEIGHBOUR: 1 files")
    (item,) = assemble(made, broken=[Path("elsewhere/unreadable")]).items
    assert item.stacks[0].warnings == ()


def test_names_are_hex_and_unique_even_without_identifiers() -> None:
    bare = {"instance": "", "series": "", "position_mm": None, "orientation": None}
    found = assemble(headers([frame(k, **bare) for k in range(3)], modality="CR"))
    names = [item.name for item in found.items]
    assert len(set(names)) == 3
    assert all(set(name) <= set("0123456789abcdef") for name in names)


def test_image_without_place_lies_at_the_corner_of_its_own_plane() -> None:
    found = assemble([header(frame(0, position_mm=None, orientation=None), modality="DX")])
    (stack,) = found.items[0].stacks
    assert np.array_equal(stack.geometry.affine, np.diag([-0.5, -0.8, 1, 1]))
    assert stack.warnings == ()


def test_image_without_spacing_is_one_mm_and_says_so() -> None:
    found = assemble([header(frame(0, position_mm=None, orientation=None, spacing_mm=None), modality="US")])
    (stack,) = found.items[0].stacks
    assert stack.geometry.spacing_mm == (1, 1, 1)
    assert stack.warnings[0].startswith("W_NO_SPACING")


def test_clip_gives_a_stack_a_frame() -> None:
    frames = [frame(0, name="clip", position_mm=None, orientation=None, index=k) for k in range(3)]
    assert whats(assemble([header(*frames, modality="XA")])) == [["frame 1", "frame 2", "frame 3"]]
    assert codes(assemble([header(*frames, modality="CT")])) == ["E_NO_GEOMETRY"]


def test_image_of_impossible_spacing_is_refused() -> None:
    flat = frame(0, position_mm=None, orientation=None, spacing_mm=(0.0, 1.0))
    assert codes(assemble([header(flat, modality="CR")])) == ["E_SPACING"]


def test_single_slice_has_its_thickness() -> None:
    found = assemble([header(frame(0, thickness_mm=4.0))])
    (stack,) = found.items[0].stacks
    assert stack.geometry.spacing_mm == pytest.approx((0.5, 0.8, 4.0))
    assert stack.warnings[0].startswith("W_SINGLE_SLICE")
    assert single(frame(0, thickness_mm=None), where="x").geometry.spacing_mm[2] == 1.0


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda f: replace(f, position_mm=(float("nan"), 0.0, 0.0)), "E_NO_GEOMETRY"),
        (lambda f: replace(f, spacing_mm=None), "E_NO_GEOMETRY"),
        (lambda f: replace(f, spacing_mm=(float("inf"), 1.0)), "E_SPACING"),
        (lambda f: replace(f, orientation=(1, 0, 0, 0, 1.02, 0)), "E_IOP"),
        (lambda f: replace(f, orientation=(1, 0, 0, 0.002, 1, 0)), "E_IOP"),
        (lambda f: replace(f, orientation=(float("nan"), 0, 0, 0, 1, 0)), "E_IOP"),
    ],
)
def test_impossible_headers_are_refused(change: Callable[[Frame], Frame], code: str) -> None:
    assert set(codes(assemble(headers([change(frame(k)) for k in range(4)])))) == {code}


def test_directions_are_normalised_within_a_percent() -> None:
    row, column, normal = axes(frame(0, orientation=(1.005, 0, 0, 0, 0.995, 0)), where="x")
    assert np.allclose([row, column, normal], np.eye(3))


def test_tag_and_positions_that_disagree_are_said() -> None:
    agreeing = prove([frame(k, thickness_mm=1.5, between_mm=-2.0) for k in range(3)], where="x")
    assert agreeing.warnings == ()
    claimed = prove([frame(k, between_mm=1.0) for k in range(3)], where="x")
    assert claimed.warnings == (
        "W_SPACING_TAG: SpacingBetweenSlices says 1 mm, the positions 2 mm; the positions are used.",
    )


@given(
    axis=st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda v: np.linalg.norm(v) > 0.1),
    angle=st.floats(0, 360),
    step=st.floats(0.3, 12),
    spacing=st.tuples(st.floats(0.1, 4), st.floats(0.1, 4)),
    tilt=st.sampled_from([0.0, 0.0, -25.0, 12.0]),
    count=st.integers(2, 12),
    seed=st.integers(0, 999),
)
@settings(max_examples=150, deadline=None)
def test_any_sound_series_has_its_exact_grid(
    axis: dicoms.Triple, angle: float, step: float, spacing: tuple[float, float], tilt: float, count: int, seed: int
) -> None:
    orientation = dicoms.rotated(dicoms.AXIAL, axis, angle)
    shape = (8, 10, count)
    truth = dicoms.series_geometry(shape, spacing=(*spacing, step), orientation=orientation, tilt_deg=tilt)
    move = dicoms.slice_step((*spacing, step), orientation, tilt)
    frames = [
        frame(
            k,
            orientation=orientation,
            spacing_mm=spacing,
            thickness_mm=None,
            position_mm=tuple(np.array([-12.0, 7.0, 30.0]) + k * move),
        )
        for k in range(count)
    ]
    random.Random(seed).shuffle(frames)
    (item,) = assemble(headers(frames)).items
    assert item.stacks[0].geometry.max_corner_distance_mm(truth) < 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_random_sets_give_exact_volumes_or_named_errors(seed: int) -> None:
    """5,000 random sets of places and traits: each frame of a volume lies where its grid says, to the tolerance."""
    rng = random.Random(seed)
    volumes = refusals = 0
    for _ in range(1000):
        frames = _random_frames(rng)
        found = assemble(headers(frames), same_pixels=never)
        taken = [f for item in found.items for stack in item.stacks for f in stack.frames]
        assert len(taken) == len(set(map(id, taken)))
        for item in found.items:
            for stack in item.stacks:
                volumes += 1
                _assert_exact(stack.geometry, stack.frames)
        for _, error in found.refused:
            refusals += 1
            assert isinstance(error, GeometryError)
        placed = (
            {f.path for f in taken} | {p for paths, _ in found.refused for p in paths} | {p for p, _ in found.notes}
        )
        assert placed == {f.path for f in frames}
    assert volumes > 300
    assert refusals > 300


def _random_frames(rng: random.Random) -> list[Frame]:
    count = rng.randint(1, 8)
    heights = [float(k) for k in range(count)]
    kind = rng.randrange(6)
    if kind == 1:
        heights = [k + rng.uniform(-0.3, 0.3) for k in heights]
    elif kind == 2 and count > 3:
        heights.pop(rng.randrange(1, count - 1))
    elif kind == 3:
        heights += rng.sample(heights, rng.randint(1, count))
    elif kind == 4:
        heights = [rng.choice([0.0, 1.0, 2.0, 2.5, 7.0]) for _ in heights]
    elif kind == 5:
        heights = [height + shift for height in heights for shift in (0.0, rng.choice([0.0, 0.5, 0.3]))]
    frames = []
    for index, height in enumerate(heights):
        traits = {name: float(rng.randint(1, 2)) for name in ("echo", "acquisition") if rng.random() < 0.3}
        changes: dict[str, object] = {}
        if rng.random() < 0.03:
            changes["spacing_mm"] = (0.9, 0.5)
        if rng.random() < 0.03:
            changes["orientation"] = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
        if rng.random() < 0.03:
            changes["rows"] = 6
        number = rng.choice([index, None, 1])
        frames.append(frame(height, name=f"f{index:03d}", number=number, traits=traits, **changes))
    return frames


def _assert_exact(geometry: Geometry, frames: Sequence[Frame]) -> None:
    tolerance = min(0.01 * geometry.spacing_mm[2], 0.05) + 1e-9
    assert geometry.shape == (frames[0].columns, frames[0].rows, len(frames))
    for k, one in enumerate(frames):
        assert one.position_mm is not None
        found = geometry.to_world((0, 0, k)) * (-1, -1, 1)
        assert np.abs(found - one.position_mm).max() <= tolerance
        assert one.spacing_mm == frames[0].spacing_mm
        assert one.traits.get("echo") == frames[0].traits.get("echo")


def test_four_thousand_slices_take_under_a_second() -> None:
    made = headers([frame(k, instance=f"n{k}") for k in range(4000)])
    start = time.perf_counter()
    (item,) = assemble(made).items
    assert time.perf_counter() - start < 1
    assert item.stacks[0].geometry.shape[2] == 4000


SERIES = [
    ("ge_anatomical/ge/anatomical/001", "ge_anatomical/ge_anatomical_001_ground_truth.nii.gz"),
    ("ge_anatomical/ge/anatomical/001_implicit", "ge_anatomical/ge_anatomical_001_implicit_ground_truth.nii.gz"),
    ("ge_dti/ge/dti/001", "ge_dti/ge_dti_001_ground_truth.nii.gz"),
    ("ge_dti_002/ge/dti/002", "ge_dti_002/ge_dti_002_ground_truth.nii.gz"),
    ("ge_fmri/ge/fmri/001", "ge_fmri/ge_fmri_001_ground_truth.nii.gz"),
    (
        "generic_non_isotropic/generic/anatomical/002_non_isotropic",
        "generic_non_isotropic/generic_anatomical_002_non_isotropic_ground_truth.nii.gz",
    ),
    ("generic_rgb/generic/rgb/001", "generic_rgb/generic_rgb_001_ground_truth.nii.gz"),
    ("hyperfine/hyperfine/anatomical/001", "hyperfine/hyperfine_anatomical_001_ground_truth.nii.gz"),
    ("philips_enh_b0/dicom", "philips_enh_b0/ref_e1.nii"),
    (
        "philips_enhanced_dti/philips_enhanced/dti/001",
        "philips_enhanced_dti/philips_enhanced_dti_001_ground_truth.nii.gz",
    ),
    (
        "philips_enhanced_fmri/philips_enhanced/fmri/001",
        "philips_enhanced_fmri/philips_enhanced_fmri_001_ground_truth.nii.gz",
    ),
    ("siemens_generic/siemens/anatomical/001", "siemens_generic/siemens_anatomical_001_ground_truth.nii.gz"),
    ("siemens_generic/generic/compressed_rle/001", "siemens_generic/generic_compressed_rle_001_ground_truth.nii.gz"),
    ("siemens_generic/failing/slicecount/001", "siemens_generic/failing_slicecount_001_ground_truth.nii.gz"),
    (
        "siemens_multiframe/siemens_multiframe/anatomical/001",
        "siemens_multiframe/siemens_multiframe_anatomical_001_ground_truth.nii.gz",
    ),
    ("nih_siemens_epi/ap", "nih_siemens_epi/ref_ap.nii"),
    ("nih_siemens_epi/pa", "nih_siemens_epi/ref_pa.nii"),
]


def _real(folder: str) -> Assembly:
    root = REAL_DATA / "dicom_series" / folder
    if not root.exists():
        pytest.skip("no shared folder of real images here")
    return assemble([read_header(path) for path in sorted(root.rglob("*")) if path.is_file()])


@pytest.mark.realdata
@pytest.mark.parametrize(("folder", "reference"), SERIES)
def test_real_series_lie_where_their_reference_conversion_does(folder: str, reference: str) -> None:
    found = _real(folder)
    image = nib.load(REAL_DATA / "dicom_series" / reference)
    truth = Geometry(image.shape[:3], image.affine).reoriented()
    (item,) = found.items
    assert found.refused == ()
    for stack in item.stacks:
        assert stack.geometry.reoriented().max_corner_distance_mm(truth) < 1e-3
    if not folder.startswith("philips_enh_b0"):
        assert len(item.stacks) == (image.shape[3] if image.ndim == 4 else 1)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("folder", "code"),
    [
        ("slice_increment_ge", "E_MISSING_SLICE"),
        ("slice_missing_siemens/failing", "E_MISSING_SLICE"),
        ("prostatex_0000/calc_bval_missing_slice", "E_MISSING_SLICE"),
        ("bits12/dicom", "E_DUP_SOP"),
    ],
)
def test_real_faulty_series_are_refused(folder: str, code: str) -> None:
    found = _real(folder)
    assert (found.items, codes(found)) == ((), [code])


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("folder", "shape", "spacing"),
    [
        ("datalad_t1", (274, 384, 20), (0.7, 0.6667, 0.6667)),
        ("hippocrop_study1", (35, 51, 32), (1, 1, 1)),
        ("hippocrop_study3", (34, 50, 40), (1, 1, 1)),
        ("prostatex_0000/t2_tra", (384, 384, 19), (0.5, 0.5, 3)),
        ("prostatex_0000/adc", (84, 128, 19), (2, 2, 3)),
        ("prostatex_0001/adc", (84, 128, 19), (2, 2, 3)),
        ("torchio_ct/dicom", (88, 128, 17), (2, 2, 2)),
    ],
)
def test_real_series_without_reference_are_one_volume(
    folder: str, shape: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    (item,) = _real(folder).items
    assert item.stacks[0].geometry.shape == shape
    assert item.stacks[0].geometry.spacing_mm == pytest.approx(spacing, abs=1e-3)


@pytest.mark.realdata
def test_real_series_of_two_orientations_is_split_and_said() -> None:
    found = _real("slice_orientation")
    assert [len(item.paths) for item in found.items] == [2, 2]
    assert all("W_SPLIT" in item.stacks[0].warnings[-1] for item in found.items)


@pytest.mark.realdata
def test_mosaic_lies_where_the_protocol_of_its_scanner_puts_each_slice() -> None:
    """The reference conversion beside this family puts the last tile at the first one's place, 151 mm too high."""
    (item,) = _real("siemens_fmri_mosaic/siemens").items
    assert [stack.geometry.shape for stack in item.stacks] == [(80, 80, 50)] * 2
    protocol = pydicom.dcmread(item.paths[0], stop_before_pixels=True)[0x00291020].value.decode("latin-1")
    for stack in item.stacks:
        for k in (0, 1, 49):
            text = [
                re.search(rf"asSlice\[{k}\]\.sPosition\.d{axis}\s*= (\S+)", protocol) for axis in ("Sag", "Cor", "Tra")
            ]
            centre = [float(found[1]) for found in text if found] * np.array([-1, -1, 1])
            assert np.abs(stack.geometry.to_world((40, 40, k)) - centre).max() < 1e-3

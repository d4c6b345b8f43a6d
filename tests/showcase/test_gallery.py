"""The gallery from a store to a page, on phantoms, on pictures and on real images."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from phantoms import REAL_DATA
from PIL import Image

from medssl.cli import app, run_guarded
from medssl.config import load_yaml
from medssl.data.loader import fixed_batches
from medssl.data.prepare import PrepareConfig, prepare
from medssl.data.scan import ScanConfig, scan
from medssl.data.store import ArrayStore
from medssl.errors import ConfigError, MedSSLError, NoInputError
from medssl.report.planes import COLOURS
from medssl.showcase.gallery import GalleryConfig, gallery
from medssl.views import RandomCrop

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = GalleryConfig.parse({"cases": 2, "views": 2, "crop": [16, 16, 12]})
FLAT = GalleryConfig.parse({"cases": 2, "views": 2})


def pictures(path: Path) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', path.read_text())
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in found]


def text_of(path: Path) -> str:
    return re.sub(r"<style>.*?</style>|<[^>]+>", " ", path.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def brains(phantoms: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of which it is known what its images show."""
    out = tmp_path_factory.mktemp("gallery") / "store"
    config = {**tiny.PREPARE, "region": "brain", "spacing_mm": [2.0, 2.0, 3.0]}
    prepare(PrepareConfig.parse(config), cohort=phantoms.cohort, out=out, workers=1)
    return out


def prepared_pictures(folder: Path, *, colour: bool, intensity: str, **options: Any) -> Path:
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(1, 255, (40, 48, 3) if colour else (40, 48), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"p{number}.png")
    config = ScanConfig.parse({"modality": "other", "workers": 1})
    cohort = scan(folder / "pictures", folder / "cohort.csv", config=config).path
    plan = {"modality": "other", "spatial_dims": 2, "intensity": {"mode": intensity}, **options}
    prepare(PrepareConfig.parse(plan), cohort=cohort, out=folder / "store", workers=1)
    return folder / "store"


def test_a_preset_becomes_a_page_with_every_augment_and_every_reason(brains: Path, tmp_path: Path) -> None:
    result = gallery("mr_light", store=brains, out=tmp_path / "page.html", config=SMALL)
    assert result.path == tmp_path / "page.html"
    assert result.warnings == ()
    text = text_of(result.path)
    for name in (
        "affine",
        "noise",
        "blur",
        "brightness",
        "contrast",
        "gamma",
        "shear 0",
        "Half of the views keep",
        "turned ",
    ):
        assert name in text
    assert str(brains) not in text
    assert "phantom" in text, "cases are called by their ids"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert "thick_ratio" not in text
    assert "fill none" not in text
    augments, cases, crops = 6, 2, 6 + 8 + 2 + 6
    assert len(pictures(result.path)) == 3 * cases + 5 * augments * cases + 4 + crops


def test_equal_seeds_show_equal_pictures_and_no_picture_of_a_view_is_blank(brains: Path, tmp_path: Path) -> None:
    first, second = (
        pictures(gallery("mr_brain", store=brains, out=tmp_path / name, config=SMALL).path)
        for name in ("a.html", "b.html")
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(shown.std() > 5 for shown in first[:6])


def test_nothing_to_augment_still_shows_crops_and_samplers(brains: Path, tmp_path: Path) -> None:
    text = text_of(gallery("none", store=brains, out=tmp_path / "page.html", config=SMALL).path)
    assert "Each augment by itself" not in text
    assert "nothing drawn" in text
    assert "Slices in three planes" in text


def test_the_frame_on_the_map_lies_where_the_sampler_says(brains: Path, tmp_path: Path) -> None:
    page = gallery("none", store=brains, out=tmp_path / "page.html", config=SMALL).path
    labelled = [case for case in ArrayStore.open(brains).cases if case.labelled]
    case = labelled[0]
    batch = fixed_batches([case], RandomCrop(SMALL.crop), count=1, batch_size=6, seed=0)[0]
    start, size = batch["crop_box_mm"][5].numpy() / np.asarray(case.spacing_mm)
    shown = pictures(page)[2 * 3]  # behind the crops and the views: the map of random crops
    edge = np.asarray(case.shape) * case.spacing_mm
    scale = 230 / edge.max()
    width, height = round(edge[0] * scale), round(edge[1] * scale)
    axial = shown[(230 - height) // 2 : (230 - height) // 2 + height, : max(width, 115)]
    axial = axial[:, (axial.shape[1] - width) // 2 :][:, :width]
    rows, columns = np.nonzero((axial == COLOURS[5]).all(axis=-1))
    expected = [start[0], start[0] + size[0], case.shape[1] - start[1] - size[1], case.shape[1] - start[1]]
    per_voxel = np.array([width / case.shape[0]] * 2 + [height / case.shape[1]] * 2)
    found = [columns.min(), columns.max() + 1, rows.min(), rows.max() + 1]
    np.testing.assert_allclose(found, np.array(expected) * per_voxel, atol=0.6)


def test_a_recipe_gives_its_augments_and_its_crops(brains: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "segment.yaml"
    recipe.write_text(json.dumps(tiny.SEGMENT))
    result = gallery(str(recipe), store=brains, out=tmp_path / "page.html", config=FLAT)
    assert "16 × 16 × 16 voxels" in text_of(result.path)
    assert "segment.yaml: segmentation" in text_of(result.path)
    assert re.search(r"In 64 draws .* lies outside the volume before anything moves", text_of(result.path))
    assert "Crops on structures and at random places this recipe" in " ".join(text_of(result.path).split())


def test_a_recipe_shows_its_own_sampler_size_and_region(brains: Path, tmp_path: Path) -> None:
    method = {**tiny.MAE["method"], "crop_mm": [40.0, 40.0, 30.0], "region": {"SI": [0.25, 0.75]}}
    page = gallery({**tiny.MAE, "method": method}, store=brains, out=tmp_path / "page.html", config=FLAT).path
    text = " ".join(text_of(page).split())
    assert "40 × 40 × 30 mm" in text
    assert "SI 25% to 75% of the body" in text
    assert "2.5 × 2.5 × 1.88 mm" in text
    assert "Crops at random places this recipe" in text


def test_the_grid_of_voco_lies_on_the_volume_and_its_targets_are_shown(brains: Path, tmp_path: Path) -> None:
    recipe = {**tiny.VOCO, "method": {**tiny.VOCO["method"], "grid": [2, 2, 1], "augment": {"preset": "none"}}}
    page = gallery(recipe, store=brains, out=tmp_path / "page.html", config=FLAT).path
    text = " ".join(text_of(page).split())
    assert "Cells of the grid are grey, and counted from left, back, foot." in text
    assert re.search(r"\d+% in cell [12] [12]", text)
    assert "In 64 draws 0 % lies outside the volume before anything moves" in text
    case = next(case for case in ArrayStore.open(brains).cases if case.labelled)
    shown = pictures(page)[2 * 3]
    edge = np.asarray(case.shape) * case.spacing_mm
    width = round(edge[0] * 230 / edge.max())
    axial = shown[:, (max(width, 115) - width) // 2 :][:, :width]
    grey = (axial == 190).all(axis=-1).mean(axis=0)
    half = {width // 2 - 1, width // 2, width // 2 + 1}
    assert max(range(5, width - 5), key=lambda column: grey[column]) in half, "the cells meet in the middle"


def test_a_crop_in_place_of_the_recipes_is_checked_as_its_own(brains: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    with pytest.raises(ConfigError, match="not a multiple of block_voxels"):
        gallery(tiny.MAE, store=brains, out=out, config=GalleryConfig.parse({"crop": [18, 16, 16]}))
    gallery(tiny.MAE, store=brains, out=out, config=GalleryConfig.parse({"crop": [12, 16, 16]}), dry_run=True)


def test_a_store_that_training_refuses_is_refused_though_the_cases_shown_are_alike(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number, channels in enumerate([(), (), (3,)]):
        pixels = np.random.default_rng(number).integers(1, 255, (24, 24, *channels), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"p{number}.png")
    config = ScanConfig.parse({"modality": "other", "workers": 1})
    cohort = scan(tmp_path / "pictures", tmp_path / "cohort.csv", config=config).path
    plan = {"modality": "other", "spatial_dims": 2, "intensity": {"mode": "robust_zscore"}}
    prepare(PrepareConfig.parse(plan), cohort=cohort, out=tmp_path / "store", workers=1)
    one = GalleryConfig.parse({"cases": 1, "views": 1})
    with pytest.raises(ConfigError, match="the store mixes images of"):
        gallery("none", store=tmp_path / "store", out=tmp_path / "page.html", config=one)


def test_mirrors_and_views_without_content_are_warned_of(brains: Path, tmp_path: Path) -> None:
    augments = [
        {"name": "mirror", "axes": ["LR"]},
        {"name": "contrast", "factor": [1e-9, 1e-9]},
        {"name": "batch_styles", "group": 3},
    ]
    page = tmp_path / "page.html"
    result = gallery(augments, store=brains, out=page, config=SMALL)
    assert any(line.startswith("mirror is asked for along LR") for line in result.warnings)
    assert any("the plain crop took their place" in line for line in result.warnings)
    assert all(line in text_of(page).replace("&#39;", "'") for line in result.warnings)


def test_pictures_are_shown_as_they_are_stored(tmp_path: Path) -> None:
    store = prepared_pictures(tmp_path, colour=True, intensity="none", region="tissue")
    result = gallery("histology", store=store, out=tmp_path / "page.html", config=FLAT)
    assert result.warnings == ("2 of 2 cases state no voxel size: for them a mm in the options is a pixel.",)
    text = text_of(result.path)
    assert "nothing says where left is" in text
    assert "Slices in three planes" not in text
    assert "after rescale 0 to 255" in text
    first = ArrayStore.open(store).cases[0].read("image", (0, 0, 0), (48, 40, 1))[:, :, :, 0].transpose(2, 1, 0)
    enlarged = Image.fromarray(first.astype(np.uint8)).resize((260, round(260 * 40 / 48)), Image.Resampling.BILINEAR)
    shown = pictures(result.path)[0]
    top = (260 - enlarged.height) // 2
    np.testing.assert_allclose(shown[top : top + enlarged.height].astype(int), np.asarray(enlarged).astype(int), atol=2)


def test_a_dry_run_checks_and_writes_nothing(brains: Path, tmp_path: Path) -> None:
    assert gallery("mr_brain", store=brains, out=tmp_path / "page.html", dry_run=True).warnings == ()
    with pytest.raises(ConfigError):
        gallery("ct_chest", store=brains, out=tmp_path / "page.html", dry_run=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("augment", "config", "out", "message"),
    [
        ("mr_brian", {}, "a.html", "did you mean mr_brain"),
        ("ct_head", {}, "a.html", "the images are MR"),
        ("mr_brain", {}, "folder", "ends in .html"),
        ("mr_brain", {"crop": [8, 8, 1]}, "a.html", "must be more than 1"),
        ("mr_brain", {"crop": [8, 0, 8]}, "a.html", "crop"),
        ({"preset": "mr_brain", "p": 2}, {}, "a.html", "unknown key p"),
        ([{"name": "mirror", "axes": ["AP"]}], {}, "a.html", "along AP"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(
    brains: Path, tmp_path: Path, augment: Any, config: dict[str, Any], out: str, message: str
) -> None:
    with pytest.raises(MedSSLError, match=message) as caught:
        gallery(augment, store=brains, out=tmp_path / out, config=GalleryConfig.parse(config))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_task_needs_labelled_cases(tmp_path: Path) -> None:
    store = prepared_pictures(tmp_path, colour=False, intensity="robust_zscore")
    segment = {**tiny.SEGMENT, "task": {**tiny.SEGMENT["task"], "crop_voxels": [16, 16, 1]}}
    with pytest.raises(NoInputError, match="as in medssl gallery mr_light; that works without labels"):
        gallery(segment, store=store, out=tmp_path / "page.html")


def medssl(*arguments: object) -> int:
    return int(run_guarded(lambda: app([str(argument) for argument in arguments], standalone_mode=False)))


def test_the_command_writes_the_page_and_says_its_warnings(
    brains: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    options = ("--cases", 1, "--views", 1, "--crop", "40,40,40")
    assert medssl("gallery", "mr_light", "--store", brains, "-o", page, *options, "--set", "without=[blur]") == 0
    said = capsys.readouterr()
    assert said.out == f"wrote {page}\n"
    assert "warning: " in said.err
    assert "lies outside the volume" in said.err
    assert "<code>blur</code>" not in page.read_text()
    assert medssl("gallery", "mr_light", "--store", brains, "-o", tmp_path / "other.html", "--dry-run") == 0
    assert "would write" in capsys.readouterr().out
    assert not (tmp_path / "other.html").exists()


@pytest.mark.parametrize("crop", ["8,x,8", "8.5,8,8", "-8,8,8", "8,8"])
def test_a_crop_that_is_none_is_refused_by_the_command(
    brains: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], crop: str
) -> None:
    assert medssl("gallery", "mr_light", "--store", brains, "-o", tmp_path / "a.html", f"--crop={crop}") == 2
    assert "crop" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_crop_of_two_numbers_is_refused_with_what_is_needed(
    brains: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert medssl("gallery", "mr_light", "--store", brains, "-o", tmp_path / "a.html", "--crop", "64,64") == 2
    assert "2 numbers given, and three are needed, as in 64,64,32; 1 last for pictures" in capsys.readouterr().err


def test_a_view_far_brighter_than_the_window_says_how_much_the_display_clips(brains: Path, tmp_path: Path) -> None:
    bright = [{"name": "brightness", "shift": [1.5, 1.5]}]
    text = text_of(gallery(bright, store=brains, out=tmp_path / "page.html", config=SMALL).path)
    assert re.search(r"display clips \d+% to white", text)
    dim = [{"name": "brightness", "shift": [0.0, 0.0]}]
    assert "display clips 1" not in text_of(gallery(dim, store=brains, out=tmp_path / "dim.html", config=SMALL).path)


def test_a_full_disk_is_one_sentence(
    brains: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    options = ("--cases", 1, "--views", 1, "--crop", "8,8,8")
    assert medssl("gallery", "none", "--store", brains, "-o", tmp_path / "a.html", *options) == 5
    assert "E_DISK_FULL" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.realdata
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the shared folder of real images is not here")
def test_the_left_of_a_real_spleen_is_on_the_left(tmp_path: Path) -> None:
    source = REAL_DATA / "nifti_geometry" / "ivadomed_spleen2"
    for kind, name in (("images", "sub-spleen2_ct.nii.gz"), ("labels", "sub-spleen2_ct_seg-manual.nii.gz")):
        (tmp_path / "scans" / kind).mkdir(parents=True)
        (tmp_path / "scans" / kind / "spleen.nii.gz").write_bytes((source / name).read_bytes())
    found = scan(tmp_path / "scans", tmp_path / "cohort.csv", config=ScanConfig.parse({"modality": "CT", "workers": 1}))
    config = load_yaml(CONFIGS / "prepare" / "ct.yaml") | {"region": "abdomen", "spacing_mm": [3.0, 3.0, 3.0]}
    prepare(PrepareConfig.parse(config), cohort=found.path, out=tmp_path / "store", workers=1)
    page = gallery("ct_abdomen", store=tmp_path / "store", out=tmp_path / "page.html", config=FLAT).path
    assert "after window -175 to 250" in text_of(page)
    axial = pictures(page)[0][:, :130].astype(int)
    bone = axial.min(axis=-1) > 240
    outline = (axial == COLOURS[0]).all(axis=-1)
    row, column = np.argwhere(outline).mean(axis=0)
    assert np.argwhere(bone[:65])[:, 1].mean() < column - 20, "ribs lie to the left of the spleen"
    assert np.argwhere(bone[:, 40:])[:, 0].mean() > row + 20, "and behind it"

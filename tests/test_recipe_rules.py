"""What a run of a recipe may take in, what it may change when it goes on, and what it says of itself."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tiny
import torch

from medssl import recipe as module
from medssl.augment.anatomy import REGIONS
from medssl.augment.images import Images
from medssl.checks import FrozenFeatures, HeldOut
from medssl.config import load_yaml
from medssl.data.cohort import Case, Cohort
from medssl.data.loader import fixed_batches
from medssl.data.prepare import PrepareConfig, Region, prepare
from medssl.data.store import ArrayStore
from medssl.engine.probe import regression_probe
from medssl.errors import CheckpointError, ConfigError, NoInputError
from medssl.evaluation import predict as predict_module
from medssl.evaluation import segment as segment_module
from medssl.geometry import Geometry
from medssl.handover import images_of
from medssl.io import write_volume
from medssl.methods.mae import MAE, Config
from medssl.methods.voco import VoCo
from medssl.nn.backbone import build_backbone
from medssl.nn.bundle import load_bundle, load_into
from medssl.recipe import finetune, pretrain
from medssl.runfolder import read_journal
from medssl.tasks.segmentation import Segmentation
from medssl.volume import Volume

WIDE = {"name": "window", "low_hu": -1000, "high_hu": 500}
NARROW = {"name": "window", "low_hu": -175, "high_hu": 250}


def trained_on(monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], *, store: Path, out: Path) -> list[str]:
    """Cases that pretraining would take."""
    seen: list[str] = []

    class LookedEnoughError(Exception):
        pass

    def look(_: Any, cases: Any, *__: Any, **___: Any) -> None:
        seen.extend(case.case_id for case in cases)
        raise LookedEnoughError

    monkeypatch.setattr(module, "_train", look)
    with pytest.raises(LookedEnoughError):
        pretrain(recipe, store=store, out=out)
    return seen


def ct_store(folder: Path) -> Path:
    """Six training scans of noise in HU, labelled."""
    rng = np.random.default_rng(0)
    cases = []
    for index in range(6):
        geometry = Geometry((10, 10, 10), np.eye(4))
        array = rng.normal(0, 300, (1, 10, 10, 10)).astype(np.float32)
        image, label = folder / f"c{index}.mha", folder / f"c{index}_seg.mha"
        write_volume(Volume(array, geometry, "HU"), image)
        write_volume(Volume((array > 200).astype(np.uint8), geometry, "label"), label)
        cases.append(
            Case(
                case_id=f"c{index}", subject_id=f"s{index}", image=str(image), label=str(label), modality="CT",
                split="train",
            )
        )  # fmt: skip
    return prepared(cases, folder, modality="CT", intensity={"mode": "hu"})


def prepared(cases: list[Case], folder: Path, **options: Any) -> Path:
    Cohort(cases).to_csv(folder / "cohort.csv")
    config = {"body_mask": {"mode": "none"}, "crop": {"mode": "none"}, **options}
    prepare(PrepareConfig.parse(config), cohort=folder / "cohort.csv", out=folder / "store", workers=1)
    return folder / "store"


def small(recipe: dict[str, Any], part: str, **options: Any) -> dict[str, Any]:
    """One step with small crops."""
    short = tiny.shorter(recipe, 1)
    return {**short, part: {**short[part], "crop_voxels": [8, 8, 8], **options}}


def test_a_second_scan_without_a_split_of_a_held_out_subject_is_not_trained_on(
    phantoms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = list(csv.DictReader(phantoms.cohort.read_text().splitlines()))
    of_test, of_train = (next(row for row in rows if row["split"] == split) for split in ("test", "train"))
    free = [row for row in rows if row["split"] == "train" and row is not of_train][:3]
    for row, subject in zip(free, (of_test["subject_id"], of_train["subject_id"], "nobody"), strict=True):
        row["split"], row["subject_id"] = "", subject
    for row in rows:
        row["image"] = str(phantoms.cohort.parent / row["image"])
        row["label"] = row["label"] and str(phantoms.cohort.parent / row["label"])
    path = tmp_path / "cohort.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    prepare(PrepareConfig.parse(tiny.PREPARE), cohort=path, out=tmp_path / "store", workers=1)
    seen = trained_on(monkeypatch, tiny.shorter(tiny.MAE, 1), store=tmp_path / "store", out=tmp_path / "out")
    expected = {row["case_id"] for row in rows if row["split"] == "train"} | {row["case_id"] for row in free[1:]}
    assert set(seen) == expected


def test_constant_images_are_left_out_and_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cases = []
    for index in range(4):
        image = tmp_path / f"c{index}.mha"
        array = np.full((1, 10, 10, 10), 7.0) if index == 2 else rng.normal(500, 100, (1, 10, 10, 10))
        write_volume(Volume(array.astype(np.float32), Geometry((10, 10, 10), np.eye(4)), "arbitrary"), image)
        cases.append(
            Case(case_id=f"c{index}", subject_id=f"s{index}", image=str(image), label=None, modality="MR", split=None)
        )
    store = prepared(cases, tmp_path, modality="MR")
    pretrain(small(tiny.MAE, "method"), store=store, out=tmp_path / "out")
    first = read_journal(tmp_path / "out" / "journal.jsonl")[0]
    assert (first["cases"], first["constant_left_out"]) == (3, 1)
    with pytest.raises(NoInputError, match="more than one value"):
        pretrain(small(tiny.MAE, "method"), store=prepared(cases[2:3], tmp_path, modality="MR"), out=tmp_path / "o")


def test_a_refused_resume_leaves_recipe_and_journal_as_they_were(phantoms: Any, tmp_path: Path) -> None:
    recipe, out = tiny.shorter(tiny.SEGMENT, 1), tmp_path / "out"
    finetune(recipe, store=phantoms.store, out=out)
    before = (out / "recipe.yaml").read_bytes(), (out / "journal.jsonl").read_bytes()
    with pytest.raises(CheckpointError):
        finetune(tiny.shorter(tiny.SEGMENT, 1, lr=0.5), store=phantoms.store, out=out)
    assert ((out / "recipe.yaml").read_bytes(), (out / "journal.jsonl").read_bytes()) == before


@pytest.mark.parametrize(
    "override",
    [
        "train.num_workers=0", "train.log_every=2", "train.checkpoint_every=1", "train.keep_checkpoints=1",
        "train.check_every=1", "train.tensorboard=false", "train.stop_on_collapse=true", "checks.batches=2",
    ],
)  # fmt: skip
def test_what_is_only_watched_or_written_may_change_in_a_resumed_run(override: str) -> None:
    recipe = tiny.shorter(tiny.MAE, 2)
    base = {**recipe, "train": {**recipe["train"], "num_workers": 1, "tensorboard": True}}
    plans = [module.PretrainRecipe.parse(module._mapping(base, given)) for given in ([], [override])]
    assert plans[0] != plans[1]
    assert module._identity(plans[0].to_dict(), {}) == module._identity(plans[1].to_dict(), {})


def test_what_the_weights_depend_on_may_not_change_in_a_resumed_run() -> None:
    base = tiny.shorter(tiny.MAE, 2)
    identities = {
        module._identity(module.PretrainRecipe.parse(module._mapping(base, given)).to_dict(), {})
        for given in ([], ["train.lr=0.5"], ["seed=1"], ["train.steps=3"], ["method.mask_ratio=0.5"])
    }
    assert len(identities) == 5
    plan = module.PretrainRecipe.parse(base)
    assert module._identity(plan.to_dict(), {"encoder": "a"}) != module._identity(plan.to_dict(), {"encoder": "b"})


def test_metrics_are_those_of_the_weights_in_the_bundle_also_after_a_kill_before_the_bundle(
    phantoms: Any, tmp_path: Path
) -> None:
    recipe = tiny.shorter(tiny.SEGMENT, 8, average_weights=0.9, lr=1e-2)
    result = finetune(recipe, store=phantoms.store, out=tmp_path / "out")
    bundle, opened = load_bundle(result.bundle), ArrayStore.open(phantoms.store)
    options = {key: value for key, value in recipe["task"].items() if key != "name"}
    task = Segmentation(
        module.configure("tasks", {"name": "segmentation", **options}, module.Task)[1],  # type: ignore[type-abstract]
        encoder=bundle.build_encoder(), label_values=opened.label_values, seed=0,
    )  # fmt: skip
    load_into(task.decoder, bundle.tensors, prefix="decoder")
    held_out = [case for case in opened.select(split="val") if case.labelled]
    fixed = fixed_batches(held_out, task.view_sampler(), count=1, batch_size=2, seed=0, spatial_dims=3)
    with torch.no_grad():
        expected = HeldOut(fixed)(task.eval(), 0)
    found = {name.removeprefix("held_out/"): value for name, value in result.metrics.items()}
    assert found == pytest.approx(expected, abs=1e-6)

    shutil.rmtree(result.bundle)
    again = finetune(recipe, store=phantoms.store, out=tmp_path / "out")
    assert dict(again.metrics) == dict(result.metrics)
    assert load_bundle(again.bundle).passport.metrics == bundle.passport.metrics


def test_the_probe_gives_the_same_numbers_again_and_knows_the_majority(phantoms: Any) -> None:
    opened = ArrayStore.open(phantoms.store)

    def found() -> dict[str, float]:
        torch.manual_seed(0)
        net = build_backbone(tiny.BACKBONE, in_channels=1, spatial_dims=3)
        config = Config.parse({"crop_voxels": [8, 8, 8], "block_voxels": [4, 4, 4]})
        check = FrozenFeatures(
            opened.select(split="train"), opened.select(split="val"), crop_voxels=(8, 8, 8), crops_per_case=8,
            label_values=opened.label_values, seed=0, spatial_dims=3,
        )  # fmt: skip
        method = MAE(config, encoder=net, seed=0).eval()
        with torch.no_grad():
            results = check(method, 0)
            assert check(method, 5) == results
        return results

    first = found()
    assert first == found()
    assert 0 < first["structure_majority"] < 1


def test_probes_see_a_window_applied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArrayStore.open(ct_store(tmp_path))
    config = Config.parse({"crop_voxels": [8, 8, 8], "block_voxels": [4, 4, 4], "augment": [NARROW]})
    method = MAE(config, encoder=build_backbone(tiny.BACKBONE, in_channels=1, spatial_dims=3), seed=0).eval()
    seen: list[torch.Tensor] = []
    method.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    check = FrozenFeatures(
        store.cases[:3], store.cases[3:], crop_voxels=(8, 8, 8), crops_per_case=4, label_values=(1,), seed=0,
        spatial_dims=3,
    )  # fmt: skip
    with torch.no_grad():
        check(method, 0)
    # noise of 300 HU: as much of it lies under the window as above
    assert float(seen[0].min()) == 0.0
    assert float(seen[0].max()) == 1.0


def test_an_encoder_under_another_window_is_journalled_and_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = ct_store(tmp_path)
    bundle = pretrain(small(tiny.MAE, "method", augment=[WIDE]), store=store, out=tmp_path / "m").bundle
    caplog.clear()
    same = finetune(small(tiny.SEGMENT, "task", augment=[WIDE]), store=store, out=tmp_path / "same", encoder=bundle)
    assert same.alarms == ()
    assert not caplog.records
    other = finetune(small(tiny.SEGMENT, "task", augment=[NARROW]), store=store, out=tmp_path / "other", encoder=bundle)
    assert "window (-1000.0, 500.0)" in other.alarms[0]
    assert "(-175.0, 250.0)" in other.alarms[0]
    assert other.alarms[0] in caplog.text
    assert [line for line in read_journal(tmp_path / "other" / "journal.jsonl") if "alarm" in line] == [
        {"step": 0, "alarm": other.alarms[0]}
    ]
    # a fine-tuned encoder can be trained on
    again = finetune(small(tiny.SEGMENT, "task", augment=[WIDE]), store=store, out=tmp_path / "x", encoder=other.bundle)
    assert "window (-175.0, 250.0)" in again.alarms[0]


def test_the_journal_says_how_many_tensors_of_the_encoder_were_loaded(model_bundle: Path, encoder_bundle: Path) -> None:
    first = read_journal(model_bundle.parent / "journal.jsonl")[0]
    total = len([name for name in load_bundle(encoder_bundle).tensors if name.startswith("encoder.")])
    assert first["encoder_tensors"] == f"{total} of {total} matched"


def test_a_method_is_told_what_its_images_are(phantoms: Any, tmp_path: Path) -> None:
    seen: list[Any] = []
    build = VoCo.__init__

    def watched(self: VoCo, *args: Any, **options: Any) -> None:
        seen.append(options["images"])
        build(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VoCo, "__init__", watched)
        pretrain(tiny.shorter(tiny.VOCO, 1), store=phantoms.store, out=tmp_path / "out", dry_run=True)
    assert seen[0].spacing_mm == pytest.approx((1.5, 1.5, 1.5))
    assert seen == [Images(domain="zscore", modality="MR", spacing_mm=seen[0].spacing_mm)]


def test_an_untrained_encoder_is_measured_before_the_first_step(encoder_bundle: Path) -> None:
    lines = [line for line in read_journal(encoder_bundle.parent / "journal.jsonl") if "probe/rank" in line]
    assert [line["step"] for line in lines] == [0, 20]
    assert "probe/structure_majority" in lines[0]


def test_the_default_penalty_of_the_regression_probe_is_that_of_the_check() -> None:
    assert regression_probe.__kwdefaults__ == {"l2": 1.0}


def test_what_is_known_of_images_follows_from_their_preparation(tmp_path: Path, phantoms: Any) -> None:
    ct = ArrayStore.open(ct_store(tmp_path))
    assert images_of(ct, ct.cases) == Images(domain="HU", modality="CT", channels=1)
    mr = ArrayStore.open(phantoms.store)
    assert images_of(mr, mr.cases).domain == "zscore"
    mr.prepare_config |= {"region": "brain", "intensity": {"mode": "none"}}
    found = images_of(mr, mr.cases)
    assert (found.region, found.domain) == ("brain", "raw")
    mr.cases[0].modality = "US"
    assert images_of(mr, mr.cases).modality == mr.modality
    mr.prepare_config["orientation"] = "LPS"
    images_of(mr, mr.cases)
    mr.prepare_config["orientation"] = "SAR"
    with pytest.raises(ConfigError, match="point to SAR"):
        images_of(mr, mr.cases)


def test_naming_the_region_makes_no_case_anew_and_keeps_encoders_usable(
    phantoms: Any, tmp_path: Path, encoder_bundle: Path
) -> None:
    named = tmp_path / "named"
    shutil.copytree(phantoms.store, named)
    result = prepare(PrepareConfig.parse({**tiny.PREPARE, "region": "brain"}), cohort=phantoms.cohort, out=named)
    assert [case.folder.name for case in result.store.cases] == [
        case.folder.name for case in ArrayStore.open(phantoms.store).cases
    ]
    assert read_journal(named / "journal.jsonl")[-1]["made"] == 0
    assert result.store.prepare_config["region"] == "brain"
    finetune(tiny.shorter(tiny.SEGMENT, 1), store=named, out=tmp_path / "f", encoder=encoder_bundle, dry_run=True)


def test_every_region_that_prepare_takes_is_one_that_augmentation_knows() -> None:
    assert set(get_args(Region)) == set(REGIONS)


def test_a_run_goes_on_with_and_without_prefetch_and_ends_with_the_same_weights(phantoms: Any, tmp_path: Path) -> None:
    moved = [
        {"name": "affine", "rotation_deg": [20, 20, 20]},
        {"name": "elastic", "p": 0.5},
        {"name": "noise", "sigma": [0.1, 0.3]},
        {"name": "batch_styles"},
    ]
    recipe = {**tiny.MAE, "method": {**tiny.MAE["method"], "augment": moved}}
    found = []
    for name, options in {
        "plain": {"prefetch": False},
        "ahead": {"prefetch": True},
        "worker": {"prefetch": True, "num_workers": 1},
    }.items():
        result = pretrain(
            tiny.shorter(recipe, 4, schedule="constant", **options), store=phantoms.store, out=tmp_path / name
        )
        found.append(load_bundle(result.bundle).tensors)
    pretrain(tiny.shorter(recipe, 4, schedule="constant", checkpoint_every=2), store=phantoms.store, out=tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "step_00000004")
    shutil.rmtree(tmp_path / "r" / "bundle")
    overrides = ["train.prefetch=false"]
    again = pretrain(
        tiny.shorter(recipe, 4, schedule="constant", checkpoint_every=2), store=phantoms.store, out=tmp_path / "r",
        resume="must", overrides=overrides,
    )  # fmt: skip
    found.append(load_bundle(again.bundle).tensors)
    for other in found[1:]:
        assert all(torch.equal(value, other[key]) for key, value in found[0].items())


def test_crops_in_mm_are_what_prediction_and_scores_work_at(phantoms: Any, tmp_path: Path) -> None:
    crop = ["task.crop_voxels=[8, 8, 8]", "task.crop_mm=[24, 24, 24]"]
    result = finetune(tiny.shorter(tiny.SEGMENT, 1), store=phantoms.store, out=tmp_path / "f", overrides=crop)
    passport = load_bundle(result.bundle).passport
    assert passport.spacing_mm == (3.0, 3.0, 3.0)
    assert passport.prepare["spacing_mm"] == [1.5, 1.5, 1.5]
    seen: list[tuple[float, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        label_map = segment_module.label_map

        def watched(image: Any, *args: Any, **options: Any) -> Any:
            seen.append(options["prepared"].spacing_mm)
            return label_map(image, *args, **options)

        patch.setattr(segment_module, "label_map", watched)
        cases = ArrayStore.open(phantoms.store).select(split="test", labelled=True)[:1]
        scores = predict_module.score_stored(result.bundle, cases, nsd_tolerance_mm=2.0)
    assert seen == [(3.0, 3.0, 3.0)]
    assert len(scores)
    scan = phantoms.cohort.parent / next(csv.DictReader(phantoms.cohort.read_text().splitlines()))["image"]
    assert len(predict_module.predict(result.bundle, scan, out=tmp_path / "p").outputs) == 1


def test_probes_embed_crops_of_the_voxel_size_that_the_method_trains_on(phantoms: Any, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Watched(FrozenFeatures):
        def __init__(self, *cases: Any, **options: Any) -> None:
            seen.append((options["crop_voxels"], options["crop_mm"]))
            super().__init__(*cases, **options)

    options = ["method.crop_mm=[24, 48, 24]", "checks.crop_voxels=[8, 8, 4]", "method.region={SI: [0.2, 0.9]}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FrozenFeatures", Watched)
        run = pretrain(tiny.shorter(tiny.MAE, 1), store=phantoms.store, out=tmp_path / "o", overrides=options)
    assert seen == [((8, 8, 4), [12.0, 24.0, 6.0])]
    assert {"probe/position_r2", "probe/share_r2"} <= run.metrics.keys()
    assert load_bundle(run.bundle).passport.spacing_mm == (1.5, 3.0, 1.5)


def test_a_network_takes_as_many_channels_as_the_windows_give(tmp_path: Path) -> None:
    store = ct_store(tmp_path)
    windows = {"name": "multi_window", "windows": ["lung", "soft", "bone"]}
    bundle = pretrain(small(tiny.MAE, "method", augment=[windows]), store=store, out=tmp_path / "m").bundle
    passport = load_bundle(bundle).passport
    assert (passport.in_channels, passport.image_channels) == (3, 1)
    model = finetune(small(tiny.SEGMENT, "task", augment=[windows]), store=store, out=tmp_path / "f", encoder=bundle)
    assert model.alarms == ()
    assert len(predict_module.predict(model.bundle, tmp_path / "c0.mha", out=tmp_path / "p").outputs) == 1


def volumes(folder: Path, *shapes: tuple[int, ...], channels: int = 1, modality: str = "MR") -> list[Case]:
    rng = np.random.default_rng(0)
    cases = []
    for index, shape in enumerate(shapes):
        path = folder / f"v{len(shapes)}_{channels}_{index}.mha"
        write_volume(
            Volume(rng.normal(size=(channels, *shape)).astype(np.float32), Geometry(shape, np.eye(4)), "arbitrary"),
            path,
        )
        name = path.stem
        cases.append(Case(case_id=name, subject_id=name, image=str(path), modality=modality, split="train"))
    return cases


@pytest.mark.parametrize("dry_run", [True, False])
def test_crops_that_would_be_filling_are_refused_before_anything_is_written(tmp_path: Path, dry_run: bool) -> None:
    store = prepared(volumes(tmp_path, (10, 12, 10), (10, 12, 11)), tmp_path, modality="MR")
    recipe = small(tiny.MAE, "method", crop_voxels=[64, 64, 64])
    with pytest.raises(ConfigError, match=r"100% of a crop would be filling\. Make crop_voxels") as caught:
        pretrain(recipe, store=store, out=tmp_path / "out", dry_run=dry_run)
    assert caught.value.code == "E_CROP"
    in_mm = small(tiny.MAE, "method", crop_mm=[64.0, 64.0, 64.0])
    with pytest.raises(
        ConfigError, match=r"crops of \[64\.0, 64\.0, 64\.0\] mm in volumes of \[10\.0, 12\.0, 10\.5\] mm"
    ):
        pretrain(in_mm, store=store, out=tmp_path / "out", dry_run=dry_run)
    assert not (tmp_path / "out").exists()


def test_crops_that_are_mostly_filling_or_stretched_are_told_of(tmp_path: Path) -> None:
    store = prepared(volumes(tmp_path, (10, 12, 10), (10, 12, 10)), tmp_path, modality="MR")
    result = pretrain(small(tiny.MAE, "method", crop_voxels=[16, 16, 16]), store=store, out=tmp_path / "out")
    assert any("71% of a crop is filling" in alarm for alarm in result.alarms)
    grid = small(tiny.VOCO, "method", crop_voxels=[16, 16, 16])
    result = pretrain(grid, store=store, out=tmp_path / "voco")
    assert any("3.2 times as many voxels along one axis" in alarm for alarm in result.alarms)


def test_a_store_of_grey_and_colour_names_the_few_and_the_way_out(tmp_path: Path) -> None:
    cases = volumes(tmp_path, (9, 9, 9), (9, 9, 9), (9, 9, 9)) + volumes(tmp_path, (9, 9, 9), channels=3)
    store = prepared(cases, tmp_path, modality="MR")
    with pytest.raises(ConfigError, match=r"3 of 1 and 1 of 3 \(such as v1_3_0\).*channels: 1") as caught:
        pretrain(small(tiny.MAE, "method"), store=store, out=tmp_path / "out")
    assert caught.value.code == "E_CHANNELS"


def test_a_bundle_does_not_depend_on_the_file_of_its_preset(tmp_path: Path) -> None:
    recipe = small(tiny.SEGMENT, "task", augment={"preset": "ct_light"})
    result = finetune(recipe, store=ct_store(tmp_path), out=tmp_path / "out")
    written = load_bundle(result.bundle).passport.recipe["task"]["augment"]
    assert [entry["name"] for entry in written] == ["affine", "window", "noise", "blur", "gamma"]
    assert written[1]["low_hu"] == -175.0
    assert load_yaml(tmp_path / "out" / "recipe.yaml")["task"]["augment"] == written

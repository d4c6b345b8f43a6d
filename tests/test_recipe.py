"""Pretraining and fine-tuning from a recipe: what is refused, what is loaded, and what is left behind."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from medssl import recipe as module
from medssl import selection
from medssl.config import load_yaml
from medssl.data.cohort import Case, Cohort
from medssl.data.prepare import PrepareConfig, prepare
from medssl.data.store import ArrayStore
from medssl.errors import CheckpointError, ConfigError, NoInputError
from medssl.io import write_volume
from medssl.nn.bundle import Passport, load_bundle, save_bundle
from medssl.recipe import TrainingResult, finetune, pretrain
from medssl.runfolder import read_journal
from medssl.selection import labelled_subjects
from medssl.volume import Volume

MakeStore = Callable[..., Path]


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """A store of noise: six training subjects with two scans each, labelled unless said otherwise."""

    def make(
        *, shape: tuple[int, int, int] = (10, 10, 10), channels: int = 1, labelled: bool = True, split: str = "train",
        modality: str = "MR", flat_too: bool = False, rgb_too: bool = False, name: str = "s",
    ) -> Path:  # fmt: skip
        from medssl.geometry import Geometry

        rng = np.random.default_rng(0)
        cases = []
        for index in range(12):
            size = (10, 10, 1) if flat_too and index % 2 else shape
            count = 3 if rgb_too and index % 2 else channels
            geometry = Geometry(size, np.eye(4))
            image = tmp_path / name / f"c{index:02d}.mha"
            array = rng.normal(500, 100, (count, *size)).astype(np.float32)
            write_volume(Volume(array, geometry, "HU" if modality == "CT" else "arbitrary"), image)
            label = tmp_path / name / f"c{index:02d}_seg.mha"
            write_volume(Volume((array[:1] > 550).astype(np.uint8), geometry, "label"), label)
            cases.append(
                Case(
                    case_id=f"c{index:02d}", subject_id=f"s{index // 2}", image=str(image),
                    label=str(label) if labelled else None, modality=modality, split=split,
                )
            )  # fmt: skip
        Cohort(cases).to_csv(tmp_path / name / "cohort.csv")
        mode = "hu" if modality == "CT" else "robust_zscore"
        config = {
            "modality": modality, "intensity": {"mode": mode}, "body_mask": {"mode": "none"}, "crop": {"mode": "none"},
        }  # fmt: skip
        store = tmp_path / name / "store"
        prepare(PrepareConfig.parse(config), cohort=tmp_path / name / "cohort.csv", out=store, workers=1)
        return store

    return make


SHORT = tiny.shorter(tiny.SEGMENT, 2)
SMALL_CROP = "task.crop_voxels=[8, 8, 8]"


def changed_bundle(source: Path, folder: Path, **changes: Any) -> Path:
    """The same weights with another passport."""
    bundle = load_bundle(source)
    encoder = bundle.build_encoder()
    save_bundle(folder, {"encoder": encoder}, Passport.parse({**bundle.passport.to_dict(), **changes}))
    return folder


def first_encoder(
    monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], *, store: Path, out: Path, encoder: Path | None
) -> torch.nn.Module:
    """The encoder of a fine-tuning run as it goes into the loop."""
    seen: list[torch.nn.Module] = []

    class LookedEnoughError(Exception):
        pass

    def look(trainable: Any, *_: Any, **__: Any) -> None:
        seen.append(trainable.encoder)
        raise LookedEnoughError

    monkeypatch.setattr(module, "fit", look)
    with pytest.raises(LookedEnoughError):
        finetune(recipe, store=store, out=out, encoder=encoder)
    return seen[0].eval()


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_pretraining_leaves_recipe_journal_checkpoints_and_a_passport(encoder_bundle: Path, phantoms: Any) -> None:
    run = encoder_bundle.parent
    assert {"bundle", "checkpoints", "journal.jsonl", "recipe.yaml"} <= {path.name for path in run.iterdir()}
    recipe = load_yaml(run / "recipe.yaml")
    assert recipe["train"]["steps"] == 20
    assert recipe["licence"] == "not stated"
    passport = load_bundle(encoder_bundle).passport
    assert (passport.kind, passport.method, passport.spatial_dims, passport.in_channels) == ("encoder", "voco", 3, 1)
    assert passport.crop_voxels == (8, 8, 8)
    assert passport.prepare == ArrayStore.open(phantoms.store).prepare_config
    assert passport.spacing_mm == (1.5, 1.5, 1.5)
    assert passport.citations
    assert {"medssl", "torch", "monai"} == set(passport.versions)
    assert {"held_out/pearson", "held_out/top1", "probe/rank_me", "probe/position_r2", "chance"} <= set(
        passport.metrics
    )
    assert str(phantoms.store.parent) not in (encoder_bundle / "passport.json").read_text()


def test_held_out_subjects_are_measured_and_never_trained_on(
    phantoms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[str]] = {}
    batches, fixed = module.batches, module.fixed_batches

    def training(cases: Any, *args: Any, **options: Any) -> Any:
        seen["train"] = [case.subject_id for case in cases]
        return batches(cases, *args, **options)

    def checking(cases: Any, *args: Any, **options: Any) -> Any:
        seen["checks"] = [case.subject_id for case in cases]
        return fixed(cases, *args, **options)

    monkeypatch.setattr(module, "batches", training)
    monkeypatch.setattr(module, "fixed_batches", checking)
    pretrain({**tiny.shorter(tiny.MAE, 1), "splits": ["train", "val"]}, store=phantoms.store, out=tmp_path / "a")
    assert "checks" not in seen, "all of split val is trained on, so nothing is held out"
    pretrain(tiny.shorter(tiny.MAE, 1), store=phantoms.store, out=tmp_path / "b")
    assert len(seen["checks"]) == 2
    assert not set(seen["checks"]) & set(seen["train"])


def test_without_held_out_cases_the_journal_says_that_nothing_is_measured(
    make_store: MakeStore, tmp_path: Path
) -> None:
    result = finetune(SHORT, store=make_store(), out=tmp_path / "out", overrides=[SMALL_CROP])
    assert result.metrics == {}
    first = read_journal(tmp_path / "out" / "journal.jsonl")[0]
    assert first["note"] == "no case in split val: nothing is measured on held-out cases"
    assert (first["cases"], first["subjects"]) == (12, 6)


def test_overrides_reach_the_recipe_and_a_file_serves_as_well_as_a_mapping(phantoms: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(tiny.MAE))
    result = pretrain(
        path, store=phantoms.store, out=tmp_path / "out", overrides=["train.steps=1", "train.warmup_steps=0", "seed=5"]
    )
    assert result.step == 1
    assert load_yaml(tmp_path / "out" / "recipe.yaml")["seed"] == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=3", r"unknown key train\.step\. Did you mean steps\?"),
        ("method.grib=[2, 2, 2]", r"unknown key grib\. Did you mean grid\?"),
        ("backbone.channel=[4]", r"unknown key channel\. Did you mean channels\?"),
        ("method.name=voko", r"did you mean voco\?"),
        ("backbone.name=unett", r"did you mean unet\?"),
        ("train.steps=many", r"train\.steps: .*integer"),
        ("seed=-1", r"seed: .*greater than or equal to 0"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_written(
    phantoms: Any, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pretrain(tiny.VOCO, store=phantoms.store, out=tmp_path / "out", overrides=[override])
    assert not (tmp_path / "out").exists()


def test_a_dry_run_builds_everything_and_writes_nothing(phantoms: Any, encoder_bundle: Path, tmp_path: Path) -> None:
    before = files_below(phantoms.store.parent), files_below(encoder_bundle)
    for result in (
        pretrain(tiny.VOCO, store=phantoms.store, out=tmp_path / "a", dry_run=True),
        finetune(tiny.SEGMENT, store=phantoms.store, out=tmp_path / "b", encoder=encoder_bundle, dry_run=True),
    ):
        assert isinstance(result, TrainingResult)
        assert result.step == 0
    assert files_below(tmp_path) == []
    assert (files_below(phantoms.store.parent), files_below(encoder_bundle)) == before


def test_two_runs_of_one_recipe_leave_the_same_bits_and_another_seed_others(phantoms: Any, tmp_path: Path) -> None:
    weights = {}
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        recipe = {**tiny.shorter(tiny.VOCO, 3), "seed": seed}
        result = pretrain(recipe, store=phantoms.store, out=tmp_path / name)
        weights[name] = (result.bundle / "weights.safetensors").read_bytes()
    assert weights["one"] == weights["two"]
    assert weights["one"] != weights["other"]


def test_a_finished_run_called_again_keeps_its_bundle_and_its_metrics(phantoms: Any, tmp_path: Path) -> None:
    recipe, out = tiny.shorter(tiny.MAE, 2), tmp_path / "out"
    first = pretrain(recipe, store=phantoms.store, out=out)
    before = (out / "bundle" / "digests.json").read_bytes()
    again = pretrain(recipe, store=phantoms.store, out=out, resume="must")
    assert again == TrainingResult(first.bundle, 2, first.metrics, first.alarms)
    assert (out / "bundle" / "digests.json").read_bytes() == before

    (out / "bundle" / "weights.safetensors").write_bytes(b"damaged")
    assert pretrain(recipe, store=phantoms.store, out=out).step == 2
    load_bundle(out / "bundle")
    shutil.rmtree(out / "bundle")
    pretrain(recipe, store=phantoms.store, out=out)
    load_bundle(out / "bundle")


def test_a_finished_fine_tuning_called_again_keeps_its_bundle(phantoms: Any, tmp_path: Path) -> None:
    first = finetune(SHORT, store=phantoms.store, out=tmp_path / "out")
    before = (first.bundle / "digests.json").read_bytes()
    again = finetune(SHORT, store=phantoms.store, out=tmp_path / "out")
    assert again.metrics == pytest.approx(dict(first.metrics))
    assert (first.bundle / "digests.json").read_bytes() == before


def test_resume_modes_refuse_what_they_promise_to_refuse(phantoms: Any, tmp_path: Path) -> None:
    recipe = tiny.shorter(tiny.MAE, 1)
    with pytest.raises(CheckpointError, match="no checkpoint") as caught:
        pretrain(recipe, store=phantoms.store, out=tmp_path / "out", resume="must")
    assert caught.value.code == "E_RESUME_NOTHING"
    pretrain(recipe, store=phantoms.store, out=tmp_path / "out")
    with pytest.raises(CheckpointError) as caught:
        pretrain(recipe, store=phantoms.store, out=tmp_path / "out", resume="never")
    assert caught.value.code == "E_RESUME_EXISTS"
    with pytest.raises(CheckpointError) as caught:
        pretrain({**recipe, "seed": 1}, store=phantoms.store, out=tmp_path / "out")
    assert caught.value.code == "E_RESUME_DIFF"


def test_averaged_weights_are_what_the_bundle_holds(
    phantoms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    fit = module.fit

    def watched(*args: Any, **options: Any) -> Any:
        kept.append(fit(*args, **options))
        return kept[-1]

    monkeypatch.setattr(module, "fit", watched)
    recipe = tiny.shorter(tiny.SEGMENT, 3, average_weights=0.5)
    result = finetune(recipe, store=phantoms.store, out=tmp_path / "out")
    average = kept[0].average
    tensors = load_bundle(result.bundle).tensors
    encoder = [name for name in tensors if name.startswith("encoder.")]
    assert encoder
    assert all(torch.equal(tensors[name], average[name]) for name in encoder)


def test_pretraining_never_reads_a_label_to_train_on(make_store: MakeStore, tmp_path: Path) -> None:
    recipe = tiny.shorter(tiny.MAE, 2)
    recipe["method"] = {**recipe["method"], "crop_voxels": [8, 8, 8]}
    with_labels = pretrain(recipe, store=make_store(name="a"), out=tmp_path / "x")
    without = pretrain(recipe, store=make_store(name="b", labelled=False), out=tmp_path / "y")
    weights = [(result.bundle / "weights.safetensors").read_bytes() for result in (with_labels, without)]
    assert weights[0] == weights[1]


def test_an_encoder_starts_with_the_features_of_its_bundle(
    phantoms: Any, encoder_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    theirs = load_bundle(encoder_bundle).build_encoder().eval()
    where = {"store": phantoms.store, "out": tmp_path / "out"}
    mine = first_encoder(monkeypatch, tiny.SEGMENT, encoder=encoder_bundle, **where)
    scratch = first_encoder(monkeypatch, tiny.SEGMENT, encoder=None, **where)
    with torch.no_grad():
        expected, found, random = theirs(image), mine(image), scratch(image)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not any(torch.allclose(a, b) for a, b in zip(expected, random, strict=True))


def test_the_run_from_scratch_is_the_architectural_twin(
    phantoms: Any, encoder_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {"store": phantoms.store, "out": tmp_path / "out"}
    shapes = [
        {
            name: value.shape
            for name, value in first_encoder(monkeypatch, SHORT, encoder=start, **where).named_parameters()
        }
        for start in (encoder_bundle, None)
    ]
    assert shapes[0] == shapes[1]


def test_two_arms_of_one_seed_share_the_weights_of_the_decoder(
    phantoms: Any, encoder_bundle: Path, tmp_path: Path
) -> None:
    recipe = tiny.shorter(tiny.SEGMENT, 1, lr=1e-12)
    tensors = [
        load_bundle(finetune(recipe, store=phantoms.store, out=tmp_path / name, encoder=start).bundle).tensors
        for name, start in (("a", encoder_bundle), ("b", None))
    ]
    decoder = [name for name in tensors[0] if name.startswith("decoder.")]
    assert decoder
    for name in decoder:
        torch.testing.assert_close(tensors[0][name], tensors[1][name], atol=1e-9, rtol=0)


def test_the_origin_of_the_encoder_is_in_the_journal_and_the_passport(model_bundle: Path, encoder_bundle: Path) -> None:
    passport = load_bundle(model_bundle).passport
    assert passport.kind == "segmenter"
    assert passport.recipe["encoder"] == "voco"
    assert passport.label_values == (0, 1, 2)
    assert passport.recipe["encoder_data"] == load_bundle(encoder_bundle).passport.data_fingerprint
    first = read_journal(model_bundle.parent / "journal.jsonl")[0]
    assert first["encoder"] == "voco"
    assert first["encoder_digest"] == passport.recipe["encoder_digest"]


def test_another_encoder_does_not_go_on_with_the_checkpoint_of_the_first(
    phantoms: Any, encoder_bundle: Path, tmp_path: Path
) -> None:
    finetune(SHORT, store=phantoms.store, out=tmp_path / "out", encoder=encoder_bundle)
    with pytest.raises(CheckpointError) as caught:
        finetune(SHORT, store=phantoms.store, out=tmp_path / "out")
    assert caught.value.code == "E_RESUME_DIFF"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backbone.channels=[4, 16]", r"backbone differs .*channels"),
        ("backbone.strides=[2, 4]", r"backbone differs .*strides"),
        ("backbone={name: segresnet}", r"backbone differs .*name unet against segresnet"),
    ],
)
def test_an_encoder_of_another_backbone_is_refused(
    phantoms: Any, encoder_bundle: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        finetune(tiny.SEGMENT, store=phantoms.store, out=tmp_path / "o", encoder=encoder_bundle, overrides=[override])
    assert caught.value.code == "E_CONTRACT"
    assert not (tmp_path / "o").exists()


def test_an_encoder_for_images_prepared_in_another_way_is_refused(
    phantoms: Any, encoder_bundle: Path, tmp_path: Path
) -> None:
    prepared = load_bundle(encoder_bundle).passport.prepare
    other = changed_bundle(encoder_bundle, tmp_path / "other", prepare={**prepared, "spacing_mm": [1.0, 1.0, 1.0]})
    with pytest.raises(CheckpointError, match="prepared with another spacing_mm") as caught:
        finetune(tiny.SEGMENT, store=phantoms.store, out=tmp_path / "o", encoder=other)
    assert caught.value.code == "E_CONTRACT"


def test_an_encoder_for_another_number_of_channels_is_refused(
    make_store: MakeStore, encoder_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="images of 1 channels, found 3") as caught:
        finetune(tiny.SEGMENT, store=make_store(channels=3), out=tmp_path / "o", encoder=encoder_bundle)
    assert caught.value.code == "E_CONTRACT"
    assert caught.value.exit_code == 6


def test_budgets_are_nested_and_count_subjects_not_scans(
    make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArrayStore.open(make_store())
    chosen = []
    for budget in range(1, 7):
        cases = selection._labelled_cases(store, num_labelled=budget, draw=0, column=None)
        chosen.append({case.subject_id for case in cases})
        assert len(chosen[-1]) == budget
        assert len(cases) == 2 * budget, "both scans of a subject come together"
    assert all(few < more for few, more in itertools.pairwise(chosen))


def test_label_draws_are_orders_of_the_same_subjects_and_follow_their_formula(make_store: MakeStore) -> None:
    import hashlib

    store = ArrayStore.open(make_store())
    ids = [f"c{index:02d}" for index in range(12)]
    for draw, prefix in ((0, "label:"), (3, "label3:")):
        order = sorted(ids, key=lambda case: hashlib.sha256((prefix + case).encode()).hexdigest())
        expected = []
        for case in order:
            subject = f"s{int(case[1:]) // 2}"
            if subject not in expected:
                expected.append(subject)
        assert labelled_subjects(store, draw=draw) == expected
    assert labelled_subjects(store) != labelled_subjects(store, draw=3)


def test_only_labelled_training_cases_count_in_a_budget(phantoms: Any) -> None:
    store = ArrayStore.open(phantoms.store)
    labelled = {case.subject_id for case in store.select(split="train", labelled=True)}
    assert set(labelled_subjects(store)) == labelled
    assert len(labelled) == 4


def test_more_labelled_subjects_than_there_are_and_none_at_all_are_refused(
    phantoms: Any, make_store: MakeStore, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"num_labelled is 9, and .* has 4 labelled training subjects"):
        finetune({**tiny.SEGMENT, "num_labelled": 9}, store=phantoms.store, out=tmp_path / "o")
    with pytest.raises(NoInputError, match="no labelled case in the split train"):
        finetune(tiny.SEGMENT, store=make_store(labelled=False), out=tmp_path / "o")
    with pytest.raises(NoInputError, match="no case in the splits val"):
        pretrain({**tiny.MAE, "splits": ["val"]}, store=make_store(name="t"), out=tmp_path / "o")


def test_stores_that_mix_channels_or_slices_with_volumes_are_refused(make_store: MakeStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"several numbers of channels: 6 of 1 and 6 of 3"):
        finetune(tiny.SEGMENT, store=make_store(rgb_too=True, name="a"), out=tmp_path / "o")
    with pytest.raises(ConfigError, match="one slice with volumes"):
        finetune(tiny.SEGMENT, store=make_store(flat_too=True, name="b"), out=tmp_path / "o")


def test_slices_are_trained_in_two_dimensions(make_store: MakeStore, tmp_path: Path) -> None:
    recipe = tiny.shorter(tiny.SEGMENT, 1)
    recipe["task"] = {**recipe["task"], "crop_voxels": [8, 8, 1]}
    passport = load_bundle(finetune(recipe, store=make_store(shape=(10, 10, 1)), out=tmp_path / "o").bundle).passport
    assert passport.spatial_dims == 2
    assert passport.crop_voxels == (8, 8)


def test_raw_hu_need_a_window_and_other_images_may_not_have_one(
    make_store: MakeStore, phantoms: Any, tmp_path: Path
) -> None:
    ct = make_store(modality="CT")
    for augment in ("{preset: mr_light}", "[{name: noise}]"):
        with pytest.raises(ConfigError, match="HU") as caught:
            finetune(SHORT, store=ct, out=tmp_path / "o", overrides=[SMALL_CROP, f"task.augment={augment}"])
        assert caught.value.code == "E_UNIT"
    assert finetune(
        SHORT, store=ct, out=tmp_path / "o", overrides=[SMALL_CROP, "task.augment={preset: ct_light}"]
    ).bundle.exists()
    window = "task.augment=[{name: window}]"
    with pytest.raises(ConfigError, match="HU") as caught:
        finetune(tiny.SEGMENT, store=phantoms.store, out=tmp_path / "p", overrides=[window])
    assert caught.value.code == "E_UNIT"


def test_processes_that_are_not_the_first_write_nothing(
    phantoms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert not module._is_first_process()
    monkeypatch.setattr(module, "fit", lambda *_, **__: module.FitResult(1, {}, None, ()))
    pretrain(tiny.MAE, store=phantoms.store, out=tmp_path / "o")
    assert not (tmp_path / "o").exists()

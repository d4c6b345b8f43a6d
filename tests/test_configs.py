"""Every recipe that we ship is valid, says what it does, and takes a first step on phantoms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from medssl.config import load_yaml
from medssl.data.cohort import Cohort
from medssl.data.prepare import PrepareConfig, prepare
from medssl.data.scan import ScanConfig, scan
from medssl.evaluation.study import StudyConfig, study
from medssl.recipe import FinetuneRecipe, PretrainRecipe, finetune, pretrain

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CLASSES = {"prepare": PrepareConfig, "pretrain": PretrainRecipe, "finetune": FinetuneRecipe, "study": StudyConfig}
SMOKE = ["train.steps=1", "train.warmup_steps=0", "train.batch_size=1", "checks.batches=1"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cohort of six ultrasound pictures and their masks."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(6):
        mask = np.zeros((140, 150), np.uint8)
        mask[40:90, 50 + number : 100] = 1
        grey = 60 + 100 * mask + rng.integers(0, 40, mask.shape)
        Image.fromarray(grey.astype(np.uint8)).save(folder / f"p{number}.png")
        Image.fromarray(mask).save(folder / f"p{number}_mask.png")
    return scan(folder, folder / "out" / "cohort.csv", config=ScanConfig.parse({"modality": "US", "workers": 1})).path


def tell(cohort: Path) -> None:
    """Facts beside a cohort: two classes in every split that has two cases, and a number."""
    lines = ["case_id,diagnosis,malignant,age"]
    for split in ("train", "val", "test"):
        for number, case in enumerate(Cohort.from_csv(cohort).select(split=split)):  # type: ignore[arg-type]
            lines.append(f"{case.case_id},{'ab'[number % 2]},{number % 2},{40 + number}")
    cohort.with_name("facts.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def phantom_store(phantoms: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms with facts."""
    folder = tmp_path_factory.mktemp("told")
    Cohort.from_csv(phantoms.cohort).to_csv(folder / "cohort.csv")
    tell(folder / "cohort.csv")
    prepare(PrepareConfig.parse(tiny.PREPARE), cohort=folder / "cohort.csv", out=folder / "store", workers=1)
    return folder / "store"


@pytest.fixture(scope="module")
def picture_store(pictures: Path) -> Path:
    tell(pictures)
    store = pictures.parent / "store"
    config = PrepareConfig.parse(load_yaml(CONFIGS / "prepare" / "picture.yaml"))
    prepare(config, cohort=pictures, out=store, workers=1)
    return store


def files(kind: str = "*") -> list[Any]:
    return [pytest.param(path, id=f"{path.parent.name}/{path.stem}") for path in sorted(CONFIGS.glob(f"{kind}/*.yaml"))]


@pytest.mark.parametrize("path", files())
def test_a_config_opens_with_what_it_does_needs_and_gives(path: Path) -> None:
    head = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        head.append(line)
    text = "\n".join(head)
    assert len(head) >= 4
    for word in ("Does:", "Needs:", "Gives:"):
        assert word in text


@pytest.mark.parametrize("path", files())
def test_a_config_is_valid(path: Path) -> None:
    CLASSES[path.parent.name].parse(load_yaml(path), source=str(path))


def test_every_folder_of_configs_has_a_command() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == set(CLASSES)


@pytest.mark.parametrize("path", files("prepare"))
def test_a_preparation_runs_on_a_phantom(path: Path, phantoms: Any, pictures: Path, tmp_path: Path) -> None:
    config = PrepareConfig.parse(load_yaml(path))
    if config.spatial_dims == 2:
        result = prepare(config, cohort=pictures, out=tmp_path / "store", workers=1)
        assert result.ledger.exit_code() == 0
        return
    lines = phantoms.cohort.read_text().replace(",MR,", f",{config.modality},").splitlines()[:2]
    cohort = tmp_path / "cohort.csv"
    cohort.write_text("\n".join(lines).replace("scans/", f"{phantoms.scans}/") + "\n")
    result = prepare(config, cohort=cohort, out=tmp_path / "store", workers=1)
    assert result.ledger.exit_code() == 0


@pytest.mark.parametrize("path", files("pretrain"))
def test_a_pretraining_recipe_takes_a_step(path: Path, phantoms: Any, picture_store: Path, tmp_path: Path) -> None:
    overrides = [*SMOKE, "checks.crops_per_case=1"]
    store = picture_store if path.stem.endswith("_2d") else phantoms.store
    assert pretrain(path, store=store, out=tmp_path, overrides=overrides).step == 1


@pytest.mark.parametrize("path", files("finetune"))
def test_a_fine_tuning_recipe_takes_a_step(
    path: Path, phantom_store: Path, picture_store: Path, tmp_path: Path
) -> None:
    store = picture_store if path.stem.endswith("_2d") else phantom_store
    overrides = list(SMOKE)
    if load_yaml(path)["task"].get("augment") == {"preset": "ct_light"}:
        overrides.append("task.augment={preset: mr_light}")
    assert finetune(path, store=store, out=tmp_path, overrides=overrides).step == 1


@pytest.mark.parametrize("path", files("study"))
def test_a_study_can_be_planned_and_names_files_that_exist(path: Path, phantoms: Any, tmp_path: Path) -> None:
    plan = load_yaml(path)
    assert "all" in plan["budgets"]
    result = study(path, store=phantoms.store, out=tmp_path / "o", overrides=["budgets=[2, all]"], dry_run=True)
    assert result.sentences[0].startswith("would run")

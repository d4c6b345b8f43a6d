"""Every recipe that we ship is valid, says what it does, and takes a first step on phantoms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medssl.config import load_yaml
from medssl.data.prepare import PrepareConfig, prepare
from medssl.evaluation.study import StudyConfig, study
from medssl.recipe import FinetuneRecipe, PretrainRecipe, finetune, pretrain

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CLASSES = {"prepare": PrepareConfig, "pretrain": PretrainRecipe, "finetune": FinetuneRecipe, "study": StudyConfig}
SMOKE = ["train.steps=1", "train.warmup_steps=0", "train.batch_size=1", "checks.batches=1"]


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
def test_a_preparation_runs_on_a_phantom(path: Path, phantoms: Any, tmp_path: Path) -> None:
    config = PrepareConfig.parse(load_yaml(path))
    lines = phantoms.cohort.read_text().replace(",MR,", f",{config.modality},").splitlines()[:2]
    cohort = tmp_path / "cohort.csv"
    cohort.write_text("\n".join(lines).replace("scans/", f"{phantoms.scans}/") + "\n")
    result = prepare(config, cohort=cohort, out=tmp_path / "store", workers=1)
    assert result.ledger.exit_code() == 0


@pytest.mark.parametrize("path", files("pretrain"))
def test_a_pretraining_recipe_takes_a_step(path: Path, phantoms: Any, tmp_path: Path) -> None:
    overrides = [*SMOKE, "checks.crops_per_case=1"]
    assert pretrain(path, store=phantoms.store, out=tmp_path, overrides=overrides).step == 1


@pytest.mark.parametrize("path", files("finetune"))
def test_a_fine_tuning_recipe_takes_a_step(path: Path, phantoms: Any, tmp_path: Path) -> None:
    overrides = list(SMOKE)
    if load_yaml(path)["task"].get("augment") == {"preset": "ct_light"}:
        overrides.append("task.augment={preset: mr_light}")
    assert finetune(path, store=phantoms.store, out=tmp_path, overrides=overrides).step == 1


@pytest.mark.parametrize("path", files("study"))
def test_a_study_can_be_planned_and_names_files_that_exist(path: Path, phantoms: Any, tmp_path: Path) -> None:
    plan = load_yaml(path)
    assert "all" in plan["budgets"]
    result = study(path, store=phantoms.store, out=tmp_path / "o", overrides=["budgets=[2, all]"], dry_run=True)
    assert result.sentences[0].startswith("would run")

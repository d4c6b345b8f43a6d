"""Does pretraining help on these data? Pretrained arms against the from-scratch twin at several label budgets.

Every arm gets the same fine-tuning recipe, the same label subsets, the same seeds and the same number of trials; the
only difference is which weights an arm starts from: none, an encoder's, or an encoder's and a decoder's. Trials are
chosen on the validation split; the test split is scored once a run, on the grid of the source, and every comparison is
paired: same subject, same labels, same seed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from pydantic import Field, JsonValue, model_validator

from medssl.config import Config, apply_overrides, dump_yaml, load_yaml
from medssl.data.store import ArrayStore
from medssl.errors import ConfigError, NoInputError
from medssl.evaluation.budgets import publish_budgets
from medssl.evaluation.claims import Claim
from medssl.evaluation.findings import compare_arms, findings, summarise_arms, without_true_negatives
from medssl.evaluation.robustness import RobustnessConfig, summarise_corruptions, summarise_sites
from medssl.evaluation.runs import Run, execute, read_table
from medssl.evaluation.study_page import StudyTables, write_study
from medssl.recipe import FinetuneRecipe, finetune, pretrain
from medssl.runfolder import Journal, RunFolder, atomic_write
from medssl.selection import labelled_subjects

Budget = int | Literal["all"]

_MINE = ("workers", "share")


class ArmConfig(Config):
    """Where the encoder of one arm comes from; neither option means random weights.

    Args:
        bundle: Folder of a pretrained bundle.
        pretrain: Recipe to pretrain one with, once, inside the study's folder; arms with the same recipe share it.
        decoder: Start from the bundle's decoder too, where the method trains one.
    """

    bundle: str | None = None
    pretrain: str | None = None
    decoder: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> ArmConfig:
        if self.bundle is not None and self.pretrain is not None:
            raise ValueError("bundle and pretrain are both given; keep one")
        return self


class StudyConfig(Config):
    """A label-savings study; file names are relative to the study's own file.

    Args:
        finetune: Recipe that every arm is fine-tuned with: a file, or written out.
        arms: Name to source of the encoder.
        reference: The arm that all others are compared with: the from-scratch twin.
        budgets: Numbers of labelled training subjects; ``all`` takes every one.
        seeds: Each seed draws other weights, another order of data and, below ``all``, another label subset.
        trials: Lists of overrides that every arm tries; the best on the validation split is kept for that arm.
        tune_budget: Budget at which trials are compared; the smallest by default.
        tune_seeds: Seeds over which a trial's validation Dice is averaged.
        nsd_tolerance_mm: Tolerance of the surface Dice.
        margin: Dice by which an arm may fall short and still count as equal.
        workers: Runs at the same time, each with its share of the cores.
        share: Several machines that see the folder of the study call the same command and share its runs; each run is
            done once, and a machine that dies gives its run back.
        site: Column of the user's table (named at scan) by which test scores are told apart, such as the hospital.
        robustness: Corrupted copies of the test images that finished models are tried on.
    """

    finetune: str | dict[str, JsonValue]
    arms: dict[str, ArmConfig]
    reference: str = "scratch"
    budgets: tuple[Budget, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    trials: tuple[tuple[str, ...], ...] = ((),)
    tune_budget: Budget | None = None
    tune_seeds: tuple[int, ...] = (0,)
    nsd_tolerance_mm: float = Field(1.0, gt=0)
    margin: float = Field(0.005, ge=0)
    workers: int = Field(1, ge=1)
    share: bool = False
    site: str | None = None
    robustness: RobustnessConfig | None = None

    @model_validator(mode="after")
    def _reference_is_scratch(self) -> StudyConfig:
        if self.reference not in self.arms:
            raise ValueError(f"reference {self.reference} is not among the arms {', '.join(self.arms)}")
        if self.arms[self.reference] != ArmConfig():
            raise ValueError(f"reference {self.reference} has pretrained weights; it must be the from-scratch twin")
        return self


@dataclass(frozen=True)
class StudyResult:
    """What a study found: its sentences, and where the tables and the page lie."""

    sentences: tuple[str, ...]
    report: Path
    summary: pd.DataFrame
    comparisons: pd.DataFrame


def study(
    config: Path | Mapping[str, Any],
    *,
    store: Path,
    out: Path,
    overrides: Iterable[str] = (),
    dry_run: bool = False,
) -> StudyResult:
    """Run a label-savings study, or finish one that was stopped: finished runs are kept.

    Args:
        config: YAML file or mapping of a :class:`StudyConfig`.
        store: What ``prepare`` wrote; needs labelled cases in the splits train and test.
        out: Gets ``results.csv`` (a line a case, structure and run), ``summary.csv``, ``comparisons.csv``,
            ``label_curve.png``, ``report.html``, ``splits/`` (the cases of each budget, to publish) and the runs
            themselves; with ``robustness`` and ``site`` the tables of those too.
        overrides: ``key=value`` strings on top of the configuration.
        dry_run: Check everything and say what would run, but write nothing.

    Raises:
        ConfigError: if the configuration is wrong or a budget exceeds the labelled subjects.
        NoInputError: if the store has no labelled test case.
    """
    source = str(config) if isinstance(config, Path) else "study"
    home = config.parent if isinstance(config, Path) else Path()
    given = load_yaml(config) if isinstance(config, Path) else config
    plan = StudyConfig.parse(apply_overrides(given, overrides), source=source)
    recipe = load_yaml(home / plan.finetune) if isinstance(plan.finetune, str) else dict(plan.finetune)
    for trial in plan.trials:
        FinetuneRecipe.parse(apply_overrides(recipe, trial), source=f"{source}: finetune")
    budgets = _budgets(plan, store)
    _check_tables(plan, ArrayStore.open(store))
    for arm in plan.arms.values():
        _check_arm(arm, plan.trials, recipe, home, store=store)
    sizes = f"{len(plan.arms)} arms x {len(budgets)} budgets x {len(plan.seeds)} seeds"
    if dry_run:
        return StudyResult((f"would run {sizes}",), out / "report.html", pd.DataFrame(), pd.DataFrame())
    with _start(plan, recipe, out):
        publish_budgets(out / "splits", ArrayStore.open(store), budgets=budgets, seeds=plan.seeds)
        encoders = {name: _encoder(arm, home, store=store, out=out, plan=plan) for name, arm in plan.arms.items()}
        make = _Runs(plan, recipe, store, out, encoders)
        chosen = _tune(plan, make, budgets, out)
        runs = [
            make(arm, budget, seed, trial=chosen[arm], split="test")
            for budget in budgets
            for seed in plan.seeds
            for arm in plan.arms
        ]
        results = _in_order(execute(runs, plan.workers, "study"), plan)
        with Claim(out / "report.claim").wait():
            return _conclude(plan, results, runs, store=ArrayStore.open(store), out=out, chosen=chosen)


def _conclude(
    plan: StudyConfig, results: pd.DataFrame, runs: Sequence[Run], *, store: ArrayStore, out: Path,
    chosen: Mapping[str, int],
) -> StudyResult:  # fmt: skip
    counted, left_out = without_true_negatives(results)
    comparisons = compare_arms(counted, plan)
    sentences = (*_tuning_sentence(plan, chosen), *left_out, *findings(counted, comparisons, plan))
    tried = [run for run in runs if run.robustness is not None]
    corrupted = pd.concat([read_table(run, "robustness") for run in tried], ignore_index=True) if tried else None
    tables = StudyTables(
        results=results,
        summary=summarise_arms(counted, plan),
        comparisons=comparisons,
        corrupted=corrupted,
        severities=None if corrupted is None else summarise_corruptions(corrupted, clean=counted, arms=list(plan.arms)),
        sites=None if plan.site is None else summarise_sites(counted, store, column=plan.site, arms=list(plan.arms)),
    )
    report = write_study(out, plan, tables, sentences)
    with contextlib.closing(Journal(out / "journal.jsonl")) as journal:
        journal.log(command="study", runs=len(runs), findings=list(sentences))
    return StudyResult(sentences, report, tables.summary, comparisons)


@contextlib.contextmanager
def _start(plan: StudyConfig, recipe: Mapping[str, Any], out: Path) -> Iterator[None]:
    """Hold the folder alone, or agree with the machines that share it on what is run."""
    resolved = {**plan.to_dict(), "finetune": dict(recipe)}
    if not plan.share:
        with RunFolder(out) as run:
            run.write_recipe(resolved)
            yield
        return
    with Claim(out / "recipe.claim").wait():
        path = out / "recipe.yaml"
        ours = _same_for_all(resolved)
        if path.exists() and _same_for_all(load_yaml(path)) != ours:
            raise ConfigError(
                f"{out}: another machine runs another study here. Give both the same recipe, or another folder.",
                code="E_RESUME_DIFF",
            )
        atomic_write(path, dump_yaml(resolved))
    yield


class _Runs:
    """Makes runs that differ only in arm, budget, seed and trial."""

    def __init__(
        self, plan: StudyConfig, recipe: Mapping[str, Any], store: Path, out: Path, encoders: Mapping[str, Path | None]
    ) -> None:
        self._plan, self._recipe, self._store, self._out, self._encoders = plan, recipe, store, out, encoders
        self._largest = max(_budgets(plan, store))

    def __call__(self, arm: str, budget: int, seed: int, *, trial: int, split: Literal["val", "test"]) -> Run:
        recipe = _arm_recipe(self._recipe, self._plan.trials[trial], self._plan.arms[arm])
        recipe = {**recipe, "seed": seed, "num_labelled": budget, "label_draw": seed}
        encoder = self._encoders[arm]
        return Run(
            arm=arm, budget=budget, seed=seed, trial=trial, split=split, recipe=json.dumps(recipe),
            store=str(self._store),
            encoder=None if encoder is None else str(encoder),
            folder=str(self._out / "runs" / f"{arm}-{budget}-{seed}-{trial}"),
            nsd_tolerance_mm=self._plan.nsd_tolerance_mm,
            threads=max(1, torch.get_num_threads() // self._plan.workers),
            share=self._plan.share,
            robustness=self._corruptions(budget, split),
        )  # fmt: skip

    def _corruptions(self, budget: int, split: str) -> str | None:
        """What the model is tried on: that of the largest budget, unless others are named."""
        asked = self._plan.robustness
        if asked is None or split != "test" or budget not in (asked.budgets or (self._largest,)):
            return None
        return json.dumps(asked.to_dict())


def _budgets(plan: StudyConfig, store: Path) -> tuple[int, ...]:
    opened = ArrayStore.open(store)
    if not opened.select(split="test", labelled=True):
        raise NoInputError(f"{store}: no labelled case in the split test; a study needs them to compare arms.")
    if len(plan.trials) > 1 and not opened.select(split="val", labelled=True):
        raise NoInputError(f"{store}: no labelled case in the split val; trials are chosen there. Give one trial only.")
    total = len(labelled_subjects(opened))
    budgets = tuple(dict.fromkeys(total if budget == "all" else budget for budget in plan.budgets))
    largest = max((*budgets, plan.tune_budget)) if isinstance(plan.tune_budget, int) else max(budgets)
    if largest > total:
        raise ConfigError(f"study: budget {largest} exceeds the {total} labelled training subjects of {store}.")
    return budgets


def _check_tables(plan: StudyConfig, store: ArrayStore) -> None:
    cases = store.select(split="test", labelled=True)
    if plan.site is not None and not any(plan.site in case.facts for case in cases):
        raise ConfigError(
            f"study: no test case of {store.path} has a column {plan.site} in its facts. Name the column at scan "
            "(--columns) and prepare again, or leave site out."
        )
    if plan.robustness is not None:
        plan.robustness.for_case(cases[0])


def _arm_recipe(recipe: Mapping[str, Any], trial: Iterable[str], arm: ArmConfig) -> dict[str, Any]:
    return apply_overrides(recipe, [*trial, f"task.decoder.pretrained={str(arm.decoder).lower()}"])


def _check_arm(
    arm: ArmConfig, trials: Iterable[Iterable[str]], recipe: Mapping[str, Any], home: Path, *, store: Path
) -> None:
    """Find out before the first run whether the arm's encoder can be trained, or loaded by every trial."""
    if arm.pretrain is not None:
        pretrain(home / arm.pretrain, store=store, out=Path(), dry_run=True)
    encoder = None if arm.bundle is None else home / arm.bundle
    for trial in trials:
        tried = _arm_recipe(recipe, trial, arm) if encoder else apply_overrides(recipe, trial)
        finetune(tried, store=store, out=Path(), encoder=encoder, dry_run=True)


def _encoder(arm: ArmConfig, home: Path, *, store: Path, out: Path, plan: StudyConfig) -> Path | None:
    if arm.bundle is not None:
        return home / arm.bundle
    if arm.pretrain is not None:
        folder = out / "pretrain" / Path(arm.pretrain).stem
        with Claim(folder.with_suffix(".claim")).wait() if plan.share else contextlib.nullcontext():
            return pretrain(home / arm.pretrain, store=store, out=folder).bundle
    return None


def _tune(plan: StudyConfig, make: _Runs, budgets: Sequence[int], out: Path) -> dict[str, int]:
    """Trial that each arm does best with on the validation split."""
    if len(plan.trials) == 1:
        return dict.fromkeys(plan.arms, 0)
    wanted = plan.tune_budget
    budget = min(budgets) if wanted is None else max(budgets) if wanted == "all" else wanted
    runs = [
        make(arm, budget, seed, trial=trial, split="val")
        for arm in plan.arms
        for trial in range(len(plan.trials))
        for seed in plan.tune_seeds
    ]
    table = _in_order(execute(runs, plan.workers, "tuning"), plan)
    table, _ = without_true_negatives(table)
    scores = table.groupby(["arm", "trial"], as_index=False)["dice"].mean()
    atomic_write(out / "tuning.csv", scores.to_csv(index=False))
    best = scores.loc[scores.groupby("arm")["dice"].idxmax()]
    return {str(row.arm): int(row.trial) for row in best.itertuples()}


def _in_order(tables: Iterable[pd.DataFrame], plan: StudyConfig) -> pd.DataFrame:
    """All rows in the order of the plan, whoever made them and when."""
    found = pd.concat(list(tables), ignore_index=True)
    place = found["arm"].map({arm: index for index, arm in enumerate(plan.arms)})
    keys = [name for name in ("budget", "seed", "trial", "case_id", "label") if name in found]
    return found.assign(_place=place).sort_values(["_place", *keys], ignore_index=True).drop(columns="_place")


def _same_for_all(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What all machines of a study must agree on."""
    return {key: value for key, value in recipe.items() if key not in _MINE}


def _tuning_sentence(plan: StudyConfig, chosen: Mapping[str, int]) -> list[str]:
    if len(plan.trials) == 1:
        return []
    picks = "; ".join(f"{arm}: {' '.join(plan.trials[trial]) or 'as written'}" for arm, trial in chosen.items())
    return [f"Each arm tried {len(plan.trials)} settings and kept its best on the validation split ({picks})."]

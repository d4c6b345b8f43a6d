"""Does pretraining help on these data? Pretrained arms against the from-scratch twin at several label budgets.

Every arm gets the same fine-tuning recipe, the same label subsets, the same seeds and the same number of trials; the
only difference is which weights an arm starts from: none, an encoder's, or an encoder's and a decoder's. Trials are
chosen on the validation split; the test split is scored once a run, on the grid of the source, and every comparison is
paired: same subject, same labels, same seed.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from pydantic import Field, JsonValue, model_validator

from medssl.config import Config, apply_overrides, dump_yaml, load_yaml
from medssl.data.store import ArrayStore
from medssl.errors import ConfigError, NoInputError
from medssl.evaluation.findings import compare_arms, findings, summarise_arms, without_true_negatives
from medssl.evaluation.predict import score_stored
from medssl.io import digest
from medssl.progress import track
from medssl.recipe import FinetuneRecipe, finetune, labelled_subjects, pretrain
from medssl.report.figures import label_curve
from medssl.report.page import Section, write_report
from medssl.runfolder import RunFolder, atomic_write

Budget = int | Literal["all"]


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


@dataclass(frozen=True)
class _Run:
    """One fine-tuning run of the study: everything a worker needs."""

    arm: str
    budget: int
    seed: int
    trial: int
    split: Literal["val", "test"]
    recipe: str
    store: str
    encoder: str | None
    folder: str
    nsd_tolerance_mm: float
    threads: int


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
            ``label_curve.png``, ``report.html`` and the runs themselves.
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
    for arm in plan.arms.values():
        _check_arm(arm, plan.trials, recipe, home, store=store)
    sizes = f"{len(plan.arms)} arms x {len(budgets)} budgets x {len(plan.seeds)} seeds"
    if dry_run:
        return StudyResult((f"would run {sizes}",), out / "report.html", pd.DataFrame(), pd.DataFrame())
    with RunFolder(out) as run:
        run.write_recipe({**plan.to_dict(), "finetune": recipe})
        encoders = {name: _encoder(arm, home, store=store, out=out) for name, arm in plan.arms.items()}
        make = _Runs(plan, recipe, store, out, encoders)
        chosen = _tune(plan, make, budgets, run)
        runs = [
            make(arm, budget, seed, trial=chosen[arm], split="test")
            for budget in budgets
            for seed in plan.seeds
            for arm in plan.arms
        ]
        results = pd.concat(list(_execute(runs, plan.workers, "study")), ignore_index=True)
        counted, left_out = without_true_negatives(results)
        summary = summarise_arms(counted, plan)
        comparisons = compare_arms(counted, plan)
        sentences = (*_tuning_sentence(plan, chosen), *left_out, *findings(counted, comparisons, plan))
        report = _write(out, plan, results=results, summary=summary, comparisons=comparisons, sentences=sentences)
        run.journal.log(command="study", runs=len(runs), findings=list(sentences))
    return StudyResult(sentences, report, summary, comparisons)


class _Runs:
    """Makes runs that differ only in arm, budget, seed and trial."""

    def __init__(
        self, plan: StudyConfig, recipe: Mapping[str, Any], store: Path, out: Path, encoders: Mapping[str, Path | None]
    ) -> None:
        self._plan, self._recipe, self._store, self._out, self._encoders = plan, recipe, store, out, encoders

    def __call__(self, arm: str, budget: int, seed: int, *, trial: int, split: Literal["val", "test"]) -> _Run:
        recipe = _arm_recipe(self._recipe, self._plan.trials[trial], self._plan.arms[arm])
        recipe = {**recipe, "seed": seed, "num_labelled": budget, "label_draw": seed}
        encoder = self._encoders[arm]
        return _Run(
            arm=arm, budget=budget, seed=seed, trial=trial, split=split, recipe=json.dumps(recipe),
            store=str(self._store),
            encoder=None if encoder is None else str(encoder),
            folder=str(self._out / "runs" / f"{arm}-{budget}-{seed}-{trial}"),
            nsd_tolerance_mm=self._plan.nsd_tolerance_mm,
            threads=max(1, torch.get_num_threads() // self._plan.workers),
        )  # fmt: skip


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


def _encoder(arm: ArmConfig, home: Path, *, store: Path, out: Path) -> Path | None:
    if arm.bundle is not None:
        return home / arm.bundle
    if arm.pretrain is not None:
        return pretrain(home / arm.pretrain, store=store, out=out / "pretrain" / Path(arm.pretrain).stem).bundle
    return None


def _tune(plan: StudyConfig, make: _Runs, budgets: Sequence[int], run: RunFolder) -> dict[str, int]:
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
    table = pd.concat(list(_execute(runs, plan.workers, "tuning")), ignore_index=True)
    table, _ = without_true_negatives(table)
    scores = table.groupby(["arm", "trial"], as_index=False)["dice"].mean()
    atomic_write(run.path / "tuning.csv", scores.to_csv(index=False))
    best = scores.loc[scores.groupby("arm")["dice"].idxmax()]
    return {str(row.arm): int(row.trial) for row in best.itertuples()}


def _execute(runs: Sequence[_Run], workers: int, label: str) -> Iterator[pd.DataFrame]:
    """Score every run, some at the same time; each leaves its own result, so nothing is done twice."""
    if workers == 1:
        yield from (_score(run) for run in track(runs, label))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(_score, run) for run in runs]
        try:
            yield from (future.result() for future in track(as_completed(futures), label, total=len(futures)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _score(run: _Run) -> pd.DataFrame:
    """Fine-tune and score one run, or read what an earlier call left."""
    store, folder = ArrayStore.open(Path(run.store)), Path(run.folder)
    encoder = Path(run.encoder) if run.encoder else None
    origin = digest(encoder / "digests.json") if encoder else "scratch"
    told = f"{run.recipe} {store.fingerprint} {origin} {run.nsd_tolerance_mm}"
    stamp = hashlib.sha256(told.encode()).hexdigest()
    done, mark = folder / f"scores-{run.split}.csv", folder / f"scores-{run.split}.sha256"
    if done.exists() and mark.exists() and mark.read_text() == stamp:
        return pd.read_csv(done, dtype={"case_id": str, "subject_id": str})
    torch.set_num_threads(run.threads)
    result = finetune(json.loads(run.recipe), store=store.path, out=folder, encoder=encoder)
    cases = store.select(split=run.split, labelled=True)
    table = score_stored(result.bundle, cases, nsd_tolerance_mm=run.nsd_tolerance_mm, device="auto")
    for name in ("trial", "seed", "budget", "arm"):
        table.insert(0, name, getattr(run, name))
    atomic_write(done, table.to_csv(index=False))
    atomic_write(mark, stamp)
    return table


def _tuning_sentence(plan: StudyConfig, chosen: Mapping[str, int]) -> list[str]:
    if len(plan.trials) == 1:
        return []
    picks = "; ".join(f"{arm}: {' '.join(plan.trials[trial]) or 'as written'}" for arm, trial in chosen.items())
    return [f"Each arm tried {len(plan.trials)} settings and kept its best on the validation split ({picks})."]


def _write(
    out: Path, plan: StudyConfig, *, results: pd.DataFrame, summary: pd.DataFrame, comparisons: pd.DataFrame,
    sentences: Sequence[str],
) -> Path:  # fmt: skip
    atomic_write(out / "results.csv", results.to_csv(index=False))
    atomic_write(out / "summary.csv", summary.to_csv(index=False))
    atomic_write(out / "comparisons.csv", comparisons.to_csv(index=False))
    curves: dict[str, list[tuple[int, float, float, float]]] = {arm: [] for arm in plan.arms}
    for row in summary.to_dict("records"):
        curves[row["arm"]].append((row["labelled_subjects"], row["dice"], row["low"], row["high"]))
    picture = label_curve(curves, title="Test Dice, mean over structures")
    atomic_write(out / "label_curve.png", picture)
    how = (
        f"{len(plan.seeds)} seeds; a seed draws the label subset, the weights of new layers and the order of data. "
        "Intervals are 95 % and take seeds and test subjects as drawn at random; they and p are of paired differences "
        "wherever two arms are compared. p_subjects swaps the arms subject by subject, for the seeds at hand. No p is "
        "corrected for the number of comparisons."
    )
    sections = [
        Section("Findings", [*sentences, how], pictures={"Dice against labelled subjects": picture}),
        Section("Scores", table=summary.to_dict("records")),  # type: ignore[arg-type]
        Section("Comparisons", table=comparisons.to_dict("records")),  # type: ignore[arg-type]
        Section("Recipe", dump_yaml(plan.to_dict()).splitlines()),
    ]
    return write_report(out / "report.html", "Does pretraining help? A label-savings study", sections=sections)

"""Cross-validation by subject: every labelled case is scored once, by a model that never saw its subject.

The folds are views of one store: an index of their own beside a link to its cases. What is left is an ensemble that
``medssl predict`` takes as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from medssl.config import apply_overrides, load_yaml
from medssl.data.facts import NAME as FACTS
from medssl.data.facts import Facts, read_facts
from medssl.data.store import ArrayStore, IndexRow, write_index
from medssl.errors import ConfigError, NoInputError
from medssl.evaluation.ensemble import open_members
from medssl.evaluation.predict import score_stored
from medssl.evaluation.summary import sentence, summarise
from medssl.io import digest
from medssl.nn.bundle import DIGESTS
from medssl.progress import track
from medssl.recipe import FinetuneRecipe, finetune
from medssl.runfolder import RunFolder, atomic_write, environment_faults, make_folder

_SEGMENTATION = "segmentation"


@dataclass(frozen=True)
class CrossvalResult:
    """Scores of every case by the model that did not see it, their summary, and the folder of the ensemble."""

    ensemble: Path
    cases: pd.DataFrame
    summary: pd.DataFrame

    def sentences(self) -> list[str]:
        """One for each structure."""
        if self.summary.empty:
            return []
        return [sentence(str(label), part) for label, part in self.summary.groupby("label", sort=False)]


def crossval(
    recipe: Path | Mapping[str, Any],
    *,
    store: Path,
    out: Path,
    folds: int = 5,
    encoder: Path | None = None,
    overrides: Iterable[str] = (),
    seed: int = 0,
    nsd_tolerance_mm: float = 1.0,
    device: str = "auto",
    dry_run: bool = False,
) -> CrossvalResult:
    """Fine-tune one model a fold and score each on the subjects that it did not see; finished folds are kept.

    Labelled cases of the split train, and those of no split, are dealt into folds. The split val stays what it is, for
    what a recipe chooses there; cases of the split test are neither trained on nor scored.

    Args:
        recipe: As for ``finetune``, of a segmentation.
        store: What ``prepare`` wrote, with labels.
        out: Gets ``fold_<i>/`` with the run of each, ``cases.csv``, ``summary.csv`` and ``folds.csv``; the folder is an
            ensemble that ``predict`` takes.
        folds: Number of folds.
        encoder: Bundle of a pretrained encoder; None starts from random weights.
        overrides: ``key=value`` strings on top of the recipe.
        seed: Of the deal of subjects.
        nsd_tolerance_mm: Tolerance of the surface Dice.
        device: Of scoring.
        dry_run: Deal and check everything, but train and write nothing.

    Raises:
        ConfigError: if the recipe is wrong, there are more folds than subjects, or a fold would lack a structure.
        NoInputError: if there is no labelled case.
    """
    given = load_yaml(recipe) if isinstance(recipe, Path) else recipe
    plan = FinetuneRecipe.parse(
        apply_overrides(given, overrides), source=str(recipe) if isinstance(recipe, Path) else "recipe"
    )
    if plan.task["name"] != _SEGMENTATION:
        raise ConfigError(f"crossval: task {plan.task['name']}; only {_SEGMENTATION} is cross-validated.")
    content = json.loads((ArrayStore.open(store).path / "store.json").read_bytes())
    rows = [IndexRow(**{**row, "label_values": tuple(row["label_values"])}) for row in content["cases"]]
    pool = [row for row in rows if row.labelled and row.split in {None, "train"}]
    held = {row.subject_id for row in rows if row.split in {"val", "test"}}
    if not pool:
        raise NoInputError(f"{store}: no labelled case in the split train. Scan and prepare again with labels.")
    structures: dict[str, set[int]] = {}
    for row in pool:
        if row.subject_id not in held:
            structures.setdefault(row.subject_id, set()).update(row.label_values)
    fold_of = deal(structures, folds, seed=seed)
    if dry_run:
        finetune(plan.to_dict(), store=store, out=out, encoder=encoder, dry_run=True)
        return CrossvalResult(out, pd.DataFrame(), pd.DataFrame())
    parts = []
    with RunFolder(out) as run:
        run.write_recipe({**plan.to_dict(), "folds": folds, "fold_seed": seed, "encoder": str(encoder or "")})
        table = pd.DataFrame({"subject_id": list(fold_of), "fold": list(fold_of.values())})
        atomic_write(out / "folds.csv", table.to_csv(index=False))
        for fold in track(range(folds), "crossval"):
            view = _view(store, out / "stores" / f"fold_{fold}", content, _resplit(rows, fold_of, fold))
            result = finetune(plan.to_dict(), store=view, out=out / f"fold_{fold}", encoder=encoder)
            scores = _scores(result.bundle, view, nsd_tolerance_mm=nsd_tolerance_mm, device=device)
            scores.insert(0, "fold", fold)
            parts.append(scores)
        cases = pd.concat(parts, ignore_index=True)
        summary = summarise(cases, seed=seed)
        atomic_write(out / "cases.csv", cases.to_csv(index=False))
        atomic_write(out / "summary.csv", summary.to_csv(index=False))
        open_members(out)
        found = CrossvalResult(out, cases, summary)
        run.journal.log(command="crossval", findings=found.sentences())
    return found


def deal(structures: Mapping[str, Iterable[int]], folds: int, *, seed: int = 0) -> dict[str, int]:
    """Deal subjects into folds so that each structure is spread as evenly as can be.

    Subjects come in the order of their rarest structure, and of a hash; each goes to the fold with the fewest subjects
    of that structure, then with the fewest subjects.

    Args:
        structures: Subject to the label values that occur in its cases.
        folds: Number of folds, at least 2.
        seed: Of the hash.

    Returns:
        Subject to fold.

    Raises:
        ConfigError: E_FOLD, if there are fewer subjects than folds, or a fold would have no subject of a structure.
    """
    if not 2 <= folds <= len(structures):
        raise ConfigError(
            f"folds is {folds}, with {len(structures)} labelled subjects; from 2 to as many as there are subjects are "
            "possible.",
            code="E_FOLD",
        )
    held = {subject: sorted(set(values) - {0}) for subject, values in structures.items()}
    number = Counter(value for values in held.values() for value in values)
    short = [value for value, count in sorted(number.items()) if count < folds]
    if short:
        counts = ", ".join(f"{value} in {number[value]}" for value in short)
        raise ConfigError(
            f"folds is {folds}, and label values occur in fewer subjects ({counts}), so that a fold would lack them. "
            f"Take {max(2, min(number.values()))} folds at most, or leave the structure out."
            if min(number.values()) >= 2
            else f"folds is {folds}, and label values occur in one subject alone ({counts}); no model can learn and be "
            "scored on them. Merge them, or leave them out of the labels.",
            code="E_FOLD",
        )
    rarest = {
        subject: min(values, key=lambda value: (number[value], value), default=0) for subject, values in held.items()
    }

    def order(subject: str) -> tuple[int, str]:
        told = hashlib.sha256(f"fold{seed}:{subject}".encode()).hexdigest()
        return number.get(rarest[subject], len(held) + 1), told

    found: dict[str, int] = {}
    size, seen = Counter[int](), Counter[tuple[int, int]]()
    for subject in sorted(held, key=order):
        fold = min(range(folds), key=lambda f: (seen[f, rarest[subject]], size[f], f))
        found[subject] = fold
        size[fold] += 1
        seen.update((fold, value) for value in held[subject])
    lacking = [(fold, value) for fold in range(folds) for value in number if not seen[fold, value]]
    if lacking:
        fold, value = lacking[0]
        raise ConfigError(
            f"fold {fold} of {folds} has no subject with label value {value}, which occurs in {number[value]}. Take "
            "fewer folds, or another seed.",
            code="E_FOLD",
        )
    return found


def _resplit(rows: Sequence[IndexRow], fold_of: Mapping[str, int], fold: int) -> list[IndexRow]:
    """The index with the fold as its test split; what was held out before, or has no label, belongs to no split."""
    found = []
    for row in rows:
        is_dealt = row.labelled and row.split in {None, "train"} and row.subject_id in fold_of
        if is_dealt:
            found.append(replace(row, split="test" if fold_of[row.subject_id] == fold else "train"))
        else:
            found.append(row if row.split == "val" else replace(row, split=None))
    return found


def _view(store: Path, folder: Path, content: Mapping[str, Any], rows: Sequence[IndexRow]) -> Path:
    """A store of the same cases with other splits; the cases themselves are linked."""
    make_folder(folder)
    for name in ("cases", "atlas.json"):
        link, target = folder / name, (store / name).resolve()
        with environment_faults(link, "linking"):
            link.unlink(missing_ok=True)
            if target.exists():
                link.symlink_to(target)
    facts = read_facts(store / FACTS) if content.get("facts_digest") else Facts()
    write_index(
        folder, rows, prepare=content["prepare"], unit=content["unit"], modality=content["modality"], facts=facts
    )
    return folder


def _scores(bundle: Path, view: Path, *, nsd_tolerance_mm: float, device: str) -> pd.DataFrame:
    """Score the fold, or read what an earlier call left for the same weights and cases."""
    store = ArrayStore.open(view)
    told = f"{digest(bundle / DIGESTS)} {store.fingerprint} {nsd_tolerance_mm}"
    stamp = hashlib.sha256(told.encode()).hexdigest()
    done, mark = bundle.parent / "scores.csv", bundle.parent / "scores.sha256"
    if done.exists() and mark.exists() and mark.read_text() == stamp:
        return pd.read_csv(done, dtype={"case_id": str, "subject_id": str})
    cases = store.select(split="test", labelled=True)
    table = score_stored(bundle, cases, nsd_tolerance_mm=nsd_tolerance_mm, device=device)
    atomic_write(done, table.to_csv(index=False))
    atomic_write(mark, stamp)
    return table

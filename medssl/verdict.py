"""From a classifier's scores to probabilities, a value and a decision; what is chosen, on validation cases only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float64
from pydantic import Field
from scipy import optimize, special

from medssl.config import Config
from medssl.data.splits import Split
from medssl.data.store import StoredCase
from medssl.tasks.classification import Classification
from medssl.tasks.targets import NO_LABEL, SEPARATOR, Kind, Targets

_LEAST_CASES = 10
_TEMPERATURES = (0.05, 20.0)


class Verdict(Config):
    """How scores are read; part of a classifier's passport.

    Args:
        column: Column of the table that was learned.
        kind: What it holds.
        classes: Names in the order of the outputs; of a binary target the second is the positive one.
        level: What is judged: an ``image``, a ``bag`` of all images of a subject, or a volume by its ``slices``.
        mean: Of the numbers of the training cases.
        spread: Their standard deviation.
        temperature: Scores are divided by it.
        thresholds: On the probability of the positive class, or of each label.
        chosen_on: Split on which temperature and thresholds were chosen; None where they were not.
        chosen_cases: Number of its cases.
    """

    column: str
    kind: Kind
    classes: tuple[str, ...] = ()
    level: Literal["image", "bag", "slices"] = "image"
    mean: float = 0.0
    spread: float = 1.0
    temperature: float = Field(1.0, gt=0)
    thresholds: tuple[float, ...] = ()
    chosen_on: Split | None = None
    chosen_cases: int = Field(0, ge=0)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of ``predictions.csv`` behind the names of case and subject."""
        if self.kind in {"ordinal", "regression"}:
            return ("value", "decision")
        return (*(f"p_{name}" for name in self.classes), "decision")

    def row(self, found: Float[np.ndarray, " k"]) -> dict[str, float | str]:
        """Named probabilities, or the value, and the decision, of what :meth:`probabilities` gives of one case."""
        if self.kind == "regression":
            return {"value": float(found[0]), "decision": ""}
        if self.kind == "ordinal":
            return {"value": _expected(found, self.classes), "decision": self.classes[int((found >= 0.5).sum())]}
        named: dict[str, float | str] = {f"p_{name}": float(p) for name, p in zip(self.classes, found, strict=True)}
        if self.kind == "multilabel":
            held = [name for name, p, at in zip(self.classes, found, self.thresholds, strict=True) if p >= at]
            return {**named, "decision": SEPARATOR.join(held) or NO_LABEL}
        if self.kind == "binary":
            return {**named, "decision": self.classes[int(found[1] >= self.thresholds[0])]}
        return {**named, "decision": self.classes[int(found.argmax())]}

    def probabilities(self, scores: Float[np.ndarray, "n k"]) -> Float64[np.ndarray, "n k"]:
        """Of each class or label; of grades, of being at least the second, the third, and so on; or the number."""
        if self.kind == "regression":
            return self.mean + self.spread * np.asarray(scores, np.float64)
        tempered = np.asarray(scores, np.float64) / self.temperature
        found: Float64[np.ndarray, "n k"] = (
            special.softmax(tempered, axis=1) if self.kind in {"binary", "multiclass"} else special.expit(tempered)
        )
        return found


def choose(
    task: Classification, cases: Sequence[StoredCase], *, split: Split, bags: Mapping[str, Sequence[StoredCase]]
) -> tuple[Verdict, list[str]]:
    """Choose temperature and thresholds on validation cases; and say what could not be chosen.

    Args:
        task: After training.
        cases: Validation cases; never trained on.
        split: Their split.
        bags: For each case id all cases of its bag.

    Reference: Guo, Pleiss, Sun, Weinberger, On calibration of modern neural networks, ICML 2017, arXiv:1706.04599,
    section 4.2; Youden, Cancer 1950.
    Deviations: none.
    """
    targets, config = task.targets, task.config
    count = {"binary": 1, "multilabel": len(targets.classes)}.get(targets.kind, 0)
    plain = Verdict(
        column=targets.column,
        kind=targets.kind,
        classes=targets.classes,
        level=config.level,
        mean=targets.mean,
        spread=targets.spread,
        thresholds=(0.5,) * count,
    )
    if targets.kind == "regression":
        return plain, []
    if not cases:
        return plain, [f"no case in split {split}: temperature 1 and threshold 0.5 were not chosen on validation"]
    classifier = task.classifier()
    scores = np.stack([classifier.scores(bags.get(case.case_id, (case,))) for case in cases])
    truth = np.stack([targets.values[case.case_id] for case in cases])
    verdict, said = plain.model_copy(update={"chosen_on": split, "chosen_cases": len(cases)}), []
    if config.calibrate and len(cases) >= _LEAST_CASES:
        verdict = verdict.model_copy(update={"temperature": _temperature(scores, truth, targets)})
    elif config.calibrate:
        said.append(f"temperature 1: {len(cases)} cases in split {split}, and {_LEAST_CASES} are needed to fit one")
    if count and config.threshold == "youden":
        p = verdict.probabilities(scores)
        pairs = [(p[:, 1], truth[:, 0] == 1)] if targets.kind == "binary" else list(zip(p.T, truth.T == 1, strict=True))
        chosen = [_youden(one, is_held) for one, is_held in pairs]
        names = targets.classes[-1:] if targets.kind == "binary" else targets.classes
        alone = [name for name, found in zip(names, chosen, strict=True) if found is None]
        if alone:
            said.append(f"threshold 0.5 for {', '.join(alone)}: split {split} has cases of one kind only")
        verdict = verdict.model_copy(update={"thresholds": tuple(0.5 if one is None else one for one in chosen)})
    return verdict, said


def _temperature(scores: Float64[np.ndarray, "n k"], truth: Float[np.ndarray, "n j"], targets: Targets) -> float:
    """The temperature of the smallest log loss, between 0.05 and 20."""
    if targets.kind == "ordinal":
        truth = (truth > np.arange(targets.outputs)).astype(np.float64)

    def loss(log_temperature: float) -> float:
        tempered = scores / np.exp(log_temperature)
        if targets.kind in {"binary", "multiclass"}:
            picked = special.log_softmax(tempered, axis=1)[np.arange(len(truth)), truth[:, 0].astype(int)]
            return float(-picked.mean())
        return float((np.logaddexp(0, tempered) - truth * tempered).mean())

    found = optimize.minimize_scalar(loss, bounds=np.log(_TEMPERATURES).tolist(), method="bounded")
    return float(np.exp(found.x)) if loss(float(found.x)) < loss(0.0) else 1.0


def _youden(p: Float64[np.ndarray, " n"], is_held: Bool[np.ndarray, " n"]) -> float | None:
    """Threshold with the largest sum of sensitivity and specificity, midway between two cases; None for one kind."""
    if is_held.all() or not is_held.any():
        return None
    values = np.unique(p)
    middles = np.concatenate(([0.0], (values[1:] + values[:-1]) / 2, [1.0]))
    decided = p >= middles[:, None]
    gain = (decided & is_held).sum(axis=1) / is_held.sum() + (~decided & ~is_held).sum(axis=1) / (~is_held).sum()
    best = middles[gain >= gain.max() - 1e-12]
    return float(best[np.abs(best - 0.5).argmin()])


def _expected(p: Float64[np.ndarray, " j"], classes: Sequence[str]) -> float:
    """Expected grade: of grades that are numbers their mean, else the mean of their place, from 0."""
    try:
        grades = np.array([float(name) for name in classes])
    except ValueError:
        grades = np.arange(len(classes), dtype=np.float64)
    return float(grades[0] + (np.diff(grades) * p).sum())

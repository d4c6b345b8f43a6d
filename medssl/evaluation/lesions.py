"""Detection of single lesions: each connected component of a structure is one, and is found, missed or invented.

Components are connected by face, edge or corner: 26 neighbours, in one slice 8. By ``iou``, the default, lesions are
matched one to one, first as many as can be, then with the largest sum of intersection over union; pairs below the
threshold do not match. By ``any``, one shared voxel finds a lesion, and one predicted component may find several: the
usual rule for small lesions, which a prediction of one large blob satisfies, so say which was used.

Counts over cases are sums: sensitivity = found / reference lesions, precision = found / (found + invented),
F1 = 2 found / (2 found + missed + invented). Where the divisor is 0 the value is not defined and left empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Float64, Int64, Integer
from scipy import ndimage, optimize, sparse

from medssl.evaluation.statistics import bootstrap
from medssl.geometry import Geometry

Rule = Literal["iou", "any"]

FOUND, MISSED, INVENTED = "found", "missed", "invented"
FP_PER_CASE = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


class Lesion(NamedTuple):
    """One row of the table of lesions.

    Args:
        kind: ``found`` and ``missed`` lesions are of the reference, ``invented`` ones of the prediction.
        lesion: Number of the component in its map, from 1, in the order of its first voxel.
        reference_ml: Volume of the reference lesion; 0 for an invented one.
        predicted_ml: Volume of the predicted lesions that found it, or of the invented one.
        iou: Of the matched pair, by ``any`` the largest; 0 without one.
        score: Largest score of the predicted lesions in question; NaN where there are no scores or no such lesion.
    """

    kind: str
    lesion: int
    reference_ml: float
    predicted_ml: float
    iou: float
    score: float


def find_lesions(
    prediction: Bool[np.ndarray, "x y z"],
    reference: Bool[np.ndarray, "x y z"],
    *,
    geometry: Geometry,
    rule: Rule = "iou",
    min_iou: float = 0.1,
    scores: Float[np.ndarray, "x y z"] | None = None,
) -> list[Lesion]:
    """Every lesion of the reference, found or missed, then every invented one.

    Args:
        prediction: Mask on the grid of ``geometry``.
        reference: Mask of the same shape.
        geometry: For volumes in ml.
        rule: See the module.
        min_iou: Smallest intersection over union of a match, above 0; not used by ``any``.
        scores: How sure the model is of each voxel; a predicted lesion has the largest inside it.
    """
    labels_p, num_p = _components(prediction)
    labels_r, num_r = _components(reference)
    shared = _shared(labels_p, labels_r, (num_p, num_r))
    sizes_p, sizes_r = (np.bincount(labels.ravel(), minlength=num + 1)[1:].astype(np.float64)
                        for labels, num in ((labels_p, num_p), (labels_r, num_r)))  # fmt: skip
    iou = shared / (sizes_p[:, None] + sizes_r[None, :] - shared)
    hits = shared > 0 if rule == "any" else _matched(iou, min_iou)
    ml = abs(float(np.linalg.det(geometry.affine[:3, :3]))) / 1000
    peaks = np.full(num_p, np.nan)
    if scores is not None and num_p:
        peaks = np.asarray(ndimage.maximum(scores, labels_p, index=np.arange(1, num_p + 1)), dtype=np.float64)
    rows = []
    for index in range(num_r):
        own = hits[:, index]
        volume, best = float(sizes_r[index] * ml), float(iou[own, index].max(initial=0.0))
        score = float(peaks[own].max()) if own.any() else math.nan
        rows.append(
            Lesion(FOUND if own.any() else MISSED, index + 1, volume, float(sizes_p[own].sum() * ml), best, score)
        )
    rows.extend(
        Lesion(INVENTED, index + 1, 0.0, float(sizes_p[index] * ml), 0.0, float(peaks[index]))
        for index in np.flatnonzero(~hits.any(axis=1)).tolist()
    )
    return rows


def lesion_tables(
    lesions: pd.DataFrame, cases: pd.DataFrame, *, num: int = 2000, seed: int = 0
) -> dict[str, pd.DataFrame]:
    """Lesions of all cases, counted by case, pooled with 95 % intervals over subjects, and as curves.

    Args:
        lesions: One row a lesion: ``case_id, subject_id, label`` and the fields of :class:`Lesion`.
        cases: One row a case and label that was searched: ``case_id, subject_id, label``.
        num: Draws of subjects.
        seed: Of the draws.

    Returns:
        ``lesions`` as given; ``lesion_cases`` with ``found, missed, invented, sensitivity, precision, f1`` by case, the
        lowest F1 first; ``lesion_summary`` with ``label, metric, value, low, high, cases, subjects, found, missed,
        invented, note``; where lesions have scores also ``froc`` with ``label, score, fp_per_case, sensitivity,
        precision`` from the highest score down, and in the summary ``ap``, the sensitivity at each of seven numbers of
        false positives a case, and their mean, ``froc_mean``. A ``note`` says why a cell is empty.

    Reference: Setio et al., Validation of automatic detection of pulmonary nodules: LUNA16, Medical Image Analysis
        2017, arXiv:1612.08012, section 3.3 (FROC and its mean at 1/8 to 8 false positives).
    Deviations: which lesion a component finds is decided once, by overlap, and not again at each score; between two
        points of the curve the lower sensitivity counts.
    """
    counts = _count(lesions, cases)
    found = {
        "lesions": lesions,
        "lesion_cases": counts,
        "lesion_summary": _summary(lesions, counts, num=num, seed=seed),
    }
    return {**found, "froc": _froc(lesions, counts)} if lesions["score"].notna().any() else found


def lesion_sentences(summary: pd.DataFrame) -> list[str]:
    """What the table ``lesion_summary`` says, one sentence a label."""
    found = []
    for label, part in summary.groupby("label"):
        rows = {str(row["metric"]): row for _, row in part.iterrows()}
        first = rows["f1"]
        shown = [_shown(name, rows[name]) for name in ("sensitivity", "precision", "f1", "ap") if name in rows]
        found.append(
            f"Lesions of label {label}: {first[FOUND]} of {first[FOUND] + first[MISSED]} found, {first[INVENTED]} "
            f"invented in {first['cases']} cases; {', '.join(shown)}."
        )
    return found


def _count(lesions: pd.DataFrame, cases: pd.DataFrame) -> pd.DataFrame:
    """One row for each of ``cases``, those with the lowest F1 first."""
    names = ["case_id", "subject_id", "label"]
    table = cases[names].reset_index(drop=True)
    for kind in (FOUND, MISSED, INVENTED):
        counts = lesions[lesions["kind"] == kind].groupby(names).size().rename(kind).reset_index()
        table = table.merge(counts, how="left", on=names)
        table[kind] = table[kind].fillna(0).astype(int)
    rates = [_rates(row) for row in table[[FOUND, MISSED, INVENTED]].to_numpy(dtype=np.float64)]
    table[["sensitivity", "precision", "f1"]] = np.array(rates).reshape(-1, 3)
    is_empty = table[[FOUND, MISSED]].sum(axis=1) == 0
    table["note"] = np.where(is_empty, "no lesion in the reference", "")
    return table.sort_values(["f1", "invented"], ascending=[True, False], kind="stable").reset_index(drop=True)


def _summary(lesions: pd.DataFrame, counts: pd.DataFrame, *, num: int, seed: int) -> pd.DataFrame:
    """Pooled detection of each label."""
    rows = []
    for label, part in counts.groupby("label"):
        own = lesions[lesions["label"] == label]
        curves = _Curves(own, part["case_id"].tolist()) if own["score"].notna().any() else None
        numbers = part[[FOUND, MISSED, INVENTED]].to_numpy(dtype=np.float64)
        names = ["sensitivity", "precision", "f1", "fp_per_case"]
        if curves is not None:
            names += ["ap", *(f"sensitivity_at_{rate:g}_fp" for rate in FP_PER_CASE), "froc_mean"]

        def measures(chosen: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " k"]:
            sums = numbers[chosen].sum(axis=0)  # noqa: B023  used within this turn of the loop only
            found = [*_rates(sums), sums[2] / len(chosen)]
            return np.array(found + (curves.measures(chosen) if curves is not None else []))  # noqa: B023

        estimates = bootstrap(measures, part["subject_id"].tolist(), num=num, seed=seed)
        sizes = {
            "cases": len(part), "subjects": part["subject_id"].nunique(),
            **{kind: int(part[kind].sum()) for kind in (FOUND, MISSED, INVENTED)},
        }  # fmt: skip
        for name, estimate in zip(names, estimates, strict=True):
            note = _note(name, estimate.value, estimate.low)
            found = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
            rows.append({"label": label, "metric": name, **found, **sizes, "note": note})
    return pd.DataFrame(rows)


def _froc(lesions: pd.DataFrame, counts: pd.DataFrame) -> pd.DataFrame:
    """Points of the curves; cases without a lesion count among the cases."""
    parts = []
    for label, part in counts.groupby("label"):
        own = lesions[lesions["label"] == label]
        if own["score"].notna().any():
            points = _Curves(own, part["case_id"].tolist()).points(np.arange(len(part)))
            parts.append(points.assign(label=label))
    columns = ["label", "score", "fp_per_case", "sensitivity", "precision"]
    return pd.concat(parts, ignore_index=True)[columns]


class _Curves:
    """Curves over the scores of one label, for any draw of its cases."""

    def __init__(self, lesions: pd.DataFrame, case_ids: Sequence[str]) -> None:
        place = {case_id: index for index, case_id in enumerate(case_ids)}
        table = lesions.assign(place=lesions["case_id"].map(place))
        scored = table[table["kind"] != MISSED].sort_values("score", ascending=False, kind="stable")
        self._place = scored["place"].to_numpy()
        self._score = scored["score"].to_numpy(dtype=np.float64)
        self._is_found = (scored["kind"] == FOUND).to_numpy()
        real = table[table["kind"] != INVENTED]["place"].to_numpy()
        self._num_real = np.bincount(real, minlength=len(case_ids))
        # the last of each run of equal scores: a threshold takes all of them or none
        self._is_end = np.append(self._score[1:] != self._score[:-1], True)[: len(self._score)]

    def points(self, chosen: Int64[np.ndarray, " n"]) -> pd.DataFrame:
        times = np.bincount(chosen, minlength=len(self._num_real))
        weight = times[self._place]
        found = np.cumsum(weight * self._is_found)[self._is_end]
        invented = np.cumsum(weight * ~self._is_found)[self._is_end]
        with np.errstate(invalid="ignore", divide="ignore"):
            return pd.DataFrame(
                {
                    "score": self._score[self._is_end],
                    "fp_per_case": invented / len(chosen),
                    "sensitivity": found / (times * self._num_real).sum(),
                    "precision": found / (found + invented),
                }
            )

    def measures(self, chosen: Int64[np.ndarray, " n"]) -> list[float]:
        """AP, sensitivity at each of the fixed rates, and the mean of these."""
        points = self.points(chosen)
        sensitivity = points["sensitivity"].to_numpy()
        if np.isnan(sensitivity).any() or not len(sensitivity):
            return [math.nan] * (len(FP_PER_CASE) + 2)
        steps = np.diff(sensitivity, prepend=0.0)
        ap = float((steps * np.nan_to_num(points["precision"].to_numpy())).sum())
        rates = points["fp_per_case"].to_numpy()
        at = [float(sensitivity[rates <= rate].max(initial=0.0)) for rate in FP_PER_CASE]
        return [ap, *at, float(np.mean(at))]


def _components(mask: Bool[np.ndarray, "x y z"]) -> tuple[Integer[np.ndarray, "x y z"], int]:
    labels, num = ndimage.label(mask, structure=np.ones((3, 3, 3), dtype=bool))
    return labels, int(num)


def _shared(
    labels_p: Integer[np.ndarray, "x y z"], labels_r: Integer[np.ndarray, "x y z"], sizes: tuple[int, int]
) -> Float64[np.ndarray, "p r"]:
    """Voxels that each predicted component has in common with each of the reference."""
    both = (labels_p > 0) & (labels_r > 0)
    pairs = (labels_p[both] - 1, labels_r[both] - 1)
    return np.asarray(sparse.coo_array((np.ones(len(pairs[0])), pairs), shape=sizes).toarray())


def _matched(iou: Float64[np.ndarray, "p r"], min_iou: float) -> Bool[np.ndarray, "p r"]:
    """One to one: as many pairs as can be, among these choices the largest sum of overlaps."""
    is_pair = iou >= min_iou
    worth = np.where(is_pair, 1 + iou / (min(iou.shape) + 1), 0.0)
    rows, columns = optimize.linear_sum_assignment(worth, maximize=True)
    hits = np.zeros(iou.shape, dtype=bool)
    hits[rows, columns] = is_pair[rows, columns]
    return hits


def _rates(counts: Float64[np.ndarray, " 3"]) -> tuple[float, float, float]:
    """Sensitivity, precision and F1 of numbers found, missed and invented."""
    found, missed, invented = counts.tolist()

    def share(part: float, whole: float) -> float:
        return part / whole if whole else math.nan

    return (
        share(found, found + missed),
        share(found, found + invented),
        share(2 * found, 2 * found + missed + invented),
    )


def _shown(metric: str, row: pd.Series[Any]) -> str:
    name = {"f1": "F1", "ap": "AP"}.get(metric, metric)
    if math.isnan(row["value"]):
        return f"{name} not defined ({row['note']})"
    if math.isnan(row["low"]):
        return f"{name} {row['value']:.3f}"
    return f"{name} {row['value']:.3f} (95 % interval {row['low']:.3f} to {row['high']:.3f})"


def _note(name: str, value: float, low: float) -> str:
    if math.isnan(value):
        undefined = {"precision": "no lesion was predicted", "f1": "no lesion in any map"}
        return undefined.get(name, "no lesion in any reference")
    return "one subject: no interval" if math.isnan(low) else ""

"""Do new images look like those that a model was trained on? Told by the distance of their features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Float64, Int64
from pydantic import Field

from medssl.config import Config
from medssl.data.splits import Split
from medssl.errors import ConfigError, NoInputError
from medssl.evaluation.decisions import auroc, curve
from medssl.evaluation.embeddings import Embeddings
from medssl.evaluation.statistics import bootstrap
from medssl.report.page import Section, write_report
from medssl.runfolder import RunFolder, atomic_write

_FLOOR = 1e-12
_FEWEST = 5


class DriftConfig(Config):
    """How new images are compared with those that were trained on.

    Args:
        neighbours: The distance of a case is that to its so many-th nearest training case; at most all of them.
        train_split: Split of the reference that is known to the model.
        alarm: Share of the held-out cases of the reference that lie below the threshold above which a new case is
            called far.
        draws: Of the bootstrap.
        seed: Of the bootstrap.
    """

    neighbours: int = Field(10, ge=1)
    train_split: Split = "train"
    alarm: float = Field(0.95, gt=0, lt=1)
    draws: int = Field(2000, ge=100)
    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class DriftResult:
    """Distances, the measures that follow from them, and what may be said."""

    distances: pd.DataFrame
    metrics: pd.DataFrame
    sentences: tuple[str, ...]


def drift(
    reference: Path, new: Path, *, out: Path, config: DriftConfig | None = None, dry_run: bool = False
) -> DriftResult:
    """Measure how far new cases lie from the training cases, against held-out cases of the same source.

    Args:
        reference: Table that ``medssl embed`` wrote of the store that the model was trained on.
        new: Table of the new images, by the same bundle.
        out: Gets ``distances.csv`` (farthest first), ``metrics.csv`` and ``report.html``.
        config: Options.
        dry_run: Check and compute; write nothing.

    Raises:
        ConfigError: ``E_CONTRACT``, if the tables come from two encoders or two levels.
        NoInputError: if a set is too small to compare.
        ReadError: if a table cannot be read.

    Reference: Sun et al., Out-of-distribution Detection with Deep Nearest Neighbors, ICML 2022, arXiv:2204.06507,
        section 3 (distance to the k-th neighbour of normalised features).
    Deviations: each feature is first brought to mean 0 and spread 1 over the training cases; images of the same
        subject are no neighbours.
    """
    options = config or DriftConfig()
    known, fresh = (Embeddings.read(path).by_case() for path in (reference, new))
    for key in ("bundle_digest", "level"):
        if known.about.get(key) != fresh.about.get(key):
            raise ConfigError(
                f"{new}: made with another {key.replace('_', ' ')} than {reference}. Embed both with the same bundle "
                "at the same level.",
                code="E_CONTRACT",
            )
    is_train = (known.table["split"] == options.train_split).to_numpy()
    sizes = {f"split {options.train_split}": is_train.sum(), "other splits": (~is_train).sum(), "new": len(fresh.table)}
    for name, size in sizes.items():
        if size < _FEWEST:
            raise NoInputError(
                f"drift: {size} cases of {name}; at least {_FEWEST} are needed. Embed more cases, or name train_split."
            )
    subjects = known.table["subject_id"].astype(str).to_numpy()
    training = known.vectors[is_train]
    tables = []
    for name, vectors, table in (
        ("held out", known.vectors[~is_train], known.table[~is_train]),
        ("new", fresh.vectors, fresh.table),
    ):
        own = table["subject_id"].astype(str).to_numpy()
        same = own[:, None] == subjects[is_train][None]
        distance = neighbour_distance(vectors, training, k=options.neighbours, excluded=same)
        tables.append(table[["case_id", "subject_id"]].assign(set=name, distance=distance))
    distances = pd.concat(tables, ignore_index=True)
    held_out = distances.loc[distances["set"] == "held out", "distance"].to_numpy()
    threshold = float(np.quantile(held_out, options.alarm))
    distances["far"] = distances["distance"] > threshold
    distances["percentile"] = 100 * np.searchsorted(np.sort(held_out), distances["distance"]) / len(held_out)
    distances = distances.sort_values(["distance", "case_id"], ascending=[False, True], ignore_index=True)
    metrics = _metrics(distances, threshold, options)
    result = DriftResult(distances, metrics, _sentences(distances, metrics, options))
    if not dry_run:
        _write(out, result, options)
    return result


def neighbour_distance(
    vectors: Float[np.ndarray, "n d"],
    training: Float[np.ndarray, "m d"],
    *,
    k: int,
    excluded: np.ndarray | None = None,
) -> Float64[np.ndarray, " n"]:
    """Distance of each vector to its ``k``-th nearest training vector, of unit vectors: 0 to 2.

    Args:
        vectors: To be measured.
        training: Known ones; each feature is brought to mean 0 and spread 1 over them.
        k: Which neighbour; the farthest where there are fewer.
        excluded: ``n x m``, true where a training vector is no neighbour of a vector; not all of a row.
    """
    mean, spread = training.mean(axis=0, dtype=np.float64), training.std(axis=0, dtype=np.float64)
    scale = np.where(spread > _FLOOR, spread, np.inf)
    units = []
    for each in (vectors, training):
        scaled = (each - mean) / scale
        units.append(scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), _FLOOR))
    cosines = units[0] @ units[1].T
    distances = np.sqrt(np.maximum(0.0, 2 - 2 * cosines))
    if excluded is not None:
        distances[excluded] = np.inf
    ordered = np.sort(distances, axis=1)
    last = np.minimum(k, np.isfinite(ordered).sum(axis=1)) - 1
    found: Float64[np.ndarray, " n"] = ordered[np.arange(len(ordered)), last]
    return found


def _metrics(distances: pd.DataFrame, threshold: float, config: DriftConfig) -> pd.DataFrame:
    scores = distances["distance"].to_numpy()
    is_new = (distances["set"] == "new").to_numpy()
    far = distances["far"].to_numpy()

    def measures(rows: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " k"]:
        chosen = is_new[rows]
        share = float(far[rows][chosen].mean()) if chosen.any() else np.nan
        return np.array([auroc(curve(scores[rows], chosen)), share])

    clusters = (distances["set"] + " " + distances["subject_id"].astype(str)).tolist()
    found = bootstrap(measures, clusters, num=config.draws, seed=config.seed)
    counts = {"cases": len(distances), "subjects": len(set(clusters))}
    names = ("auroc_new_against_held_out", "share_of_new_that_is_far")
    rows = [
        {"metric": name, "value": estimate.value, "low": estimate.low, "high": estimate.high, **counts}
        for name, estimate in zip(names, found, strict=True)
    ]
    return pd.DataFrame([*rows, {"metric": "threshold", "value": threshold, **counts}])


def _sentences(distances: pd.DataFrame, metrics: pd.DataFrame, config: DriftConfig) -> tuple[str, ...]:
    area, share = metrics.iloc[0], metrics.iloc[1]
    verdict = (
        "lie farther from the training cases than"
        if area["low"] > 0.5
        else "lie closer to the training cases than"
        if area["high"] < 0.5
        else "cannot be told by their distance from"
    )
    count = int((distances["set"] == "new").sum())
    return (
        f"The {count} new cases {verdict} held-out cases of the reference: AUROC {area['value']:.3f} (95 % interval "
        f"{area['low']:.3f} to {area['high']:.3f}).",
        f"{share['value']:.0%} of them ({share['low']:.0%} to {share['high']:.0%}) lie beyond {config.alarm:.0%} of "
        "the held-out cases.",
    )


def _write(out: Path, result: DriftResult, config: DriftConfig) -> None:
    with RunFolder(out) as run:
        run.write_recipe(config.to_dict())
        atomic_write(out / "distances.csv", result.distances.to_csv(index=False))
        atomic_write(out / "metrics.csv", result.metrics.to_csv(index=False))
        write_report(
            out / "report.html",
            "Do new images look like those that were trained on?",
            sections=[
                Section("Findings", result.sentences),
                Section("Measures", table=_rows(result.metrics)),
                Section("Cases, farthest first", table=_rows(result.distances)),
            ],
        )
        run.journal.log(command="drift", findings=list(result.sentences))


def _rows(table: pd.DataFrame) -> Sequence[dict[str, object]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]

"""Which cases of a store a run trains on and is measured on, and what a task is taught about them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from medssl.config import Config
from medssl.data.splits import Split
from medssl.data.store import ArrayStore, StoredCase
from medssl.errors import CaseError, ConfigError, NoInputError
from medssl.tasks.targets import Kind, Targets, read_targets


@dataclass(frozen=True)
class Taught:
    """What a task is trained with.

    Args:
        cases: What the loop draws from; a rare class may be in it several times, and of a bag its first case is.
        held_out: What checks and choices are made on.
        arguments: What the task is built with, beside its configuration.
        notes: For the journal.
        is_sliced: Whether volumes are seen as slices, by a 2D network.
        bags: For the id of each of these cases all cases of its bag.
    """

    cases: Sequence[StoredCase]
    held_out: Sequence[StoredCase]
    arguments: Mapping[str, Any]
    notes: Mapping[str, Any] = field(default_factory=dict)
    is_sliced: bool = False
    bags: Mapping[str, Sequence[StoredCase]] = field(default_factory=dict)

    @property
    def members(self) -> list[StoredCase]:
        """Every case that the loop reads, once."""
        found = {one.case_id: one for case in self.cases for one in self.bags.get(case.case_id, (case,))}
        return list(found.values())


def labelled_subjects(store: ArrayStore, *, draw: int = 0, column: str | None = None) -> list[str]:
    """Labelled training subjects in the order in which a label budget takes them.

    Draw 0 orders cases by ``sha256("label:" + case_id)``, draw ``k`` by ``sha256("label<k>:" + case_id)``; a subject
    comes where its first case comes. The subjects of a small budget are therefore among those of a larger one.

    Args:
        store: The store.
        draw: Which order.
        column: Cases are labelled if this column of their facts is stated; None asks for a label map.
    """
    prefix = f"label{draw or ''}:"
    cases = sorted(
        (case for case in store.select(split="train") if _is_labelled(case, column)),
        key=lambda case: hashlib.sha256((prefix + case.case_id).encode()).hexdigest(),
    )
    return list(dict.fromkeys(case.subject_id for case in cases))


def pretraining_cases(store: ArrayStore, splits: Sequence[Split]) -> tuple[list[StoredCase], int]:
    """Cases of the splits and of none, without subjects that are also elsewhere; and how many constant images less.

    Raises:
        NoInputError: if there is none.
    """
    elsewhere = {case.subject_id for case in store.cases if case.split is not None and case.split not in splits}
    cases = [case for case in store.cases if case.subject_id not in elsewhere]
    varied = [case for case in cases if not case.is_constant]
    if not varied:
        raise NoInputError(
            f"{store.path}: no case in the splits {', '.join(splits)} with more than one value; set splits to those "
            "that it has."
        )
    return varied, len(cases) - len(varied)


def held_out_cases(store: ArrayStore, *, split: Split, trained_on: Sequence[StoredCase]) -> list[StoredCase]:
    """Cases of a split without the subjects that are trained on."""
    used = {case.subject_id for case in trained_on}
    return [case for case in store.select(split=split) if case.subject_id not in used]


def taught(store: ArrayStore, config: Config, *, num_labelled: int | None, draw: int, held_out: Split) -> Taught:
    """What a task with this configuration learns from: label maps, or, if it names a ``target``, a column of facts.

    Args:
        store: The store.
        config: Of the task.
        num_labelled: Use only so many labelled subjects of the training split.
        draw: Which random order of subjects these are taken from.
        held_out: Split of the held-out cases.

    Raises:
        ConfigError: if more subjects are asked for than there are; E_TARGET, if the column is not in the store or tells
            nothing apart.
        CaseError: E_TARGET, if a case has a value that cannot be, or the images of a bag have different ones.
        NoInputError: if no training case is labelled.
    """
    options = config.to_dict()
    column = cast("str | None", options.get("target"))
    if column is not None and column not in store.fact_columns:
        known = f"it has {', '.join(store.fact_columns)}" if store.fact_columns else "it has none"
        raise ConfigError(
            f"{store.path}: no column {column} of facts; {known}. Scan with --columns {column} and prepare again.",
            code="E_TARGET",
        )
    cases = _labelled_cases(store, num_labelled=num_labelled, draw=draw, column=column)
    beside = held_out_cases(store, split=held_out, trained_on=cases)
    watched = [case for case in beside if _is_labelled(case, column)]
    if column is None:
        return Taught(cases, watched, {"label_values": store.label_values})
    unstated = sum(not _is_labelled(case, column) for case in store.select(split="train"))
    notes = {"target": column, "without_target": unstated, "held_out_without_target": len(beside) - len(watched)}
    bags: dict[str, Sequence[StoredCase]] = {}
    texts = {case.case_id: case.facts[column] for case in (*cases, *watched)}
    if options["level"] == "bag":
        train_bags = _bags(store, {case.subject_id for case in cases}, column, split="train")
        watched_bags = _bags(store, {case.subject_id for case in watched}, column, split=held_out)
        bags = {**train_bags, **watched_bags}
        cases, watched = ([members[0] for members in some.values()] for some in (train_bags, watched_bags))
        texts = {case_id: next(one.facts[column] for one in bags[case_id] if column in one.facts) for case_id in bags}
        notes |= {"bags": len(train_bags)}
    targets = read_targets(
        texts,
        train=[case.case_id for case in cases],
        column=column,
        kind=cast("Kind", options["kind"]),
        classes=cast("tuple[str, ...] | None", options["classes"]),
    )
    notes |= {"classes": dict(zip(targets.classes, targets.counts, strict=False))}
    shown = _balanced(cases, targets) if options["balance"] == "sampling" else cases
    return Taught(shown, watched, {"targets": targets, "bags": bags or None}, notes, options["level"] == "slices", bags)


def _labelled_cases(store: ArrayStore, *, num_labelled: int | None, draw: int, column: str | None) -> list[StoredCase]:
    subjects = labelled_subjects(store, draw=draw, column=column)
    if not subjects:
        lacks = "labelled case" if column is None else f"case with a value of {column}"
        means = "with labels" if column is None else "with a table that states it"
        raise NoInputError(f"{store.path}: no {lacks} in the split train. Scan and prepare again {means}.")
    if num_labelled is not None:
        if num_labelled > len(subjects):
            raise ConfigError(
                f"num_labelled is {num_labelled}, and {store.path} has {len(subjects)} labelled training "
                "subjects. Ask for at most that many."
            )
        subjects = subjects[:num_labelled]
    chosen = set(subjects)
    return [case for case in store.select(split="train") if _is_labelled(case, column) and case.subject_id in chosen]


def _is_labelled(case: StoredCase, column: str | None) -> bool:
    return case.labelled if column is None else column in case.facts


def _bags(store: ArrayStore, subjects: set[str], column: str, *, split: Split) -> dict[str, list[StoredCase]]:
    """All images of each subject, by the id of the first."""
    by_subject: dict[str, list[StoredCase]] = {}
    for case in store.select(split=split):
        if case.subject_id in subjects:
            by_subject.setdefault(case.subject_id, []).append(case)
    for subject, members in by_subject.items():
        said = sorted({case.facts[column] for case in members if column in case.facts})
        if len(said) > 1:
            raise CaseError(
                f"subject {subject}: its images have {column} {' and '.join(said[:3])}; a bag has one value. Correct "
                "the table, or take level image.",
                code="E_TARGET",
            )
    return {members[0].case_id: members for members in by_subject.values()}


def _balanced(cases: Sequence[StoredCase], targets: Targets) -> list[StoredCase]:
    """Each case as often as brings its rarest class up to the most frequent one, to whole numbers."""
    most = max(targets.counts)
    shown: list[StoredCase] = []
    for case in cases:
        value = targets.values[case.case_id]
        if targets.kind == "multilabel":
            held = [count for count, has in zip(targets.counts, value, strict=True) if has]
        else:
            held = [targets.counts[int(value[0])]]
        shown += [case] * max(1, round(most / min(held, default=most)))
    return shown

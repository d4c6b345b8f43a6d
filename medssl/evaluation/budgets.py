"""The label budgets of a study as files to publish: which cases each budget and seed trains on, and a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from medssl.data.store import ArrayStore
from medssl.errors import CheckpointError
from medssl.runfolder import atomic_write
from medssl.selection import labelled_subjects

RULE = "subjects in the order of the sha256 of 'label<seed>:' and the first of their case ids; a budget takes the first"


def publish_budgets(folder: Path, store: ArrayStore, *, budgets: Sequence[int], seeds: Sequence[int]) -> list[Path]:
    """Write ``budget_<n>_seed_<s>.json`` for each budget and seed, or verify those that are there.

    A file holds the case ids that the run trains on, sorted, the subjects in the order in which a budget takes them,
    the fingerprint of the store, and ``sha256`` of the case ids joined by line breaks. Subsets are nested: the
    subjects of a budget are among those of every larger one of the same seed.

    Args:
        folder: Where the files lie.
        store: Whose labelled training cases are drawn from.
        budgets: Numbers of subjects.
        seeds: One draw each.

    Raises:
        CheckpointError: ``E_DIGEST``, if a file that is there names other cases than this store and medssl give.
    """
    cases = store.select(split="train", labelled=True)
    paths = []
    for seed in seeds:
        order = labelled_subjects(store, draw=seed)
        for budget in budgets:
            subjects = order[:budget]
            ids = sorted(case.case_id for case in cases if case.subject_id in set(subjects))
            content = {
                "budget": budget,
                "seed": seed,
                "rule": RULE,
                "store": store.fingerprint,
                "subjects": subjects,
                "case_ids": ids,
                "sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
            }
            path = folder / f"budget_{budget}_seed_{seed}.json"
            _write_or_verify(path, content["sha256"], json.dumps(content, indent=1) + "\n")
            paths.append(path)
    return paths


def _write_or_verify(path: Path, sha256: object, text: str) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text)
        return
    try:
        there = json.loads(path.read_text()).get("sha256")
    except (ValueError, AttributeError):
        there = None
    if there != sha256:
        raise CheckpointError(
            f"{path}: names other cases than this store gives for the same budget and seed. Use the store that the "
            "file was published with, or another folder for the study.",
            code="E_DIGEST",
        )

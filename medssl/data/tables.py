"""The tables that a scan leaves beside the cohort."""

from __future__ import annotations

from collections.abc import Mapping

from medssl.explain import remedy
from medssl.io.dicom.model import FACTS
from medssl.ledger import Ledger, csv_text


def refused_table(ledger: Ledger) -> str:
    """What was not taken as it is, why, and what to do: ``path,outcome,code,reason,remedy`` as CSV text.

    Rows are in the order of the ledger.
    """
    rows = ((entry.item, entry.outcome, entry.code, entry.reason, remedy(entry.code)) for entry in ledger.noted())
    return csv_text(("path", "outcome", "code", "reason", "remedy"), rows)


def acquisition_table(facts: Mapping[str, Mapping[str, str | float]]) -> str:
    """How each case was acquired, as far as its header tells, as CSV text.

    Args:
        facts: For each case id, those of :data:`medssl.io.dicom.model.FACTS` that are known; cases without any are left
            out.
    """
    rows = ((case_id, *(known.get(name, "") for name in FACTS)) for case_id, known in facts.items() if known)
    return csv_text(("case_id", *FACTS), rows)

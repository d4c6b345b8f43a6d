"""What a command says at its end of the inputs that it did not take as they are: short, however many there are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from medssl import explain
from medssl.ledger import Entry, Ledger, Outcome

_MOST_NAMED = 3


def closing_lines(ledger: Ledger) -> list[str]:
    """Refused inputs by code with a few names each, warnings by code with their number, and how many are duplicates.

    A few lines a code, whatever the number of inputs; the whole list is in the table that the command wrote.
    """
    return [*_rejected(ledger), *_warned(ledger), *_duplicates(ledger)]


def _rejected(ledger: Ledger) -> list[str]:
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in ledger:
        if entry.outcome is Outcome.REJECTED:
            groups[entry.code].append(entry)
    lines = []
    for code, entries in _commonest_first(groups):
        lines.append(f"rejected, {len(entries)} x {code}:")
        lines += [f"  {entry.item}: {_without_name(entry)}" for entry in entries[:_MOST_NAMED]]
        lines += _more(entries)
    return lines


def _warned(ledger: Ledger) -> list[str]:
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in ledger:
        if entry.outcome is Outcome.WARNED:
            for code in dict.fromkeys(explain.codes(entry.reason) or [entry.code]):
                groups[code].append(entry)
    lines = []
    for code, entries in _commonest_first(groups):
        if len(entries) == 1:
            lines.append(f"accepted with {code}: {entries[0].item}: {explain.meaning(code)}")
        else:
            lines.append(f"accepted, {len(entries)} x {code}: {explain.meaning(code)}")
    return lines


def _duplicates(ledger: Ledger) -> list[str]:
    found = [entry for entry in ledger if entry.outcome is Outcome.DUPLICATE]
    if not found:
        return []
    named = [f"  {entry.item}: {entry.reason}" for entry in found[:_MOST_NAMED]]
    return [f"duplicate, {len(found)} left out:", *named, *_more(found)]


def _commonest_first(groups: dict[str, list[Entry]]) -> list[tuple[str, list[Entry]]]:
    return sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))


def _more(entries: Sequence[Entry]) -> list[str]:
    return [f"  and {len(entries) - _MOST_NAMED} more"] if len(entries) > _MOST_NAMED else []


def _without_name(entry: Entry) -> str:
    """The reason without the name of the input that it opens with."""
    before, name, after = entry.reason.partition(entry.item)
    if not name or ": " in before:
        return entry.reason
    return after.partition(": ")[2] or entry.reason

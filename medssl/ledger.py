"""The conservation law: every input of a command ends in exactly one column, with its reason."""

from __future__ import annotations

import csv
import enum
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from medssl.errors import ExitCode, MedSSLError, code_of


class Outcome(enum.StrEnum):
    """What became of one input."""

    ACCEPTED = "accepted"
    WARNED = "accepted with warning"
    REJECTED = "rejected"
    DUPLICATE = "duplicate"
    IGNORED = "ignored"


@dataclass(frozen=True)
class Entry:
    """One line of a ledger: the input, what became of it, and why."""

    item: str
    outcome: Outcome
    code: str = ""
    reason: str = ""


class Ledger:
    """Books every input of a command once and proves at the end that none was lost.

    ``expect`` announces inputs as they are seen; ``accept``, ``reject``, ``duplicate`` and ``ignore`` book them.
    """

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()
        self._entries: list[Entry] = []

    def expect(self, item: str) -> None:
        """Announce one input."""
        self._seen[item] += 1

    def accept(self, item: str, *, warnings: tuple[str, ...] = ()) -> None:
        """Book ``item`` as used; ``warnings`` are ``W_CODE: sentence`` strings."""
        if warnings:
            self._entries.append(Entry(item, Outcome.WARNED, code_of(warnings[0]), "; ".join(dict.fromkeys(warnings))))
        else:
            self._entries.append(Entry(item, Outcome.ACCEPTED))

    def reject(self, item: str, error: MedSSLError) -> None:
        """Book ``item`` as refused with the error that says why."""
        self._entries.append(Entry(item, Outcome.REJECTED, error.code, error.message))

    def duplicate(self, item: str, reason: str) -> None:
        """Book ``item`` as the copy of another input."""
        self._entries.append(Entry(item, Outcome.DUPLICATE, "W_DUPLICATE", reason))

    def ignore(self, item: str, reason: str) -> None:
        """Book ``item`` as not an input of this command."""
        self._entries.append(Entry(item, Outcome.IGNORED, "", reason))

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def noted(self) -> Iterator[Entry]:
        """Entries of a table of what was not taken as it is: all but the plainly accepted, in their order."""
        return (entry for entry in self._entries if entry.outcome is not Outcome.ACCEPTED)

    def count(self, outcome: Outcome) -> int:
        """Number of inputs with this outcome."""
        return sum(entry.outcome is outcome for entry in self._entries)

    def counts(self) -> dict[str, int]:
        """Number of inputs seen, and with each outcome."""
        return {"seen": self._seen.total(), **{outcome.value: self.count(outcome) for outcome in Outcome}}

    def check(self) -> None:
        """Raise unless every announced input was booked exactly once.

        Raises:
            RuntimeError: if an input was lost or booked twice; this is a defect of medssl, never of the data.
        """
        booked = Counter(entry.item for entry in self._entries)
        if booked != self._seen:
            lost, extra = self._seen - booked, booked - self._seen
            msg = f"conservation law broken: {dict(lost)} not booked, {dict(extra)} booked too often; please report it."
            raise RuntimeError(msg)

    def exit_code(self) -> ExitCode:
        """0 when all is good, 3 when some inputs were rejected, 4 when none was usable."""
        used = self.count(Outcome.ACCEPTED) + self.count(Outcome.WARNED)
        if used == 0:
            return ExitCode.NO_INPUT
        return ExitCode.SOME_REJECTED if self.count(Outcome.REJECTED) else ExitCode.OK

    def to_csv(self, *outcomes: Outcome) -> str:
        """Table ``item,outcome,code,reason`` of the given outcomes, or of all, as CSV text."""
        chosen = (entry for entry in self._entries if not outcomes or entry.outcome in outcomes)
        rows = ((entry.item, entry.outcome, entry.code, entry.reason) for entry in chosen)
        return csv_text(("item", "outcome", "code", "reason"), rows)

    def summary(self) -> str:
        """One line for the end of a command."""
        counts = self.counts()
        parts = [f"{n} {name}" for name, n in counts.items() if name != "seen" and n]
        return f"{counts['seen']} seen: " + (", ".join(parts) or "nothing")


def csv_text(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table as CSV text whose cells are :func:`inert`."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([inert(str(value)) for value in row] for row in rows)
    return buffer.getvalue()


def inert(text: str) -> str:
    """Escape control characters, and keep a spreadsheet from reading the cell as a formula."""
    shown = printable(text)
    return f"'{shown}" if shown[:1] in {"=", "+", "@"} else shown


def printable(text: str) -> str:
    """Escape what would move the cursor, colour, turn or forge a line: control, bidirectional and undecodable ones."""
    return "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode() for ch in text)

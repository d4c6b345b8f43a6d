"""What medssl said of an input, reduced to codes."""

from __future__ import annotations

from typing import Protocol

from medssl.errors import code_of
from medssl.ledger import Ledger, Outcome


class Warned(Protocol):
    """A source, header, decoded image or anything else that carries warnings."""

    @property
    def warnings(self) -> tuple[str, ...]: ...


class Booked(Protocol):
    """The result of a command."""

    @property
    def ledger(self) -> Ledger: ...


def warned(found: Warned) -> list[str]:
    """Codes of its warnings, in their order."""
    return [code_of(warning) for warning in found.warnings]


def booked(result: Booked, outcome: Outcome = Outcome.REJECTED) -> dict[str, str]:
    """Code of each input with this outcome."""
    return {entry.item: entry.code for entry in result.ledger if entry.outcome is outcome}

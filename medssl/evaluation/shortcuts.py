"""Columns that a network should not need, such as the site: can they be read from its features?"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from scipy.stats.contingency import association

CHANCE_MARGIN = 0.05
"""How far above chance the lower end of the interval must lie for an alarm."""

_MUCH_TIED = 0.3
_NAMES = re.compile(
    r"(^|_)(site|scanner|manufacturer|vendor|institution|hospital|cent(er|re)|station|device|model|protocol|source)"
    r"(_|$)"
)


@dataclass(frozen=True)
class Shortcut:
    """How well one column can be told by a linear reader fitted on other subjects.

    Args:
        column: Its name.
        classes: Number of its values.
        cases: That state it.
        subjects: Theirs.
        chance: Balanced accuracy of naming always the same value.
        value: Balanced accuracy of the reader.
        low: Lower end of its interval.
        high: Upper end.
        tied: Cramér's V between the column and the target, from 0 (independent) to 1; NaN for numbers.
        alarm: Whether ``low`` lies clearly above chance.
        note: Why there is no value.
    """

    COLUMNS: ClassVar[list[str]] = [
        "column", "classes", "cases", "subjects", "chance", "value", "low", "high", "tied", "alarm", "note",
    ]  # fmt: skip

    column: str
    classes: int = 1
    cases: int = 0
    subjects: int = 0
    chance: float = math.nan
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    tied: float = math.nan
    alarm: bool = False
    note: str = ""

    def row(self) -> dict[str, Any]:
        """A row of the table."""
        return asdict(self)

    def sentences(self) -> Iterator[str]:
        """What is to be said of it: a warning, or nothing."""
        if not self.alarm:
            return
        tied = (
            f" The target goes with it (Cramér's V {self.tied:.2f}): a network may read it instead; test on another "
            "value of it."
            if self.tied > _MUCH_TIED
            else ""
        )
        yield (
            f"shortcut: the embedding tells {self.column} with balanced accuracy {self.value:.3f} (95 % {self.low:.3f} "
            f"to {self.high:.3f}), chance {self.chance:.3f}.{tied}"
        )


def is_named_shortcut(column: str) -> bool:
    """Whether a column's name says where or with what an image was made."""
    return _NAMES.search(re.sub(r"[^a-z0-9]+", "_", column.casefold())) is not None


def tie(pairs: Sequence[tuple[str, float]]) -> float:
    """Cramér's V between two columns of classes, in [0, 1]; NaN if one of them has one value only.

    Reference: Cramér, Mathematical methods of statistics, 1946, section 21.9.
    Deviations: none; without correction for few cases.
    """
    columns, values = {name for name, _ in pairs}, {value for _, value in pairs}
    if min(len(columns), len(values)) < 2:
        return math.nan
    table = pd.crosstab(np.array([name for name, _ in pairs]), np.array([value for _, value in pairs]))
    return float(association(table.to_numpy(np.int64), method="cramer"))

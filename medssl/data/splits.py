"""The parts of a cohort; apart from what reads images, so that a loader does not bring all readers into memory."""

from __future__ import annotations

from typing import Literal

Split = Literal["train", "val", "test"]

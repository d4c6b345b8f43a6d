"""Windows in HU by the names that radiologists call them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class HuWindow(NamedTuple):
    """A display window of CT.

    Args:
        level_hu: The value in the middle.
        width_hu: From black to white.
        shows: What it is for.
        source: Who uses these numbers; departments differ by tens of HU.
    """

    level_hu: float
    width_hu: float
    shows: str
    source: str

    @property
    def low_hu(self) -> float:
        """What is black."""
        return self.level_hu - self.width_hu / 2

    @property
    def high_hu(self) -> float:
        """What is white."""
        return self.level_hu + self.width_hu / 2


_RADIOPAEDIA = "Radiopaedia, article Windowing (CT)"
_OHIF = "OHIF viewer, default presets"

WINDOWS: Mapping[str, HuWindow] = MappingProxyType(
    {
        "abdomen": HuWindow(50, 400, "organs of the abdomen", _RADIOPAEDIA),
        "angio": HuWindow(200, 600, "heart and vessels with contrast medium", _RADIOPAEDIA),
        "bone": HuWindow(400, 1800, "cortical and spongy bone", _RADIOPAEDIA),
        "brain": HuWindow(40, 80, "grey and white matter, blood", _RADIOPAEDIA),
        "liver": HuWindow(30, 150, "lesions of liver and spleen", _RADIOPAEDIA),
        "lung": HuWindow(-600, 1500, "lung, airways and nodules", _RADIOPAEDIA),
        "mediastinum": HuWindow(50, 350, "heart, great vessels and lymph nodes", _RADIOPAEDIA),
        "soft": HuWindow(40, 400, "muscle, fat and organs anywhere", _OHIF),
        "stroke": HuWindow(40, 40, "early loss of contrast between grey and white matter", _RADIOPAEDIA),
    }
)
"""By name, all in HU."""

"""Parts of the body: along which axes their images may be mirrored, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Axis = Literal["LR", "AP", "SI"]

_STANDING = "Images are made and read with the head up: an image upside down does not occur."
_FACING = "Front and back are different, and images are made and read with one of them up."


@dataclass(frozen=True)
class Anatomy:
    """A part of the body.

    Args:
        shows: What its images show, in a few words.
        mirrors: Axes along which a mirrored image is one that could have been made. In a picture LR is from column to
            column and AP from row to row.
        left_right: Why left and right may, or may not, change places.
        front_back: Why front and back may, or may not.
        head_foot: Why head and foot may, or may not.
        within: The part of the body that it belongs to, if that has a name here.
    """

    shows: str
    mirrors: frozenset[Axis]
    left_right: str
    front_back: str = _FACING
    head_foot: str = _STANDING
    within: str | None = "whole_body"

    def reason(self, axis: Axis) -> str:
        """Why images may, or may not, be mirrored along ``axis``."""
        return {"LR": self.left_right, "AP": self.front_back, "SI": self.head_foot}[axis]


_NONE: frozenset[Axis] = frozenset()
_SIDES: frozenset[Axis] = frozenset({"LR"})
_IN_PLANE: frozenset[Axis] = frozenset({"LR", "AP"})

_LOOSE = "The sample lies as it fell or was put; no direction in it means anything."
_PHOTOGRAPH = "A photograph of the skin can be taken from any side; turned over, a lesion is still a lesion."

REGIONS: Mapping[str, Anatomy] = {
    "whole_body": Anatomy(
        shows="the body, or most of it",
        mirrors=_NONE,
        left_right="Heart, liver and spleen each lie on one side; the mirror image is situs inversus, which is rare.",
        within=None,
    ),
    "head_neck": Anatomy(
        shows="head and neck",
        mirrors=_SIDES,
        left_right="The sides are nearly alike; labels of paired structures must change places.",
    ),
    "brain": Anatomy(
        shows="the brain",
        mirrors=_SIDES,
        left_right="The hemispheres are nearly alike; labels of paired structures must change places, and what depends "
        "on the side, such as language, is lost.",
        within="head_neck",
    ),
    "eye": Anatomy(
        shows="fundus photographs and OCT of the eye",
        mirrors=_SIDES,
        left_right="A mirrored left eye looks like a right eye: the disc lies on the side of the nose. Labels of the "
        "side must change too.",
        front_back="In OCT the layers lie in one order, and in a fundus photograph the macula lies below the level of "
        "the disc's centre.",
        within="head_neck",
    ),
    "chest": Anatomy(
        shows="lungs, heart and mediastinum",
        mirrors=_NONE,
        left_right="The heart and the aortic arch lie on the left; mirrored, that is dextrocardia.",
    ),
    "cardiac": Anatomy(
        shows="the heart",
        mirrors=_NONE,
        left_right="The right ventricle is no mirror image of the left, and lies on one side of it.",
        within="chest",
    ),
    "breast": Anatomy(
        shows="one breast",
        mirrors=_SIDES,
        left_right="A mirrored left breast looks like a right one; labels of the side must change too. Images that "
        "show the heart as well are of the chest.",
        within="chest",
    ),
    "abdomen": Anatomy(
        shows="the abdomen",
        mirrors=_NONE,
        left_right="The liver lies on the right, spleen and stomach on the left.",
    ),
    "pelvis": Anatomy(
        shows="the pelvis with prostate or uterus, bladder and rectum",
        mirrors=_SIDES,
        left_right="Bones, muscles and the prostate are nearly alike on both sides; bowel is not, and labels of paired "
        "structures must change places.",
    ),
    "spine": Anatomy(
        shows="the spine",
        mirrors=_SIDES,
        left_right="Vertebrae and discs are nearly alike on both sides; the aorta beside them is not, and labels of "
        "roots and pedicles must change places.",
    ),
    "extremity": Anatomy(
        shows="an arm, a leg, or a joint of them",
        mirrors=_SIDES,
        left_right="A mirrored left limb looks like a right one; labels of the side must change too.",
    ),
    "skin": Anatomy(
        shows="photographs of the skin",
        mirrors=_IN_PLANE,
        left_right=_PHOTOGRAPH,
        front_back=_PHOTOGRAPH,
        head_foot="Photographs have no depth.",
    ),
    "tissue": Anatomy(
        shows="samples under the microscope",
        mirrors=_IN_PLANE,
        left_right=_LOOSE,
        front_back=_LOOSE,
        head_foot="In a stack light is lost with depth, so that its two ends differ.",
        within=None,
    ),
}
"""Parts of the body by name. A mirror image may be made only where it is one that could have been taken."""


def share_anatomy(first: str, second: str) -> bool:
    """Whether one of two parts of the body is, or lies within, the other."""
    return first in _around(second) or second in _around(first)


def _around(region: str) -> list[str]:
    """The part and all that it lies within."""
    found: list[str] = []
    name: str | None = region
    while name is not None:
        found.append(name)
        name = REGIONS[name].within
    return found

"""Where views are cut from a case: boxes, places in the body, and the samplers that loader workers run."""

from __future__ import annotations

from medssl.views.base import BODY, CaseArrays, ViewSampler, median_mm
from medssl.views.boxes import Box, grid_boxes, overlap_fractions, position_labels
from medssl.views.coordinates import atlas_coordinates, body_coordinates
from medssl.views.crops import LabelledCrop, RandomCrop
from medssl.views.grid import GridCrops, resize_linear, resize_weights
from medssl.views.multicrop import MultiCrop
from medssl.views.pairs import OverlapPair
from medssl.views.placing import EdgesMm, RegionOption
from medssl.views.slices import PLANES, SliceViews

__all__ = [
    "BODY",
    "PLANES",
    "Box",
    "CaseArrays",
    "EdgesMm",
    "GridCrops",
    "LabelledCrop",
    "MultiCrop",
    "OverlapPair",
    "RandomCrop",
    "RegionOption",
    "SliceViews",
    "ViewSampler",
    "atlas_coordinates",
    "body_coordinates",
    "grid_boxes",
    "median_mm",
    "overlap_fractions",
    "position_labels",
    "resize_linear",
    "resize_weights",
]

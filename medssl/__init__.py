"""medssl: self-supervised learning on medical images, from raw scans to a trusted segmentation.

The commands are functions of the same name: ``scan``, ``doctor``, ``convert``, ``prepare``, ``gallery``, ``pretrain``,
``finetune``, ``predict``, ``evaluate``, ``study`` and ``demo``. Names load on first use, so that ``import medssl``
stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "ArrayStore": "medssl.data.store",
    "Case": "medssl.data.cohort",
    "Cohort": "medssl.data.cohort",
    "FinetuneRecipe": "medssl.recipe",
    "Geometry": "medssl.geometry",
    "MedSSLError": "medssl.errors",
    "PrepareConfig": "medssl.data.prepare",
    "PretrainRecipe": "medssl.recipe",
    "StudyConfig": "medssl.evaluation.study",
    "Volume": "medssl.volume",
    "convert": "medssl.data.convert",
    "demo": "medssl.quickstart",
    "doctor": "medssl.data.doctor",
    "evaluate": "medssl.evaluation.assess",
    "finetune": "medssl.recipe",
    "gallery": "medssl.showcase.gallery",
    "load_bundle": "medssl.nn.bundle",
    "load_yaml": "medssl.config",
    "predict": "medssl.evaluation.predict",
    "prepare": "medssl.data.prepare",
    "pretrain": "medssl.recipe",
    "read_volume": "medssl.io",
    "resample_to": "medssl.volume",
    "scan": "medssl.data.scan",
    "study": "medssl.evaluation.study",
    "write_volume": "medssl.io",
}

__all__ = [
    "ArrayStore",
    "Case",
    "Cohort",
    "FinetuneRecipe",
    "Geometry",
    "MedSSLError",
    "PrepareConfig",
    "PretrainRecipe",
    "StudyConfig",
    "Volume",
    "convert",
    "demo",
    "doctor",
    "evaluate",
    "finetune",
    "gallery",
    "load_bundle",
    "load_yaml",
    "predict",
    "prepare",
    "pretrain",
    "read_volume",
    "resample_to",
    "scan",
    "study",
    "write_volume",
]

if TYPE_CHECKING:
    from medssl.config import load_yaml
    from medssl.data.cohort import Case, Cohort
    from medssl.data.convert import convert
    from medssl.data.doctor import doctor
    from medssl.data.prepare import PrepareConfig, prepare
    from medssl.data.scan import scan
    from medssl.data.store import ArrayStore
    from medssl.errors import MedSSLError
    from medssl.evaluation.assess import evaluate
    from medssl.evaluation.predict import predict
    from medssl.evaluation.study import StudyConfig, study
    from medssl.geometry import Geometry
    from medssl.io import read_volume, write_volume
    from medssl.nn.bundle import load_bundle
    from medssl.quickstart import demo
    from medssl.recipe import FinetuneRecipe, PretrainRecipe, finetune, pretrain
    from medssl.showcase.gallery import gallery
    from medssl.volume import Volume, resample_to


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'medssl' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOME)

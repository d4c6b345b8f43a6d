"""medssl: self-supervised learning on medical images, from raw scans to a trusted segmentation.

The commands are functions of the same name: ``scan``, ``doctor``, ``convert``, ``prepare``, ``gallery``, ``plan``,
``pretrain``, ``adopt``, ``finetune``, ``crossval``, ``postprocess``, ``predict``, ``evaluate``, ``study``, ``embed``,
``probe``, ``similar``, ``leaks``, ``drift`` and ``demo``. Names load on first use, so that ``import medssl``
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
    "adopt": "medssl.adoption",
    "convert": "medssl.data.convert",
    "crossval": "medssl.evaluation.folds",
    "demo": "medssl.quickstart",
    "doctor": "medssl.data.doctor",
    "drift": "medssl.evaluation.drift",
    "embed": "medssl.evaluation.embed",
    "evaluate": "medssl.evaluation.assess",
    "finetune": "medssl.recipe",
    "gallery": "medssl.showcase.gallery",
    "leaks": "medssl.evaluation.leakage",
    "load_bundle": "medssl.nn.bundle",
    "load_yaml": "medssl.config",
    "plan": "medssl.blueprint.plan",
    "postprocess": "medssl.evaluation.postprocess",
    "predict": "medssl.evaluation.predict",
    "prepare": "medssl.data.prepare",
    "pretrain": "medssl.recipe",
    "probe": "medssl.evaluation.probing",
    "read_volume": "medssl.io",
    "resample_to": "medssl.volume",
    "scan": "medssl.data.scan",
    "similar": "medssl.evaluation.neighbours",
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
    "adopt",
    "convert",
    "crossval",
    "demo",
    "doctor",
    "drift",
    "embed",
    "evaluate",
    "finetune",
    "gallery",
    "leaks",
    "load_bundle",
    "load_yaml",
    "plan",
    "postprocess",
    "predict",
    "prepare",
    "pretrain",
    "probe",
    "read_volume",
    "resample_to",
    "scan",
    "similar",
    "study",
    "write_volume",
]

if TYPE_CHECKING:
    from medssl.adoption import adopt
    from medssl.blueprint.plan import plan
    from medssl.config import load_yaml
    from medssl.data.cohort import Case, Cohort
    from medssl.data.convert import convert
    from medssl.data.doctor import doctor
    from medssl.data.prepare import PrepareConfig, prepare
    from medssl.data.scan import scan
    from medssl.data.store import ArrayStore
    from medssl.errors import MedSSLError
    from medssl.evaluation.assess import evaluate
    from medssl.evaluation.drift import drift
    from medssl.evaluation.embed import embed
    from medssl.evaluation.folds import crossval
    from medssl.evaluation.leakage import leaks
    from medssl.evaluation.neighbours import similar
    from medssl.evaluation.postprocess import postprocess
    from medssl.evaluation.predict import predict
    from medssl.evaluation.probing import probe
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

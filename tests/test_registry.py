"""Parts are found by the name of their file."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from medssl import registry
from medssl.config import Config
from medssl.errors import ConfigError
from medssl.methods.base import Method
from medssl.nn.backbone import Backbone
from medssl.tasks.base import Task


@pytest.mark.parametrize(
    ("package", "base", "known"),
    [
        ("methods", Method, ["mae", "voco"]),
        ("tasks", Task, ["classification", "segmentation"]),
        ("nn", Backbone, ["genesis", "resenc", "resnet", "segresnet", "swin", "unet", "vit"]),
    ],
)
def test_the_names_of_a_package_are_its_files_that_hold_such_a_part(
    package: str, base: type[object], known: list[str]
) -> None:
    assert registry.names(package, base) == known
    for name in known:
        found = registry.find(package, name, base)
        assert issubclass(found, base)
        assert found.__module__ == f"medssl.{package}.{name}"


def test_configure_gives_the_class_and_its_own_options() -> None:
    cls, config = registry.configure("nn", {"name": "unet", "channels": [4, 8, 16, 32]}, Backbone)
    assert cls.__name__ == "ResidualUNetEncoder"
    assert config.to_dict()["channels"] == [4, 8, 16, 32]


@pytest.mark.parametrize(
    ("mapping", "message", "code"),
    [
        ({"name": "vocoo"}, r"methods: there is no 'vocoo'; did you mean voco\?", "E_UNKNOWN_NAME"),
        ({"name": "zzzz"}, r"there is no 'zzzz'; known are mae, voco\.", "E_UNKNOWN_NAME"),
        ({"name": "base"}, r"there is no 'base'", "E_UNKNOWN_NAME"),
        ({"name": "os.system"}, r"there is no 'os\.system'", "E_UNKNOWN_NAME"),
        ({"name": "../nn/unet"}, r"there is no", "E_UNKNOWN_NAME"),
        ({}, r"name is missing; known are mae, voco\.", "E_CONFIG"),
        ({"name": 3}, r"name is missing", "E_CONFIG"),
        (
            {"name": "mae", "mask_ration": 0.5},
            r"methods mae: unknown key mask_ration\. Did you mean mask_ratio\?",
            "E_CONFIG",
        ),
    ],
)
def test_unknown_names_and_options_are_refused_with_the_nearest_known_one(
    mapping: dict[str, object], message: str, code: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        registry.configure("methods", mapping, Method)  # type: ignore[type-abstract]
    assert caught.value.code == code


def test_a_new_file_is_a_new_part_and_one_without_config_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = types.ModuleType("medssl.parts")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "medssl.parts", package)
    head = "from medssl.config import Config as Base\n"
    part = "class Part(Base):\n    pass\n"
    (tmp_path / "added.py").write_text(f"{head}class Config(Base):\n    size: int = 3\n{part}")
    (tmp_path / "helper.py").write_text(f"{head}{part}")
    (tmp_path / "borrows.py").write_text("from medssl.parts.added import Config, Part\n")
    try:
        assert registry.names("parts", Config) == ["added"]
        cls, config = registry.configure("parts", {"name": "added", "size": 4}, Config)
        assert config.to_dict() == {"size": 4}
        assert cls.__module__ == "medssl.parts.added"
    finally:
        for name in ("added", "helper", "borrows"):
            sys.modules.pop(f"medssl.parts.{name}", None)

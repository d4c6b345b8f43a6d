"""What users import: every name resolves, and a signature changes only on purpose (see tests/api_surface.json)."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import medssl
from medssl.config import Config

SURFACE = Path(__file__).with_name("api_surface.json")


def described(name: str) -> str | list[str]:
    """The signature of a function; the fields and public methods of a class."""
    thing = getattr(medssl, name)
    if inspect.isfunction(thing):
        return str(inspect.signature(thing))
    members = {member for member in vars(thing) if not member.startswith("_")}
    fields = set(thing.model_fields) if issubclass(thing, Config) else set(typing.get_type_hints(thing))
    return sorted((members | fields) - {"model_config"})


def test_the_public_names_are_those_with_a_home() -> None:
    assert sorted(medssl._HOME) == medssl.__all__ == dir(medssl)


@pytest.mark.parametrize("name", medssl.__all__)
def test_every_public_name_is_what_the_surface_says_and_has_a_docstring(name: str) -> None:
    surface = json.loads(SURFACE.read_text())
    assert getattr(medssl, name).__doc__
    assert described(name) == surface[name], f"{name} changed; if on purpose: python tests/test_public_api.py"


def test_the_surface_has_no_name_that_is_gone() -> None:
    assert sorted(json.loads(SURFACE.read_text())) == medssl.__all__


def test_the_names_for_type_checkers_are_the_public_ones() -> None:
    text = Path(medssl.__file__).read_text()
    block = text.split("if TYPE_CHECKING:\n")[1].split("\n\n")[0]
    imported = {}
    for line in block.splitlines():
        _, home, _, names = line.split(maxsplit=3)
        imported |= dict.fromkeys(names.split(", "), home)
    assert imported == medssl._HOME


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = medssl.nothing


def test_names_load_on_first_use_alone() -> None:
    code = (
        "import sys, medssl; heavy = {'torch', 'monai', 'pandas', 'scipy', 'SimpleITK', 'matplotlib', 'pydantic'};"
        "assert not heavy & set(sys.modules); medssl.load_yaml; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert medssl.__version__ == version("medssl")


if __name__ == "__main__":
    SURFACE.write_text(json.dumps({name: described(name) for name in medssl.__all__}, indent=1) + "\n")

"""A part is found by the name of the file that defines it; there is no list to edit."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, TypeVar

from medssl.config import Config
from medssl.errors import ConfigError

T = TypeVar("T")


def names(package: str, base: type[object]) -> list[str]:
    """Names of the files in ``medssl/<package>`` that define a ``base``.

    Args:
        package: ``methods``, ``tasks`` or ``nn``.
        base: The class that a part derives from.
    """
    module = importlib.import_module(f"medssl.{package}")
    found = sorted(info.name for info in pkgutil.iter_modules(module.__path__))
    return [name for name in found if _part(package, name, base) is not None]


def find(package: str, name: str, base: type[T]) -> type[T]:
    """The class derived from ``base`` that ``medssl/<package>/<name>.py`` defines.

    Raises:
        ConfigError: for an unknown name, with the nearest known one.
    """
    known = names(package, base)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
        raise ConfigError(f"{package}: there is no {name!r}; {hint}", code="E_UNKNOWN_NAME")
    part = _part(package, name, base)
    assert part is not None  # noqa: S101  names() has just found it
    return part


def configure(package: str, mapping: Mapping[str, Any], base: type[T]) -> tuple[type[T], Config]:
    """Find the part that ``mapping["name"]`` names and validate the rest with that file's ``Config``.

    Raises:
        ConfigError: if the name is missing or unknown, or a value is wrong.
    """
    rest = dict(mapping)
    name = rest.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{package}: name is missing; known are {', '.join(names(package, base))}.")
    cls = find(package, name, base)
    config_class: type[Config] = importlib.import_module(f"medssl.{package}.{name}").Config
    return cls, config_class.parse(rest, source=f"{package} {name}")


def _part(package: str, name: str, base: type[T]) -> type[T] | None:
    module = importlib.import_module(f"medssl.{package}.{name}")
    if not hasattr(module, "Config"):
        return None
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, base)
            and value is not base
            and value.__module__ == module.__name__
        ):
            return value
    return None

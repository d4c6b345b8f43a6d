"""Configuration as data: strict typed models, safe YAML, ``--set`` overrides, errors of one line each."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from medssl.errors import ConfigError

_MAX_BYTES = 1_000_000
_MAX_DEPTH = 32
_MAX_NODES = 100_000


class Config(BaseModel):
    """Frozen, strict base of every configuration: unknown keys and silent conversions are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, mapping: Mapping[str, Any], *, source: str = "configuration") -> Self:
        """Validate ``mapping``; ``source`` names it in errors.

        Raises:
            ConfigError: one line per fault, with the nearest valid key for an unknown one.
        """
        try:
            # the JSON mode of strict validation takes lists for tuples, as YAML has no tuple
            return cls.model_validate_json(json.dumps(mapping))
        except TypeError as error:
            raise ConfigError(
                f"{source}: {error}; a configuration holds only text, numbers, lists and mappings."
            ) from error
        except ValidationError as error:
            raise ConfigError("\n".join(_line(cls, fault, source) for fault in error.errors())) from error

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``parse`` reads back."""
        return typing.cast("dict[str, Any]", json.loads(self.model_dump_json()))


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping without running anything in it; ``1e-3`` reads as a number.

    Raises:
        ConfigError: if the file is missing, too large or deep, uses tags or aliases, or is not a mapping.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Give the path of a YAML file.") from error
    if len(raw) > _MAX_BYTES:
        raise ConfigError(f"{path}: {len(raw)} bytes; a configuration has at most {_MAX_BYTES}.")
    try:
        return parse_yaml(raw.decode("utf-8"), source=str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start}. Save the file as UTF-8.") from error


def parse_yaml(text: str, *, source: str) -> dict[str, Any]:
    """Read a YAML mapping from ``text``; see :func:`load_yaml`."""
    try:
        depth = 0
        for nodes, event in enumerate(yaml.parse(text, Loader=_Loader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH or nodes > _MAX_NODES:
                raise ConfigError(f"{source}: nested deeper than {_MAX_DEPTH} or more than {_MAX_NODES} nodes.")
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{source}: YAML alias *{event.anchor}; write the value out.")
        data = yaml.load(text, Loader=_Loader)  # noqa: S506  a subclass of SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        where = getattr(error, "problem_mark", None)
        place = f" line {where.line + 1}" if where else ""
        raise ConfigError(f"{source}:{place} is not valid YAML ({getattr(error, 'problem', error)}).") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: holds a {type(data).__name__}; a configuration is a mapping of keys to values.")
    return data


def apply_overrides(mapping: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return ``mapping`` with ``a.b=c`` strings applied; values are read as YAML.

    Raises:
        ConfigError: if an override has no ``=`` or goes through a value that is not a mapping.
    """
    result: dict[str, Any] = json.loads(json.dumps(mapping))
    for override in overrides:
        key, sep, text = override.partition("=")
        if not sep or not key:
            raise ConfigError(f"--set {override}: expected key=value, for example train.steps=100.")
        value = parse_yaml(f"value: {text}", source=f"--set {override}").get("value")
        *parents, last = key.split(".")
        node = result
        for depth, parent in enumerate(parents, start=1):
            child = node.setdefault(parent, {})
            if isinstance(child, list):
                whole = _whole([*parents[depth:], last], text)
                raise ConfigError(
                    f"--set {override}: {parent} is a list, which is given as a whole. Write "
                    f"--set '{'.'.join(parents[:depth])}={whole}'."
                )
            if not isinstance(child, dict):
                raise ConfigError(f"--set {override}: {parent} is {child!r}, not a mapping that has {last}.")
            node = child
        node[last] = value
    return result


def _whole(keys: Sequence[str], text: str) -> str:
    """``text`` under ``keys`` as YAML of one line; just a list where the first key is a place in one."""
    if keys[0].isdigit():
        return "[...]"
    for key in reversed(keys):
        text = f"{{{key}: {text}}}"
    return text


def dump_yaml(mapping: Mapping[str, Any]) -> str:
    """YAML text of plain data, keys in their given order."""
    return yaml.safe_dump(json.loads(json.dumps(mapping)), sort_keys=False, width=120)


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-3 as a number, as every other tool does, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", node.start_mark)
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _line(cls: type[BaseModel], fault: Mapping[str, Any], source: str) -> str:
    """One sentence for one pydantic fault."""
    loc = [str(part) for part in fault["loc"]]
    where = ".".join(loc) or "the whole"
    if fault["type"] == "extra_forbidden":
        known = _known_keys(cls, loc[:-1])
        near = difflib.get_close_matches(loc[-1], known, n=1)
        hint = f" Did you mean {near[0]}?" if near else f" Known keys: {', '.join(sorted(known))}."
        return f"{source}: unknown key {where}.{hint}"
    if fault["type"] == "missing":
        return f"{source}: {where} is missing. Add it."
    found = fault.get("input")
    shown = f" (found {found!r})" if isinstance(found, str | int | float | bool) or found is None else ""
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{source}: {where}: {message}{shown}."


def _known_keys(cls: type[BaseModel], path: list[str]) -> list[str]:
    """Field names of the model reached by ``path``; those of the root where a union hides it."""
    model: type[BaseModel] = cls
    for part in path:
        field = model.model_fields.get(part)
        inner = _model_of(field.annotation) if field else None
        if inner is None:
            continue
        model = inner
    return list(model.model_fields)


def _model_of(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        for argument in typing.get_args(annotation):
            found = _model_of(argument)
            if found:
                return found
    return None

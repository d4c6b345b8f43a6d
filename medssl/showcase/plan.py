"""What a gallery is asked to show: a preset, a list of augments, or the augments of a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from medssl.augment.images import Images
from medssl.augment.presets import preset
from medssl.config import Config, apply_overrides, load_yaml, parse_yaml
from medssl.errors import ConfigError
from medssl.handover import fresh_encoder
from medssl.methods.base import Method
from medssl.registry import configure
from medssl.tasks.base import Task
from medssl.views import ViewSampler

Triple = tuple[int, int, int]

_YAML = {".yaml", ".yml"}
_PRESET_KEYS = {"preset", "without"}
_BACKBONE = {"name": "unet"}


@dataclass(frozen=True)
class Learner:
    """The method or task of a recipe, from which training takes its sampler.

    Args:
        cls: Its class.
        config: Its options.
        backbone: Of the recipe; the one by default where it names none.
    """

    cls: type[Method] | type[Task[Any]]
    config: Config
    backbone: Mapping[str, Any]

    def sampler(self, images: Images, label_values: Sequence[int]) -> ViewSampler:
        """What cuts the views of a run.

        Raises:
            ConfigError: if training would refuse the recipe for these images.
        """
        encoder = fresh_encoder(self.backbone, images, augment=self.config.to_dict()["augment"], seed=0)
        labels = {"label_values": label_values} if issubclass(self.cls, Task) else {}
        built = cast("Any", self.cls)(self.config, encoder=encoder, seed=0, images=images, **labels)
        return cast("ViewSampler", built.view_sampler())


@dataclass(frozen=True)
class Plan:
    """Augments, and how crops are drawn for them.

    Args:
        title: What was asked for, in a few words.
        augment: As a recipe would write it.
        crop_voxels: Of the recipe, if it is one.
        crop_mm: Likewise.
        region: Likewise.
        inside_body: Whether crop centres lie in the body.
        foreground_share: How often a crop is centred on a structure; None where labels are not read.
        position_task: Whether the recipe learns positions, so that nothing may move.
        needs_label: Whether only labelled cases will do.
        learner: The method or task, if it is a recipe.
    """

    title: str
    augment: Sequence[Mapping[str, Any]] | Mapping[str, Any]
    crop_voxels: Triple | None = None
    crop_mm: tuple[float, float, float] | None = None
    region: Mapping[str, tuple[float, float]] | None = None
    inside_body: bool = True
    foreground_share: float | None = None
    position_task: bool = False
    needs_label: bool = False
    learner: Learner | None = None

    @property
    def preset_names(self) -> list[str]:
        """The presets that are asked for."""
        entries = [self.augment] if isinstance(self.augment, Mapping) else self.augment
        given = [entry.get("preset", []) for entry in entries]
        return [str(name) for names in given for name in ([names] if isinstance(names, str) else names)]

    def reasons(self, name: str, options: Mapping[str, Any]) -> Mapping[str, str]:
        """Why the preset that an augment comes from gives it these options; empty where none does.

        Args:
            name: Of the augment.
            options: All of its options.
        """
        for one in map(preset, self.preset_names):
            for written, reasons in zip(one.augments, one.reasons, strict=True):
                given = {**written, "name": name}
                if written["name"] == name and all({**options, "name": name}[k] == given[k] for k in given):
                    return reasons
        return {}


def read_plan(
    augment: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    overrides: Iterable[str] = (),
    *,
    crop_voxels: Triple | None = None,
) -> Plan:
    """Find out what is meant by ``augment``.

    Args:
        augment: Name of a preset; a YAML file, or its content: augments as a recipe lists them, or a recipe.
        overrides: ``key=value`` strings on top of it.
        crop_voxels: In place of those of a recipe.

    Raises:
        ConfigError: if the file cannot be read, or holds something else.
    """
    if isinstance(augment, Path) or (isinstance(augment, str) and Path(augment).suffix in _YAML):
        return _of_mapping(_load(Path(augment)), overrides, title=Path(augment).name, crop_voxels=crop_voxels)
    if isinstance(augment, str):
        return _of_mapping({"preset": augment}, overrides, title=augment)
    given = augment if isinstance(augment, Mapping) else {"augment": list(augment)}
    return _of_mapping(given, overrides, title="augments", crop_voxels=crop_voxels)


def _load(path: Path) -> dict[str, Any]:
    """A mapping from a file; a bare list of augments becomes one."""
    try:
        return load_yaml(path)
    except ConfigError:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        if not any(line.startswith("- ") for line in text.splitlines()):
            raise
    return parse_yaml(f"augment:\n{text}", source=str(path))


def _of_mapping(
    mapping: Mapping[str, Any], overrides: Iterable[str], *, title: str, crop_voxels: Triple | None = None
) -> Plan:
    content = apply_overrides(mapping, overrides)
    if content.keys() & {"method", "task"}:
        return _of_recipe(content, title, crop_voxels)
    if mapping.keys() <= _PRESET_KEYS and (unknown := content.keys() - _PRESET_KEYS):
        raise ConfigError(
            f"{title}: --set {min(unknown)} on a preset, of which only without can be set, as in without=[noise]. To "
            f"give an augment other options, list it in a YAML file: [{{preset: {content.get('preset')}, without: "
            "[noise]}, {name: noise, p: 0.5}]."
        )
    if "augment" in content and len(content) == 1:
        content = content["augment"]
    entries = [content] if isinstance(content, Mapping) else content
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) and _is_augment(entry) for entry in entries):
        raise ConfigError(
            f"{title}: neither augments nor a recipe. Give the name of a preset, a list such as "
            "[{name: noise}, {preset: mr_light}], or a recipe of pretrain or finetune."
        )
    return Plan(title, content)


def _is_augment(entry: Mapping[str, Any]) -> bool:
    return bool(entry.keys() & {"name", "preset"})


def _of_recipe(recipe: Mapping[str, Any], title: str, crop_voxels: Triple | None) -> Plan:
    is_task = "task" in recipe
    part = recipe["task" if is_task else "method"]
    if not isinstance(part, Mapping):
        raise ConfigError(f"{title}: {'task' if is_task else 'method'} is {part!r}; a mapping with a name is needed.")
    if crop_voxels is not None:
        part = {**part, "crop_voxels": list(crop_voxels)}
    cls: type[Method] | type[Task[Any]]
    if is_task:
        cls, config = configure("tasks", part, Task)  # type: ignore[type-abstract]
    else:
        cls, config = configure("methods", part, Method)  # type: ignore[type-abstract]
    options = json.loads(json.dumps(config.to_dict()))
    return Plan(
        title=f"{title}: {part['name']}",
        augment=options["augment"],
        crop_voxels=cast("Triple", tuple(options["crop_voxels"])),
        crop_mm=_floats(options.get("crop_mm")),
        region={axis: (low, high) for axis, (low, high) in (options.get("region") or {}).items()} or None,
        inside_body=bool(options.get("inside_body", not is_task)),
        foreground_share=options.get("foreground_share"),
        position_task=bool(getattr(cls, "position_task", False)),
        needs_label=is_task,
        learner=Learner(cls, config, recipe.get("backbone", _BACKBONE)),
    )


def _floats(values: Sequence[float] | None) -> tuple[float, float, float] | None:
    if values is None:
        return None
    x, y, z = values
    return x, y, z

"""Find the tensors of a public checkpoint that belong to the encoder, and give them our names.

A family knows three things: which names belong to the encoder (whatever stands before them, ``module.``, ``student.``
or the keys of nested mappings, is found and taken off), what we call them, and how the shapes tell the configuration.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from medssl.errors import CheckpointError

_SHOWN = 4


@dataclass(frozen=True)
class Family:
    """One kind of public checkpoint.

    Args:
        name: As in ``medssl adopt --as``.
        title: What it is, for a list.
        rules: Pattern of a name and what we call it; a pattern may begin after any dot.
        infer: Gives the backbone's mapping from the renamed tensors, its ``name`` included.
        stem: Our name of the kernel over the image's channels.
        prepare: How the images were prepared, as far as it was published and ``prepare`` can do it; empty if unknown.
        hint: What has to be known of the images, in a sentence.
        source: Where the weights are published; their licence is stated there.
        citations: Papers to cite.
        convert: Makes tensors of their layout ours, after renaming.
    """

    name: str
    title: str
    rules: tuple[tuple[str, str], ...]
    infer: Callable[[Mapping[str, Tensor]], dict[str, Any]]
    stem: str
    source: str
    citations: tuple[str, ...]
    prepare: Mapping[str, Any] = field(default_factory=dict)
    hint: str = ""
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict


@dataclass(frozen=True)
class Renamed:
    """The tensors of a checkpoint under our names.

    Args:
        tensors: Our name to tensor.
        sources: Our name to the name in the file.
        unused: Names in the file that were taken for nothing.
        prefix: What stood before the names.
    """

    tensors: dict[str, Tensor]
    sources: dict[str, str]
    unused: tuple[str, ...]
    prefix: str


def flatten(content: object, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor in nested mappings, its name the keys on the way with dots between."""
    if isinstance(content, Tensor):
        return {prefix: content}
    if not isinstance(content, Mapping):
        return {}
    found: dict[str, Tensor] = {}
    for key, value in content.items():
        found |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def rename(family: Family, tensors: Mapping[str, Tensor], *, prefix: str | None = None) -> Renamed:
    """Find the encoder among ``tensors`` and give its tensors our names.

    Args:
        family: Whose names they are.
        tensors: Name to tensor, as :func:`flatten` gives them.
        prefix: What stands before the names of the encoder; found if left out.

    Raises:
        CheckpointError: ``E_WEIGHTS``, if no name fits, or if the file holds several such networks that differ.
    """
    patterns = [(re.compile(rf"(?:^|(?<=\.)){pattern}$"), target) for pattern, target in family.rules]
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for name in tensors:
        fits = [(match.start(), match, target) for rule, target in patterns if (match := rule.search(name))]
        if fits:
            start, match, target = min(fits, key=lambda fit: fit[0])
            groups[name[:start]].setdefault(match.expand(target), name)
    chosen = _choose(family, tensors, groups, prefix)
    sources = groups[chosen]
    renamed = family.convert({ours: tensors[theirs] for ours, theirs in sources.items()})
    taken = set(sources.values())
    return Renamed(renamed, sources, tuple(name for name in tensors if name not in taken), chosen)


def _choose(
    family: Family, tensors: Mapping[str, Tensor], groups: Mapping[str, Mapping[str, str]], prefix: str | None
) -> str:
    """Prefix of the network with most names; of equal networks the shortest prefix."""
    if prefix is not None:
        wanted = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
        if wanted not in groups:
            raise CheckpointError(
                f"adopt: no tensor of {family.name} begins with {prefix!r}; found are {_listed(groups) or 'none'}. "
                "Correct prefix."
            )
        return wanted
    if not groups:
        examples = ", ".join(list(tensors)[:_SHOWN])
        raise CheckpointError(
            f"adopt: none of the {len(tensors)} tensors is named as in {family.name} (first are {examples}). "
            "Choose the family that the file belongs to."
        )
    most = max(len(group) for group in groups.values())
    best = sorted((name for name, group in groups.items() if len(group) == most), key=len)
    for other in best[1:]:
        if not _equal(tensors, groups[best[0]], groups[other]):
            raise CheckpointError(
                f"adopt: the file holds several networks that differ, under {_listed(best)}. Say which one with "
                f"prefix, for example --set prefix={best[0]}."
            )
    return best[0]


def _equal(tensors: Mapping[str, Tensor], one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensors[one[k]], tensors[other[k]]) for k in one)


def _listed(prefixes: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in list(prefixes)[:_SHOWN])

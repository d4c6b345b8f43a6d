"""A plan as a recipe: plain data, and YAML with a reason above each value."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import yaml

from medssl.blueprint.choose import Choice
from medssl.blueprint.fingerprint import Fingerprint
from medssl.blueprint.fit import Fit, PlanConfig
from medssl.nn.bundle import Bundle


def nested(choices: Sequence[Choice]) -> dict[str, Any]:
    """The recipe as plain data."""
    recipe: dict[str, Any] = {}
    for key, value, _ in choices:
        section, _, name = key.partition(".")
        if name:
            recipe.setdefault(section, {})[name] = value
        else:
            recipe[section] = value
    return recipe


def commented(
    choices: Sequence[Choice],
    remarks: Sequence[str],
    *,
    found: Fingerprint,
    fit: Fit,
    given: PlanConfig,
    encoder: Bundle | None,
) -> str:
    """The recipe as YAML, each value under its reason.

    Args:
        choices: In the order of the recipe.
        remarks: Notes for the head of the file.
        found: Of the labelled cases.
        fit: What was chosen.
        given: Budget.
        encoder: Bundle, if there is one.
    """
    structures = "; ".join(
        f"{s.value} in {s.cases} cases, {s.volume_ml:.2g} ml" if found.is_metric else f"{s.value} in {s.cases} cases"
        for s in found.structures
    )
    head = [
        f"Segmentation, planned by medssl plan for {found.cases} labelled cases of {found.subjects} subjects.",
        f"Does:  trains from {'the weights of a bundle (--encoder)' if encoder else 'random weights'}.",
        f"Label values: {structures}.",
        f"Needs: at most {given.minutes:g} minutes and {fit.gib:.2g} GiB on the machine that it was planned on.",
        "Gives: held-out crop_dice in the journal, where there are labelled cases in the split val.",
        *([f"HU inside the structures: {found.hu_range[0]} to {found.hu_range[1]}."] if found.hu_range else []),
        *(f"Note:  {remark}." for remark in remarks),
    ]
    lines = [line for text in head for line in _comment(text, "")]
    section = ""
    for key, value, reason in choices:
        parent, _, name = key.partition(".")
        if name and parent != section:
            lines.append(f"{parent}:")
        section = parent
        indent = "  " if name else ""
        lines += _comment(reason, indent) if reason else []
        lines.append(f"{indent}{name or parent}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 118, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ")


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")

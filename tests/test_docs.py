"""What the documents say is true: code runs, commands parse, links lead somewhere, no path of our own machines."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny
import typer
import yaml

from medssl.augment.build import build_augment
from medssl.cli import app
from medssl.methods.base import Method
from medssl.recipe import pretrain
from medssl.registry import configure
from medssl.runfolder import read_journal
from medssl.tasks.base import Task

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCKER = sorted((ROOT / "docker").iterdir())
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SCRIPTS = sorted((ROOT / "pipelines").glob("*.py"))
EVERYTHING = [*PAGES, *DOCKER, *CONFIGS, *SCRIPTS, ROOT / "Makefile"]

COMMAND_LINE = re.compile(r"^[ #\t]*(?:\$ )?(?:\S*/)?medssl ([a-z-].*)$")
INLINE = re.compile(r"`(?:\S*/)?medssl ([a-z-][^`]*)`")
IN_DOCKER = re.compile(r"medssl:\w+ ([a-z-].*)$")

commands = typer.main.get_command(app)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def command_lines(path: Path) -> list[tuple[str, bool]]:
    """Every command of a file, and whether it is written out in full, to be copied."""
    text = path.read_text()
    whole = "\n".join(blocks(path, "[a-z]*")) if path.suffix == ".md" else text
    found = [(match.group(1), True) for line in whole.splitlines() if (match := COMMAND_LINE.match(line))]
    found += [(match.group(1), True) for line in text.splitlines() if (match := IN_DOCKER.search(line))]
    return found + [(line, False) for line in INLINE.findall(text)]


ALL_LINES = [(name(path), line, whole) for path in EVERYTHING for line, whole in command_lines(path)]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_python_block_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(path, "python"):
        exec(compile(block, name(path), "exec"), {"__name__": "page"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("page", "line", "whole"), ALL_LINES)
def test_every_command_line_is_one_that_medssl_takes(page: str, line: str, whole: bool) -> None:
    first, *arguments = shlex.split(line, comments=True)
    if first.startswith("-"):
        assert {first, *arguments} <= {"--help", "--version"}
        return
    assert first in commands.commands, f"{page}: medssl {line}"
    command = commands.commands[first]
    known = {flag for parameter in command.params for flag in parameter.opts} | {"--help"}
    assert {word.split("=")[0] for word in arguments if re.match(r"--?[a-z]", word)} <= known, f"{page}: {line}"
    if whole and "--help" not in arguments:
        command.make_context(first, list(arguments))


def test_the_sequence_of_the_readme_uses_every_command() -> None:
    used = {line.split()[0] for page, line, whole in ALL_LINES if page == "README.md" and whole}
    assert used >= set(commands.commands) - {"demo"}
    assert "make demo" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", EVERYTHING, ids=name)
def test_every_repository_file_that_is_named_exists(path: Path) -> None:
    text = path.read_text()
    named = re.findall(
        r"\b(?:configs|docs|pipelines|benchmarks|docker|medssl|tests)/[\w./-]+\.(?:yaml|py|md|cpu|cuda)\b", text
    )
    missing = [found for found in named if not (ROOT / found).exists()]
    assert missing == []


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_link_between_pages_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", [*EVERYTHING, *sorted((ROOT / "medssl").rglob("*.py"))], ids=name)
def test_no_file_names_a_place_on_our_machines(path: Path) -> None:
    found = re.findall(r"(?<![\w.$}])/(?:work|home|root|Users|mnt|tmp|venv|shared)/\S*", path.read_text())
    assert found == []


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_part_of_a_recipe_in_a_document_is_one_that_medssl_takes(path: Path) -> None:
    for block in blocks(path, "yaml"):
        content = yaml.safe_load(block)
        for part, package, base in (("method", "methods", Method), ("task", "tasks", Task)):
            if part in content:
                config = configure(package, content[part], base)[1].to_dict()
                build_augment(config["augment"])


def documented() -> set[str]:
    """Names in the table of the journal's page."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/concepts/journal.md").read_text(), flags=re.MULTILINE)
    return {found for row in rows for found in re.findall(r"`([^`]+)`", row)}


def emitted(folder: str, pattern: str) -> set[str]:
    return {
        found for path in (ROOT / "medssl" / folder).rglob("*.py") for found in re.findall(pattern, path.read_text())
    }


def test_every_note_of_samplers_and_augments_stands_in_the_table_of_the_journal() -> None:
    notes = emitted("views", r'"note_(\w+)"') | emitted("augment", r'notes\["(\w+)"\]')
    assert {"padded", "moved", "fallback", "hu_clipped"} <= notes
    assert {word for word in documented() if word.startswith("views/")} == {f"views/{note}" for note in notes}


def test_everything_that_runs_write_stands_in_the_table_of_the_journal(
    phantoms: Any, model_bundle: Path, encoder_bundle: Path, tmp_path: Path
) -> None:
    inter = {**tiny.VOCO, "method": {**tiny.VOCO["method"], "inter": True}}
    for run, recipe in (("mae", tiny.MAE), ("inter", inter)):
        pretrain(tiny.shorter(recipe, 2), store=phantoms.store, out=tmp_path / run)
    runs = [encoder_bundle.parent, model_bundle.parent, tmp_path / "mae", tmp_path / "inter"]
    lines = [line for run in runs for line in read_journal(run / "journal.jsonl")]
    written = {key for line in lines for key in line} - {"step"}
    assert {key.removeprefix("held_out/") for key in written} <= documented()
    assert {key for key in written if key.startswith("probe/")} == {key for key in documented() if key[:6] == "probe/"}


def test_the_readme_says_what_medssl_is_not() -> None:
    assert "research use only" in (ROOT / "README.md").read_text().lower()


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_a_pipeline_is_short_enough_to_be_read_and_edited(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 80


def test_both_images_are_built_from_the_same_lock() -> None:
    for path in DOCKER:
        assert "-c constraints.txt" in path.read_text()
        assert "COPY pyproject.toml constraints.txt" in path.read_text()

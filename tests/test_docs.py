"""What the documents say is true: code runs, commands parse, links lead somewhere, no path of our own machines."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from medssl.cli import app

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


def test_the_readme_says_what_medssl_is_not() -> None:
    assert "research use only" in (ROOT / "README.md").read_text().lower()


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_a_pipeline_is_short_enough_to_be_read_and_edited(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 80


def test_both_images_are_built_from_the_same_lock() -> None:
    for path in DOCKER:
        assert "-c constraints.txt" in path.read_text()
        assert "COPY pyproject.toml constraints.txt" in path.read_text()

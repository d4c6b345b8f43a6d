"""When, on what and with which versions a result was made; the head of every page of results."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator


def head(title: str, *packages: str) -> Iterator[str]:
    """Lines of Markdown: title, date, commit (``-dirty`` with changes), cores, versions and the command."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    yield f"# {title}"
    yield ""
    yield f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}, commit `{commit}`, {len(os.sched_getaffinity(0))} cores,"
    yield f"{', '.join([f'Python {platform.python_version()}', *map(_version, packages)])}."
    yield ""
    yield "```"
    yield f"python {shlex.join(sys.argv)}"
    yield "```"
    yield ""


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} not installed"

"""Rules of the whole house: light start, no network, no code from data, one function a command."""

from __future__ import annotations

import ast
import inspect
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import medssl
from medssl.cli import app

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "medssl").rglob("*.py"))
COMMANDS = (
    "scan", "doctor", "convert", "prepare", "gallery", "plan", "pretrain", "finetune", "adopt", "crossval",
    "postprocess", "predict", "evaluate", "study", "embed", "probe", "similar", "leaks", "drift", "demo",
)  # fmt: skip

HELP = """
import json, sys, time
from medssl.cli import main
sys.argv = ["medssl", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"torch", "monai", "numpy", "pandas", "scipy", "SimpleITK", "nibabel", "matplotlib", "blosc2"}
    sys.stderr.write(json.dumps([time.process_time(), sorted(heavy & set(sys.modules))]))
"""


def show_help(*command: str) -> tuple[str, float, list[str]]:
    """Text, CPU seconds of the process (a busy machine must not fail the test), and heavy modules that it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", HELP, *command, "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    seconds, heavy = json.loads(done.stderr.splitlines()[-1])
    return done.stdout, seconds, heavy


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_takes_less_than_a_third_of_a_second_and_loads_nothing_heavy(command: tuple[str, ...]) -> None:
    best = float("inf")
    for _ in range(3):
        text, seconds, heavy = show_help(*command)
        assert heavy == []
        assert "Usage:" in text
        best = min(best, seconds)
        if best < 0.3:
            return
    assert best < 0.3


def test_the_help_names_every_command_and_the_limits_of_use() -> None:
    text, _, _ = show_help()
    assert all(name in text for name in COMMANDS)
    assert "not a medical device" in text


def test_every_command_is_a_public_function_of_the_same_name() -> None:
    registered = [command.callback.__name__ for command in app.registered_commands if command.callback]
    assert tuple(registered) == COMMANDS
    for name in COMMANDS:
        function = getattr(medssl, name)
        assert name in medssl.__all__
        assert inspect.isfunction(function)
        writes = name != "doctor"
        assert ("dry_run" in inspect.signature(function).parameters) == writes


class _NoNetwork(socket.socket):
    def __init__(self, *_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")


def test_prediction_opens_no_socket(
    phantoms: Any, model_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", _NoNetwork)
    monkeypatch.setattr(socket, "create_connection", _NoNetwork)
    scan = tmp_path / "in" / "a.nii.gz"
    scan.parent.mkdir()
    shutil.copy(phantoms.scans / "imagesTs" / "phantom_010.nii.gz", scan)
    result = medssl.predict(model_bundle, scan, out=tmp_path / "out")
    assert [path.name for path in result.outputs] == ["a.nii.gz"]


def test_importing_everything_opens_no_socket() -> None:
    code = (
        "import socket\n"
        "class Refused(socket.socket):\n"
        "    def __init__(self, *a, **k): raise AssertionError('a socket was opened')\n"
        "socket.socket = Refused\n"
        "import medssl\n"
        "for name in medssl.__all__: getattr(medssl, name)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120, env=environment)


NETWORK = {"urllib", "http", "requests", "ftplib", "smtplib", "xmlrpc", "httpx", "aiohttp", "huggingface_hub", "wandb"}
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def _calls_and_imports(path: Path) -> tuple[set[str], set[str], list[ast.Call]]:
    tree = ast.parse(path.read_text())
    imported: set[str] = set()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if [name.name for name in node.names] == ["UnpicklingError"]:
                continue  # the name of a refusal, which reads nothing
            imported.add(node.module.split(".")[0])
    return {ast.unparse(call.func) for call in calls}, imported, calls


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_runs_code_from_data_or_knows_a_network(path: Path) -> None:
    called, imported, calls = _calls_and_imports(path)
    forbidden = {
        "eval",
        "exec",
        "compile",
        "yaml.unsafe_load",
        "os.system",
        "__import__",
        "print",
        "input",
    }
    assert not called & forbidden
    assert not imported & (NETWORK | PICKLES | {"subprocess"})
    for call in calls:
        name, keywords = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name in {"np.load", "numpy.load"}:
            assert keywords.get("allow_pickle") == "False"
        if name == "torch.load":
            assert keywords.get("weights_only") == "True"
        if name == "yaml.load":
            assert keywords["Loader"] == "_Loader", "a subclass of SafeLoader"
        assert name != "pd.read_pickle"


def test_every_room_has_something_in_it() -> None:
    packages = [path.parent for path in (ROOT / "medssl").rglob("__init__.py")]
    assert all(len(list(package.glob("*.py"))) > 1 for package in packages)

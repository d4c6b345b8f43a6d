"""The command line: each command, its exit codes, and what a user reads when something is wrong."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from medssl import __version__, cli
from medssl.cli import app, run_guarded
from medssl.errors import ExitCode, MedSSLError
from medssl.runfolder import RunFolder, read_journal

COMMANDS = ("scan", "prepare", "pretrain", "finetune", "predict", "evaluate", "study", "demo")
SHORT = ("--set", "train.steps=1", "--set", "train.warmup_steps=0")


def medssl(*arguments: object) -> int:
    """Run a command as the shell would; give its exit code."""
    return int(run_guarded(lambda: app([str(argument) for argument in arguments], standalone_mode=False)))


class Files:
    """Everything that a command can be given."""

    def __init__(self, folder: Path, phantoms: Any, encoder: Path, model: Path) -> None:
        self.folder, self.scans, self.cohort, self.store = folder, phantoms.scans, phantoms.cohort, phantoms.store
        self.encoder, self.model = encoder, model
        self.images, self.labels = folder / "images", folder / "labels"
        for there, here in (("imagesTr", self.images), ("labelsTr", self.labels)):
            here.mkdir()
            for name in ("phantom_000.nii.gz", "phantom_001.nii.gz"):
                shutil.copy(phantoms.scans / there / name, here / name)
        study = {"finetune": tiny.shorter(tiny.SEGMENT, 1), "arms": {"scratch": {}}, "budgets": [1], "seeds": [0]}
        for name, recipe in (("prepare", tiny.PREPARE), ("mae", tiny.MAE), ("segment", tiny.SEGMENT), ("study", study)):
            (folder / f"{name}.yaml").write_text(json.dumps(recipe))
            setattr(self, name, folder / f"{name}.yaml")
        self.commands: dict[str, tuple[object, ...]] = {
            "scan": ("scan", self.images, "--modality", "MR"),
            "prepare": ("prepare", self.prepare, "--cohort", self.cohort, "--workers", 1),
            "pretrain": ("pretrain", self.mae, "--store", self.store, *SHORT),
            "finetune": ("finetune", self.segment, "--store", self.store, "--encoder", encoder, *SHORT),
            "predict": ("predict", model, self.images, "--device", "cpu"),
            "evaluate": ("evaluate", self.labels, self.labels),
            "study": ("study", self.study, "--store", self.store),
            "demo": ("demo",),
        }

    def out(self, command: str) -> Path:
        return self.folder / "out" / ("cohort.csv" if command == "scan" else command)

    def run(self, command: str, *more: object) -> int:
        return medssl(*self.commands[command], "-o", self.out(command), *more)


@pytest.fixture
def files(tmp_path: Path, phantoms: Any, encoder_bundle: Path, model_bundle: Path, monkeypatch: Any) -> Files:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # a study takes all cores that it sees
    return Files(tmp_path, phantoms, encoder_bundle, model_bundle)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_command_runs_and_leaves_a_recipe_and_a_journal(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS[:-1]:
        assert files.run(command) == 0, capsys.readouterr()
        said = capsys.readouterr().out
        assert str(files.out(command)) in said
        assert "refused.csv" not in said
        assert ("look at" in said) == (command == "scan")
        folder = files.out(command).parent if command == "scan" else files.out(command)
        names = {path.name for path in folder.iterdir()}
        assert "journal.jsonl" in names
        assert names & {"recipe.yaml", "scan.yaml", "prepare.yaml"}
        assert not [name for name in names if name.startswith(".")], "no lock and no temporary file is left"
        for line in read_journal(folder / "journal.jsonl"):
            assert str(files.folder) not in json.dumps(line)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dry_run_writes_nothing_and_says_what_it_would(
    files: Files, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, store = contents(files.folder), contents(files.store)
    monkeypatch.chdir(files.folder)
    assert files.run(command, "--dry-run") == 0
    assert str(files.out(command).parent) in capsys.readouterr().out
    assert contents(files.folder) == before
    assert not (files.folder / "out").exists()
    assert contents(files.store) == store


@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_a_full_disk_is_one_sentence_and_exit_code_5(
    files: Files, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert files.run(command) == ExitCode.ENVIRONMENT
    said = capsys.readouterr().err
    assert "E_DISK_FULL" in said
    assert "Free space" in said
    assert "Traceback" not in said
    assert not [path for path in files.folder.rglob("*") if path.name.startswith((".tmp", ".lock"))]


@pytest.mark.parametrize("command", ["pretrain", "finetune", "predict", "evaluate", "study"])
def test_a_folder_that_another_run_holds_is_refused_with_exit_code_7(
    files: Files, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunFolder(files.out(command)):
        assert files.run(command) == ExitCode.LOCKED
    assert f"E_LOCKED: {files.out(command)}: held by process {os.getpid()}" in capsys.readouterr().err
    assert not (files.out(command) / "bundle").exists()


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        ("scan", "modalty=CT", "unknown key modalty. Did you mean modality?"),
        ("scan", "seed=first", "seed: Input should be a valid integer"),
        ("prepare", "spacing=[1, 1, 1]", "unknown key spacing. Did you mean spacing_mm?"),
        ("prepare", "spacing_mm=1", "spacing_mm"),
        ("pretrain", "train.step=1", "unknown key train.step. Did you mean steps?"),
        ("pretrain", "train.steps=1.5", "train.steps: Input should be a valid integer"),
        ("pretrain", "method.name=maee", "did you mean mae?"),
        ("finetune", "task.mode=frozn", "mode"),
        ("finetune", "num_labeled=3", "unknown key num_labeled. Did you mean num_labelled?"),
        ("finetune", "train.lr", "expected key=value"),
        ("evaluate", "bootstrp=100", "unknown key bootstrp. Did you mean bootstrap?"),
        ("evaluate", "bootstrap=lots", "bootstrap: Input should be a valid integer"),
        ("study", "seed=[1]", "unknown key seed. Did you mean seeds?"),
        ("study", "workers=two", "workers: Input should be a valid integer"),
    ],
)
def test_a_wrong_option_is_refused_with_exit_code_2_and_the_nearest_right_one(
    files: Files, command: str, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert files.run(command, "--set", override) == ExitCode.USAGE
    said = capsys.readouterr().err
    assert said.startswith("E_")
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not files.out(command).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pretrian",), "pretrain"),
        (("pretrain",), "Missing argument"),
        (("pretrain", "x.yaml", "--store", "s", "-o", "o", "--step", "3"), "--step"),
        (("pretrain", "x.yaml", "--store", "s", "-o", "o", "--resume", "perhaps"), "auto, never or must"),
        (("predict", "b", "s", "-o", "o", "--overlap", "half"), "--overlap"),
    ],
)
def test_wrong_usage_has_exit_code_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert medssl(*arguments) == ExitCode.USAGE
    assert message in capsys.readouterr().err


def test_a_recipe_that_is_not_there_has_exit_code_2(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert medssl("pretrain", files.folder / "no.yaml", "--store", files.store, "-o", files.folder / "o") == 2
    assert "no.yaml: cannot be read" in capsys.readouterr().err


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_one_bad_case_among_good_ones_is_named_and_has_exit_code_3(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, broken in (("scan", files.images), ("predict", files.images), ("evaluate", files.labels)):
        path = broken / "phantom_001.nii.gz"
        whole = path.read_bytes()
        _truncate(path)
        assert files.run(command) == ExitCode.SOME_REJECTED
        output = capsys.readouterr()
        assert "phantom_001" in output.err
        assert "rejected" in output.err
        assert "2 seen: 1 accepted" in output.out
        assert "refused.csv" in output.out.splitlines()[-1]
        path.write_bytes(whole)


def test_a_case_that_broke_after_the_scan_costs_prepare_that_case(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    assert files.run("scan", "--keep-names") == 0
    _truncate(files.images / "phantom_001.nii.gz")
    arguments = ("prepare", files.prepare, "--cohort", files.out("scan"), "-o", files.out("prepare"), "--workers", 1)
    assert medssl(*arguments) == ExitCode.SOME_REJECTED
    assert "phantom_001" in capsys.readouterr().err


def test_nothing_usable_has_exit_code_4(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    empty = files.folder / "empty"
    empty.mkdir()
    out = files.folder / "out"
    assert medssl("scan", empty, "-o", out / "cohort.csv") == ExitCode.NO_INPUT
    assert medssl("predict", files.model, empty, "-o", out) == ExitCode.NO_INPUT
    assert medssl("evaluate", empty, files.labels, "-o", out) == ExitCode.NO_INPUT
    assert medssl("pretrain", files.mae, "--store", files.store, "-o", out, "--set", "splits=[]") == ExitCode.NO_INPUT
    for path in files.images.iterdir():
        path.write_bytes(gzip.compress(b"nothing"))
    assert files.run("scan") == ExitCode.NO_INPUT
    assert files.run("predict") == ExitCode.NO_INPUT
    assert "Traceback" not in capsys.readouterr().err


def test_inputs_that_are_not_there_are_one_sentence(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere, out = files.folder / "nowhere", files.folder / "out"
    for arguments in (
        ("scan", nowhere),
        ("prepare", files.prepare, "--cohort", nowhere),
        ("pretrain", files.mae, "--store", nowhere),
        ("finetune", files.segment, "--store", files.store, "--encoder", nowhere),
        ("predict", nowhere, files.images),
        ("predict", files.model, nowhere),
        ("evaluate", nowhere, files.labels),
        ("evaluate", files.labels, nowhere),
        ("study", files.study, "--store", nowhere),
    ):
        assert medssl(*arguments, "-o", out) in {ExitCode.NO_INPUT, ExitCode.INTEGRITY}, arguments
        said = capsys.readouterr().err
        assert "nowhere" in said
        assert said.startswith("E_")


def test_a_damaged_bundle_has_exit_code_6(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    for source, command in (
        (files.model, ("predict", "BUNDLE", files.images)),
        (files.encoder, ("finetune", files.segment, "--store", files.store, "--encoder", "BUNDLE")),
    ):
        damaged = files.folder / f"damaged-{command[0]}"
        shutil.copytree(source, damaged)
        weights = bytearray((damaged / "weights.safetensors").read_bytes())
        weights[-1] ^= 1
        (damaged / "weights.safetensors").write_bytes(weights)
        arguments = [damaged if part == "BUNDLE" else part for part in command]
        assert medssl(*arguments, "-o", files.folder / "out") == ExitCode.INTEGRITY
        assert "E_DIGEST" in capsys.readouterr().err
    assert not (files.folder / "out").exists()


def test_an_encoder_where_a_model_is_needed_has_exit_code_6(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert medssl("predict", files.encoder, files.images, "-o", files.folder / "out") == ExitCode.INTEGRITY
    assert "E_CONTRACT" in capsys.readouterr().err


def test_options_reach_the_function(files: Files) -> None:
    table = files.folder / "splits.csv"
    table.write_text("case_id,subject_id,split\nphantom_000,anna,train\nphantom_001,anna,train\n")
    assert files.run("scan", "--table", table, "--set", "seed=3") == 0
    ids = [line.split(",")[:2] for line in files.out("scan").read_text().splitlines()[1:]]
    assert ids == [["phantom_000", "anna"], ["phantom_001", "anna"]]  # names that the table gives are kept
    assert files.run("scan") == 0
    assert "\ncase-" in files.out("scan").read_text()
    assert files.run("scan", "--keep-names") == 0
    assert "\nphantom_001," in files.out("scan").read_text()
    assert (files.out("scan").parent / "pseudonyms.json").stat().st_mode & 0o077 == 0
    assert files.run("predict", "--overlap", 0.25) == 0
    assert "overlap: 0.25" in (files.out("predict") / "recipe.yaml").read_text()
    assert files.run("finetune", "--set", "task.mode=frozen", "--resume", "never") == 0
    assert "mode: frozen" in (files.out("finetune") / "recipe.yaml").read_text()
    assert files.run("finetune", "--set", "task.mode=frozen", "--resume", "never") == ExitCode.INTEGRITY


def test_a_signal_during_pretraining_leaves_a_checkpoint_and_exit_code_75(files: Files) -> None:
    out = files.folder / "out"
    arguments = ["pretrain", files.mae, "--store", files.store, "-o", out, "--set", "train.log_every=1"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from medssl.cli import main; main()", *arguments, "--set", "train.steps=1000000"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    journal = out / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and any("loss" in line for line in read_journal(journal))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == ExitCode.PREEMPTED
    assert "E_STOPPED: stopped by a signal after step" in said
    assert "Traceback" not in said
    assert list((out / "checkpoints").glob("step_*"))
    assert not (out / "bundle").exists()
    assert not (out / ".lock").exists()


def _raise(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyboardInterrupt(), ExitCode.INTERRUPTED, "E_STOPPED: stopped by Ctrl-C"),
        (MemoryError("64 GB"), ExitCode.ENVIRONMENT, "E_MEMORY: out of memory (64 GB)"),
        (OSError(errno.EACCES, "Permission denied", "x"), ExitCode.ENVIRONMENT, "E_ENVIRONMENT: x: Permission denied"),
        (OSError(errno.EFBIG, "File too large", "x"), ExitCode.ENVIRONMENT, "E_ENVIRONMENT: x: File too large"),
        (MedSSLError("x: found 1, needed 2. Do y."), ExitCode.USAGE, "E_MEDSSL: x: found 1, needed 2. Do y."),
    ],
)
def test_faults_become_one_line_and_an_exit_code(
    error: BaseException, code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_guarded(_raise(error)) == code
    assert capsys.readouterr().err.startswith(sentence)


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EACCES, "no", "x"), MedSSLError("x")])
def test_debug_lets_the_traceback_through(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_guarded(_raise(error), debug=True)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken", "x"), RuntimeError("a defect")])
def test_a_defect_is_never_hidden(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_guarded(_raise(error))


def test_main_ends_with_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["medssl", "--version"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    assert capsys.readouterr().out.strip() == __version__
    monkeypatch.setattr(sys, "argv", ["medssl", "--quiet", "predict"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2


def test_alarms_of_a_run_are_shown(files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from medssl import recipe

    result = recipe.TrainingResult(files.folder / "bundle", 1, {"held_out/loss": 0.5}, ("it learned nothing",))
    monkeypatch.setattr(recipe, "pretrain", lambda *_, **__: result)
    assert files.run("pretrain") == 0
    output = capsys.readouterr()
    assert "warning: it learned nothing" in output.err
    assert "held_out/loss 0.5" in output.out


def test_the_demo_says_where_each_result_lies(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from medssl import quickstart

    monkeypatch.setattr(
        quickstart, "demo", lambda out, *, seed, steps_share, dry_run: {"report": out / f"{seed}-{steps_share}"}
    )
    assert files.run("demo", "--seed", 7, "--set", "steps_share=0.5") == 0
    assert capsys.readouterr().out.split() == ["report", str(files.out("demo") / "7-0.5")]

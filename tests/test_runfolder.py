from __future__ import annotations

import errno
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medssl.errors import EnvironmentFaultError, LockedError
from medssl.runfolder import (
    Journal,
    RunFolder,
    atomic_path,
    atomic_write,
    environment_faults,
    make_folder,
    read_journal,
    remove_stale,
)


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a.json"
    atomic_write(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "E_DISK_FULL"),
        (errno.EACCES, "E_PERMISSION"),
        (errno.ENOTDIR, "E_NOT_A_FOLDER"),
        (errno.EEXIST, "E_NOT_A_FOLDER"),
        (errno.ENAMETOOLONG, "E_NAME"),
        (errno.EIO, "E_DISK"),
        (errno.ESTALE, "E_DISK"),
    ],
)
def test_a_full_forbidden_or_broken_disk_is_one_sentence_with_exit_code_5(tmp_path, number, code):
    with pytest.raises(EnvironmentFaultError) as caught, environment_faults(tmp_path, "writing"):
        raise OSError(number, "x")
    assert (caught.value.code, caught.value.exit_code) == (code, 5)


def test_other_faults_of_the_system_pass_through(tmp_path):
    with pytest.raises(OSError, match="odd"), environment_faults(tmp_path, "writing"):
        raise OSError(errno.EDEADLK, "odd")


def test_a_folder_is_replaced_whole_and_the_first_of_two_writers_stays(tmp_path):
    target = tmp_path / "folder"
    for text, replace in (("one", True), ("two", True), ("three", False)):
        with atomic_path(target, replace=replace) as temporary:
            temporary.mkdir()
            (temporary / "x").write_text(text)
    assert (target / "x").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_the_first_of_two_writers_of_a_file_stays_when_asked(tmp_path):
    path = tmp_path / "a"
    atomic_write(path, b"one")
    with atomic_path(path, replace=False) as temporary:
        temporary.write_bytes(b"two")
    assert path.read_bytes() == b"one"


def test_a_file_gets_the_mode_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        atomic_write(tmp_path / "a", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def leave_a_temporary(folder, pid):
    """A temporary as process ``pid`` of this machine names it."""
    with atomic_path(folder / "x") as mine:
        mine.write_text("")
        left = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{pid}-"))
        left.write_text("")
    (folder / "x").unlink()
    return left


def test_temporaries_of_dead_processes_go_and_those_of_the_living_stay(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=os.getpid)
    process.start()
    process.join()
    leave_a_temporary(tmp_path, process.pid)
    alive = leave_a_temporary(tmp_path, os.getppid())
    assert remove_stale(tmp_path) == 1
    assert list(tmp_path.iterdir()) == [alive]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_process_that_ended_and_waits_for_its_parent_is_dead(tmp_path):
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    leave_a_temporary(tmp_path, zombie.pid)
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    assert remove_stale(tmp_path) == 1
    zombie.wait()


def test_temporaries_of_another_machine_stay_for_a_day(tmp_path):
    fresh, old = tmp_path / ".tmp-0123456789ab-77-cd", tmp_path / ".tmp-0123456789ab-78-cd"
    for path, age in ((fresh, 0), (old, 2 * 86_400)):
        path.mkdir()
        os.utime(path, (time.time() - age,) * 2)
    assert remove_stale(tmp_path) == 1
    assert list(tmp_path.iterdir()) == [fresh]


def test_a_name_as_long_as_the_disk_allows_is_written_and_a_longer_one_is_refused(tmp_path):
    for name in ("n" * 248 + ".nii.gz", "ü" * 124 + ".nii.gz", "a." + "b" * 253):
        for text in ("one", "two"):
            atomic_write(tmp_path / name, text)
        assert (tmp_path / name).read_text() == "two"
    with pytest.raises(EnvironmentFaultError, match="too long"):
        atomic_write(tmp_path / ("n" * 256), "x")


def test_a_folder_with_a_name_as_long_as_the_disk_allows_is_replaced(tmp_path):
    target = tmp_path / ("n" * 255)
    for text in ("one", "two"):
        with atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / "x").write_text(text)
    assert (target / "x").read_text() == "two"
    assert list(tmp_path.iterdir()) == [target]


def test_a_second_run_in_a_folder_is_told_who_holds_it(tmp_path):
    with RunFolder(tmp_path / "run") as run, pytest.raises(LockedError, match=str(os.getpid())) as caught:
        RunFolder(run.path).__enter__()
    assert caught.value.exit_code == 7
    with RunFolder(tmp_path / "run"):
        pass


@pytest.mark.parametrize("holder", ["", "{}", '{"host": "%s", "pid": 1, "boot": "another"}'])
def test_a_lock_of_a_dead_run_or_another_boot_is_taken_over(tmp_path, holder):
    (tmp_path / ".lock").write_text(holder.replace("%s", socket.gethostname()))
    with RunFolder(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_lock_from_another_machine_is_respected(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "boot": ""}))
    with pytest.raises(LockedError, match="elsewhere"):
        RunFolder(tmp_path).__enter__()


def test_a_lock_that_another_process_holds_but_has_not_yet_signed_is_respected(tmp_path):
    with RunFolder(tmp_path):
        (tmp_path / ".lock").write_text("")
        with pytest.raises(LockedError):
            RunFolder(tmp_path).__enter__()


def test_a_refused_run_removes_no_temporary_of_the_holder(tmp_path):
    temporary = leave_a_temporary(tmp_path, 999_999_999)
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "boot": ""}))
    with pytest.raises(LockedError):
        RunFolder(tmp_path).__enter__()
    assert temporary.exists()


HOLD = """
import sys, time
from pathlib import Path
from medssl.errors import LockedError
from medssl.runfolder import RunFolder
print("ready", flush=True)
sys.stdin.readline()
try:
    with RunFolder(Path(sys.argv[1])):
        time.sleep(0.3)
        print("held")
except LockedError:
    print("refused")
"""


def test_of_several_runs_that_find_a_dead_lock_at_once_one_gets_it(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({"host": socket.gethostname(), "pid": 999_999_999, "boot": "another"}))
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    runs = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    assert sorted(run.communicate(timeout=60)[0] for run in runs) == ["held\n", "refused\n", "refused\n"]


def test_where_the_disk_knows_no_locks_the_recorded_holder_counts(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with RunFolder(tmp_path), pytest.raises(LockedError, match=str(os.getpid())):
        RunFolder(tmp_path).__enter__()
    (tmp_path / ".lock").write_text(json.dumps({"host": socket.gethostname(), "pid": 999_999_999, "boot": ""}))
    with RunFolder(tmp_path):
        pass


def test_a_lock_file_that_vanishes_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    import fcntl

    locked = fcntl.flock
    removed = []

    def lose(handle, how):
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        locked(handle, how)

    monkeypatch.setattr("fcntl.flock", lose)
    with RunFolder(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert removed


@pytest.mark.parametrize("path", ["run", "run/deep"])
def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, path):
    (tmp_path / "run").write_text("")
    for make in (make_folder, lambda where: RunFolder(where).__enter__()):
        with pytest.raises(EnvironmentFaultError, match="a file lies") as caught:
            make(tmp_path / path)
        assert caught.value.exit_code == 5


def test_the_recipe_is_there_before_the_work(tmp_path):
    with RunFolder(tmp_path / "run") as run:
        assert run.write_recipe({"seed": 1}).read_text() == "seed: 1\n"


def test_the_journal_appends_after_a_cut_line_and_stays_json(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    journal = Journal(path)
    journal.log(3, loss=float("nan"), bundle=tmp_path / "secret" / "bundle")
    journal.close()
    assert read_journal(path) == [{"step": 1}, {"step": 3, "loss": "nan", "bundle": "bundle"}]


def test_a_replacement_that_was_cut_short_is_undone(tmp_path):
    (tmp_path / ".former-ab" / "bundle").mkdir(parents=True)
    (tmp_path / ".former-ab" / "bundle" / "x").write_text("old")
    (tmp_path / ".former-cd" / "other").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    remove_stale(tmp_path)
    assert (tmp_path / "bundle" / "x").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "other"]

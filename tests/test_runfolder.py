from __future__ import annotations

import errno
import json
import multiprocessing
import os

import pytest

from medssl.errors import EnvironmentFaultError, LockedError
from medssl.runfolder import (
    Journal,
    RunFolder,
    atomic_path,
    atomic_write,
    environment_faults,
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


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "E_DISK_FULL"), (errno.EACCES, "E_PERMISSION")])
def test_a_full_or_forbidden_disk_is_one_sentence_with_exit_code_5(tmp_path, number, code):
    with pytest.raises(EnvironmentFaultError) as caught, environment_faults(tmp_path, "writing"):
        raise OSError(number, "x")
    assert (caught.value.code, caught.value.exit_code) == (code, 5)


def test_other_faults_of_the_system_pass_through(tmp_path):
    with pytest.raises(OSError, match="odd"), environment_faults(tmp_path, "writing"):
        raise OSError(errno.EIO, "odd")


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


def test_temporaries_of_dead_processes_go_and_those_of_the_living_stay(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=os.getpid)
    process.start()
    process.join()
    (tmp_path / f".tmp-{process.pid}-ab-x").write_text("")
    (tmp_path / ".tmp-odd").mkdir()
    mine = tmp_path / f".tmp-{os.getpid()}-ab-x"
    mine.write_text("")
    assert remove_stale(tmp_path) == 2
    assert list(tmp_path.iterdir()) == [mine]


def test_a_second_run_in_a_folder_is_told_who_holds_it(tmp_path):
    with RunFolder(tmp_path / "run") as run, pytest.raises(LockedError, match=str(os.getpid())) as caught:
        RunFolder(run.path).__enter__()
    assert caught.value.exit_code == 7
    with RunFolder(tmp_path / "run"):
        pass


@pytest.mark.parametrize("holder", ["", "{}", '{"host": "%s", "pid": 1, "boot": "another"}'])
def test_a_lock_of_a_dead_run_or_another_boot_is_taken_over(tmp_path, holder):
    import socket

    (tmp_path / ".lock").write_text(holder.replace("%s", socket.gethostname()))
    with RunFolder(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_lock_from_another_machine_is_respected(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "boot": ""}))
    with pytest.raises(LockedError, match="elsewhere"):
        RunFolder(tmp_path).__enter__()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(EnvironmentFaultError, match="is a file"):
        RunFolder(tmp_path / "run").__enter__()


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
    (tmp_path / ".former-bundle").mkdir()
    (tmp_path / ".former-bundle" / "x").write_text("old")
    (tmp_path / ".former-other").mkdir()
    (tmp_path / "other").mkdir()
    remove_stale(tmp_path)
    assert (tmp_path / "bundle" / "x").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "other"]

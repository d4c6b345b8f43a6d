from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from medssl import pool
from medssl.errors import CaseError, MedSSLError, ReadError

# spawned workers must be able to import the function, so it lives in a module of its own, written for the test
_MODULE = """
import os, signal, time
from medssl.errors import ReadError

def work(item):
    number, folder = item
    if number == 2:
        raise ReadError("two is damaged", code="E_CRC")
    if number == 3:
        raise KeyError("a name")
    if number == 4:
        raise MemoryError
    if number == 5:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 6:
        os._exit(9)
    if number == 7:
        time.sleep(60)
    if number == 8:  # dies once, then works
        flag = os.path.join(folder, "tried")
        if not os.path.exists(flag):
            open(flag, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
    return number * number
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    (tmp_path / "pool_test_work.py").write_text(textwrap.dedent(_MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    import pool_test_work

    yield pool_test_work.work
    sys.modules.pop("pool_test_work")


def _name(item: tuple[int, str]) -> str:
    return f"case {item[0]}"


def _run(work: object, numbers: list[int], folder: Path, **options: float) -> dict[int, object]:
    items = [(number, str(folder)) for number in numbers]
    return {item[0]: result for item, result in pool.run(work, items, name=_name, **options)}


@pytest.mark.parametrize("workers", [1, 2])
def test_faults_come_back_as_values_and_the_others_go_on(work: object, tmp_path: Path, workers: int) -> None:
    results = _run(work, [0, 1, 2, 3, 4, 9], tmp_path, workers=workers)
    assert (results[0], results[1], results[9]) == (0, 1, 81)
    errors = {number: results[number] for number in (2, 3, 4)}
    assert all(isinstance(error, MedSSLError) for error in errors.values())
    assert isinstance(errors[2], ReadError)
    assert [error.code for error in errors.values()] == ["E_CRC", "E_UNEXPECTED", "E_MEMORY"]
    assert "KeyError in pool_test_work.py:10" in errors[3].message
    assert "a name" not in errors[3].message


def test_a_dead_or_hung_worker_costs_only_its_own_case(work: object, tmp_path: Path) -> None:
    results = _run(work, [0, 5, 6, 7, 8, 9, 10], tmp_path, workers=2, timeout_s=4.0)
    assert (results[0], results[8], results[9], results[10]) == (0, 64, 81, 100)
    assert isinstance(results[5], CaseError)
    assert results[5].code == "E_READER_CRASH"
    assert "case 5: its worker process died twice (SIGSEGV)" in results[5].message
    assert "exit code 9" in results[6].message
    assert results[7].code == "E_HUNG"


def test_no_worker_is_left_when_the_caller_stops_early(work: object, tmp_path: Path) -> None:
    finished = pool.run(work, [(n, str(tmp_path)) for n in (0, 1, 7, 7)], name=_name, workers=2)
    next(finished)
    crew = finished.gi_frame.f_locals["crew"]
    pids = [worker.process.pid for worker in crew._busy]
    assert pids
    finished.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_nothing_to_do_is_done_at_once() -> None:
    assert list(pool.run(len, [], name=str)) == []


def test_workers_end_with_their_parent(work: object, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, sys
            sys.path.insert(0, {str(tmp_path)!r})
            from medssl import pool
            from pool_test_work import work
            if __name__ == "__main__":
                for _ in pool.run(work, [(n, "") for n in range(2)] * 500, name=str, workers=2):
                    import multiprocessing
                    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
                    os.kill(os.getpid(), 9)
            """
        )
    )
    parent = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert parent.returncode == -signal.SIGKILL
    for pid in map(int, parent.stdout.split()):
        for _ in range(200):
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except FileNotFoundError:
                break
            if state == "Z":
                break
            signal.sigtimedwait([], 0.05)
        else:
            raise AssertionError(f"worker {pid} outlived its parent")

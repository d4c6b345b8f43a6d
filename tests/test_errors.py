from __future__ import annotations

import pickle

import pytest

from medssl import errors
from medssl.errors import ExitCode, MedSSLError, ReadError, StoppedError

ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, MedSSLError)]


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_error_survives_the_way_back_from_a_worker(cls):
    back = pickle.loads(pickle.dumps(cls("case a: found 1, needed 2. Do that.")))
    assert type(back) is cls
    assert str(back) == "case a: found 1, needed 2. Do that."
    assert back.code.startswith("E_")


def test_a_code_given_at_raise_time_is_kept():
    assert pickle.loads(pickle.dumps(ReadError("x", code="E_CRC"))).code == "E_CRC"


def test_a_stop_tells_whether_a_checkpoint_was_left():
    back = pickle.loads(pickle.dumps(StoppedError("x", exit_code=ExitCode.TERMINATED)))
    assert back.exit_code == 143


@pytest.mark.parametrize("cls", ALL[1:], ids=lambda cls: cls.__name__)
def test_every_error_is_also_a_fitting_builtin_and_drawn_in_the_tree(cls):
    assert any(base.__module__ == "builtins" and base is not Exception for base in cls.__bases__)
    assert cls.__name__ in (errors.__doc__ or "")

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest

from medssl.errors import CaseError, ReadError
from medssl.io.dicom.objects import parsing

FILE = Path("a.dcm")


def test_what_pydicom_says_of_the_content_goes_nowhere(caplog, recwarn):
    with parsing(FILE):
        logging.getLogger("pydicom").warning("Zzcanary")
        warnings.warn("Zzcanary", stacklevel=1)
    assert not caplog.records
    assert not recwarn.list
    logging.getLogger("pydicom").warning("of others")
    assert "of others" in caplog.text


def test_foreign_errors_become_a_refusal_without_their_text():
    with pytest.raises(ReadError) as caught, parsing(FILE):
        raise KeyError("Zzcanary")
    assert caught.value.code == "E_HEADER"
    assert "a.dcm" in caught.value.message
    assert "canary" not in caught.value.message
    assert caught.value.__cause__ is None


def test_own_errors_pass():
    with pytest.raises(CaseError) as caught, parsing(FILE):
        raise CaseError("a", code="E_NDIM")
    assert caught.value.code == "E_NDIM"

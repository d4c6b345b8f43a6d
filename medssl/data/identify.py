"""What cases and subjects are called: keyed hashes, unless the user has given names."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from medssl.data.cohort import Case
from medssl.errors import ConfigError
from medssl.runfolder import atomic_write

_KEY_BYTES = 16
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def load_key(path: Path, *, key_file: Path | None = None) -> bytes:
    """The secret of a cohort, by which equal names get equal hashes.

    Args:
        path: ``pseudonyms.json`` of the cohort; its key is taken if it is there.
        key_file: That of another cohort, whose key goes before.

    Returns:
        The key; a new one where there is none.

    Raises:
        ConfigError: E_KEY, if a file is there and holds none, or ``key_file`` is not there.
    """
    source = path if key_file is None else key_file
    if key_file is None and not path.exists():
        return secrets.token_bytes(_KEY_BYTES)
    try:
        key = bytes.fromhex(json.loads(source.read_bytes())["key"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{source}: holds no key of pseudonyms. Give the pseudonyms.json of an earlier scan, or move it away.",
            code="E_KEY",
        ) from error
    if len(key) < _KEY_BYTES:
        raise ConfigError(f"{source}: its key is shorter than {_KEY_BYTES} bytes. Move the file away.", code="E_KEY")
    return key


def hashed(kind: str, name: str, *, key: bytes) -> str:
    """Keyed hash of a name, such as ``case-0123456789abcdef``."""
    return f"{kind}-{hmac.digest(key, f'{kind}:{name}'.encode(), 'sha256').hex()[:16]}"


def renamed(case: Case, *, key: bytes, keeps_case: bool, keeps_subject: bool) -> Case:
    """The case with hashes for those of its names that the user has not given."""
    return case.model_copy(
        update={
            "case_id": case.case_id if keeps_case else hashed("case", case.case_id, key=key),
            "subject_id": case.subject_id if keeps_subject else hashed("subject", case.subject_id, key=key),
        }
    )


def write_names(path: Path, pairs: Iterable[tuple[Case, Case]], *, key: bytes) -> None:
    """Keep the key, and what each case and its subject were called, for the owner only; earlier cases stay.

    Args:
        path: ``pseudonyms.json``.
        pairs: Each case under its own name, and under the new one.
        key: Of the hashes.

    Raises:
        EnvironmentFaultError: if the disk is full or the folder may not be written.
    """
    cases: dict[str, list[str]] = {}
    try:
        earlier: Mapping[str, list[str]] = json.loads(path.read_bytes())["cases"]
        cases.update(earlier)
    except (OSError, ValueError, LookupError, TypeError):
        pass  # nothing was kept before
    cases |= {new.case_id: [old.case_id, old.subject_id] for old, new in pairs if old != new}
    atomic_write(path, json.dumps({"key": key.hex(), "cases": cases}, indent=1), private=True)


def safe_id(name: str) -> str:
    """A name of ASCII letters, digits and ``. _ -``; a short hash is added wherever something was replaced."""
    safe = _UNSAFE.sub("_", name).strip("._-")[:150]
    if safe and safe == name:
        return safe
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{safe}-{digest}" if safe else f"case-{digest}"

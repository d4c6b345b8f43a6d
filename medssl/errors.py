"""Everything that medssl refuses, and the exit code that each refusal ends a command with.

::

    MedSSLError
    ├── ReadError        (OSError)       a file cannot be trusted or understood
    ├── GeometryError    (ValueError)    a grid is impossible, or two grids disagree
    ├── CaseError        (ValueError)    a case breaks a rule of the cohort, its label or its voxels
    ├── ConfigError      (ValueError)    a recipe or an option is wrong                      exit 2
    ├── NoInputError     (ValueError)    nothing usable was left                             exit 4
    ├── EnvironmentFaultError (RuntimeError)  disk, memory, device or permission                  exit 5
    ├── CheckpointError  (ValueError)    weights or a checkpoint are damaged or do not fit   exit 6
    ├── LockedError      (RuntimeError)  another run holds the folder                        exit 7
    ├── TrainingError    (RuntimeError)  training went wrong and was stopped                 exit 6
    └── StoppedError     (RuntimeError)  a signal ended the run                              exit 75/130/143

A message says which object, what was found against what is needed, and what to do, in one or two sentences.
"""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """What the exit code of a ``medssl`` command means."""

    OK = 0
    USAGE = 2
    SOME_REJECTED = 3
    NO_INPUT = 4
    ENVIRONMENT = 5
    INTEGRITY = 6
    LOCKED = 7
    PREEMPTED = 75
    INTERRUPTED = 130
    TERMINATED = 143


class MedSSLError(Exception):
    """Base of every error that medssl raises on purpose.

    Args:
        message: Which object, what was found against what is needed, what to do.
        code: Stable name of the fault, ``E_...``; defaults to the class's own.
    """

    code = "E_MEDSSL"
    exit_code = ExitCode.USAGE

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the way back from a worker process with the code intact."""
        return _rebuild, (type(self), self.message, self.code)


class ReadError(MedSSLError, OSError):
    """A file is missing, damaged, truncated or of a kind that medssl does not read."""

    code = "E_READ"
    exit_code = ExitCode.NO_INPUT


class GeometryError(MedSSLError, ValueError):
    """A voxel grid is impossible, ambiguous, or not the one that is needed."""

    code = "E_GEOMETRY"
    exit_code = ExitCode.NO_INPUT


class CaseError(MedSSLError, ValueError):
    """A case breaks a rule of the cohort, of its label, or of its voxel values."""

    code = "E_CASE"
    exit_code = ExitCode.NO_INPUT


class ConfigError(MedSSLError, ValueError):
    """A recipe, an override or an option is wrong."""

    code = "E_CONFIG"
    exit_code = ExitCode.USAGE


class NoInputError(MedSSLError, ValueError):
    """No usable input is left for a command."""

    code = "E_NO_INPUT"
    exit_code = ExitCode.NO_INPUT


class EnvironmentFaultError(MedSSLError, RuntimeError):
    """Disk, memory, device or permission stands in the way."""

    code = "E_ENVIRONMENT"
    exit_code = ExitCode.ENVIRONMENT


class CheckpointError(MedSSLError, ValueError):
    """Weights or a checkpoint are damaged, incomplete, or made for something else."""

    code = "E_WEIGHTS"
    exit_code = ExitCode.INTEGRITY


class LockedError(MedSSLError, RuntimeError):
    """Another live run holds the output folder."""

    code = "E_LOCKED"
    exit_code = ExitCode.LOCKED


class TrainingError(MedSSLError, RuntimeError):
    """Training produced values that cannot be trusted and was stopped."""

    code = "E_TRAINING"
    exit_code = ExitCode.INTEGRITY


class StoppedError(MedSSLError, RuntimeError):
    """A signal ended the run; ``exit_code`` says whether a good checkpoint was left.

    Args:
        message: What was stopped and how to go on.
        exit_code: 75 after a good checkpoint, 130 or 143 without one.
    """

    code = "E_STOPPED"

    def __init__(self, message: str, *, exit_code: ExitCode = ExitCode.PREEMPTED, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_stopped, (self.message, self.exit_code)


def code_of(warning: str) -> str:
    """Code of a ``W_CODE: sentence`` string."""
    return warning.partition(":")[0]


def _rebuild(cls: type[MedSSLError], message: str, code: str) -> MedSSLError:
    return cls(message, code=code)


def _rebuild_stopped(message: str, exit_code: ExitCode) -> StoppedError:
    return StoppedError(message, exit_code=exit_code)

"""Errors a user can cause and mend; each carries the exit code that launchers read.

A message names the field, what was got, what was wanted and the way out.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class T5PegasusError(Exception):
    """Any error that is reported to the user as one sentence instead of a traceback."""

    exit_code = 1


class UsageError(T5PegasusError):
    """A flag, config value or input path that cannot work as given (exit code 2)."""

    exit_code = 2


class ArtifactError(T5PegasusError):
    """An artifact on disk is missing, damaged, or does not belong to the one it meets (exit code 2)."""

    exit_code = 2


class DataError(T5PegasusError):
    """The data itself cannot be used, e.g. no document has enough sentences (exit code 44)."""

    exit_code = 44


class DivergedError(T5PegasusError):
    """The loss is no longer finite (exit code 45)."""

    exit_code = 45


class PreemptedError(T5PegasusError):
    """The run was asked to stop and has saved what it has done; the same command goes on (exit code 42)."""

    exit_code = 42


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around code that takes the content of an artifact apart: what a changed file causes there becomes words.

    Raises:
        ArtifactError: instead of an error of a lookup, a type or a value.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{path} does not hold what was written there ({type(error).__name__}: {error}); it was damaged, changed, "
            "or written by another version: copy it anew from where it is whole, or make it anew"
        ) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around writes to a file: an OSError that does not know its file, as that of a full disk, learns its name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise

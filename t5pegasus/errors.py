"""Errors a user can cause and mend; each carries the exit code that launchers read.

A message names the field, what was got, what was wanted and the way out.
"""


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

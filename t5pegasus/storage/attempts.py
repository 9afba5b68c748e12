"""Trying again what an object store refuses for the moment, within a bounded time, and naming what it refuses for good.

Retried are 408, 429, 5xx, time-outs, broken connections, short reads, and logins that expired or could not be renewed
for the moment, after pauses that double up to 16 s, each with jitter so that the hosts of a pod do not come back
together.
"""

import errno
import logging
import os
import random
from collections.abc import Callable
from time import monotonic, sleep
from typing import Any, TypeVar

from t5pegasus.errors import UsageError

logger = logging.getLogger(__name__)

RETRY_SECONDS_VARIABLE = "T5PEGASUS_STORAGE_RETRY_SECONDS"
_RETRY_SECONDS = 120.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 16.0
_TRANSIENT_CODES = {408, 429, *range(500, 505)}
_TRANSIENT_MODULES = ("aiohttp", "requests", "urllib3")
_FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_REFUSED_CODES = {401, 403}
_WAY_IN = (
    "give this account the role Storage Object User on the bucket, or log in as another one: "
    "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS=KEY.json"
)
_Result = TypeVar("_Result")


def attempt(path: object, verb: str, operation: Callable[[], _Result]) -> _Result:
    """The result of an operation on an object, tried again while the store says that it may yet succeed.

    Args:
        path: for the message.
        verb: what is being done, for the message: "read", "write", "list".
        operation: asked again after a transient failure, so it must bear being done twice.

    Raises:
        FileNotFoundError: if there is no such object; FileExistsError if there is one that must not be.
        OSError: naming object and cause, if the store refuses, or still fails after the time for retries
            (`T5PEGASUS_STORAGE_RETRY_SECONDS`, 120).
        UsageError: if that is no number.
    """
    seconds = _retry_seconds()
    began, pause, tries = monotonic(), _FIRST_PAUSE, 0
    while True:
        tries += 1
        try:
            return operation()
        except FileNotFoundError:
            what = "bucket, or nothing to copy; check the address" if verb == "write" else "object"
            raise FileNotFoundError(errno.ENOENT, f"there is no such {what}", str(path)) from None
        except _FINAL:
            raise
        except Exception as error:
            spent = monotonic() - began
            if not _is_transient(error):
                raise OSError(errno.EIO, f"cannot {verb} {path}: {_describe(error)}") from error
            if spent + pause > seconds:
                raise OSError(
                    errno.EIO,
                    f"cannot {verb} {path}: {_describe(error)}; tried {tries} times in {spent:.0f} s, see whether the "
                    "store can be reached and its quota is not used up, then give the same command again",
                ) from error
            logger.info("%s %s: %s; trying again in %.1f s", verb, path, _describe(error), pause)
            sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)


def _retry_seconds() -> float:
    given = os.environ.get(RETRY_SECONDS_VARIABLE, "")
    try:
        return float(given or _RETRY_SECONDS)
    except ValueError:
        raise UsageError(f"{RETRY_SECONDS_VARIABLE}={given!r} must be a number of seconds, such as 600") from None


def _code(error: BaseException) -> int | None:
    code: Any = getattr(error, "code", None) or getattr(error, "status", None)
    return int(code) if isinstance(code, (int, str)) and str(code).isdigit() else None


def _is_transient(error: BaseException) -> bool:
    code = _code(error)
    if code is not None:
        return code in _TRANSIENT_CODES or (code == 401 and _may_be_renewed(error))
    if isinstance(error, (TimeoutError, ConnectionError, EOFError)):
        return True
    module = type(error).__module__
    named = type(error).__name__ in ("FSTimeoutError", "ChecksumError", "TransportError")
    return module.startswith(_TRANSIENT_MODULES) or named or bool(getattr(error, "retryable", False))


def _may_be_renewed(error: BaseException) -> bool:
    """Whether a 401 is of a token that has expired, and not of an account without one or whose login was withdrawn.

    gcsfs says so in these words, also where the token could not be renewed: then google.auth's reason is the cause.
    """
    if "Invalid Credentials" not in str(error):
        return False
    reasons = _reasons(error)
    return not reasons or any(map(_is_transient, reasons))


def _reasons(error: BaseException) -> list[BaseException]:
    """What an error was raised from, and that, and so on."""
    return [] if error.__cause__ is None else [error.__cause__, *_reasons(error.__cause__)]


def _describe(error: BaseException) -> str:
    if not str(error) and error.__cause__ is not None:  # fsspec's time-outs say nothing themselves
        error = error.__cause__
    text = " ".join(str(error).split()) or "no reason given"
    refused = _code(error) in _REFUSED_CODES or text.startswith("Forbidden")
    if refused or (type(error).__module__.startswith("google.auth") and not _is_transient(error)):
        text = ": ".join([text, *(" ".join(str(reason).split()) for reason in _reasons(error)[:1])])
        return f"access refused ({text[:200]}); {_WAY_IN}"
    code = _code(error)
    return f"{type(error).__name__}{f' {code}' if code else ''}: {text[:200]}"

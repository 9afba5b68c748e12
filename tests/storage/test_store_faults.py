from collections.abc import Callable
from typing import Any

import aiohttp
import google.auth.exceptions
import pytest
from gcsfs.retry import HttpError

from launch.cli import main
from t5pegasus.errors import UsageError
from t5pegasus.storage import list_files, read_range, write_bytes

UNAVAILABLE = HttpError({"code": 503, "message": "Service Unavailable"})
TOO_MANY = HttpError({"code": 429, "message": "Too Many Requests"})
PASSING: list[Exception] = [
    UNAVAILABLE,
    TOO_MANY,
    TimeoutError("no answer within 60 s"),
    ConnectionResetError("reset by peer"),
    aiohttp.ServerDisconnectedError("closed"),
]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: f"{type(fault).__name__} {fault}")
def test_what_fails_for_the_moment_is_tried_again(fault: Exception, faults: Any, remote: Any):
    faults.plan("pipe_file", fault, fault)
    write_bytes(remote / "x", b"0123456789")
    faults.plan("cat_file", fault)
    assert read_range(remote / "x", 2, 3) == b"234"
    faults.plan("find", fault)
    assert list_files(remote) == {"x": 10}
    faults.plan("info", fault)
    assert (remote / "x").is_file()
    assert (faults.count("pipe_file"), faults.count("cat_file"), faults.count("find")) == (3, 2, 2)


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: f"{type(fault).__name__} {fault}")
def test_what_goes_on_failing_ends_naming_object_and_cause(fault: Exception, faults: Any, remote: Any):
    write_bytes(remote / "x", b"0123456789")
    told = type(fault).__name__ if not isinstance(fault, HttpError) else f"HttpError {fault.code}"
    operations: list[tuple[str, str, Callable[[], Any]]] = [
        ("pipe_file", "write", lambda: write_bytes(remote / "x", b"new")),
        ("cat_file", "read", lambda: read_range(remote / "x", 0, 3)),
        ("cat_file", "read", (remote / "x").read_bytes),
        ("find", "list", lambda: list_files(remote)),
        ("rm_file", "delete", (remote / "x").unlink),
        # Where it cannot be known whether there is something, to say no would begin a run over the one that lies there.
        ("info", "look at", (remote / "x").exists),
        ("info", "look at", (remote / "x").is_file),
        ("info", "look at", (remote / "x").is_dir),
        ("info", "look at", lambda: list(remote.glob("*"))),
    ]
    for name, verb, operation in operations:
        faults.plan(name, forever=fault)
        before = faults.count(name)
        with pytest.raises(OSError, match=f"cannot {verb} {remote}.*{told}.*tried"):
            operation()
        assert 5 < faults.count(name) - before < 30
        assert 100 < sum(faults.pauses) <= 120
        assert max(faults.pauses) <= 16
        faults.pauses.clear()
        faults.plan(name)
    assert (remote / "x").read_bytes() == b"0123456789"


def test_fewer_bytes_than_asked_for_are_no_answer(faults: Any, remote: Any):
    write_bytes(remote / "x", b"0123456789")

    def short(operation: Any, *args: Any, **options: Any) -> bytes:
        return operation(*args, **options)[:-1]

    faults.plan("cat_file", short, short)
    assert read_range(remote / "x", 2, 5) == b"23456"
    faults.plan("cat_file", forever=short)
    with pytest.raises(OSError, match="EOFError: 4 of 5 bytes came from offset 2"):
        read_range(remote / "x", 2, 5)


@pytest.mark.parametrize(
    "refusal",
    [
        HttpError({"code": 401, "message": "Anonymous caller does not have storage.objects.get access"}),
        OSError("Forbidden: https://storage.googleapis.com/b/bucket/o/x\nno access"),
        google.auth.exceptions.DefaultCredentialsError("Your default credentials were not found."),
    ],
)
def test_who_may_not_is_told_how_to_in_one_sentence(refusal: Exception, faults: Any, remote: Any):
    faults.plan("info", forever=refusal)
    with pytest.raises(OSError, match="gcloud auth application-default login") as caught:
        (remote / "x").exists()
    assert str(remote / "x") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert faults.count("info") == 1


def _expired(*reasons: Exception) -> Exception:
    """As gcsfs raises it of a token that could not be renewed, with google.auth's reasons behind it."""
    error: Exception = HttpError({"code": 401, "message": "Invalid Credentials"})
    inner = error
    for reason in reasons:
        inner.__cause__ = reason
        inner = reason
    return error


UNREACHABLE = google.auth.exceptions.TransportError("the metadata server does not answer")


@pytest.mark.parametrize(
    "fault",
    [
        _expired(),
        _expired(google.auth.exceptions.RefreshError("no token"), UNREACHABLE),
        _expired(google.auth.exceptions.RefreshError("no token", retryable=True)),
        UNREACHABLE,
    ],
)
def test_a_login_that_cannot_be_renewed_for_the_moment_does_not_end_a_run(fault: Exception, faults: Any, remote: Any):
    faults.plan("pipe_file", fault, fault)
    write_bytes(remote / "x", b"0123456789")
    assert faults.count("pipe_file") == 3


def test_a_login_that_was_withdrawn_is_told_at_once(faults: Any, remote: Any):
    faults.plan("pipe_file", forever=_expired(google.auth.exceptions.RefreshError("invalid_grant: revoked")))
    with pytest.raises(OSError, match=r"access refused .*invalid_grant: revoked.*application-default login"):
        write_bytes(remote / "x", b"0123456789")
    assert faults.count("pipe_file") == 1


def test_a_time_limit_that_is_none_is_refused(remote: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("T5PEGASUS_STORAGE_RETRY_SECONDS", "ten")
    with pytest.raises(UsageError, match="T5PEGASUS_STORAGE_RETRY_SECONDS='ten' must be a number of seconds"):
        write_bytes(remote / "x", b"")


def test_the_command_ends_with_exit_code_46(faults: Any, remote: Any, capsys: pytest.CaptureFixture[str]):
    faults.plan("cat_file", forever=UNAVAILABLE)
    assert main(["pseudo-summary", "--input", f"{remote}/documents.jsonl"]) == 46
    assert f"cannot read {remote}/documents.jsonl" in (message := capsys.readouterr().err)
    assert "503" in message
    assert "Traceback" not in message


def test_an_answer_that_was_lost_does_not_make_another_writer(faults: Any, remote: Any):
    def lose_the_answer(operation: Any, *args: Any, **options: Any) -> None:
        operation(*args, **options)
        raise TimeoutError("no answer")

    faults.plan("pipe_file", lose_the_answer)
    write_bytes(remote / "mine", b"me", create=True)
    faults.plan("pipe_file", lambda *_, **__: (_ for _ in ()).throw(UNAVAILABLE))
    with pytest.raises(FileExistsError):
        write_bytes(remote / "mine", b"you", create=True)
    assert (remote / "mine").read_bytes() == b"me"

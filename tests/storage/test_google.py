"""What gcsfs makes of requests and answers, over HTTP, against an emulator; Google's own answers may differ."""

import os
from pathlib import Path
from typing import Any

import pytest
from google_store import GoogleStore, cut_short, hang_up, stop_the_clock

from t5pegasus.storage import (
    Claim,
    copy_file,
    copy_tree,
    fetch,
    list_files,
    read_range,
    remove_tree,
    transfer,
    working_copy,
    write_bytes,
)


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch, google: GoogleStore) -> None:
    google.forget_plans()
    google.requests.clear()
    stop_the_clock(monkeypatch)


def name_of(value: Any) -> str:
    """The same in every process, as pytest-xdist wants its tests' names."""
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("fault", [503, 500, 429, 408, hang_up, cut_short], ids=name_of)
def test_what_fails_for_the_moment_is_tried_again(fault: Any, google: GoogleStore, bucket: Any):
    google.plan("POST", "/upload/", fault, times=2)
    write_bytes(bucket / "x", b"0123456789")
    google.plan("GET", "alt=media", fault, times=2)
    assert read_range(bucket / "x", 2, 3) == b"234"
    google.plan("GET", "/o?", fault)
    assert list_files(bucket) == {"x": 10}


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (503, "HttpError 503: planned"),
        (429, "HttpError 429: planned"),
        (hang_up, "ServerDisconnectedError"),
        (cut_short, "ClientPayloadError"),
    ],
    ids=name_of,
)
def test_what_goes_on_failing_names_object_and_cause(fault: Any, told: str, google: GoogleStore, bucket: Any):
    write_bytes(bucket / "x", b"0123456789")
    google.plan("GET", "alt=media", fault, times=1000)
    with pytest.raises(OSError, match=f"cannot read {bucket}/x: {told}.*tried"):
        (bucket / "x").read_bytes()


@pytest.mark.parametrize("status", [401, 403])
def test_who_may_not_is_told_how_to(status: int, google: GoogleStore, bucket: Any):
    google.plan("GET", "/o", status, times=10)
    google.plan("GET", "/b", status, times=10)
    with pytest.raises(OSError, match=r"access refused .*gcloud auth application-default login"):
        (bucket / "x").exists()


def test_no_listing_is_remembered(google: GoogleStore, bucket: Any):
    """What another host has put meanwhile is seen at once."""
    assert list_files(bucket) == {}
    assert not (bucket / "a" / "x").exists()
    write_bytes(bucket / "a" / "x", b"1")
    assert [path.name for path in bucket.glob("*")] == ["a"]
    assert (bucket / "a" / "x").exists()
    write_bytes(bucket / "a" / "y", b"22")
    assert list_files(bucket) == {"a/x": 1, "a/y": 2}
    (bucket / "a" / "x").unlink()
    assert list_files(bucket) == {"a/y": 2}


def test_one_level_is_listed_without_what_lies_below(google: GoogleStore, bucket: Any):
    for step in (4, 8):
        for number in range(5):
            write_bytes(bucket / "checkpoints" / str(step) / f"chunk-{number}", b"1")
    google.requests.clear()
    assert sorted(path.name for path in (bucket / "checkpoints").glob("*")) == ["4", "8"]
    lists = [path for _, path in google.requests if "/o?" in path]
    assert lists
    assert all("delimiter=" in path for path in lists)


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp's, which gcsfs accepts
def test_an_object_above_the_limit_of_one_request_is_whole(google: GoogleStore, bucket: Any, tmp_path: Path):
    content = os.urandom(51 << 20)  # from 50 MiB on gcsfs puts an object in parts
    write_bytes(bucket / "tree" / "large", content)
    write_bytes(bucket / "tree" / "manifest.json", b"{}")
    assert read_range(bucket / "tree" / "large", (51 << 20) - 5, 5) == content[-5:]
    copy_tree(bucket / "tree", bucket / "copy")
    assert (fetch(bucket / "copy") / "large").read_bytes() == content
    remove_tree(bucket)
    assert list_files(bucket) == {}


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_a_large_file_goes_up_in_parts_and_is_whole(
    google: GoogleStore, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(transfer, "PART_BYTES", 10 << 20)
    content = os.urandom((51 << 20) + 5)
    (tmp_path / "large").write_bytes(content)
    google.plan("POST", "/upload/", 503)
    copy_file(tmp_path / "large", bucket / "large")
    copy_file(bucket / "large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n", b"\n\r", b"--==0==", b"\n--==0==--\r"])
def test_an_object_may_end_as_it_likes(end: bytes, google: GoogleStore, bucket: Any):
    """It goes up between boundaries in lines of their own, and is all of what lies between them."""
    for content in (end, b"0123456789" + end):
        write_bytes(bucket / "x", content)
        assert (bucket / "x").read_bytes() == content


def test_only_one_writer_creates_and_a_lost_answer_is_no_other_writer(google: GoogleStore, bucket: Any):
    write_bytes(bucket / "x", b"me", create=True)
    write_bytes(bucket / "x", b"me", create=True)  # as if the first answer had been lost
    with pytest.raises(FileExistsError):
        write_bytes(bucket / "x", b"you", create=True)
    assert any("ifGenerationMatch=0" in path for _, path in google.requests)


def test_what_grows_is_mirrored(google: GoogleStore, bucket: Any):
    with working_copy(bucket, Claim(bucket).take()) as copy:
        (copy.path / "metrics.jsonl").write_text("1\n")
        google.plan("POST", "/upload/", 503)
        copy.push()
        assert (bucket / "metrics.jsonl").read_text() == "1\n"
    with working_copy(bucket, Claim(bucket).take()) as copy:
        assert (copy.path / "metrics.jsonl").read_text() == "1\n"

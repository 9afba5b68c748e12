import hashlib
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from t5pegasus.errors import ArtifactError
from t5pegasus.storage import fetch, fetched, list_files, write_bytes

CONTENT = {"shard-0": bytes(range(250)) * 40, "shard-1": b"second" * 1000}


def _put_examples(folder: Any, **changed: bytes) -> None:
    shards = [
        {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in CONTENT.items()
    ]
    write_bytes(folder / "tokenizer" / "tokenizer.json", b"{}")
    apart = {"file": "shard-0", "bytes": 5, "sha256": hashlib.sha256(b"apart").hexdigest()}
    write_bytes(folder / "heldout" / "manifest.json", json.dumps({"shards": [apart]}).encode())
    write_bytes(folder / "heldout" / "shard-0", changed.pop("heldout", b"apart"))
    for name, content in (CONTENT | changed).items():
        write_bytes(folder / name, content)
    write_bytes(folder / "packing-1" / "rows.npy", b"made anew")
    write_bytes(folder / "lengths.npy", b"lengths")
    lengths = {"lengths_sha256": hashlib.sha256(b"lengths").hexdigest()}
    write_bytes(folder / "manifest.json", json.dumps({"shards": shards, **lengths}).encode())


def test_a_local_path_comes_back_as_it_is(tmp_path: Path):
    assert fetch(tmp_path / "nothing") == tmp_path / "nothing"


def test_an_artifact_is_fetched_once_whatever_its_name(faults: Any, remote: Any):
    _put_examples(remote / "one")
    _put_examples(remote / "two" / "one")
    local = fetch(remote / "one")
    described = {"lengths.npy", "tokenizer/tokenizer.json", "manifest.json"}
    assert list_files(local).keys() == {*CONTENT, *described, "heldout/shard-0", "heldout/manifest.json"}
    assert all((local / name).read_bytes() == content for name, content in CONTENT.items())
    faults.calls.clear()
    assert fetch(remote / "one") == local
    assert fetch(remote / "two" / "one") == local
    assert [name for operation, name in faults.calls if operation == "cat_file" and "shard" in name] == []


def test_a_change_in_the_store_is_another_artifact(remote: Any):
    write_bytes(remote / "documents.jsonl", b"first")
    first = fetch(remote / "documents.jsonl")
    assert (first.name, first.read_bytes()) == ("documents.jsonl", b"first")
    write_bytes(remote / "documents.jsonl", b"other")
    assert fetch(remote / "documents.jsonl").read_bytes() == b"other"
    write_bytes(remote / "model" / "config.json", b"{}")
    write_bytes(remote / "model" / "weights", b"1")
    assert list_files(fetch(remote / "model")) == {"config.json": 2, "weights": 1}


def test_a_damaged_file_is_named_and_not_kept(remote: Any, own_cache: Path):
    _put_examples(remote, **{"shard-1": b"SECOND" * 1000})
    for _ in range(2):
        with pytest.raises(ArtifactError, match=f"{remote}/shard-1: sha256 is .* its manifest says"):
            fetch(remote)
    assert [path for path in own_cache.rglob("shard-1*") if path.is_file()] == []


def test_an_object_of_another_size_is_damaged_and_no_fault_of_the_store(remote: Any, faults: Any):
    """Else it would be asked for again and again, and the checkpoint before not be used."""
    for content in (b"cut short", b"", CONTENT["shard-1"] + b"longer"):
        _put_examples(remote, **{"shard-1": content})
        with pytest.raises(
            ArtifactError, match=f"{remote}/shard-1 has {len(content):,} bytes, its manifest says 6,000"
        ):
            fetch(remote)
        assert faults.pauses == []
    assert (fetch(remote, lambda name: name != "shard-1") / "shard-0").read_bytes() == CONTENT["shard-0"]


def test_what_lies_inside_is_verified_by_its_own_manifest(remote: Any):
    _put_examples(remote, heldout=b"wrong")
    with pytest.raises(ArtifactError, match="heldout/shard-0: sha256 is"):
        fetch(remote)
    write_bytes(remote / "heldout" / "shard-0", b"apart")
    first = fetch(remote)
    write_bytes(remote / "heldout" / "manifest.json", b"{}")
    write_bytes(remote / "heldout" / "shard-0", b"other")
    assert (first / "heldout" / "shard-0").read_bytes() == b"apart"
    assert (fetch(remote) / "heldout" / "shard-0").read_bytes() == b"other"


def test_what_is_not_there_or_not_whole_is_named(remote: Any):
    with pytest.raises(ArtifactError, match=f"{remote}/none does not exist"):
        fetch(remote / "none")
    _put_examples(remote)
    (remote / "shard-1").unlink()
    with pytest.raises(ArtifactError, match=f"{remote}/shard-1 is missing"):
        fetch(remote)


def test_a_manifest_cannot_name_files_outside_its_folder(remote: Any):
    for name in ("../../outside", "/outside", "a/../../outside"):
        entry = {"file": name, "bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
        write_bytes(remote / "manifest.json", json.dumps({"shards": [entry]}).encode())
        with pytest.raises(ArtifactError, match="no name of a file"):
            fetch(remote)


NUM_MANIFESTS = 2  # read each time


def test_a_fetch_that_was_cut_off_goes_on_where_it_was(faults: Any, remote: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetched, "PART_BYTES", 1000)
    monkeypatch.setattr(fetched, "NUM_THREADS", 1)
    _put_examples(remote)
    faults.plan("cat_file", *[None] * (NUM_MANIFESTS + 3), forever=TimeoutError("no answer"))
    with pytest.raises(OSError, match="no answer"):
        fetch(remote)
    faults.plan("cat_file")
    faults.calls.clear()
    local = fetch(remote)
    assert all((local / name).read_bytes() == content for name, content in CONTENT.items())
    num_parts = 10 + 6 + 4  # of the two shards, and of four small files
    assert faults.count("cat_file") == NUM_MANIFESTS + num_parts - 3


def test_what_a_cut_off_fetch_left_is_verified_too(
    remote: Any, own_cache: Path, faults: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fetched, "NUM_THREADS", 1)
    _put_examples(remote)
    faults.plan("cat_file", *[None] * NUM_MANIFESTS, forever=TimeoutError("no answer"))
    with pytest.raises(OSError, match="no answer"):
        fetch(remote)
    faults.plan("cat_file")
    (part,) = own_cache.rglob("shard-0.part")
    part.write_bytes(b"wrong")
    with pytest.raises(ArtifactError, match="shard-0: sha256"):
        fetch(remote)
    assert (fetch(remote) / "shard-0").read_bytes() == CONTENT["shard-0"]


def test_of_several_at_once_one_fetches(faults: Any, remote: Any):
    _put_examples(remote)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(remote))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert sum("place/shard" in name for operation, name in faults.calls if operation == "cat_file") == len(CONTENT)


def test_a_disk_without_room_is_told_before_it_is_full(remote: Any, monkeypatch: pytest.MonkeyPatch):
    _put_examples(remote)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(OSError, match=r"takes 0.00 GB here, 0.00 GB are free; .* T5PEGASUS_CACHE") as caught:
        fetch(remote)
    assert caught.value.errno == 28


def test_a_listing_that_lags_behind_hides_nothing_that_the_manifest_names(faults: Any, remote: Any):
    _put_examples(remote)

    def without_the_new(operation: Any, *args: Any, **options: Any) -> Any:
        return {name: entry for name, entry in operation(*args, **options).items() if "shard-1" not in name}

    faults.plan("find", forever=without_the_new)
    assert (fetch(remote) / "shard-1").read_bytes() == CONTENT["shard-1"]

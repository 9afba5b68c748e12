import contextlib
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from google_store import stop_the_clock

from t5pegasus.errors import UsageError
from t5pegasus.json_files import read_json, write_json
from t5pegasus.storage import (
    copy_file,
    copy_tree,
    list_files,
    open_path,
    publish,
    read_range,
    remove_tree,
    require_unused,
    write_bytes,
)


def _fill(folder: Path) -> dict[str, bytes]:
    files = {"manifest.json": b"{}", "a/b/values": bytes(range(200)), "a/c": b"", "tokenizer/tokenizer.json": b"{1}"}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, content)
    return files


def test_what_is_written_is_read_and_listed(place: Path):
    files = _fill(place)
    assert list_files(place) == {name: len(content) for name, content in files.items()}
    for name, content in files.items():
        assert (place / name).read_bytes() == content
        assert (place / name).is_file()
        assert not (place / name).is_dir()
        with (place / name).open("rb") as file:
            assert file.read() == content
    assert (place / "a").is_dir()
    assert not (place / "a").is_file()
    assert not (place / "ab").exists()
    assert read_range(place / "a/b/values", 50, 3) == bytes([50, 51, 52])
    assert read_range(place / "a/b/values", 200, 0) == b""
    assert sorted(path.name for path in place.iterdir()) == ["a", "manifest.json", "tokenizer"]
    assert [path.name for path in place.glob("*.json")] == ["manifest.json"]
    assert [path.name for path in place.glob("*/tokenizer.json")] == ["tokenizer.json"]
    assert list((place / "none").glob("*")) == []
    assert list_files(place / "none") == {}
    with pytest.raises(FileNotFoundError):
        next((place / "none").iterdir())
    with pytest.raises(FileNotFoundError):
        (place / "none").read_bytes()


def test_a_file_is_replaced_whole_and_nothing_stays_beside_it(place: Path):
    write_bytes(place / "x", b"first, and longer")
    write_bytes(place / "x", b"second")
    assert list_files(place) == {"x": 6}
    write_json(place / "y.json", {"schema": 1, "text": "你好"})
    assert read_json(place / "y.json") == {"schema": 1, "text": "你好"}


def test_only_one_writer_creates(place: Path):
    write_bytes(place / "x", b"mine", create=True)
    with pytest.raises(FileExistsError):
        write_bytes(place / "x", b"yours", create=True)
    assert (place / "x").read_bytes() == b"mine"
    assert list_files(place) == {"x": 4}


def test_a_file_on_a_disk_that_fails_leaves_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_bytes(tmp_path / "x", b"first")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    for create in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(OSError, match="No space left") as caught:
                write_bytes(tmp_path / "x", b"second", create=create)
        assert caught.value.filename == str(tmp_path / "x")
        assert list_files(tmp_path) == {"x": 5}


@pytest.mark.parametrize("create", [False, True])
def test_a_file_that_is_written_has_its_name_on_the_disk(create: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A name that only memory knows is lost with the power, and with it the manifest that commits a checkpoint."""
    flushed, fsync = list[set[str]](), os.fsync

    def flush(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            flushed.append({path.name for path in tmp_path.iterdir()})
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    write_bytes(tmp_path / "x", b"content", create=create)
    assert flushed == [{"x"}]


def test_a_file_that_ends_too_early_is_an_error(place: Path, monkeypatch: pytest.MonkeyPatch):
    stop_the_clock(monkeypatch)
    write_bytes(place / "x", b"0123456789")
    with pytest.raises(OSError, match="x"):
        read_range(place / "x", 5, 6)


def test_an_object_can_be_read_from_anywhere(remote: Any):
    content = bytes(range(256)) * 50
    write_bytes(remote / "x", content)
    with (remote / "x").open("rb") as file:
        for offset, length in ((0, 5), (12_000, 700), (3, 0), (12_799, 9), (20_000, 1)):
            file.seek(offset)
            assert file.read(length) == content[offset : offset + length]
    write_bytes(remote / "text", "第一行\n第二行\n".encode())
    with (remote / "text").open(encoding="utf-8") as file:
        assert list(file) == ["第一行\n", "第二行\n"]


@pytest.mark.parametrize("way", ["up", "down", "within"])
def test_a_tree_is_copied_and_removed(way: str, remote: Any, tmp_path: Path):
    source, target = {
        "up": (tmp_path / "tree", remote / "tree"),
        "down": (remote / "tree", tmp_path / "tree"),
        "within": (remote / "one", remote / "two"),
    }[way]
    files = _fill(source)
    copy_tree(source, target)
    assert list_files(target) == list_files(source)
    assert all((target / name).read_bytes() == content for name, content in files.items())
    copy_file(source / "a/c", target / "d")
    remove_tree(target)
    assert list_files(target) == {}
    assert not target.exists()
    remove_tree(target)
    assert list_files(source) == {name: len(content) for name, content in files.items()}


def test_what_says_that_a_folder_is_whole_comes_last_and_goes_first(faults: Any, remote: Any, tmp_path: Path):
    _fill(tmp_path)
    copy_tree(tmp_path, remote)
    written = [name.rpartition("/place/")[2] for operation, name in faults.calls if operation == "pipe_file"]
    assert written[-2:] == ["tokenizer/tokenizer.json", "manifest.json"]
    faults.calls.clear()
    remove_tree(remote)
    removed = [name.rpartition("/place/")[2] for operation, name in faults.calls if operation == "rm_file"]
    assert removed[0] == "manifest.json"
    write_bytes(remote / "manifest.json", b"{}")
    write_bytes(remote / "heldout" / "manifest.json", b"{}")
    faults.calls.clear()
    remove_tree(remote)
    assert next(name for operation, name in faults.calls if operation == "rm_file").endswith("/place/manifest.json")


def test_an_upload_that_was_cut_off_is_no_artifact_and_can_be_done_again(faults: Any, remote: Any, tmp_path: Path):
    folder = tmp_path / "made"
    folder.mkdir()
    _fill(folder)
    faults.plan("pipe_file", None, None, forever=TimeoutError("no answer"))
    with pytest.raises(OSError, match="cannot write"):
        publish(folder, remote)
    assert "manifest.json" not in list_files(remote)
    faults.plan("pipe_file")
    require_unused(remote)
    publish(folder, remote)
    assert list_files(remote).keys() == {"manifest.json", "a/b/values", "a/c", "tokenizer/tokenizer.json"}
    assert not folder.exists()
    with pytest.raises(UsageError, match="in use"):
        require_unused(remote)


@pytest.mark.parametrize("operation", ["pipe_file", "rm_file"])
@pytest.mark.parametrize("number", range(6))
def test_an_upload_cut_off_anywhere_is_done_again(
    operation: str, number: int, faults: Any, remote: Any, tmp_path: Path
):
    folder = tmp_path / "made"
    folder.mkdir()
    files = _fill(folder)
    faults.plan(operation, *[None] * number, forever=TimeoutError("no answer"))
    with contextlib.suppress(OSError):
        publish(folder, remote)
    faults.plan(operation)
    if folder.exists():
        require_unused(remote)
        publish(folder, remote)
    assert list_files(remote) == {name: len(content) for name, content in files.items()}


def test_an_upload_does_not_mind_an_answer_that_was_lost(faults: Any, remote: Any, tmp_path: Path):
    def lose_the_answer(operation: Any, *args: Any, **options: Any) -> None:
        operation(*args, **options)
        raise TimeoutError("no answer")

    folder = tmp_path / "made"
    folder.mkdir()
    files = _fill(folder)
    faults.plan("rm_file", lose_the_answer)
    publish(folder, remote)
    assert list_files(remote).keys() == files.keys()


def test_an_object_store_has_no_append_and_no_rename(remote: Any):
    for mode in ("a", "w", "wb", "r+b"):
        with pytest.raises(OSError, match="no open"):
            (remote / "x").open(mode)
    with pytest.raises(OSError, match="no rename"):
        (remote / "x").rename(remote / "y")
    assert open_path("memory://bucket/x") != Path("memory://bucket/x")


def test_a_folder_goes_only_when_it_holds_nothing(place: Path):
    folder = place / "run"
    folder.mkdir()
    write_bytes(folder / "x", b"kept")
    with pytest.raises(OSError):
        folder.rmdir()
    assert list_files(place) == {"run/x": 4}
    (folder / "x").unlink()
    folder.rmdir()
    assert not folder.exists()

import io
import os
import subprocess
import tarfile

import pytest

import launch.bundle
from launch.bundle import write_bundle
from t5pegasus.errors import UsageError


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "repository"
    (root / "包").mkdir(parents=True)
    files = {
        "pyproject.toml": "[project]\n",
        "包/tracked.py": "1\n",
        "untracked.py": "2\n",
        "ignored.log": "3\n",
        "removed.py": "4\n",
        ".gitignore": "*.log\n",
    }
    for name, text in files.items():
        (root / name).write_text(text, encoding="utf-8")
    (root / "run").symlink_to("untracked.py")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run(["git", "add", "包/tracked.py", "removed.py"], cwd=root, check=True)
    (root / "removed.py").unlink()
    return root


def bundle(root):
    sink = io.BytesIO()
    digest = write_bundle(root, sink)
    return digest, sink.getvalue()


def test_a_bundle_holds_what_git_lists_and_nothing_else(repository):
    with tarfile.open(fileobj=io.BytesIO(bundle(repository)[1])) as tar:
        assert tar.getnames() == [".gitignore", "pyproject.toml", "run", "untracked.py", "包/tracked.py"]
        content = tar.extractfile("包/tracked.py")
        assert content is not None
        assert content.read() == b"1\n"


def test_equal_code_gives_equal_bytes(repository):
    first = bundle(repository)
    os.utime(repository / "untracked.py", (0, 0))
    (repository / "untracked.py").chmod(0o600)
    assert bundle(repository) == first
    (repository / "untracked.py").chmod(0o700)
    assert bundle(repository) != first


def test_too_much_code_names_the_largest_files(repository, monkeypatch):
    monkeypatch.setattr(launch.bundle, "MAX_BYTES", 10)
    with pytest.raises(UsageError, match=r"The largest: \w+"):
        bundle(repository)


def test_a_folder_without_code_is_refused(repository, tmp_path):
    with pytest.raises(UsageError, match=r"no pyproject.toml"):
        bundle(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    with pytest.raises(UsageError, match="git cannot say"):
        bundle(tmp_path)

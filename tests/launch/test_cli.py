import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import cli
from t5pegasus.errors import ArtifactError, DataError, DivergedError, UsageError

FLOW = [
    "tokenizer",
    "build",
    "pseudo-summary",
    "plan",
    "pretrain",
    "grow",
    "finetune",
    "few-shot",
    "summarize",
    "evaluate",
    "checkpoint",
    "convert",
    "report",
    "quickstart",
    "launch",
]


@pytest.fixture
def verb(monkeypatch):
    """Replace a verb, `build` or another one, by a function."""

    def replace(action, name="build"):
        module = type(sys)(f"launch.verbs.{name}")
        module.main = action
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return replace


def raising(error):
    def action(argv):
        raise error

    return action


def test_help_lists_the_verbs_in_the_order_of_the_flow(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert [line.split()[0] for line in lines if line.startswith("  ")] == FLOW


def test_without_a_verb_the_help_is_an_error_message(capsys):
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "pretrain" in captured.err


def test_an_unknown_verb_names_the_nearest(capsys):
    assert cli.main(["pretrian"]) == 2
    assert capsys.readouterr().err == "t5pegasus: unknown verb 'pretrian'; perhaps you meant 'pretrain'\n"


def test_a_verb_gets_its_arguments_and_decides_the_exit_code(verb):
    seen = []
    verb(seen.append)
    assert cli.main(["build", "a", "--b"]) == 0
    assert seen == [["a", "--b"]]
    verb(lambda argv: 42)
    assert cli.main(["build"]) == 42


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("field=1 must be 2"), 2, "t5pegasus build: field=1 must be 2\n"),
        (ArtifactError("torn"), 2, "t5pegasus build: torn\n"),
        (DataError("empty"), 44, "t5pegasus build: empty\n"),
        (DivergedError("nan"), 45, "t5pegasus build: nan\n"),
        (FileNotFoundError(2, "No such file", "语料.txt"), 46, "t5pegasus build: 语料.txt: No such file\n"),
        (
            OSError(18, "Invalid cross-device link", "a", None, "b"),
            46,
            "t5pegasus build: a -> b: Invalid cross-device link\n",
        ),
        (TimeoutError("no answer"), 46, "t5pegasus build: no answer\n"),
        (
            OSError(28, "No space left on device", "a"),
            46,
            "t5pegasus build: a: No space left on device; free some space or choose another disk, then give the same "
            "command again\n",
        ),
        (KeyboardInterrupt(), 130, "t5pegasus build: interrupted; give the same command again to go on\n"),
        (SystemExit(2), 2, ""),
        (SystemExit("why"), 1, "why\n"),
        (SystemExit(), 0, ""),
    ],
)
def test_each_error_has_its_exit_code_and_one_line(verb, capsys, error, code, message):
    verb(raising(error))
    assert cli.main(["build"]) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", message)


def test_termination_stops_a_verb_as_an_interrupt_does(verb, capsys):
    cleaned = []

    def wait(_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    verb(wait)
    assert cli.main(["build"]) == 143
    assert capsys.readouterr().err == "t5pegasus build: terminated; give the same command again to go on\n"
    assert cleaned == [True]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_a_verb_that_saves_has_nothing_to_save_before_it_listens(name, verb, capsys):
    def wait(_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    verb(wait, name)
    assert cli.main([name]) == 42
    assert capsys.readouterr().err == f"t5pegasus {name}: terminated before it had begun; the same command goes on\n"


def test_a_bug_shows_its_traceback(verb, capsys):
    verb(raising(KeyError("oops")))
    assert cli.main(["build"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("KeyError: 'oops'\n")


def run_command(*argv, **options):
    return subprocess.run([sys.executable, "-m", "launch.cli", *argv], check=False, **options)


def test_a_reader_that_leaves_early_is_no_error_message():
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as broken:
        ended = run_command("--help", stdout=broken, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_a_full_disk_under_stdout_is_reported():
    with Path("/dev/full").open("wb") as full:
        ended = run_command("--help", stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 46
    assert ended.stderr.startswith(b"t5pegasus: No space left on device")


def test_a_full_disk_under_stderr_does_not_change_the_exit_code():
    with Path("/dev/full").open("wb") as full:
        assert run_command("pretrian", stderr=full).returncode == 2


@pytest.mark.parametrize("name", ["tokenizer", "build", "pseudo-summary", "report", "launch"])
def test_a_verb_that_needs_no_jax_does_not_import_it(name):
    script = (
        "import sys; from launch.cli import main; code = main(sys.argv[1:]); "
        "loaded = {'jax', 'flax', 'orbax', 'grain', 'optax'} & set(sys.modules); "
        "sys.exit(code or ','.join(sorted(loaded)) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", script, name, "--help"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "usage: t5pegasus" in ended.stdout


def test_the_command_itself_imports_nothing_large():
    script = "import sys, launch.cli; print(sorted({'jax', 'numpy', 'tyro', 'rich'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"

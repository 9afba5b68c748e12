"""Flags of pretrain and finetune: nothing that is given is ignored, and help shows what will be used."""

import shutil

import pytest

from launch.preflight import _compare
from launch.verbs import finetune, pretrain
from t5pegasus.config import DataConfig, RunConfig
from t5pegasus.errors import UsageError
from t5pegasus.train.run_folder import RunPaths
from tests.data.example_folders import random_examples, write_examples


@pytest.mark.parametrize(
    ("main", "argv", "flag", "source"),
    [
        (pretrain.main, ["tiny", "--examples-path", "x", "--run-path", "y"], "--model.vocab-size", "the tokenizer's"),
        (pretrain.main, ["tiny", "--examples-path", "x", "--run-path", "y"], "--model.eos_token_id", "the tokenizer's"),
        (finetune.main, ["x", "--train-path", "x", "--run-path", "y"], "--train.steps", "--epochs"),
    ],
)
def test_what_follows_from_something_else_has_no_flag_and_is_named_with_its_source(main, argv, flag, source):
    for given in ([flag, "5"], [f"{flag}=5"]):
        with pytest.raises(UsageError, match=f"{flag} is no flag: .*{source}"):
            main([*argv, *given])


def test_help_names_defaults_that_are_empty(capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["--help"])
    shown = capsys.readouterr().out
    assert "(default: )" not in shown
    assert "(default: none)" in shown


def test_help_shows_the_defaults_of_the_preset(capsys):
    shown = []
    for argv in (["--help"], ["base", "--help"], ["tiny", "--help"]):
        with pytest.raises(SystemExit):
            pretrain.main(argv)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]
    assert "768" in shown[0]
    assert "768" not in shown[2]


@pytest.mark.parametrize(
    ("main", "argv", "message"),
    [
        (pretrain.main, ["tinny", "--examples-path", "x", "--run-path", "y"], "perhaps you meant 'tiny'"),
        (
            pretrain.main,
            ["tiny", "--run-path", "y", "--train.batch-size", "7", "--train.accumulation-steps", "2"],
            "batch_size=7 is not a multiple of accumulation_steps=2; nearest: 6 or 8",
        ),
        (
            pretrain.main,
            ["tiny", "--run-path", "y", "--train.profile-steps", "7:5"],
            "must be FIRST:LAST, two updates .* the last is not before the first",
        ),
        (pretrain.main, ["--examples-path", "x", "--run-path", "y"], "no preset given; begin with one of tiny, small"),
        (pretrain.main, ["tiny", "--examples-path", "x", "--run-path", "y", "--reset-rows"], "goes with --start-from"),
        (finetune.main, ["x", "--run-path", "y"], "either as --train-path FILE or as --examples-path FOLDER"),
        (finetune.main, ["x", "--run-path", "y", "--train-path", "z", "--epochs", "0"], "epochs=0.0 must be positive"),
    ],
)
def test_commands_that_cannot_work_say_what_can(main, argv, message):
    with pytest.raises(UsageError, match=message):
        main(argv)


@pytest.mark.parametrize("mixture", [False, True])
def test_processes_with_other_examples_under_the_same_name_are_told_apart(tmp_path, mixture):
    folder = write_examples(tmp_path / "examples", random_examples(20, seed=0))
    write_examples(folder / "heldout", random_examples(20, seed=1))
    data = DataConfig(mixture=(f"{folder}=1",)) if mixture else DataConfig()
    config, paths = RunConfig(data=data), RunPaths(tmp_path / "run", folder)
    first = pretrain.attempt_facts(config, paths)
    shutil.rmtree(folder / "heldout")
    without = pretrain.attempt_facts(config, paths)
    shutil.rmtree(folder)
    write_examples(folder, random_examples(20, seed=2))
    other = pretrain.attempt_facts(config, paths)
    assert f"process 1 has in {folder / 'heldout'} the examples none, process 0 has " in _compare([first, without])
    assert f"process 1 has in {folder} the examples " in _compare([without, other])
    assert _compare([other, pretrain.attempt_facts(config, paths)]) == ""

"""What `--help` says: every command by its task and with an example, every option described, nothing cut."""

from __future__ import annotations

import re
import shlex

import click
import pytest
from click.testing import CliRunner

from scialm_dask.__main__ import main
from scialm_dask.cli.group import _TASKS


def told(*words):
    result = CliRunner().invoke(main, [*words, "--help"], prog_name="scialm-dask")
    assert result.exit_code == 0
    return result.output


def test_commands_stand_by_task_with_the_whole_of_their_first_sentence():
    text = " ".join(told().split())
    assert sorted(" ".join(_TASKS.values()).split()) == sorted(main.commands)
    for task, names in _TASKS.items():
        assert f"{task}: {names.split()[0]} " in text
    for name, command in main.commands.items():
        sentence = re.split(r"\.(?:\s|$)", " ".join(command.help.split()))[0]
        assert f" {name} {sentence}." in text


def options_of(name):
    return [option for option in main.commands[name].params if isinstance(option, click.Option)]


@pytest.mark.parametrize("name", main.commands)
def test_a_command_has_an_example_and_describes_its_options(name):
    text = told(name)
    (example,) = re.findall(rf"Example:\n  scialm-dask {name}(.*)\n$", text)
    main.commands[name].make_context(name, shlex.split(example))  # its own parser takes it
    assert not re.search(r"(\.\.\.|…)$", text, re.MULTILINE)
    for option in options_of(name):
        words = (option.help or "").partition("[default")[0]
        assert len(words) > 10, option.name
        assert " ".join(words.split()) in " ".join(text.split())


@pytest.mark.parametrize(("typed", "expected"), [("im", "plain,impute"), ("qc --max-m", "plain,--max-mito")])
def test_the_shell_completes_names(typed, expected):
    words = f"scialm-dask {typed}"
    environment = {
        "_SCIALM_DASK_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    result = CliRunner().invoke(main, [], prog_name="scialm-dask", env=environment)
    assert result.output.split() == [expected]
    assert 'eval "$(_SCIALM_DASK_COMPLETE=bash_source scialm-dask)"' in told()

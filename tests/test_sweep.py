"""Sweeps: the points are what direct runs give, survive kills, and are shared by processes."""

from __future__ import annotations

import functools
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from helpers import TASKS
from helpers_engine import exits_config
from helpers_harness import add_post_processor, results_of, sweep_options
from lm_eval.tasks import TaskManager
from torch.utils import collect_env

from dynamax_lm_eval.cli import main
from dynamax_lm_eval.compute.accounting import ratio_stderr
from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.files import file_checksum
from dynamax_lm_eval.harness import cache, tasks
from dynamax_lm_eval.harness.responder import Responder
from dynamax_lm_eval.lm import DynamaxLM
from dynamax_lm_eval.locks import locked
from dynamax_lm_eval.sweep import command
from dynamax_lm_eval.sweep import results as collect
from dynamax_lm_eval.sweep.drawing import with_drawn_documents
from dynamax_lm_eval.sweep.files import POINT, POINT_NAME, RESPONSES_NAME, SWEEP_NAME, finished_points
from dynamax_lm_eval.sweep.grid import grid
from dynamax_lm_eval.sweep.model import SweepLM
from dynamax_lm_eval.sweep.options import SweepOptions, parse_thresholds, read_yaml
from dynamax_lm_eval.sweep.store import Response, ResponseStore

FULL = DynamaxArgs(backbone="b", threshold=(1.0,))


def test_points_are_what_direct_runs_give(model_folder: Path, exits_folder: Path, tmp_path: Path) -> None:
    shared = f"exits={exits_folder},repetition_penalty=1.2,static_segments=true"
    options = sweep_options(
        model_folder, tmp_path, confidences="calm,mamba,state", model_args=shared, thresholds="0.4", limit=4
    )
    command.sweep(options)
    swept = results_of(tmp_path)
    assert len(swept) == 1 + 3 * 2 + 1
    first = finished_points(tmp_path)[0]
    settings = json.loads((first["folder"] / first["results"]).read_text())["config"]["dynamax"]
    assert settings["static_segments"]["static"] > 0  # direct runs go block by block
    common: dict[str, Any] = {"exits": str(exits_folder), "repetition_penalty": 1.2, "batch_size": 2, "device": "cpu"}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    for name, arguments in {
        "full": {"threshold": 1},
        "mamba-skip-0.4": {"threshold": 0.4, "classifier": "mamba", "state_mode": "skip"},
        "calm-recompute-0.4": {"threshold": 0.4, "classifier": "calm"},
        "pruning-deepest-1": {"threshold": 1, "prune_layers": 1},
    }.items():
        lm = DynamaxLM(str(model_folder), **common, **arguments)
        direct = lm_eval.simple_evaluate(
            lm, tasks=["tiny_generate", "tiny_choice"], task_manager=manager, bootstrap_iters=0, limit=4
        )
        assert direct is not None
        for task, metrics in direct["results"].items():
            for metric, value in metrics.items():
                if isinstance(value, float) and "stderr" not in metric:
                    assert swept[name][task][metric] == pytest.approx(value), (name, task, metric)


def test_points_are_compared_with_the_full_model(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = sweep_options(model_folder, tmp_path, tasks="tiny_group", thresholds="0.3", prune="", state_modes="skip")
    command.sweep(options)
    found = results_of(tmp_path)
    samples = {}
    for point in finished_points(tmp_path):
        for task, file in point["samples"].items():
            lines = (point["folder"] / file).read_text(encoding="utf-8").splitlines()
            samples[point["point"], task] = [json.loads(line)["macs"]["total"] for line in lines]
    own = found["state-skip-0.3"]
    both = [samples[name, "tiny_generate"] for name in ("full", "state-skip-0.3")]
    assert own["tiny_generate"]["compute_vs_full,none"] == pytest.approx(sum(both[0]) / sum(both[1]))
    alone = ratio_stderr([list(zip(*both, strict=True))])
    assert own["tiny_generate"]["compute_vs_full_stderr,none"] == pytest.approx(alone)
    tasks = ("tiny_generate", "tiny_choice")
    pairs = [list(zip(samples["full", task], samples["state-skip-0.3", task], strict=True)) for task in tasks]
    group = own["tiny_group"]
    assert group["compute_vs_full_stderr,none"] == pytest.approx(ratio_stderr(pairs))
    assert found["full"]["tiny_group"]["compute_vs_full,none"] == 1
    (task,) = [task for task in collect.read([tmp_path], 0.1) if task.task == "tiny_generate"]
    assert task.vs_full(task.points[1]) == pytest.approx(own["tiny_generate"]["compute_vs_full,none"])
    assert not any("compute" in metric for metric in task.metrics)
    # A point that was finished when the full model was not is made up for, from the answers that are stored.
    for path in tmp_path.rglob(POINT_NAME):
        point = POINT.read(path)
        if point["point"] != "full":
            POINT.write(path, {**point, "vs_full": False})
    monkeypatch.setattr(ResponseStore, "add", None)
    command.sweep(options)
    assert all(point["vs_full"] for point in finished_points(tmp_path))
    assert results_of(tmp_path) == found


def test_the_environment_is_looked_at_once(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every point's file describes it, as the harness would; its log level is as it was."""
    asked = []

    def environment() -> str:
        asked.append(1)
        return "torch on a machine"

    monkeypatch.setattr(collect_env, "get_pretty_env_info", environment)
    log = logging.getLogger("lm_eval")
    log.setLevel(logging.INFO)
    options = sweep_options(model_folder, tmp_path, tasks="tiny_choice", limit=1)
    command.sweep(options)
    command.sweep(replace(options, thresholds="0.8"))
    points = finished_points(tmp_path)
    assert len(points) == 6 + 2
    found = [json.loads((point["folder"] / point["results"]).read_text())["pretty_env_info"] for point in points]
    assert found == ["torch on a machine"] * 8
    assert len(asked) == 1
    assert (collect_env.get_pretty_env_info, log.level) == (environment, logging.INFO)


def test_a_stopped_sweep_goes_on(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = command.sweep(sweep_options(model_folder, tmp_path / "whole"))
    options = sweep_options(model_folder, tmp_path / "stopped")
    answered: list[str] = []
    add = ResponseStore.add

    def killed(self: ResponseStore, key: str, response: Response) -> None:
        add(self, key, response)
        answered.append(key)
        if len(answered) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResponseStore, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        command.sweep(options)
    stopped = Path(options.output)
    assert finished_points(stopped) == []
    cut = next(file for file in stopped.rglob(RESPONSES_NAME) if len(file.read_text().splitlines()) > 1)
    cut.write_text(cut.read_text() + '{"key": "half of a li')  # what a kill may leave

    def counted(self: ResponseStore, key: str, response: Response) -> None:
        add(self, key, response)
        answered.append(key)

    monkeypatch.setattr(ResponseStore, "add", counted)
    command.sweep(options)
    lines = sum(len(file.read_text().splitlines()) - 1 for file in whole.rglob(RESPONSES_NAME))
    assert len(answered) == lines, "nothing was answered twice"
    assert results_of(stopped) == results_of(whole)
    answered.clear()
    command.sweep(options)
    assert not answered, "everything is done"


def test_a_sweep_may_grow_but_not_change(model_folder: Path, tmp_path: Path) -> None:
    options = sweep_options(model_folder, tmp_path, thresholds="0.3", prune="", limit=2)
    command.sweep(options)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob(POINT_NAME)}
    command.sweep(replace(options, thresholds="0.3,0.6", prune="2"))
    assert len(finished_points(tmp_path)) == 1 + 4 + 1
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "what was done stays"
    command.sweep(replace(options, limit=3))
    assert all(path.stat().st_mtime_ns != time for path, time in before.items()), "with more documents it is redone"
    with pytest.raises(UserError, match="seed"):
        command.sweep(replace(options, seed=2))


def test_a_sweep_keeps_to_its_rules_of_counting_and_its_tokenizer(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = shutil.copytree(model_folder, tmp_path / "model")
    options = sweep_options(moved, tmp_path / "out", thresholds="0.3", prune="", limit=2)
    command.sweep(options)
    for name in ("ACCOUNTING", "SCHEMA_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(cache, name, "other")
            with pytest.raises(UserError, match=f"differs in {name.lower()} "):
                command.sweep(options)
    add_post_processor(moved)
    with pytest.raises(UserError, match="differs in tokenizer"):
        command.sweep(options)


def test_processes_share_the_points(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = command.sweep(sweep_options(model_folder, tmp_path / "whole", limit=2))
    options = sweep_options(model_folder, tmp_path / "shared", limit=2)
    counts = []
    start = SweepLM.start
    for rank in (0, 1):
        monkeypatch.setattr(command, "process", lambda rank=rank: (rank, 2))

        def launched(self: SweepLM, points: Any, rank: int = rank) -> None:
            monkeypatch.setenv("LOCAL_RANK", str(rank))  # as launchers set it, but after the model has loaded alone
            start(self, points)

        monkeypatch.setattr(SweepLM, "start", launched)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        counts.append(len(finished_points(command.sweep(options))))
    assert counts == [3, 6]
    assert results_of(Path(options.output)) == results_of(whole)


@pytest.fixture
def only_our_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the harness's thousands of tasks out: indexing them takes most of the time."""
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setattr(command, "task_manager", command.task_manager.__wrapped__)


@pytest.mark.usefixtures("only_our_tasks")
@pytest.mark.parametrize("name", ["a/b task", "x" * 250])
def test_names_that_no_file_can_have(model_folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "tasks").mkdir()
    for file in TASKS.glob("utils.py"):
        (tmp_path / "tasks" / file.name).write_text(file.read_text())
    yaml_text = (TASKS / "tiny_generate.yaml").read_text()
    (tmp_path / "tasks" / "task.yaml").write_text(yaml_text.replace("task: tiny_generate", f"task: {name}"))
    given = {"tasks": name, "include_path": str(tmp_path / "tasks"), "thresholds": "0.3", "prune": "", "limit": 2}
    folder = command.sweep(sweep_options(model_folder, tmp_path / "out", state_modes="skip", **given))
    (task,) = collect.read([folder], 0.1)
    assert task.task == name
    assert [len(point.samples) for point in task.points] == [2, 2]


@pytest.mark.usefixtures("only_our_tasks")
def test_data_that_cannot_be_read_end_in_one_line(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{')
    given = ["--backbone", str(model_folder), "--tasks", "local_text", "--output", str(tmp_path / "out")]
    given += ["--metadata", f"file={tmp_path / 'a.jsonl'}", "--device", "cpu", "--confidences", "state"]
    assert main(["sweep", *given]) == 2
    assert "a.jsonl: line 2 is no JSON" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.usefixtures("only_our_tasks")
def test_points_that_answered_other_documents_are_made_anew(model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    options = replace(
        sweep_options(model_folder, tmp_path / "out", thresholds="0.3", prune=""),
        tasks="local_text",
        metadata=json.dumps({"file": str(data)}),
    )
    for thresholds, words in (("0.3", "The quick"), ("0.3,0.6", "A slow")):
        data.write_text("".join(json.dumps({"text": f"{words} fox {i}"}) + "\n" for i in range(3)))
        command.sweep(replace(options, thresholds=thresholds))
    (task,) = collect.read([tmp_path / "out"], 0.1)
    assert {sample["doc"]["text"] for point in task.points for sample in point.samples} == {
        f"A slow fox {i}" for i in range(3)
    }


def test_a_report_does_not_compare_other_documents(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = sweep_options(model_folder, tmp_path, thresholds="0.3", prune="2", limit=2)
    command.sweep(replace(options, tasks="tiny_choice"))
    (point,) = [path for path in tmp_path.rglob(POINT_NAME) if POINT.read(path)["family"] == "pruning"]
    data = POINT.read(point)
    file = point.parent / data["samples"]["tiny_choice"]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**line, "doc_hash": "other"}) + "\n" for line in lines))
    checksums = {name: file_checksum(point.parent / name) for name in data["checksums"]}
    POINT.write(point, {**data, "checksums": checksums})
    (task,) = collect.read([tmp_path], 0.1)
    assert {result.kind for result in task.points} == {"full", "exits"}
    assert "1 points answered other documents" in caplog.text


def test_a_sweep_goes_on_where_its_model_was_moved(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = sweep_options(model_folder, tmp_path / "out", thresholds="0.3", prune="", limit=2)
    command.sweep(options)
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    monkeypatch.setattr(Responder, "generations", lambda *_: pytest.fail("asked again"))
    command.sweep(replace(options, backbone=str(moved)))


@pytest.mark.usefixtures("only_our_tasks")
def test_one_process_writes_a_folder(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load", lambda _: pytest.fail("the backbone was loaded"))
    with locked(tmp_path), pytest.raises(UserError, match=r"in use by process .* remove .*\.dynamax\.lock"):
        command.sweep(sweep_options(model_folder, tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        command.sweep(sweep_options(model_folder, tmp_path / "file"))
    (tmp_path / SWEEP_NAME).write_text("backbone: mine\n")
    with pytest.raises(UserError, match="was not written by a sweep"):
        command.sweep(sweep_options(model_folder, tmp_path))
    assert (tmp_path / SWEEP_NAME).read_text() == "backbone: mine\n"


def test_rolling_texts_are_replayed(model_folder: Path, tmp_path: Path) -> None:
    options = sweep_options(
        model_folder, tmp_path, tasks="tiny_rolling", thresholds="0.3", prune="", state_modes="skip"
    )
    first = results_of(command.sweep(options))
    for path in tmp_path.rglob(POINT_NAME):
        path.unlink()
    assert results_of(command.sweep(options)) == first


def test_all_points_are_answered_in_one_batch(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    answers = Responder.generations

    def counted(self: Responder, asked: Any, *args: Any) -> Any:
        calls.append(len(asked))
        return answers(self, asked, *args)

    monkeypatch.setattr(Responder, "generations", counted)
    options = sweep_options(model_folder, tmp_path, tasks="tiny_generate", limit=3)
    command.sweep(options)
    assert calls[0] == 6 * 3
    assert not any(calls[1:])


def test_thresholds() -> None:
    found = [value for (value,) in parse_thresholds("0.5:0.95:0.05")]
    assert found == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    assert parse_thresholds("0.7, 0.2") == [(0.2,), (0.7,)]
    assert parse_thresholds("0.9, 0.8+1+0.2, 0.1:0.2:0.1") == [(0.1,), (0.2,), (0.8, 1.0, 0.2), (0.9,)]
    for wrong in ("0.5:0.9:0", "a", "1", "0.5:1:0.5", ""):
        with pytest.raises(UserError, match="--thresholds"):
            parse_thresholds(wrong)
    for wrong in ("0.9:0.5:0.1", "0.5:0.9:0"):
        with pytest.raises(UserError, match="the order is first:last:step, rising"):
            parse_thresholds(wrong)


def test_grid() -> None:
    options = SweepOptions(
        "b", "t", "o", thresholds="0.5", confidences="mamba,softmax", state_modes="skip", prune="0,2,1"
    )
    points = grid(options, FULL, exits_config(classifiers=("mamba",)))
    assert [point.name for point in points] == [
        "full",
        "mamba-skip-0.5",
        "softmax-skip-0.5",
        "pruning-deepest-1",
        "pruning-deepest-2",
    ]
    assert points[1].args == replace(
        FULL, confidence="classifier", classifier="mamba", state_mode="skip", threshold=(0.5,)
    )
    assert points[4].args == replace(FULL, prune_layers=2)


def test_a_grid_under_a_preset() -> None:
    """Where nothing else is asked for, tokens leave what the preset says, and pruned models prune where it says."""
    options = SweepOptions("b", "t", "o", thresholds="0.5", confidences="state", prune="1")
    thesis = replace(FULL, preset="thesis", prune_scope="generated")
    assert [point.name for point in grid(options, thesis, None)][1:] == [
        "state-copy_previous-0.5",
        "pruning-deepest-generated-1",
    ]
    points = grid(options, thesis, None, recurrent_backbone=True)
    assert (points[1].args.state_mode, points[2].args.prune_scope) == ("skip", "generated")
    everywhere = grid(replace(options, prune_scope="all"), thesis, None)
    assert (everywhere[2].name, everywhere[2].args.prune_scope) == ("pruning-deepest-1", "all")
    with pytest.raises(UserError, match="--prune_scope has no effect without --prune"):
        replace(options, prune="", prune_scope="all")
    with pytest.raises(UserError, match="--propose has no effect without a cascade among --confidences"):
        grid(replace(options, propose="0.3"), thesis, None)


def test_thresholds_of_each_task() -> None:
    options = SweepOptions("b", "t,u", "o", thresholds="t=0.3,0.5; u=0.5:0.6:0.1,0.2+0.4", confidences="state")
    assert options.thresholds_by_task() == {(0.3,): ("t",), (0.2, 0.4): ("u",), (0.5,): ("t", "u"), (0.6,): ("u",)}
    points = grid(options, FULL, None)
    assert [(point.x, point.tasks) for point in points][:2] == [(1.0, ("t", "u")), (0.3, ("t",))]
    text = "backbone: b\ntasks: [t, u]\noutput: o\nthresholds: {t: [0.3, 0.5], u: 0.2}\n"
    assert SweepOptions(**read_yaml(text)).thresholds_by_task() == {(0.2,): ("u",), (0.3,): ("t",), (0.5,): ("t",)}
    for wrong, message in {
        "t=0.3": "no list for u",
        "t=1;u=2;v=3": "--thresholds",
        "t=.1;u=.1;v=.1": "v is not among",
    }.items():
        with pytest.raises(UserError, match=message):
            SweepOptions("b", "t,u", "o", thresholds=wrong)


def test_points_answer_the_tasks_that_their_threshold_is_for(model_folder: Path, tmp_path: Path) -> None:
    options = sweep_options(
        model_folder,
        tmp_path,
        confidences="state",
        state_modes="skip",
        thresholds="tiny_generate=0.3,0.4;tiny_choice=0.4",
        prune="",
        limit=2,
    )
    command.sweep(options)
    found = results_of(tmp_path)
    assert {name: set(tasks) for name, tasks in found.items()} == {
        "full": {"tiny_generate", "tiny_choice"},
        "state-skip-0.3": {"tiny_generate"},
        "state-skip-0.4": {"tiny_generate", "tiny_choice"},
    }
    table = collect.tidy(collect.read([tmp_path], 0.1))
    assert set(table[table["point"] == "state-skip-0.3"]["task"]) == {"tiny_generate"}
    # A list that grows asks for what is missing alone.
    lines = sum(len(path.read_text().splitlines()) for path in tmp_path.rglob(RESPONSES_NAME))
    command.sweep(replace(options, thresholds="tiny_generate=0.3,0.4;tiny_choice=0.3,0.4"))
    assert set(results_of(tmp_path)["state-skip-0.3"]) == {"tiny_generate", "tiny_choice"}
    grown = sum(len(path.read_text().splitlines()) for path in tmp_path.rglob(RESPONSES_NAME))
    assert lines < grown <= lines + 2 * 4, "the continuations of two documents, and no text again"


def test_yaml() -> None:
    text = "backbone: b\ntasks: [a, b]\noutput: o\nthresholds: [0.5, 0.7]\nprune: 2\nmodel_args: {exit_scope: all}\n"
    options = SweepOptions(**read_yaml(text))
    assert options.task_names == ["a", "b"]
    assert parse_thresholds(options.thresholds) == [(0.5,), (0.7,)]
    assert options.shared_arguments == {"exit_scope": "all"}
    lists = SweepOptions(**read_yaml("backbone: b\ntasks: a\noutput: o\nmodel_args: {exit_layers: [2, 4], top: x}\n"))
    assert lists.shared_arguments == {"exit_layers": [2, 4], "top": "x"}
    for metadata in ('{"depth": 2}', "depth=2"):
        assert SweepOptions("b", "a", "o", metadata=metadata).metadata_given == {"depth": 2}
    with pytest.raises(UserError, match="thresholds"):
        read_yaml("treshold: 1")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--tasks", "tiny_nothing"], "tiny_nothing"),
        (["--confidences", "calm,guess"], "guess"),
        (["--state_modes", "forget"], "forget"),
        (["--prune", "two"], "--prune"),
        (["--model_args", "threshold=0.5"], "threshold"),
        (["--model_args", "treshold=0.5"], "treshold"),
        (["--model_args", "exit_scope"], "--model_args"),
        (["--metadata", "{depth"], "--metadata"),
        (["--limit", "0"], "--limit"),
        (["--prune", "40"], "prune_layers=40"),
        (["--tresholds", "0.5"], "--thresholds"),
        (["--prune_profile", "nowhere.json", "--prune", "1"], "nowhere.json"),
    ],
)
def test_refusals(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: list[str], message: str
) -> None:
    given = ["--backbone", str(model_folder), "--tasks", "tiny_generate", "--output", str(tmp_path / "out")]
    given += ["--include_path", str(TASKS), "--device", "cpu", "--confidences", "state"]
    assert main(["sweep", *given, *changed]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "out").exists()


def test_command_reads_a_file(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    given = {"backbone": str(model_folder), "tasks": ["tiny_generate"], "output": str(tmp_path / "out"), "limit": 2}
    given |= {"thresholds": [0.5], "confidences": ["state"], "device": "cpu", "include_path": str(TASKS)}
    file.write_text(yaml.safe_dump(given))
    assert main(["sweep", "--config", str(file), "--limit", "1"]) == 0
    stored = yaml.safe_load((tmp_path / "out" / SWEEP_NAME).read_text())
    assert stored["limit"] == 1
    assert stored["confidences"] == "state"
    assert SweepOptions(**stored).task_names == ["tiny_generate"]


def test_documents_are_drawn_by_a_seed(manager: TaskManager) -> None:
    def drawn(limit: int, seed: int) -> dict[str, list[int]]:
        options = SweepOptions(backbone="x", tasks="tiny_generate,tiny_choice", output="out", limit=limit, draw=seed)
        resolved = with_drawn_documents(options, manager)
        assert resolved.limit is None
        assert resolved.samples_given is not None
        return resolved.samples_given

    some, more = drawn(2, 1), drawn(3, 1)
    assert [len(documents) for documents in some.values()] == [2, 2]
    assert all(set(some[task]) < set(more[task]) for task in some)
    assert drawn(2, 1) == some
    assert any(drawn(2, seed) != some for seed in range(2, 9))
    with pytest.raises(UserError, match="--draw takes documents of tasks, and tiny_group is a group of tiny_"):
        with_drawn_documents(SweepOptions("x", "tiny_group", "out", limit=2, draw=0), manager)
    with pytest.raises(UserError, match="--draw is a seed of at least 0, and needs --limit"):
        SweepOptions("x", "tiny_generate", "out", draw=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"confidences": "clam"}, r"--confidences must name some of .*, got clam; did you mean 'calm'\?"),
        ({"state_modes": "copied"}, "--state_modes must name some of .*, got copied"),
        ({"samples": "nowhere.json", "limit": None}, "--samples nowhere.json cannot be read"),
    ],
)
def test_wrong_names_are_found_before_anything_is_loaded(
    model_folder: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        sweep_options(model_folder, tmp_path, **changed)


def test_a_folder_of_other_files_is_left_alone(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load", lambda _: pytest.fail("the model was loaded"))
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"is no folder of a sweep, and holds other files \(thesis.tex, ...\)"):
        command.sweep(sweep_options(model_folder, tmp_path))

"""The tasks as the authors' code ran them, on small made-up files and against the harness's own tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import pandas as pd
import pytest
from helpers_engine import exits_config
from helpers_harness import results_of, save_exits
from helpers_tasks import HARNESS, SPIDER, STORY, coqa_row, load, prompt, write_csv, write_jsonl
from jinja2 import Template
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from test_paper_tasks import Parrot

from dynamax_lm_eval import tasks_dir
from dynamax_lm_eval.cli import main
from dynamax_lm_eval.config import parse_model_args
from dynamax_lm_eval.exits.checkpoint import BackboneIdentity, ExitConfig
from dynamax_lm_eval.exits.resolve import default_exit_layers, resolve_policy
from dynamax_lm_eval.sweep.files import finished_points
from dynamax_lm_eval.sweep.grid import grid
from dynamax_lm_eval.sweep.options import SweepOptions, read_yaml

NAMES = ("triviaqa_thesis", "coqa_thesis", "truthfulqa_gen_thesis")
STOCK = {"triviaqa_thesis": "triviaqa/default.yaml", "truthfulqa_gen_thesis": "truthfulqa/truthfulqa_gen.yaml"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose shortest aliases have fewer and fewer characters, and such files for the other tasks."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"question_id": f"q-{i:04d}", "question": f"Question {i}?", "aliases": ["b" * 200, "a" * ((3000 - i) // 20)]}
        for i in range(2010)
    ]
    write_jsonl(folder / "triviaqa.jsonl", rows)
    one = coqa_row()
    write_jsonl(folder / "coqa.jsonl", [one, one | {"id": "invented-2"}])
    write_csv(folder / "truthfulqa.csv", [SPIDER, SPIDER | {"Question": "Second?"}, SPIDER | {"Question": "Third?"}])
    return folder


def test_the_group(data_dir: Path) -> None:
    metadata = {"data_dir": str(data_dir)}
    loaded = TaskManager(include_path=str(tasks_dir()), include_defaults=False, metadata=metadata).load(
        ["dynamax_thesis"]
    )
    assert tuple(loaded["tasks"]) == NAMES
    assert loaded["group_map"] == {"dynamax_thesis": list(NAMES)}


@pytest.mark.parametrize("name", NAMES)
def test_evaluates_offline(name: str, data_dir: Path) -> None:
    task = load(name, data_dir)
    assert task.config.generation_kwargs["max_gen_toks"] == 64 and task.config.generation_kwargs["do_sample"] is False
    tasks = {"tasks": {name: task}, "groups": {}, "group_map": {}}
    results = lm_eval.evaluate(Parrot(), tasks, limit=2, bootstrap_iters=0)
    metrics = {key.split(",")[0] for key in results["results"][name] if "," in key and "stderr" not in key}
    assert metrics == set(task.higher_is_better())


def test_ranks_by_characters_of_the_first_alias(data_dir: Path) -> None:
    task = load("triviaqa_thesis", data_dir)
    assert [doc["question_id"] for doc in task.eval_docs] == [f"q-{i:04d}" for i in range(1000, 2000)]
    assert {doc["question_id"] for doc in task.dataset["train"]} == {f"q-{i:04d}" for i in range(2000, 2010)}


def test_too_few_questions(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "triviaqa.jsonl", [{"question_id": "1", "question": "Which?", "aliases": ["a"]}])
    with pytest.raises(ValueError, match="1 questions are too few; triviaqa_thesis needs more than 2000"):
        load("triviaqa_thesis", tmp_path)


@pytest.mark.parametrize("name", STOCK)
def test_prompts_are_those_of_the_harness(name: str, data_dir: Path) -> None:
    stock, task = load_yaml(HARNESS / STOCK[name]), load(name, data_dir)
    doc = task.eval_docs[0]
    assert prompt(task, num_fewshot=0).strip() == Template(stock["doc_to_text"], keep_trailing_newline=True).render(
        **doc
    )
    until = stock.get("generation_kwargs", {}).get("until", ["\n\n"])
    assert task.config.generation_kwargs["until"] == until


def test_the_example_of_truthfulqa_has_no_answer(data_dir: Path) -> None:
    task = load("truthfulqa_gen_thesis", data_dir)
    example, _, question = prompt(task).rpartition("\n\nQ: What is human life expectancy in the United States?")
    assert example.rstrip(" ").endswith("?") and "A: " in example
    assert question.endswith(str(task.eval_docs[0]["question"]))
    assert example.count("Q: ") == 7


def test_equal_references_of_coqa_count_once(tmp_path: Path) -> None:
    row: dict[str, Any] = coqa_row()
    for turns, answer in zip(row["additional_answers"].values(), ("A Fence", "a fence", "a gate"), strict=True):
        turns[-1]["input_text"] = answer
    write_jsonl(tmp_path / "coqa.jsonl", [row])
    task = load("coqa_thesis", tmp_path)
    assert task.eval_docs[0]["references"] == ["a fence", "a gate"]
    assert prompt(task).startswith(STORY)
    assert load("coqa_exit", tmp_path).eval_docs[0]["references"] == ["a fence", "A Fence", "a fence", "a gate"]
    assert task.process_results(task.eval_docs[0], [" a fence"]) == {"em": 0.5, "f1": 0.5}


EXAMPLES = Path(__file__).parents[1] / "examples"
#: The file, its number of blocks, whether it is Mamba, and how many points it has for each task but the full model.
GRIDS = {"thesis_mistral.yaml": (32, False, 9 + 8), "thesis_codestral.yaml": (64, True, 9 + 9)}


@pytest.mark.parametrize("name", GRIDS)
def test_the_grids_of_the_examples_resolve(name: str) -> None:
    num_layers, is_mamba, points_of_task = GRIDS[name]
    options = SweepOptions(**read_yaml((EXAMPLES / name).read_text(encoding="utf-8")))
    assert tuple(options.task_names) == NAMES
    full, _ = parse_model_args(
        {"backbone": options.backbone, "threshold": 1.0, **options.shared_arguments}, ("dtype", "max_length")
    )
    identity = BackboneIdentity(options.backbone, "main", "any", 4096, num_layers, "0" * 32)
    layers = default_exit_layers(num_layers)
    exits = ExitConfig(identity, layers, ("calm",), "silu", final_block=True)
    points = grid(options, full, exits, is_mamba)
    policies = [resolve_policy(point.args, num_layers, exits, is_mamba) for point in points]
    assert layers == tuple(num_layers * part // 8 for part in (4, 5, 6, 7))
    assert {policy.state_mode for policy in policies[1:]} == {"skip" if is_mamba else "copy_previous"}
    assert all(policy.final_block and policy.above_threshold for policy in policies)
    assert {policy.prune_scope for policy in policies if policy.pruned_blocks} == {"generated"}
    for task in NAMES:
        assert sum(task in point.tasks for point in points[1:]) == points_of_task


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
def test_the_examples_run_from_one_end_to_the_other(
    name: str, model_folder: Path, mamba_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    """As the files say, but for a small model and few documents."""
    backbone = mamba_folder if GRIDS[name][1] else model_folder
    identity = replace(exits_config().backbone, model_type="mamba2" if GRIDS[name][1] else "llama")
    changes = {"final_block": True, "classifiers": ("calm",), "backbone": identity}
    exits = save_exits(backbone, tmp_path / "exits", **changes)
    output = tmp_path / "out"
    given = {"backbone": backbone, "output": output, "limit": 4, "prune": "1,2", "device": "cpu"}
    given |= {"metadata": f"data_dir={data_dir}", "model_args": f"preset=thesis,exits={exits}"}
    line = [part for option, value in given.items() for part in (f"--{option}", str(value))]
    assert main(["sweep", "--config", str(EXAMPLES / name), *line]) == 0
    limits = "triviaqa_thesis=0.05,coqa_thesis=0.05,truthfulqa_gen_thesis=0.122"
    assert main(["report", str(output), "--max_token_limit", limits, "--bootstrap", "20"]) == 0
    table = pd.read_csv(output / "report" / "points.csv")
    assert set(table["task"]) == set(NAMES)
    by_task = table.groupby("task")["point"].nunique()
    assert by_task.to_dict() == dict.fromkeys(NAMES, 1 + 9 + 2)
    point = finished_points(output)[-1]
    compute = json.loads((point["folder"] / point["results"]).read_text(encoding="utf-8"))["compute"]
    assert compute["overall"]["compute_reduction_thesis"] > 0
    assert not any("thesis" in key for key in results_of(output)["full"]["triviaqa_thesis"])

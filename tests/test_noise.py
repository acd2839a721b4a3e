"""The noise floor of a sweep: the full model answers twice, and reports say which differences are no larger."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers_harness import made_results, point, sweep_options

from dynamax_lm_eval.cli import main
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.export.results import read as read_files
from dynamax_lm_eval.reports import noise as reported
from dynamax_lm_eval.reports.command import report
from dynamax_lm_eval.reports.options import ReportOptions
from dynamax_lm_eval.sweep import command, noise
from dynamax_lm_eval.sweep import results as collect
from dynamax_lm_eval.sweep.files import GRID, GRID_NAME, finished_points
from dynamax_lm_eval.sweep.results import TaskResults

HALF = {"model_args": "dtype=bfloat16", "thresholds": "0.95", "state_modes": "skip", "prune": "", "limit": 3}


@pytest.fixture(scope="module")
def swept(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return command.sweep(sweep_options(model_folder, tmp_path_factory.mktemp("noise") / "out", **HALF))


def test_there_is_a_second_run_where_rounding_may_show(tmp_path: Path) -> None:
    options = sweep_options(tmp_path, tmp_path / "out", batch_size=32)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert noise.rows_of(options, torch.float32, cpu) == 0
    assert noise.rows_of(options, torch.float32, gpu) == 16
    for dtype in (torch.bfloat16, torch.float16):
        assert noise.rows_of(options, dtype, cpu) == 16
    assert noise.rows_of(replace(options, batch_size=1), torch.bfloat16, cpu) == 2
    assert noise.rows_of(replace(options, noise_rows=0), torch.bfloat16, cpu) == 0
    assert noise.rows_of(replace(options, noise_rows=4), torch.float32, cpu) == 4
    for rows in (32, -1):
        with pytest.raises(UserError, match="--noise_rows must be 0, or another number of rows than --batch_size 32"):
            replace(options, noise_rows=rows)


def test_the_full_model_answers_again_apart_from_all_points(swept: Path) -> None:
    points = {found["point"]: found for found in finished_points(swept)}
    assert set(points) == {"full", "full-rows2", "state-skip-0.95"}
    assert GRID.read(swept / GRID_NAME)["points"] == ["full", "state-skip-0.95", "full-rows2"]
    again = points["full-rows2"]
    assert again["policy"] == points["full"]["policy"] and again["answers"] == points["full"]["answers"]
    config = json.loads((again["folder"] / again["results"]).read_text(encoding="utf-8"))["config"]
    assert (config["batch_size"], config["dynamax"]["batch_size"], config["dynamax"]["label"]) == (2, 2, "full-rows2")
    assert config["dynamax"]["sweep"] == {"point": "full-rows2", "family": "noise"}


def test_it_is_no_point_of_a_report_and_no_row_of_an_export(swept: Path) -> None:
    assert main(["report", str(swept), "--bootstrap", "20", "--draws", "20"]) == 0
    table = pd.read_csv(swept / "report" / "points.csv")
    assert set(table["point"]) == {"full", "state-skip-0.95"}
    assert set(table["within_noise"].dropna()) <= {
        "score",
        "score, answers",
        "score, compute",
        "score, answers, compute",
    }
    text = (swept / "report" / "report.md").read_text(encoding="utf-8")
    assert "within_noise" in text and "nan" not in text.lower(), "the full model is compared with nothing"
    assert text.count("### Noise floor") == 2, "one for each task"
    assert "The full model in bfloat16, once more with 2 sequences at once in place of 5" in text
    for task in collect.read([swept], 0.1):
        assert [point.name for point in task.again] == ["full-rows2"]
        assert all("rows" not in name for name in task.series())
    assert {found.settings["label"] for found in read_files(swept)} >= {"full"}
    assert all("rows" not in found.settings["label"] for found in read_files(swept))


def test_half_precision_on_a_cpu_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        noise.warn_of_half_precision(torch.float32, torch.device("cpu"))
        noise.warn_of_half_precision(torch.bfloat16, torch.device("cuda"))
        assert not caplog.records
        noise.warn_of_half_precision(torch.bfloat16, torch.device("cpu"))
    assert "bfloat16 on a CPU" in caplog.text and "add dtype=float32 to --model_args" in caplog.text


def test_a_sweep_in_half_precision_that_has_no_second_run_says_so(model_folder: Path, tmp_path: Path) -> None:
    options = sweep_options(model_folder, tmp_path / "out", **HALF, noise_rows=0, tasks="tiny_choice")
    report(ReportOptions([str(command.sweep(options))], bootstrap=20, draws=20))
    text = (tmp_path / "out" / "report" / "report.md").read_text(encoding="utf-8")
    assert "how much of the differences is rounding is not known" in text and "### Noise floor" not in text
    assert "within_noise" not in pd.read_csv(tmp_path / "out" / "report" / "points.csv")


def made_again(scores: list[float], cost: float = 1.0) -> TaskResults:
    """The results that are made by hand, with likenesses and a second run of these scores that costs so much."""
    made = made_results()
    task = TaskResults(made.backbone, made.task, made.points, [point("again", "", scores, 1 / cost, "noise")])
    for found in (*task.points, *task.again):
        changed = [float(sample["acc"]) for sample in found.samples]
        found.similarity = {"consistency_exact": changed}
        found.scores["consistency_exact"] = (sum(changed) / len(changed), 0.0)
        found.dtype, found.rows = "bfloat16", 32
    return task


def test_what_moves_per_document_is_the_floor() -> None:
    """Of 40 documents one changes; the point of exits loses four, and pruning 20."""
    task = made_again([0.0] + [1.0] * 39)
    floors = reported.floor(task)
    assert floors == pytest.approx({"acc,none": 1 / 40, "consistency_exact": 1 / 40, "compute_vs_full": 0.0})
    full, exits, pruned = task.points
    assert reported.within(task, floors, exits, "acc,none") is None
    floors = reported.floor(made_again([0.0] * 4 + [1.0] * 36, cost=0.6))
    assert floors == pytest.approx({"acc,none": 0.1, "consistency_exact": 0.1, "compute_vs_full": 2 / 3})
    assert reported.within(task, floors, exits, "acc,none") == "score, answers, compute"
    assert reported.within(task, floors, pruned, "acc,none") == "compute"
    assert reported.within(task, floors, full, "acc,none") == "score, answers, compute"


def test_changes_of_documents_do_not_cancel() -> None:
    """A score that stays the same says nothing where the documents behind it do not."""
    task = made_again([1.0] * 40)
    task.full.samples[0]["acc"] = 0.0
    task.again[0].samples[1]["acc"] = 0.0
    for found in (task.full, task.again[0]):
        found.scores["acc,none"] = (39 / 40, 0.0)
    assert reported.floor(task)["acc,none"] == pytest.approx(2 / 40)


def test_what_a_report_says_of_it() -> None:
    text = "\n".join(reported.section(made_again([0.0] * 4 + [1.0] * 36), "acc,none"))
    assert "0.1000 of what consistency_exact lacks of 1" in text
    assert "- in score, answers: e" in text
    text = "\n".join(reported.section(made_again([0.0] + [1.0] * 39), "acc,none"))
    assert "No point is within it." in text
    assert "Both runs gave the same answers." in "\n".join(reported.section(made_again([1.0] * 40), "acc,none"))


@pytest.mark.slow
def test_tiny_llama_in_half_precision(tmp_path: Path) -> None:
    arguments = ["--backbone", "tiny-llama", "--tasks", "trivia_demo", "--thresholds", "0.95", "--device", "cpu"]
    arguments += ["--model_args", "dtype=bfloat16", "--limit", "12", "--output", str(tmp_path)]
    assert main(["sweep", *arguments]) == 0
    assert main(["report", str(tmp_path), "--bootstrap", "20", "--draws", "20"]) == 0
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "### Noise floor" in text and "Rounding may account, at every point, for " in text
    table = pd.read_csv(tmp_path / "report" / "points.csv")
    assert table["within_noise"].notna().any() and not table["point"].str.contains("rows").any()

"""Two processes on CPU give the results of one, compute included."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import TASKS, launcher

#: Chosen documents, so that their numbers differ from their places; five do not divide by two.
SAMPLES = json.dumps({"tiny_generate": [1, 2, 4, 6, 7], "tiny_choice": [0, 3, 5], "tiny_rolling": [0, 1, 2, 3, 6]})


def run(folder: Path, output: Path, processes: int, model_args: str = "") -> dict[str, Any]:
    """Runs the command as a user would."""
    given = f"backbone={folder},threshold=0.1,exit_layers=[2,4]{model_args}"
    command = ["-m", "dynamax_lm_eval", "run", "--model_args", given]
    command += [
        "--tasks",
        "tiny_group,tiny_rolling",
        "--include_path",
        str(TASKS),
        "--samples",
        SAMPLES,
        "--batch_size",
        "2",
    ]
    command += ["--output_path", str(output), "--log_samples", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    if processes > 1:
        command = [*launcher(processes), *command]
        environment["ACCELERATE_USE_CPU"] = "true"
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    (file,) = output.rglob("results_*.json")
    data: dict[str, Any] = json.loads(file.read_text())
    data["logged"] = {
        samples.name.split("_2")[0]: sorted(
            (json.loads(line) for line in samples.read_text().splitlines()), key=lambda sample: sample["doc_id"]
        )
        for samples in output.rglob("samples_*.jsonl")
    }
    return data


def numbers(responses: list[Any]) -> list[float]:
    """All log-probabilities in logged responses, which the harness writes as text."""
    flat = [item for response in responses for item in (response if isinstance(response, list) else [response])]
    return [float(item) for item in flat if item not in ("True", "False")]


def assert_same_metrics(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """All that is counted exactly; what is made of log-probabilities within the README's 1e-4 per token."""
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        if name.startswith("bits_per_byte") and isinstance(value, float):  # no token is shorter than a byte
            assert ours[name] == pytest.approx(value, abs=1e-4 / math.log(2)), name
        else:
            assert ours[name] == value, name


@pytest.mark.slow
@pytest.mark.parametrize("model_args", ["", ",tp_plan=auto"], ids=["by documents", "by heads"])
def test_two_processes_equal_one(model_args: str, model_folder: Path, tmp_path: Path) -> None:
    """Each has half of the documents, or all of them and half of every block, and one writes."""
    one, two = run(model_folder, tmp_path / "one", 1), run(model_folder, tmp_path / "two", 2, model_args)
    assert list(two["results"]) == list(one["results"])
    for task, metrics in one["results"].items():
        assert_same_metrics(two["results"][task], metrics)
    assert two["compute"]["by_task"] == one["compute"]["by_task"]
    for task, samples in one["logged"].items():
        for ours, theirs in zip(two["logged"][task], samples, strict=True):
            assert ours["exit_layers"] == theirs["exit_layers"]
            # Filtered: the harness logs the answers to its padding clones beside the document's own.
            if "generate" in task:
                assert ours["filtered_resps"] == theirs["filtered_resps"]
            else:  # rows share passes with other rows, so log-probabilities differ by rounding
                answers = (numbers(sample["filtered_resps"]) for sample in (ours, theirs))
                assert next(answers) == pytest.approx(next(answers), abs=1e-4)
    assert one["compute"]["by_task"]["tiny_generate"]["documents"] == 5

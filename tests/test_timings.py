"""Points that are answered one after the other: each has a time of its own, and the same results."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from helpers_harness import results_of, sweep_options

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.sweep import command
from dynamax_lm_eval.sweep import results as collect
from dynamax_lm_eval.sweep.files import POINT, POINT_NAME, finished_points
from dynamax_lm_eval.sweep.options import SweepOptions
from dynamax_lm_eval.sweep.store import Response, ResponseStore

GRID: dict[str, Any] = {"thresholds": "0.3", "state_modes": "skip", "tasks": "tiny_generate"}


def overall_of(folder: Path) -> dict[str, dict[str, Any]]:
    """What the result file of each point says of all its tasks together."""
    files = {point["point"]: point["folder"] / point["results"] for point in finished_points(folder)}
    return {name: json.loads(file.read_text(encoding="utf-8"))["compute"]["overall"] for name, file in files.items()}


@pytest.fixture
def timed(model_folder: Path, tmp_path: Path) -> SweepOptions:
    return sweep_options(model_folder, tmp_path / "timed", timed=True, **GRID)


def test_each_point_has_its_own_time_and_the_same_results(
    model_folder: Path, tmp_path: Path, timed: SweepOptions
) -> None:
    folder = command.sweep(timed)
    together = command.sweep(sweep_options(model_folder, tmp_path / "together", **GRID))
    assert results_of(folder) == results_of(together)
    found = overall_of(folder)
    assert set(found) == {"full", "state-skip-0.3", "pruning-deepest-1"}
    for overall in found.values():
        # The first batch, which counts for nothing, asked the same requests.
        assert overall["latency"]["requests"] == overall["generations"] > 0
        assert overall["fed_tokens_in_seconds"] == overall["tokens"]["fed"]
        assert overall["physical"]["macs"] == overall["macs"]["total"]
        assert overall["seconds_total"] > 0 and "reason" in overall["energy"]
    assert not any("latency" in overall or "seconds" in overall for overall in overall_of(together).values())
    (task,) = collect.read([folder], 0.1)
    assert all(point.timing["time_to_first_token_ms"] > 0 for point in task.points)
    table = collect.tidy([task])
    assert (table[["time_to_first_token_ms", "time_per_output_token_ms", "seconds"]] > 0).all(axis=None)


def test_what_was_stopped_on_the_way_has_no_time(
    timed: SweepOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add, answered = ResponseStore.add, []

    def killed(self: ResponseStore, key: str, response: Response) -> None:
        add(self, key, response)
        answered.append(key)
        if "skip" in str(self._path):
            raise KeyboardInterrupt

    monkeypatch.setattr(ResponseStore, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        command.sweep(timed)
    monkeypatch.setattr(ResponseStore, "add", add)
    with caplog.at_level(logging.WARNING, "dynamax_lm_eval"):
        folder = command.sweep(timed)
    (message,) = [record.getMessage() for record in caplog.records if "no time is" in record.getMessage()]
    assert message.startswith("Point state-skip-0.3 goes on from 1 answers")
    has_time = {name: "latency" in overall for name, overall in overall_of(folder).items()}
    assert has_time == {"full": True, "state-skip-0.3": False, "pruning-deepest-1": True}


def test_a_point_that_is_evaluated_again_keeps_its_time(timed: SweepOptions) -> None:
    folder = command.sweep(timed)
    before = overall_of(folder)
    home = folder / "points" / "state-skip-0.3"
    POINT.write(home / POINT_NAME, {**POINT.read(home / POINT_NAME), "vs_full": False})
    command.sweep(timed)
    assert POINT.read(home / POINT_NAME)["vs_full"]
    assert overall_of(folder) == before


def test_answers_that_were_not_timed_are_not_mixed_in(model_folder: Path, tmp_path: Path) -> None:
    command.sweep(sweep_options(model_folder, tmp_path / "out", limit=1, **GRID))
    with pytest.raises(UserError, match="differs in timed"):
        command.sweep(sweep_options(model_folder, tmp_path / "out", limit=1, timed=True, **GRID))

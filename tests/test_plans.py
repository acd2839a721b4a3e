"""Long work says at its start what it will do, and lines of the log do not run into its bar."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.api.metrics
import pytest
from helpers import TASKS
from helpers_harness import sweep_options
from tqdm import tqdm

from dynamax_lm_eval.cli import main
from dynamax_lm_eval.harness.evaluate import one_of_many_evaluations
from dynamax_lm_eval.harness.responder import Progress
from dynamax_lm_eval.run import quiet
from dynamax_lm_eval.sweep import command
from dynamax_lm_eval.training.log import LOG_NAME, plan
from dynamax_lm_eval.training.options import TrainingOptions


def test_of_a_sweep(model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = sweep_options(
        model_folder, tmp_path / "out", tasks="tiny_generate", thresholds="0.3", prune="2", state_modes="skip", limit=2
    )
    with caplog.at_level(logging.INFO, logger="dynamax_lm_eval"):
        command.sweep(options)
        command.sweep(options)
    first, again = (text for text in caplog.messages if text.startswith("Sweep of "))
    for words in ("6 blocks, run as fused, float32 on cpu", "points in", "2 of tiny_generate", str(tmp_path / "out")):
        assert words in first
    points = sum(text.startswith("point ") for text in caplog.messages)
    assert f"{points} points in" in first
    assert f"({points} done already)" in again


@pytest.mark.parametrize("is_watched", [False, True])
def test_a_sweep_shows_nothing_of_the_harness(
    model_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_watched: bool,
) -> None:
    """Bars of prompts go when they are done, and are none in a file; the same for the weights."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_watched)
    samples = tmp_path / "samples.json"
    samples.write_text('{"tiny_generate": [0, 2]}', encoding="utf-8")
    theirs = logging.getLogger("lm_eval")
    monkeypatch.setattr(theirs, "level", theirs.level)  # which the command sets
    given = ["--backbone", str(model_folder), "--tasks", "tiny_generate", "--include_path", str(TASKS)]
    given += ["--confidences", "state", "--thresholds", "0.3,0.6", "--samples", str(samples), "--device", "cpu"]
    with caplog.at_level(logging.INFO):
        assert main(["sweep", *given, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'out'}\n"
    assert not [r.getMessage() for r in caplog.records if r.name.startswith("lm_eval") and r.levelno <= logging.INFO]
    if is_watched:
        assert "Building prompts" in shown.err
        assert not shown.err.rpartition("Building prompts")[2].split("\r")[-2].strip(), "what is left is blank"
    else:
        assert shown.err == ""


def test_standard_errors_are_bootstrapped_in_silence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    before = lm_eval.api.metrics.bootstrap_stderr
    with one_of_many_evaluations():
        estimate = lm_eval.api.metrics.stderr_for_metric(lm_eval.api.metrics.median, 20)
        assert estimate is not None and estimate([1.0, 2.0, 4.0, 8.0]) > 0
    assert capsys.readouterr() == ("", "")
    assert lm_eval.api.metrics.bootstrap_stderr is before


@pytest.mark.parametrize(
    ("message", "passes"),
    [
        ("t: Using gen_kwargs: {'until': []}", False),
        ("t: Evaluating on 3 examples", False),
        ("Selected Tasks: ['t']", False),
        ("Output path not provided, skipping saving results aggregated", False),
        ("Overwriting default num_fewshot of t from 2 to 0", True),
    ],
)
def test_what_the_harness_says_of_every_run(message: str, passes: bool) -> None:
    record = logging.LogRecord("lm_eval.evaluator", logging.INFO, "", 0, message, None, None)
    assert quiet.Quiet(lambda: False).filter(record) == passes
    assert quiet.Quiet(lambda: True).filter(record)


def test_of_a_training(tmp_path: Path) -> None:
    options = TrainingOptions("b", max_tokens=10_000, batch_tokens=2048, micro_batch_tokens=2048)
    said = plan(options, 12, (6, 8), "float32", "cpu", tmp_path)
    for words in ("of b (12 blocks, float32 on cpu)", "exits after blocks 6, 8: 5 steps of 2048 tokens", str(tmp_path)):
        assert words in said
    (tmp_path / LOG_NAME).touch()
    assert "5 steps (or what is left of them)" in plan(options, 12, (6, 8), "float32", "cpu", tmp_path)


class Shown:
    """A bar that keeps what it shows."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def show(self, text: str) -> None:
        self.texts.append(text)

    def update(self) -> None:
        self.texts.append("")


@pytest.mark.parametrize(
    ("records", "shows", "expected"),
    [
        ([(0, 5), (40, 25)], True, ["", "compute_reduction=1.333", ""]),  # what warms classifiers comes first
        ([(0, 0)], True, [""]),
        ([(40, 20)], False, [""]),  # several policies
    ],
)
def test_no_reduction_is_shown_before_a_token_could_exit(
    records: list[tuple[int, int]], shows: bool, expected: list[str]
) -> None:
    bar: Any = Shown()
    progress = Progress(bar, shows_reduction=shows)
    for full, spent in records:
        record: Any = SimpleNamespace(full_macs=full, spent_macs=spent)
        progress.advance(record)
    assert bar.texts == expected


def test_lines_begin_beside_a_bar() -> None:
    stream = io.StringIO()
    logger = logging.Logger("of a test")
    logger.addHandler(logging.StreamHandler(stream))
    for _ in range(2):  # has effect once
        quiet.install(logger, is_wanted=lambda: True)
    with tqdm(total=2, file=stream, desc="bar") as bar:
        bar.update()
        logger.warning("a line")
    lines = stream.getvalue().replace("\r", "\n").split("\n")
    assert "a line" in lines

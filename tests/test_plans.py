"""Long work says at its start what it will do, and lines of the log do not run into its bar."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers_harness import sweep_options
from tqdm import tqdm

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

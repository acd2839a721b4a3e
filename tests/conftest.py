"""The process that tests run in, and what several test modules share: folders with a model, exits, texts, tasks."""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TASKS, TEXT, save_model
from torch.utils import collect_env

os.environ.setdefault("TQDM_DISABLE", "1")
# The models are tiny: one thread per worker is the fastest, and the workers share the cores. torch has read the
# variable by now; processes that tests start have not.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
# Exits that whoever runs the tests has trained must not be found, and what tests log must not be added to theirs.
os.environ["DYNAMAX_CACHE"] = tempfile.mkdtemp(prefix="dynamax-tests-")
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-tests-")
# Every evaluation of the harness asks pip for all installed packages, which takes longer than the evaluation.
collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither random numbers nor what commands set up for their logs depend on which tests ran before."""
    from lm_eval import utils

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    monkeypatch.setattr(utils, "_LOGGING_CONFIGURED", False)
    for name in ("lm_eval", "dynamax_lm_eval"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama-for-tests")


@pytest.fixture(scope="session")
def mamba_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("mamba2", tmp_path_factory.mktemp("models") / "tiny-mamba2-for-tests")


# What follows imports the harness and the package where it is used: tests of small parts need neither.


@pytest.fixture(scope="module")
def exits_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exits for ``model_folder``; of one module, because calibrations leave their certificates beside them."""
    from helpers_harness import save_exits

    return save_exits(model_folder, tmp_path_factory.mktemp("exits") / "exits")


@pytest.fixture(scope="module")
def manager() -> Any:
    """The tasks of the tests, without those of the harness."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS), include_defaults=False)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short documents, as a user would have them."""
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    words = TEXT.split()
    rng = random.Random(0)
    lines = [" ".join(rng.choices(words, k=rng.randint(5, 60))) for _ in range(40)]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with made-up documents of the tasks of the paper."""
    from helpers_tasks import SPIDER, coqa_row, trivia_rows, write_csv, write_jsonl

    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "triviaqa_made_up.jsonl", trivia_rows())
    write_jsonl(folder / "coqa_made_up.jsonl.gz", [coqa_row(), coqa_row() | {"id": "invented-2"}], gzipped=True)
    empty = SPIDER | {"Question": "No false answer?", "Incorrect Answers": ""}
    write_csv(folder / "truthfulqa_made_up.csv", [SPIDER, empty])
    (folder / "notes.txt").write_text("not data")
    return folder

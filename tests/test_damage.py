"""Damaged files: whoever reads one goes on with an equal result, or says in one line which file it is.

Every file that a command leaves and another reads: empty, cut, with a byte flipped, replaced, recoded, gone.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from helpers import TASKS
from helpers_engine import CLASSIFIERS, exits_config
from helpers_harness import results_of, sweep_options
from helpers_training import make_trainer
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from sqlitedict import SqliteDict

from dynamax_lm_eval.compute.accounting import ComputeRecord
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import checkpoint
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.exits.pruning import PruneProfile
from dynamax_lm_eval.harness.cache import check_database
from dynamax_lm_eval.harness.certificate import Certificate
from dynamax_lm_eval.harness.ledger import ResponseLedger
from dynamax_lm_eval.lm import DynamaxLM
from dynamax_lm_eval.measure.threshold_search import ThresholdPath
from dynamax_lm_eval.sweep import command
from dynamax_lm_eval.sweep import results as collect
from dynamax_lm_eval.sweep.files import POINT_NAME, RESPONSES_NAME, SWEEP_NAME
from dynamax_lm_eval.sweep.store import Response, ResponseStore
from dynamax_lm_eval.training import state
from dynamax_lm_eval.training.log import cut_log

SLOW = pytest.mark.slow


def damages(content: bytes, flips: int) -> Iterator[tuple[str, bytes | None]]:
    """Names and contents; None stands for a file that is gone."""
    yield "empty", b""
    yield from ((f"cut at {i * len(content) // 10}", content[: i * len(content) // 10]) for i in range(1, 10))
    yield "last byte gone", content[:-1]
    rng = random.Random(len(content))
    for place in sorted(rng.sample(range(len(content)), min(flips, len(content)))):
        flipped = bytearray(content)
        flipped[place] ^= rng.choice((1, 1, 1, 128))  # a digit stays a digit
        yield f"byte {place} flipped", bytes(flipped)
    yield "other JSON", b'{"a": 1}'
    yield "a list", b"[1]\n"
    yield "UTF-16", content.decode(errors="replace").encode("utf-16")
    yield "gone", None


def survives(file: Path, read: Callable[[], Any], expected: Any, flips: int, *others: Any) -> int:
    """Damages a file in every way; ``read`` must give what it gave before (or one of ``others``), or a UserError.

    Returns in how many ways it went on.
    """
    content, went_on = file.read_bytes(), 0
    for name, damaged in damages(content, flips):
        if damaged is None:
            file.unlink()
        else:
            file.write_bytes(damaged)
        try:
            found = read()
        except UserError as error:
            told = str(error)
            if "\n" in told or not (file.name in told or str(file.parent) in told):
                pytest.fail(f"{file.name}, {name}: {told}")
        except Exception as error:
            pytest.fail(f"{file.name}, {name}: {error!r}")
        else:
            went_on += 1
            assert any(found == known for known in (expected, *others)), f"{file.name}, {name}: another result"
    file.write_bytes(content)
    assert read() == expected
    return went_on


CERTIFICATE = Certificate(
    method="ltt",
    bound="betting",
    loss="consistency",
    measured_by="rouge_l",
    tolerance=0.1,
    level=0.05,
    thresholds=[0.75],
    candidates=[[0.9], [0.75]],
    certified=2,
    scores=[0.01, 0.02],
    losses=[0.0, 0.03],
    reductions=[1.1, 1.25],
    compute_reduction=1.25,
    task="tiny_generate",
    run={"num_fewshot": 0},
    model={"weights": "abc", "policy.classifier": "calm"},
    fingerprint="f" * 64,
    seed=0,
    population=4,
    calibration_documents=["d1", "d2"],
    test=None,
    created="2026-01-01",
    version="0",
)
PROFILE = PruneProfile("b", "f" * 64, 3, [[0.2, 0.1, 0.3], [0.4, 0.5]], 8, 16, "texts.jsonl")
PATH = ThresholdPath("b", "f" * 64, "calm", "skip", [2, 3], [{"thresholds": [0.5, 0.6]}], [], [], 100, "texts.jsonl")


@pytest.mark.parametrize("made", [CERTIFICATE, PROFILE, PATH], ids=lambda made: type(made).__name__)
def test_files_of_one_object(made: Any, tmp_path: Path) -> None:
    file = tmp_path / "made.json"
    made.save(file)
    went_on = survives(file, lambda: type(made).load(file), made, 200)
    assert went_on < 20, "only what changes the layout alone"


@pytest.mark.parametrize("name", [checkpoint.CONFIG_NAME, checkpoint.WEIGHTS_NAME])
def test_exits(name: str, tmp_path: Path) -> None:
    small = exits_config(classifiers=("calm",), exit_layers=(2, 3))
    checkpoint.save(tmp_path, small, small.build(1))

    def read() -> Any:
        opened = ExitCheckpoint.open(tmp_path)
        return opened.config, {name: tensor.tolist() for name, tensor in opened.load().state_dict().items()}

    survives(tmp_path / name, read, read(), 60)


def test_sizes_of_exits_are_checked_before_anything_is_made(tmp_path: Path) -> None:
    """A state of 10^9 would be terabytes."""
    checkpoint.save(tmp_path, exits_config(), CLASSIFIERS)
    file = tmp_path / checkpoint.CONFIG_NAME
    data = json.loads(file.read_text())
    del data["checksum"]
    for name, value in (("mamba_state", 10**9), ("mamba_kernel", 10**8), ("ffn_expand", 1e7), ("mamba_expand", 1e30)):
        file.write_text(json.dumps({**data, "options": {**data["options"], name: value}}))
        with pytest.raises(UserError, match=r"exits\.safetensors cannot be used"):
            ExitCheckpoint.open(tmp_path).load()


@pytest.mark.parametrize("name", [state.PROGRESS_NAME, "weights.safetensors", "optimizer.safetensors"])
def test_training_goes_on_from_the_state_before(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, batches = make_trainer(("calm",))
    for step in range(2):
        trainer.step(step, batches)
        progress = state.Progress(step + 1, batches.position.to_json(), {"seed": 0}, 1.5)
        state.save(tmp_path, progress, trainer.classifiers, trainer.optimizer)
    fresh, _ = make_trainer(("calm",))

    def read() -> Any:
        found = state.latest(tmp_path)
        assert found is not None
        state.load(found[0], fresh.classifiers, fresh.optimizer)
        weights = {name: tensor.tolist() for name, tensor in fresh.classifiers.state_dict().items()}
        moments = [values["exp_avg"].tolist() for values in fresh.optimizer.state.values()]
        return found[1], weights, moments

    newest = read()
    hidden = tmp_path / ".newest"
    (tmp_path / "state-00000002").rename(hidden)
    before = read()
    assert before != newest
    hidden.rename(tmp_path / "state-00000002")
    went_on = survives(tmp_path / "state-00000002" / name, read, newest, 20, before)
    assert went_on == 35, "always"
    assert "Not going on from the newest state" in caplog.text
    shutil.rmtree(tmp_path / "state-00000001")
    survives(tmp_path / "state-00000002" / name, read, newest, 5)


def test_a_log_keeps_the_lines_that_can_be_read(tmp_path: Path) -> None:
    log = tmp_path / "training.jsonl"
    log.write_bytes(b'{"step": 1}\n\xff\xfe\n[3]\n{"step": "x"}\n{"step": 2}\n{"step": 3}\n{"step": 2')
    cut_log(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what the harness notes of the machine in every result file: most of the time of a point."""
    monkeypatch.setattr(evaluator, "add_env_info", lambda _: None)
    monkeypatch.setattr(evaluator, "get_git_commit_hash", lambda: None)


@pytest.fixture(scope="module")
def swept(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A small sweep, and the model to go on with."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    options = sweep_options(
        model_folder, folder, tasks="tiny_generate", thresholds="0.3", state_modes="skip", prune="", limit=3
    )
    lm = command.load(options)
    command.sweep(options, lm)
    return options, lm


@pytest.mark.parametrize("flips", [1, pytest.param(40, marks=SLOW)])
@pytest.mark.parametrize("pattern", [SWEEP_NAME, RESPONSES_NAME, POINT_NAME, "results_*.json", "samples_*.jsonl"])
@pytest.mark.usefixtures("quick")
def test_sweeps_and_reports(
    swept: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, pattern: str, flips: int
) -> None:
    options, lm = swept
    folder = tmp_path / "out"
    shutil.copytree(options.output, folder)
    again = replace(options, output=str(folder))

    def table(found: Any) -> str:  # points that are made anew are of another date
        return str(collect.tidy(found).drop(columns="date").to_json())

    reported = table(collect.read([folder], 0.1))
    results = results_of(folder)
    file = sorted(folder.rglob(pattern))[-1]
    pieces = [point.pieces for (task,) in [collect.read([folder], 0.1)] for point in task.points]

    def report() -> Any:
        (task,) = collect.read([folder], 0.1)
        return table([task]), [point.pieces for point in task.points]

    def restart() -> Any:
        content = file.read_bytes() if file.exists() else None
        try:
            return results_of(command.sweep(again, lm)), report()
        finally:  # whatever was made anew; the next damage is to the file as it was
            if content is not None:
                shutil.rmtree(folder)
                shutil.copytree(options.output, folder)

    others = []
    if pattern == POINT_NAME:  # one point less, with a warning
        file.rename(file.with_suffix(".kept"))
        caplog.set_level(logging.WARNING)
        others = [report()]
        assert "1 points are not finished" in caplog.text
        file.with_suffix(".kept").rename(file)
    survives(file, report, (reported, pieces), 3 * flips, *others)
    went_on = survives(file, restart, (results, (reported, pieces)), flips)
    if pattern in (POINT_NAME, "results_*.json", "samples_*.jsonl", SWEEP_NAME):
        assert went_on == 15 + flips, "a restart always can"


@pytest.mark.usefixtures("quick")
def test_what_is_damaged_is_asked_again(swept: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options, lm = swept
    folder = tmp_path / "out"
    shutil.copytree(options.output, folder)
    file = folder / "points" / "full" / RESPONSES_NAME
    whole = file.read_bytes()
    lines = whole.split(b"\n")
    torn = {**json.loads(lines[2]), "answer": None}
    caplog.set_level(logging.WARNING)
    for damaged in (
        json.dumps(torn).encode(),
        b"",
        b"null",
        lines[2][:40],
        b"\xff\xfe",
        lines[2].replace(b"key", b"kez"),
    ):
        file.write_bytes(b"\n".join([*lines[:2], damaged, *lines[3:]]))
        caplog.clear()
        command.sweep(replace(options, output=str(folder)), lm)
        assert sorted(file.read_bytes().split(b"\n")) == sorted(whole.split(b"\n")), "the same answer again"
        assert [str(file) in record.message for record in caplog.records] == [True]
    # Without its first line, the answers say themselves whose they are.
    file.write_bytes(b"\n".join([b"{", *lines[1:]]))
    command.sweep(replace(options, output=str(folder)), lm)
    assert file.read_bytes().split(b"\n")[0] == lines[0]
    file.write_bytes(b'{"text": "my own data"}\n')
    with pytest.raises(UserError, match="holds no answers of this sweep"):
        command.sweep(replace(options, output=str(folder)), lm)
    assert file.read_bytes() == b'{"text": "my own data"}\n'


def test_a_line_may_be_cut_inside_a_character(tmp_path: Path) -> None:
    encoded = "Zürich 東京 \U0001f600"
    file = tmp_path / RESPONSES_NAME
    first = ResponseStore(file, {"weights": "w"})
    for key in "ab":
        first.add(key, Response(encoded, ComputeRecord(), [encoded]))
    first.close()
    whole = file.read_bytes()
    begin = whole.index(b'{"key": "b"')
    inside = whole.index("東".encode(), begin)
    for end in (begin, begin + 1, *range(inside, inside + 12), len(whole) - 1):
        file.write_bytes(whole[:end])
        store = ResponseStore(file, {"weights": "w"})
        store.close()
        assert ("a" in store, "b" in store, store.damaged) == (True, False, False), end
        assert file.read_bytes() == whole[:begin]


@pytest.mark.parametrize("flips", [40, pytest.param(2000, marks=SLOW)])
def test_use_cache(model_folder: Path, tmp_path: Path, flips: int) -> None:
    lm = DynamaxLM(str(model_folder), threshold=0.3, confidence="softmax", batch_size=4, device="cpu")
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    lm_eval.simple_evaluate(
        lm,
        tasks=["tiny_generate", "tiny_choice"],
        task_manager=manager,
        limit=2,
        bootstrap_iters=0,
        use_cache=str(tmp_path / "c"),
    )
    lm.set_cache_hook(lm_eval.api.model.CacheHook(None))
    (file,) = tmp_path.glob("*.db")
    identity = lm.identity()

    def read() -> dict[str, Any]:
        check_database(file)
        with SqliteDict(str(file), autocommit=True) as database:
            ResponseLedger().use_database(database, identity)
            return {key: value for key, value in database.items() if not key.startswith("dynamax:")}

    known = read()
    assert len(known) >= 4

    class Subset(dict[str, Any]):
        """Some of the responses: what is missing is asked again."""

        def __eq__(self, other: object) -> bool:
            return isinstance(other, dict) and other.items() <= self.items()

        __hash__ = None  # type: ignore[assignment]

    survives(file, read, Subset(known), flips)

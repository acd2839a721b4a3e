"""A training that was killed goes on as if it had not been, and several processes train what one trains."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from helpers import launcher
from helpers_engine import EXITS
from helpers_training import STEPS, train, training_options
from safetensors.torch import load_file

from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.frozen.model import load_backbone
from dynamax_lm_eval.frozen.observe import observe
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.training import command, evaluation, state
from dynamax_lm_eval.training.curve import measured_curves
from dynamax_lm_eval.training.options import RunOptions
from dynamax_lm_eval.training.trainer import Trainer


def tensors(saved: ExitCheckpoint) -> dict[str, torch.Tensor]:
    return saved.load().state_dict()


def assert_same_weights(one: ExitCheckpoint, other: ExitCheckpoint, **tolerance: float) -> None:
    theirs = tensors(other)
    for name, tensor in tensors(one).items():
        if tolerance:
            torch.testing.assert_close(tensor, theirs[name], **tolerance)
        else:
            assert torch.equal(tensor, theirs[name]), name


class KilledError(BaseException):
    """Stands for a kill: nothing catches it."""


class TestResume:
    @pytest.fixture(scope="class")
    def unbroken(self, model_folder: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> ExitCheckpoint:
        return train(model_folder, texts, tmp_path_factory.mktemp("unbroken"))

    @pytest.mark.parametrize("seed", range(6))
    def test_killed_at_random_moments(
        self, unbroken: ExitCheckpoint, model_folder: Path, texts: Path, tmp_path: Path, seed: int
    ) -> None:
        """Also in the middle of writing a state: the file functions die as well."""
        rng = random.Random(seed)
        for _ in range(40):
            countdown = itertools.count(rng.randint(1, 14), -1)

            def dying(original: Any, countdown: Any = countdown) -> Any:
                def call(*args: Any, **kwargs: Any) -> Any:
                    if next(countdown) == 0:
                        raise KilledError
                    return original(*args, **kwargs)

                return call

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Trainer, "_accumulate", dying(Trainer._accumulate))
                patch.setattr(Trainer, "_update", dying(Trainer._update))
                patch.setattr(state, "write_tensors", dying(state.write_tensors))
                patch.setattr(Path, "rename", dying(Path.rename))
                try:
                    saved = train(model_folder, texts, tmp_path, resume=True)
                except KilledError:
                    continue
            break
        else:
            saved = train(model_folder, texts, tmp_path, resume=True)
        assert_same_weights(saved, unbroken)
        steps = [json.loads(line)["step"] for line in (tmp_path / "training.jsonl").read_text().splitlines()]
        assert steps == list(range(1, STEPS + 1))
        assert not (tmp_path / "state").exists()

    @pytest.mark.slow
    def test_kill_9(self, unbroken: ExitCheckpoint, model_folder: Path, texts: Path, tmp_path: Path) -> None:
        result = subprocess.run(
            [sys.executable, "-c", KILLED_AT_STEP_4, *command_line(model_folder, texts, tmp_path)[3:]],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert result.returncode == -signal.SIGKILL
        found = state.latest(tmp_path / "state")
        assert found is not None
        assert found[1].step == 2, "the last one that was saved"
        with pytest.raises(UserError, match="--resume: this training began with other options: max_tokens"):
            train(model_folder, texts, tmp_path, resume=True)
        # The same training, told to end soon.
        stopped_at = found[1].step
        progress = tmp_path / "state" / f"state-{stopped_at:08d}" / "progress.json"
        shorter = training_options(model_folder, texts, max_tokens=(stopped_at + 1) * 128).to_json()
        data_of = state.PROGRESS.read(progress)
        state.PROGRESS.write(progress, {**data_of, "options": {**data_of["options"], **shorter}})
        saved = train(model_folder, texts, tmp_path, resume=True, max_tokens=(stopped_at + 1) * 128)
        assert saved.config.training["steps"] == stopped_at + 1

    def test_a_used_folder_is_not_written_over(
        self, unbroken: ExitCheckpoint, model_folder: Path, texts: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(UserError, match="already holds trained exits"):
            train(model_folder, texts, unbroken.path)
        (tmp_path / "state" / "state-00000002").mkdir(parents=True)
        progress = {"step": 2, "data": {}, "options": {}, "seconds": 1.0}
        (tmp_path / "state" / "state-00000002" / "progress.json").write_text(json.dumps(progress))
        with pytest.raises(UserError, match="not finished; add --resume"):
            train(model_folder, texts, tmp_path)

    def test_what_is_written(self, unbroken: ExitCheckpoint) -> None:
        config = unbroken.config
        assert config.classifiers == ("calm", "mamba")
        assert config.training["options"]["seed"] == 0
        assert config.training["tokens"] == STEPS * 128
        card = (unbroken.path / "README.md").read_text()
        assert "AUROC" in card
        assert config.backbone.fingerprint[:12] in card
        measured = json.loads((unbroken.path / "evaluation.json").read_text())
        assert measured["tokens"] == pytest.approx(200, abs=1)
        assert set(measured["classifiers"]) == {"mamba", "calm"}
        for found in measured["classifiers"].values():
            for curve in (found["curve"], found["predicted"]):
                shares = [point["share_exiting"] for point in curve]
                assert shares == sorted(shares, reverse=True)
        assert (unbroken.path / "curve.png").read_bytes().startswith(b"\x89PNG")

    def test_trackers_are_told_of_steps_and_of_held_out_text(
        self, model_folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[tuple[int, dict[str, float]]] = []
        monkeypatch.setattr(accelerate.Accelerator, "log", lambda _, values, step: told.append((step, values)))
        train(model_folder, texts, tmp_path, max_tokens=256, classifier="calm")
        assert [step for step, _ in told] == [1, 2, 2]
        assert {"learning_rate", "calm/loss_0", "calm/accuracy_2"} <= set(told[0][1])
        measured = json.loads((tmp_path / "evaluation.json").read_text())["classifiers"]["calm"]["exits"]
        held_out = told[-1][1]
        assert held_out["held_out/calm/exit_3/auroc"] == measured["3"]["auroc"]
        assert len(held_out) == 6

    def test_half_size_with_a_note(
        self, unbroken: ExitCheckpoint, model_folder: Path, texts: Path, tmp_path: Path
    ) -> None:
        """The held-out numbers are of the rounded weights."""
        run = RunOptions(output=str(tmp_path), device="cpu", save_dtype="bfloat16", card_note="Text: by the authors.")
        saved = command.train(training_options(model_folder, texts), run)
        assert saved is not None
        for name, tensor in tensors(unbroken).items():
            assert torch.equal(load_file(tmp_path / "exits.safetensors")[name], tensor.bfloat16())
        loaded = saved.load()
        backbone = load_backbone(training_options(model_folder, texts).reading(run))
        frozen = FrozenPass(backbone.engine.backbone, EXITS, False, 1)
        held_out = command._data(training_options(model_folder, texts), backbone, (), tmp_path).held_out
        seen = observe(frozen, loaded, held_out.rows, 64)
        measured = json.loads((tmp_path / "evaluation.json").read_text())
        engine = Engine(backbone.engine.backbone, loaded)
        curves = measured_curves(engine, held_out, saved.config, "recompute", 5_000)
        document = held_out.document
        again = evaluation.report(seen, document, saved.config, loaded, engine.backbone.cost, "recompute", curves)
        assert measured["classifiers"] == again["classifiers"]
        assert measured["documents"] == held_out.documents > 3
        assert f"200 tokens of {held_out.documents} documents" in (tmp_path / "README.md").read_text()
        point = measured["classifiers"]["calm"]["curve"][0]
        assert point["documents"] == held_out.documents and point["agreement_stderr"] > 0
        assert "\nText: by the authors.\n" in (tmp_path / "README.md").read_text()


def test_trainings_that_held_out_whole_documents_go_on_where_that_can_be_done() -> None:
    """States of earlier releases do not say how many documents the evaluation is of."""
    before = {"seed": 0, "eval_dataset": None, "eval_tokens": 200}
    state.check_same(before, {**before, "eval_documents": 1})
    with pytest.raises(UserError, match=r"eval_documents \(1, now 100\)"):
        state.check_same(before, {**before, "eval_documents": 100})
    other = {**before, "seed": 3}
    with pytest.raises(UserError, match="held out other documents"):
        state.check_same(other, {**other, "eval_documents": 1})
    apart = {**other, "eval_dataset": "text.jsonl"}
    state.check_same(apart, {**apart, "eval_documents": 1})


#: The command; the kernel ends its process in the middle of the fourth step.
KILLED_AT_STEP_4 = """
import itertools, os, signal, sys
from dynamax_lm_eval import cli
from dynamax_lm_eval.training.trainer import Trainer

steps, step = itertools.count(1), Trainer.step


def killed(*args):
    if next(steps) == 4:
        Trainer._update = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)


Trainer.step = killed
cli.main([*sys.argv[1:], "--max_tokens", "1000000"])
"""


def command_line(backbone: Path, texts: Path, output: Path) -> list[str]:
    options = training_options(backbone, texts).to_json()
    line = [sys.executable, "-m", "dynamax_lm_eval", "train", "--output", str(output)]
    line += ["--save_steps", "2", "--log_steps", "1"]
    for name, value in options.items():
        if value is not None and name != "max_tokens":
            line += [f"--{name}", str(value)]
    return line


@pytest.mark.slow
def test_two_processes_train_what_one_trains(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    one = train(model_folder, texts, tmp_path / "one")
    line = command_line(model_folder, texts, tmp_path / "two")
    result = subprocess.run(
        [line[0], *launcher(2), *line[1:], "--max_tokens", str(STEPS * 128)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    two = ExitCheckpoint.open(tmp_path / "two")
    assert two.config.training["processes"] == 2
    assert_same_weights(two, one, rtol=1e-3, atol=1e-4)
    logs = [(tmp_path / name / "training.jsonl").read_text().splitlines() for name in ("one", "two")]
    for mine, theirs in zip(*(map(json.loads, log) for log in logs), strict=True):
        for name in ("losses", "accuracies", "gradient_norms"):
            for kind, values in mine[name].items():
                assert theirs[name][kind] == pytest.approx(values, rel=1e-3), (mine["step"], name, kind)

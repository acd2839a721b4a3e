"""Training exits: labels, losses, data, resuming, several processes, and what is written at the end."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LAYERS, TEXT, launcher, random_ids, tiny_model
from reference import RECURRENT
from safetensors.torch import load_file
from test_exits import EXITS, KINDS, exits_config

from dynamax_lm_eval import cli
from dynamax_lm_eval.backbones import TransformerBackbone
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.exits.classifiers import ClassifierOptions, ExitClassifiers
from dynamax_lm_eval.frozen import text as data
from dynamax_lm_eval.frozen.model import load_backbone
from dynamax_lm_eval.frozen.observe import Observations, observe
from dynamax_lm_eval.frozen.options import TextSource
from dynamax_lm_eval.frozen.passes import FrozenPass, best_tokens
from dynamax_lm_eval.locks import locked
from dynamax_lm_eval.training import command, evaluation, state
from dynamax_lm_eval.training.batches import MicroBatches, Position
from dynamax_lm_eval.training.generated import generated_documents
from dynamax_lm_eval.training.options import RunOptions, TrainingOptions
from dynamax_lm_eval.training.trainer import Trainer, exit_weights, labelled_positions, learning_rate

ROWS = [random_ids(length, 90 + i) for i, length in enumerate((9, 4, 11))]
STEPS = 6


def frozen(family: str = "llama", top_k: int = 1, final_block: bool = False) -> FrozenPass:
    return FrozenPass(TransformerBackbone(tiny_model(family), max_length=256), EXITS, final_block, top_k)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short documents, as a user would have them."""
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    words = TEXT.split()
    rng = random.Random(0)
    lines = [" ".join(rng.choices(words, k=rng.randint(5, 60))) for _ in range(40)]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


def options_for(backbone: Path, texts: Path, **changes: Any) -> TrainingOptions:
    settings: dict[str, Any] = {
        "classifier": "calm,mamba",
        "max_tokens": STEPS * 128,
        "seq_len": 32,
        "batch_tokens": 128,
        "micro_batch_tokens": 64,
        "label_share": 0.5,
        "eval_tokens": 200,
        "mamba_state": 4,
        "exit_layers": "2+3+4",
        "dtype": "float32",
        "learning_rate": 1e-2,
        **changes,
    }
    if not any(kind in settings["classifier"] for kind in RECURRENT):
        del settings["mamba_state"]
    return TrainingOptions(backbone=str(backbone), dataset=str(texts), **settings)


def train(backbone: Path, texts: Path, output: Path, resume: bool = False, **changes: Any) -> ExitCheckpoint:
    run = RunOptions(output=str(output), resume=resume, device="cpu", save_steps=2, log_steps=1)
    saved = command.train(options_for(backbone, texts, **changes), run)
    assert saved is not None
    return saved


class TestLabels:
    @pytest.mark.parametrize("top_k", [1, 4])
    @pytest.mark.parametrize("family", ["llama", "gemma3"])
    def test_equal_a_direct_computation(self, family: str, top_k: int) -> None:
        model = tiny_model(family)
        pass_ = frozen(family, top_k)
        batch = pass_.run(ROWS)
        labels = pass_.label(batch, torch.arange(sum(map(len, ROWS))))
        within, agrees = [], []
        for row in ROWS:
            with torch.no_grad():
                output = model(torch.tensor([row]), output_hidden_states=True)
                best = output.logits[0].topk(top_k).indices
                for layer in EXITS:
                    norm = next(m for m in model.children() if hasattr(m, "layers")).norm
                    found = model.lm_head(norm(output.hidden_states[layer][0])).argmax(-1)
                    within.append((found[:, None] == best).any(-1))
                    agrees.append(found == output.logits[0].argmax(-1))
        expected = [torch.cat(within[i :: len(EXITS)]) for i in range(len(EXITS))]
        assert torch.equal(labels.within_k, torch.stack(expected))
        assert torch.equal(labels.agrees, torch.stack([torch.cat(agrees[i :: len(EXITS)]) for i in range(len(EXITS))]))
        assert 0 < labels.within_k.sum() < labels.within_k.numel()

    def test_with_a_final_block_the_read_out_is_after_it(self) -> None:
        pass_ = frozen(final_block=True)
        batch = pass_.run(ROWS[:1])
        without = frozen().run(ROWS[:1])
        model = tiny_model("llama")
        with torch.no_grad():
            hidden = without.exits[3].unsqueeze(0)
            positions = torch.arange(len(ROWS[0])).unsqueeze(0)
            mask = torch.full((1, 1, len(ROWS[0]), len(ROWS[0])), -1e9).triu(1)
            rotary = model.model.rotary_emb(hidden, positions)
            expected = model.model.layers[-1](hidden, attention_mask=mask, position_embeddings=rotary)
        torch.testing.assert_close(batch.reads[3].unsqueeze(0), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(batch.exits[3], without.exits[3])

    @pytest.mark.parametrize(("vocab", "k"), [(97, 1), (97, 5), (1024, 1), (1000, 7), (4097, 3)])
    def test_best_tokens_are_topk(self, vocab: int, k: int) -> None:
        logits = torch.randn(50, vocab)
        assert torch.equal(best_tokens(logits, k), logits.topk(k).indices)

    def test_positions_are_reproducible_and_differ_from_batch_to_batch(self) -> None:
        first = labelled_positions(3, 0, 100, 25)
        assert torch.equal(first, labelled_positions(3, 0, 100, 25))
        assert not torch.equal(first, labelled_positions(3, 1, 100, 25))
        assert len(first.unique()) == 25


def make_trainer(kinds: tuple[str, ...], **changes: Any) -> tuple[Trainer, Any]:
    options = options_for(Path("x"), Path("x"), classifier=",".join(kinds), clip=0.01, **changes)
    classifiers = ExitClassifiers(
        options.kinds, EXITS, 32, "silu", options.classifier_options, options.seed, options.adapter
    )

    def documents(epoch: int, first: int) -> Any:
        return itertools.islice((random_ids(40, i) for i in itertools.count()), first, None)

    return Trainer(frozen(), classifiers, options), MicroBatches(documents, 64, 32)


class TestLoop:
    def test_weights_fall_linearly_and_sum_to_1(self) -> None:
        weights = exit_weights(4)
        assert weights == pytest.approx([0.4, 0.3, 0.2, 0.1])

    def test_learning_rate_rises_and_falls(self) -> None:
        rates = [learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
        assert rates[9] == max(rates) == 2.0
        assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
        assert all(a > b for a, b in itertools.pairwise(rates[10:]))
        assert rates[-1] < 0.01

    def test_a_kind_trains_as_it_would_alone(self) -> None:
        together, batches = make_trainer(KINDS)
        for step in range(3):
            together.step(step, batches)
        for kind in KINDS:
            alone, batches = make_trainer((kind,))
            for step in range(3):
                alone.step(step, batches)
            for name, tensor in alone.classifiers.state_dict().items():
                torch.testing.assert_close(together.classifiers.state_dict()[name], tensor)

    def test_the_loss_is_the_mean_cross_entropy_of_the_labels(self) -> None:
        trainer, batches = make_trainer(("calm",))
        batch = trainer.frozen.run(next(batches))
        positions = torch.tensor([3, 17, 40])
        sums = trainer._accumulate(batch, positions, trainer.groups)
        labels = trainer.frozen.label(batch, positions).within_k
        for i, layer in enumerate(EXITS):
            logits, _ = trainer.classifiers.at("calm", layer)(batch.exits[layer][positions])
            expected = torch.stack([-row.log_softmax(-1)[int(y)] for row, y in zip(logits, labels[i], strict=True)])
            assert float(sums[0, i]) == pytest.approx(expected.mean().item(), rel=1e-5)
            assert float(sums[-1, i]) == pytest.approx(float(labels[i].float().mean()))
        # The gradient is that of the weighted sum over exits, over the micro-batches of a step.
        found = trainer.classifiers.at("calm", 2).out_proj.bias.grad
        logits, _ = trainer.classifiers.at("calm", 2)(batch.exits[2][positions])
        by_hand = (logits.softmax(-1) - torch.nn.functional.one_hot(labels[0].long(), 2)).mean(0)
        torch.testing.assert_close(found, by_hand.detach() * exit_weights(3)[0] / 2)

    def test_training_learns_what_can_be_learned(self) -> None:
        kinds = ("mamba", "hybrid", "calm")
        trainer, batches = make_trainer(kinds, learning_rate=3e-2, label_share=1.0, max_tokens=40 * 128)
        trainer.options = replace(trainer.options, clip=1.0)
        first = trainer.step(0, batches)
        for step in range(1, 40):
            last = trainer.step(step, batches)
        for kind in kinds:
            assert sum(last.losses[kind]) < 0.8 * sum(first.losses[kind])

    def test_a_gradient_that_is_not_finite_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer, batches = make_trainer(("calm",))
        before = {name: tensor.clone() for name, tensor in trainer.classifiers.state_dict().items()}
        run = trainer.frozen.run

        def broken(rows: Any) -> Any:
            batch = run(rows)
            batch.exits[3][:] = torch.nan
            return batch

        monkeypatch.setattr(trainer.frozen, "run", broken)
        with pytest.raises(UserError, match="step 1: the gradient of calm is not finite"):
            trainer.step(0, batches)
        assert all(torch.equal(before[name], t) for name, t in trainer.classifiers.state_dict().items())


def letters(text: str) -> Any:
    """A tokenizer."""
    return type("Encoded", (), {"input_ids": [ord(letter) for letter in text]})


class TestData:
    @staticmethod
    def documents(epoch: int, first: int) -> Any:
        lengths = [5, 0, 23, 1, 8] if epoch % 2 == 0 else [8, 5, 23]
        return itertools.islice(([100 * i + t for t in range(n)] for i, n in enumerate(lengths)), first, None)

    def test_rows_hold_one_document_each_and_fill_the_batch(self) -> None:
        batches = MicroBatches(self.documents, 12, 10)
        found = [next(batches) for _ in range(6)]
        assert all(sum(map(len, rows)) == 12 for rows in found)
        rows = [row for batch in found for row in batch]
        assert all(len(row) <= 10 and len({token // 100 for token in row}) == 1 for row in rows)
        assert rows[:4] == [[0, 1, 2, 3, 4], list(range(200, 207)), list(range(207, 217)), [217, 218]]

    def test_any_position_can_be_continued(self) -> None:
        batches = MicroBatches(self.documents, 7, 6)
        positions, found = [batches.position], []
        for _ in range(25):
            found.append(next(batches))
            positions.append(batches.position)
        for start in range(25):
            resumed = MicroBatches(self.documents, 7, 6, Position(**positions[start].to_json()))
            assert [next(resumed) for _ in range(25 - start)] == found[start:]

    def test_held_out_text_is_never_trained_on(self) -> None:
        rows, count = data.held_out(self.documents, 20, 10)
        assert sum(map(len, rows)) >= 19
        kept = data.without_first(self.documents, count)
        assert count == 3
        assert list(kept(0, 0)) == [[], [], [], *self.documents(0, 3)]
        assert list(kept(1, 0)) == [list(range(8)), list(range(100, 105)), []]
        same_text = data.without_first(lambda _, first: iter([[7], [8], [7]][first:]), 1)
        assert list(same_text(0, 0)) == [[], [8], []]
        assert list(same_text(1, 1)) == [[8], []]
        with pytest.raises(UserError, match="all documents would be held out"):
            data.without_first(self.documents, 5)

    @pytest.mark.parametrize("buffer", [0, 3, 100])
    @pytest.mark.parametrize("files", [1, 3])
    def test_streams_continue_in_every_epoch(self, tmp_path: Path, buffer: int, files: int) -> None:
        for i in range(files):
            lines = [json.dumps({"text": chr(ord("a") + i) * n}) + "\n" for n in range(1, 8)]
            (tmp_path / f"{i}.jsonl").write_text("".join(lines))
        documents = data.text_documents(TextSource(str(tmp_path), shuffle_buffer=buffer), letters)
        whole = [list(documents(epoch, 0)) for epoch in range(3)]
        for epoch, expected in enumerate(whole):
            assert list(documents(epoch, 4)) == expected[4:]
            assert sorted(expected) == sorted(whole[0])
        assert (whole[0] == whole[1]) == (buffer == 0)

    @pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet", "txt"])
    def test_files_of_every_kind(self, tmp_path: Path, ending: str) -> None:
        import datasets

        table = datasets.Dataset.from_dict({"text": ["abc", "de"]})
        file = tmp_path / f"a.{ending}"
        if ending == "parquet":
            table.to_parquet(file)
        elif ending == "txt":
            file.write_text("abc")
            (tmp_path / "b.txt").write_text("de")
        else:
            table.to_json(file)
        source = file if ending != "txt" else tmp_path
        documents = data.text_documents(TextSource(str(source), shuffle_buffer=0), letters)
        assert list(documents(0, 0)) == [[97, 98, 99], [100, 101]]
        assert list(documents(0, 1)) == [[100, 101]]

    @pytest.mark.parametrize("dataset", ["./missing.jsonl", "/no/such/folder", "x*.txt"])
    def test_missing_files_are_errors(self, dataset: str) -> None:
        with pytest.raises(UserError, match="no file there with one of the endings"):
            data.text_documents(TextSource(dataset), None)

    def test_text_of_the_backbone_itself(self, model_folder: Path) -> None:
        engine = Engine(TransformerBackbone(tiny_model("llama"), max_length=256))
        tokenizer = type("T", (), {"bos_token_id": 1, "eos_token_id": 2})
        documents = generated_documents(engine, tokenizer, options_for(model_folder, Path("self"), seq_len=12))
        first = list(itertools.islice(documents(0, 0), 40))
        assert first[35:38] == list(itertools.islice(documents(0, 35), 3))
        assert first[33:40] == list(itertools.islice(documents(0, 33), 7))
        assert all(row[0] == 1 and len(row) <= 12 for row in first)
        assert len({tuple(row) for row in first}) > 35


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
                patch.setattr(state, "save_file", dying(state.save_file))
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
        shorter = options_for(model_folder, texts, max_tokens=(stopped_at + 1) * 128).to_json()
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
        assert config.classifiers == ("mamba", "calm")
        assert config.training["options"]["seed"] == 0
        assert config.training["tokens"] == STEPS * 128
        card = (unbroken.path / "README.md").read_text()
        assert "AUROC" in card
        assert config.backbone.fingerprint[:12] in card
        measured = json.loads((unbroken.path / "evaluation.json").read_text())
        assert measured["tokens"] == pytest.approx(200, abs=1)
        assert set(measured["classifiers"]) == {"mamba", "calm"}
        for found in measured["classifiers"].values():
            shares = [point["share_exiting"] for point in found["curve"]]
            assert shares == sorted(shares, reverse=True)
        assert (unbroken.path / "curve.png").read_bytes().startswith(b"\x89PNG")

    def test_trackers_are_told_of_steps_and_of_held_out_text(
        self, model_folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[tuple[int, dict[str, float]]] = []
        monkeypatch.setattr("accelerate.Accelerator.log", lambda _, values, step: told.append((step, values)))
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
        saved = command.train(options_for(model_folder, texts), run)
        assert saved is not None
        for name, tensor in tensors(unbroken).items():
            assert torch.equal(load_file(tmp_path / "exits.safetensors")[name], tensor.bfloat16())
        loaded = saved.load()
        backbone = load_backbone(options_for(model_folder, texts).reading(run))
        frozen = FrozenPass(backbone.engine.backbone, EXITS, False, 1)
        _, rows = command._data(options_for(model_folder, texts), backbone)
        seen = observe(frozen, loaded, rows, 64)
        measured = json.loads((tmp_path / "evaluation.json").read_text())
        again = evaluation.report(seen, saved.config, loaded, backbone.engine.backbone.cost)
        assert measured["classifiers"]["mamba"]["exits"] == again["classifiers"]["mamba"]["exits"]
        assert "\nText: by the authors.\n" in (tmp_path / "README.md").read_text()


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
    options = options_for(backbone, texts).to_json()
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


class TestOutput:
    """What lies in the folder of a training is looked at before anything else is done."""

    @pytest.fixture
    def no_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(command, "load_backbone", lambda *_: pytest.fail("the backbone was loaded"))

    @pytest.mark.usefixtures("no_work")
    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("README.md", "MY OWN README"),
            ("training.jsonl", '{"text": "a"}\n'),
            ("training.jsonl", '{"step": 1, "loss": 2.5}\n'),
            ("training.jsonl", "[1]"),
            ("config.json", '{"model_type": "llama"}'),
            ("main.py", "pass"),
            ("evaluation.json", "{}"),
        ],
    )
    def test_other_files_are_not_written_over(
        self, model_folder: Path, texts: Path, tmp_path: Path, name: str, content: str, overwrite: bool
    ) -> None:
        (tmp_path / name).write_text(content)
        run = RunOptions(output=str(tmp_path), overwrite=overwrite, device="cpu")
        with pytest.raises(UserError, match=f"--output .*holds other files .*{name}"):
            command.train(options_for(model_folder, texts), run)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert (tmp_path / name).read_text() == content

    @pytest.mark.usefixtures("no_work")
    @pytest.mark.parametrize("damaged", ["", "[1]", None])
    def test_a_damaged_state_can_be_overwritten_only(
        self,
        model_folder: Path,
        texts: Path,
        tmp_path: Path,
        damaged: str | None,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        home = tmp_path / "state" / "state-00000002"
        home.mkdir(parents=True)
        if damaged is not None:
            (home / state.PROGRESS_NAME).write_text(damaged)
        line = ["train", "--backbone", str(model_folder), "--dataset", str(texts), "--output", str(tmp_path)]
        line += ["--exit_layers", "2+3+4", "--device", "cpu"]
        assert cli.main([*line, "--resume"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert str(home) in error
        assert "--overwrite" in error
        assert cli.main(line) == 2
        monkeypatch.undo()
        saved = command.train(
            options_for(model_folder, texts, classifier="calm", max_tokens=128),
            RunOptions(output=str(tmp_path), overwrite=True, device="cpu"),
        )
        assert saved is not None
        assert not (tmp_path / "state").exists()

    @pytest.mark.usefixtures("no_work")
    def test_one_training_at_a_time(self, model_folder: Path, texts: Path, tmp_path: Path) -> None:
        with locked(tmp_path), pytest.raises(UserError, match="in use by process"):
            train(model_folder, texts, tmp_path)
        with pytest.raises(UserError, match="cannot be written"):
            train(model_folder, texts, texts)

    def test_a_begun_log_is_its_own(self, model_folder: Path, texts: Path, tmp_path: Path) -> None:
        """A training that was killed before its first state, in the middle of a line."""
        (tmp_path / "training.jsonl").write_text('{"step": 1, "tok')
        train(model_folder, texts, tmp_path, classifier="calm", max_tokens=128)
        assert len((tmp_path / "training.jsonl").read_text().splitlines()) == 1
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_damaged_text_is_named(tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps({"text": f"{random.random()}" * 50}) + "\n" for _ in range(500)).encode())
    for name, content in (
        ("cut.jsonl.gz", whole[: len(whole) // 2]),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n'),
        ("text.parquet", b"PAR1"),
        ("latin.txt", b"caf\xe9"),
    ):
        (tmp_path / name).write_bytes(content)
        source = TextSource(str(tmp_path / name), shuffle_buffer=0)
        with pytest.raises(UserError, match=name):
            list(data.text_documents(source, letters)(0, 0))


class TestEvaluation:
    def test_quality_on_known_numbers(self) -> None:
        confidence = np.asarray([0.1, 0.4, 0.35, 0.8, 0.95, 0.6])
        label = np.asarray([False, False, True, True, True, False])
        quality = evaluation.exit_quality(confidence, label)
        # Of the nine pairs of a right and a wrong one, seven are in order.
        assert quality["auroc"] == pytest.approx(7 / 9)
        assert quality["thresholds"]["0.5"] == {"precision": 2 / 3, "recall": 2 / 3, "share": 0.5}
        assert quality["thresholds"]["0.9"]["precision"] == 1
        # Every number is alone in its bin.
        assert quality["expected_calibration_error"] == pytest.approx(np.abs(confidence - label).mean())
        assert sum(quality["histogram"]["tokens"]) == 6
        assert evaluation.exit_quality(confidence, np.ones(6, dtype=bool))["auroc"] is None

    def test_the_predicted_curve_equals_what_the_engine_does_when_states_do_not_matter(self) -> None:
        """Tokens of a single row that exit where predicted cost what is predicted."""
        config = exits_config(classifiers=("calm",))
        classifiers = ExitClassifiers(("calm",), EXITS, 32, "silu", ClassifierOptions())
        seen = Observations(
            (3,),
            np.zeros((3, 3), dtype=bool),
            np.asarray([[True, True, False], [True, True, True], [True, False, True]]),
            {"calm": np.asarray([[0.9, 0.9, 0.1], [0.0, 0.0, 0.8], [0.9, 0.9, 0.9]])},
        )
        cost = frozen().backbone.cost
        point = evaluation.predicted_point(seen, "calm", 0.7, config, classifiers, cost, "recompute")
        # The first token of a row may not exit; the others leave at 2 (right) and 3 (right).
        assert point["share_exiting"] == 1
        assert point["agreement"] == 1
        assert point["mean_exit_layer"] == 2.5
        full = sum(block.at(1) + block.at(2) for block in cost.blocks)
        spent = sum(block.at(1) for block in cost.blocks[:2]) + sum(block.at(2) for block in cost.blocks[:3])
        spent += 64 * (1 + 2) + sum(block.state_recompute for block in (*cost.blocks[2:], *cost.blocks[3:]))
        assert point["compute_reduction"] == pytest.approx(full / spent)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classifier", "calm,cnn"], "must name some of calm, ffn, mamba, hybrid, got 'cnn'"),
        (["--top_k", "0"], "--top_k must be at least 1, got 0"),
        (["--label_share", "1.5"], "--label_share must be at most 1"),
        (["--batch_tokens", "1000", "--micro_batch_tokens", "600"], "must be a multiple of"),
        (["--exit_layers", "2+9"], "exit_layers must lie in 1..5"),
        (["--dataset", "./missing.jsonl"], "no file there"),
        (["--resume", "--overwrite"], "contradict each other"),
        (["--max_token", "5"], "unknown option '--max_token'; did you mean --max_tokens?"),
        (["--seq_len", "9000"], "must be at most --micro_batch_tokens=4096"),
        (["--save_dtype", "int8"], "--save_dtype must be one of float32, bfloat16"),
        (["--private", "True"], "--private has no effect without --push_to_hub"),
        (["--eval_split", "test"], "have no effect without --eval_dataset"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--dataset_split", "test"], "is a local file, which has no configuration and no splits"),
        (["--adapter", "cubic"], "adapter must be none, affine or lowrank:R"),
        (["--classifier", "calm", "--ffn_expand", "2"], "--ffn_expand has no effect on --classifier calm"),
        (["--classifier", "ffn", "--mamba_state", "8"], "--mamba_state has no effect on --classifier ffn"),
        (["--dataset", "self", "--dataset_split", "test"], "have no effect with --dataset self"),
        (["--classifier", "calm", "--mamba_state", "8"], "add mamba or hybrid, or remove it"),
        (["--hybrid_expand", "0.5"], "--hybrid_expand has no effect on --classifier mamba,ffn,calm"),
        (["--classifier", "hybrid", "--hybrid_expand", "0"], "hybrid_expand must be a finite number above 0"),
        (["--mamba_expand", "-1"], "mamba_expand must be a finite number above 0"),
    ],
)
def test_refusals_are_one_line(
    model_folder: Path, texts: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    line = ["train", "--backbone", str(model_folder), "--dataset", str(texts), "--device", "cpu"]
    assert cli.main([*line, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dynamax-lm-eval: error: ")
    assert message in error
    assert LAYERS == 6

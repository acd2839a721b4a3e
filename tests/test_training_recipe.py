"""How exits are trained: labels in both directions, weights of exits, optimisers, templates, ``--preset thesis``."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_ids, tiny_model
from helpers_engine import EXITS
from helpers_training import ROWS, make_trainer, train, training_options
from transformers import AutoTokenizer

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.cli import main
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.exits.classifiers import ClassifierOptions, ExitClassifiers
from dynamax_lm_eval.frozen.options import TextSource
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.frozen.text import text_documents
from dynamax_lm_eval.training import state
from dynamax_lm_eval.training.optimizers import make_optimizer, stepping
from dynamax_lm_eval.training.option_rules import PRESETS
from dynamax_lm_eval.training.options import TrainingOptions
from dynamax_lm_eval.training.trainer import exit_weights

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"


@pytest.mark.parametrize("label_final_block", [True, False])
@pytest.mark.parametrize("final_block", [True, False])
@pytest.mark.parametrize("label", ["exit_in_full", "full_in_exit"])
@pytest.mark.parametrize("k", [1, 4, 15])
def test_labels_against_direct_computation(label: Any, k: int, final_block: bool, label_final_block: bool) -> None:
    model = tiny_model("llama")
    backbone = make_backbone(model, max_length=64)
    frozen = FrozenPass(backbone, EXITS, final_block, k, label, label_final_block)
    batch = frozen.run(ROWS)
    positions = torch.arange(0, sum(map(len, ROWS)), 2)
    found = frozen.label(batch, positions)
    with torch.no_grad():
        full = torch.cat([model(torch.tensor([row])).logits[0] for row in ROWS])[positions]
        for i, layer in enumerate(EXITS):
            behind = final_block and label_final_block
            hidden = (batch.reads if behind else batch.exits)[layer][positions]
            own = model.lm_head(model.model.norm(hidden))
            one, other = (own, full) if label == "exit_in_full" else (full, own)
            expected = [int(a.argmax()) in b.topk(k).indices.tolist() for a, b in zip(one, other, strict=True)]
            assert found.within_k[i].tolist() == expected
            read = model.lm_head(model.model.norm(batch.reads[layer][positions]))
            assert found.agrees[i].tolist() == (read.argmax(-1) == full.argmax(-1)).tolist()
    assert found.within_k.any()


def test_weights_of_exits() -> None:
    assert exit_weights(4, "increasing") == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert exit_weights(4, "equal") == [0.25] * 4


@pytest.mark.parametrize("kind", ["calm", "ffn", "mamba", "hybrid"])
def test_classifiers_that_take_hidden_states_as_they_come(kind: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 16)
    options = ClassifierOptions(normalize=False)
    plain, normed = (
        ExitClassifiers((kind,), (2,), 16, "silu", o, 3).at(kind, 2) for o in (options, ClassifierOptions())
    )
    assert plain.macs == normed.macs
    assert not [name for name, _ in plain.named_parameters() if name.startswith("norm.")]
    scaled = normed.norm(hidden)
    batch = FrozenPass(make_backbone(tiny_model("llama"), max_length=64), EXITS, False, 1).run([random_ids(5, 1)])
    torch.testing.assert_close(plain(scaled, batch.rows)[0], normed(hidden, batch.rows)[0])
    assert not torch.allclose(plain(hidden, batch.rows)[0], plain(2 * hidden, batch.rows)[0])


class TestScheduleFree:
    def test_one_step_by_hand(self) -> None:
        """Of equations 6 to 8 of the paper: z moves, the average is z after one step, gradients are taken between."""
        weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = make_optimizer("schedulefree", [[weight]], 0.1, 0.0, 0)
        with stepping(optimizer):
            weight.grad = torch.tensor([0.5, -0.25])
            optimizer.step()
        # Adam's first step is the sign of the gradient.
        torch.testing.assert_close(weight.data, torch.tensor([0.9, -1.9]), atol=1e-5, rtol=0)

    def test_goes_on_as_if_it_had_not_been_stopped(self, tmp_path: Path) -> None:
        unbroken, batches = make_trainer(("calm", "mamba"), optimizer="schedulefree", weight_decay=0.0)
        for step in range(4):
            report = unbroken.step(step, batches)
        stopped, batches = make_trainer(("calm", "mamba"), optimizer="schedulefree", weight_decay=0.0)
        for step in range(2):
            stopped.step(step, batches)
        progress = state.Progress(2, batches.position.to_json(), {}, 0.0)
        state.save(tmp_path, progress, stopped.classifiers, stopped.optimizer)
        resumed, _ = make_trainer(("calm", "mamba"), optimizer="schedulefree", weight_decay=0.0)
        found = state.latest(tmp_path)
        assert found is not None
        state.load(found[0], resumed.classifiers, resumed.optimizer)
        for step in range(2, 4):
            resumed.step(step, batches)
        for name, tensor in unbroken.classifiers.state_dict().items():
            assert torch.equal(tensor, resumed.classifiers.state_dict()[name]), name
        assert report.learning_rate == unbroken.options.learning_rate

    def test_learns(self) -> None:
        changes = {"learning_rate": 3e-2, "label_share": 1.0, "max_tokens": 40 * 128, "optimizer": "schedulefree"}
        trainer, batches = make_trainer(("calm",), **changes)
        losses = [sum(trainer.step(step, batches).losses["calm"]) for step in range(40)]
        assert losses[-1] < 0.9 * losses[0]


class TestText:
    def test_only_the_first_documents(self, texts: Path, model_folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        source = TextSource(str(texts), shuffle_buffer=0)
        every = list(text_documents(source, tokenizer)(0, 0))
        first = dataclasses.replace(source, documents=3)
        assert list(text_documents(first, tokenizer)(0, 0)) == every[:3]
        shuffled = dataclasses.replace(first, shuffle_buffer=100)
        assert sorted(text_documents(shuffled, tokenizer)(1, 0)) == sorted(every[:3])

    def test_a_users_turn(self, texts: Path, model_folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        tokenizer.chat_template = TEMPLATE
        plain = TextSource(str(texts), shuffle_buffer=0, documents=2)
        wrapped = dataclasses.replace(plain, template="instruct")
        for ids, own in zip(
            text_documents(wrapped, tokenizer)(0, 0), text_documents(plain, tokenizer)(0, 0), strict=True
        ):
            text = tokenizer.decode(own, skip_special_tokens=True)
            assert ids == tokenizer(f"<user>{text}</s>", add_special_tokens=False).input_ids

    def test_a_tokenizer_without_a_template_is_refused_before_weights(
        self, texts: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dynamax_lm_eval.models.loading.CompleteModels.from_pretrained", pytest.fail)
        with pytest.raises(UserError, match="--template instruct needs a tokenizer with a chat template"):
            train(model_folder, texts, tmp_path / "out", template="instruct")


class TestPreset:
    def test_sets_what_is_left_at_its_default(self) -> None:
        options = TrainingOptions(backbone="x", preset="thesis", top_k=10)
        assert options.top_k == 10
        expected = {**PRESETS["thesis"], "top_k": 10}
        assert {name: getattr(options, name) for name in expected} == expected
        assert options.steps == 900 and options.kinds == ("calm",)

    def test_trains_and_says_so(self, model_folder: Path, texts: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(model_folder, tmp_path / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
        options: dict[str, Any] = {"backbone": folder, "dataset": texts, "output": tmp_path / "exits", "device": "cpu"}
        options |= {"preset": "thesis", "exit_layers": "2+3+4", "eval_tokens": 200, "dtype": "float32"}
        options |= {"max_tokens": 4 * 128, "seq_len": 32, "batch_tokens": 128, "micro_batch_tokens": 64}
        assert main(["train", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]) == 0
        saved = ExitCheckpoint.open(tmp_path / "exits")
        assert (saved.config.label, saved.config.top_k, saved.config.label_final_block) == ("full_in_exit", 15, False)
        assert saved.config.final_block and not saved.config.options.normalize
        assert saved.config.training["options"]["optimizer"] == "schedulefree"
        card = (tmp_path / "exits" / "README.md").read_text(encoding="utf-8")
        assert "the full model's best token is among the 15 most probable tokens of the exit" in card
        assert "leaves the last block out" in card
        report = json.loads((tmp_path / "exits" / "evaluation.json").read_text(encoding="utf-8"))
        assert report["label"] == "full_in_exit"
        saved.load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "both"}, "--label must be one of exit_in_full, full_in_exit"),
        ({"exit_weights": "rising"}, "--exit_weights must be one of decreasing, increasing, equal"),
        ({"optimizer": "sgd"}, "--optimizer must be one of adamw, schedulefree"),
        ({"template": "chat"}, "--template must be one of none, instruct"),
        ({"label_final_block": False}, "has no effect without --final_block"),
        ({"max_documents": 0}, "--max_documents must be at least 1"),
        ({"preset": "paper"}, "--preset must be thesis"),
        (
            {"optimizer": "schedulefree", "adapter": "affine", "adapter_first": 0.5},
            "schedulefree and --adapter_first exclude each other",
        ),
    ],
)
def test_what_cannot_be_honoured(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        training_options(tmp_path, tmp_path / "texts", **changes)


@pytest.mark.parametrize("name", ["template", "max_documents"])
def test_no_effect_on_generated_text(name: str) -> None:
    with pytest.raises(UserError, match=f"--{name} has no effect with --dataset self"):
        TrainingOptions(backbone="x", dataset="self", **{name: "instruct" if name == "template" else 5})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install schedulefree"):
        TrainingOptions(backbone="x", optimizer="schedulefree")

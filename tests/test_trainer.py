"""Steps of the trainer: losses, gradients, learning rate."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers_engine import EXITS, KINDS
from helpers_training import make_trainer

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.training.trainer import exit_weights, learning_rate


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

        def broken(rows: Any, _: Any = None) -> Any:
            batch = run(rows)
            batch.exits[3][:] = torch.nan
            return batch

        monkeypatch.setattr(trainer.frozen, "run", broken)
        with pytest.raises(UserError, match="step 1: the gradient of calm is not finite"):
            trainer.step(0, batches)
        assert all(torch.equal(before[name], t) for name, t in trainer.classifiers.state_dict().items())


def test_states_do_not_depend_on_which_kind_is_preferred() -> None:
    """Of releases that wrote ``mamba`` first; the optimiser's tensors are known by their place."""
    trainer, _ = make_trainer(("calm", "mamba", "hybrid", "ffn"))
    assert trainer.classifiers.kinds == ("calm", "mamba", "hybrid", "ffn")
    assert list(trainer.groups) == ["mamba", "hybrid", "ffn", "calm"]
    sizes = [[p.shape for p in group["params"]] for group in trainer.optimizer.param_groups]
    assert [shape for group in sizes for shape in group] == [p.shape for g in trainer.groups.values() for p in g]

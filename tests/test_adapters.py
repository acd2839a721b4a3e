"""Exit adapters: in the engine against early exit written a second time, counted, trained, saved and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LAYERS, random_ids, tiny_model
from helpers_engine import (
    EXITS,
    NEW_TOKENS,
    PROMPTS,
    exits_config,
    is_separated,
    policy_of,
    run_generate,
    run_score,
    separated_policy,
    varied_classifiers,
)
from helpers_training import ROWS, frozen, make_trainer, training_options
from reference import reference_generate, reference_score

from dynamax_lm_eval.backbones import TransformerBackbone
from dynamax_lm_eval.compute.accounting import account
from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import checkpoint
from dynamax_lm_eval.exits.adapters import make_adapters
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.exits.classifiers import ClassifierOptions, ExitClassifiers
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.training.trainer import ADAPTERS


def exits_with(adapter: str) -> ExitClassifiers:
    """Exits whose adapters change what is read out."""
    exits = varied_classifiers(exits_config(adapter=adapter))
    torch.manual_seed(11)
    for parameter in exits.adapters.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))
    return exits


def policy_with(adapter: str, confidence: str = "classifier", **changes: Any) -> ExitPolicy:
    kind = "mamba" if confidence == "classifier" else None
    policy = ExitPolicy(LAYERS, EXITS, (0.5,) * 3, confidence=confidence, classifier=kind, adapter=adapter)  # type: ignore[arg-type]
    return replace(policy, **changes)


@pytest.mark.parametrize("adapter", ["affine", "lowrank:3", "swiglu:5"])
@pytest.mark.parametrize("confidence", ["classifier", "softmax", "state"])
def test_generation_equals_the_reference(adapter: str, confidence: str) -> None:
    model, exits = tiny_model("llama"), exits_with(adapter)
    policy = separated_policy(model, policy_with(adapter, confidence), PROMPTS[0], classifiers=exits)
    expected = [reference_generate(model, policy, prompt, NEW_TOKENS, exits) for prompt in PROMPTS[:3]]
    assert is_separated(*(row for _, row in expected))
    engine = Engine(TransformerBackbone(model, max_length=256), exits)
    results = run_generate(engine, [policy] * 3, PROMPTS[:3], max_rows=2)
    for (tokens, row), result in zip(expected, results, strict=True):
        assert result.tokens == tokens
        assert list(result.trace.exit_layers) == row.layers[result.trace.prompt_tokens :]
    plain = replace(policy, adapter="none")
    assert [r.tokens for r in run_generate(engine, [plain] * 3, PROMPTS[:3], 2)] != [r.tokens for r in results]


def test_scoring_equals_feeding_one_by_one_beside_rows_without_adapters() -> None:
    model, exits = tiny_model("qwen3"), exits_with("affine")
    policy = separated_policy(model, policy_with("affine", exit_scope="all"), PROMPTS[0], classifiers=exits)
    engine = Engine(TransformerBackbone(model, max_length=256), exits)
    pairs = [(prompt, random_ids(9, 70 + i)) for i, prompt in enumerate(PROMPTS)]
    for (context, continuation), result in zip(pairs, run_score(engine, policy, pairs, 3), strict=True):
        expected, row = reference_score(model, policy, context, continuation, exits)
        assert is_separated(row)
        assert [line[0] for line in result.log_probs] == pytest.approx(expected, abs=1e-4)
    mixed = [policy, replace(policy, adapter="none"), policy]
    together = run_generate(engine, mixed, PROMPTS[:3], 3)
    alone = [run_generate(engine, [p], [prompt], 1)[0] for p, prompt in zip(mixed, PROMPTS[:3], strict=True)]
    assert together == alone


def test_macs() -> None:
    assert exits_with("affine").adapter_macs() == dict.fromkeys(EXITS, 32 * 32)
    assert exits_with("lowrank:3").adapter_macs() == dict.fromkeys(EXITS, 2 * 3 * 32)
    assert exits_with("swiglu:5").adapter_macs() == dict.fromkeys(EXITS, 32 * 32 + 3 * 5 * 32)
    cost = TransformerBackbone(tiny_model("llama"), max_length=256).cost
    # Four prompt tokens, two of which exit (they are not read out); then tokens that left at 2, at 4 and not at all.
    trace = Trace(4, 7, 4, (2, 3, LAYERS, 2, 4, LAYERS), generated=True)
    adapters = {2: 1000, 3: 100, 4: 10}
    learned = account(trace, policy_with("affine", exit_scope="all").cost_terms(4, None, adapters), cost)
    assert learned.adapter_macs == 1000 + 10
    assert learned.exit_macs == learned.adapter_macs + learned.recompute_macs
    softmax = account(trace, policy_with("affine", "softmax", exit_scope="all").cost_terms(4, None, adapters), cost)
    assert softmax.adapter_macs == 1000 + 1100 + 1110 + 1000 + 1110 + 1110


@pytest.mark.parametrize("adapter", ["affine", "lowrank:3", "swiglu:5"])
def test_the_gradient_is_that_of_the_kl_divergence(adapter: str) -> None:
    pass_, exits = frozen(), exits_with(adapter)
    exits.adapters.requires_grad_(True)
    batch, positions = pass_.run(ROWS), torch.tensor([0, 5, 7, 20])
    labels = pass_.label(batch, positions, exits, learn=[0.5, 0.3, 0.2])
    found = {name: parameter.grad.clone() for name, parameter in exits.adapters.named_parameters()}  # type: ignore[union-attr]
    exits.zero_grad()
    target = pass_.backbone.readout(batch.last[positions]).log_softmax(-1).detach()
    assert labels.divergence is not None
    for i, (layer, weight) in enumerate(zip(EXITS, (0.5, 0.3, 0.2), strict=True)):
        adapter_at = exits.adapter(layer)
        assert adapter_at is not None
        own = pass_.backbone.readout(adapter_at(batch.reads[layer][positions])).log_softmax(-1)
        divergence = torch.nn.functional.kl_div(own, target, log_target=True, reduction="batchmean")
        assert labels.divergence[i].item() == pytest.approx(divergence.item(), rel=1e-4)
        (weight * divergence).backward()
    for name, parameter in exits.adapters.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_training_lowers_the_divergence_and_raises_agreement() -> None:
    trainer, batches = make_trainer(
        ("calm",), adapter="affine", learning_rate=1e-2, label_share=1.0, max_tokens=40 * 128
    )
    trainer.options = replace(trainer.options, clip=1.0)
    first = trainer.step(0, batches)
    for step in range(1, 40):
        last = trainer.step(step, batches)
    assert sum(last.losses[ADAPTERS]) < 0.8 * sum(first.losses[ADAPTERS])
    assert sum(last.accuracies[ADAPTERS]) > sum(first.accuracies[ADAPTERS])


def test_adapters_first_then_classifiers() -> None:
    trainer, batches = make_trainer(("calm",), adapter="lowrank:2", adapter_first=0.5)
    before = {name: tensor.clone() for name, tensor in trainer.classifiers.state_dict().items()}
    assert trainer.options.adapter_steps == 3
    assert set(trainer.step(0, batches).losses) == {ADAPTERS}
    half = {name: tensor.clone() for name, tensor in trainer.classifiers.state_dict().items()}
    assert {name for name in half if not torch.equal(half[name], before[name])} <= {
        name for name in half if name.startswith("adapters.")
    }
    assert set(trainer.step(3, batches).losses) == {"calm"}
    assert all(
        torch.equal(tensor, half[name])
        for name, tensor in trainer.classifiers.state_dict().items()
        if name.startswith("adapters.")
    )


def test_round_trip_and_the_policy(tmp_path: Path) -> None:
    exits = exits_with("lowrank:3")
    checkpoint.save(tmp_path, exits_config(adapter="lowrank:3"), exits)
    opened = ExitCheckpoint.open(tmp_path)
    loaded = opened.load()
    for layer in EXITS:
        assert torch.equal(loaded.adapter(layer).up.weight, exits.adapter(layer).up.weight)  # type: ignore[union-attr]
    assert policy_of(opened.config).adapter == "lowrank:3"
    corrected = policy_of(opened.config, confidence="softmax", exits="x")
    assert (corrected.adapter, corrected.classifier, corrected.exit_layers) == ("lowrank:3", None, EXITS)


def test_a_fresh_adapter_changes_nothing() -> None:
    fresh = ExitClassifiers(("calm",), EXITS, 32, "silu", ClassifierOptions(), adapter="affine")
    hidden = torch.randn(5, 32)
    adapter = fresh.adapter(2)
    assert adapter is not None
    assert torch.equal(adapter(hidden), hidden)


@pytest.mark.parametrize("name", ["Affine", "lowrank", "lowrank:0", "lowrank:x", "lowrank:-2", ""])
def test_unknown_adapters_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"adapter must be none, affine, lowrank:R or swiglu:W"):
        make_adapters(name, EXITS, 32)


def test_refusals() -> None:
    with pytest.raises(UserError, match="rank must be at most the hidden size, 32"):
        make_adapters("lowrank:33", EXITS, 32)
    with pytest.raises(UserError, match="--adapter and --final_block exclude each other"):
        training_options(Path("x"), Path("x"), adapter="affine", final_block=True)
    with pytest.raises(UserError, match="--adapter_first must be in"):
        training_options(Path("x"), Path("x"), adapter_first=0.5)
    with pytest.raises(UserError, match="final_block and exit adapters exclude each other"):
        policy_of(exits_config(adapter="affine"), confidence="softmax", exits="x", final_block=True)

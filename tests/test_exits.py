"""Exit classifiers and final blocks in the engine, against early exit written a second time; checkpoints."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import LAYERS, random_ids, tiny_model
from reference import RECURRENT, reference_generate, reference_score
from safetensors.torch import load_file, save_file
from test_engine import (
    NEW_TOKENS,
    PROMPTS,
    is_separated,
    run_generate,
    run_score,
    separated_policy,
)

from dynamax_lm_eval.backbones import TransformerBackbone
from dynamax_lm_eval.backbones.mamba.ssm import MixerShape, RaggedRows, causal_conv, selective_scan
from dynamax_lm_eval.compute.accounting import Trace, account
from dynamax_lm_eval.compute.cost import EvaluationCost
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import checkpoint
from dynamax_lm_eval.exits.checkpoint import BackboneIdentity, ExitCheckpoint, ExitConfig
from dynamax_lm_eval.exits.classifiers import CLASSIFIERS as TABLE
from dynamax_lm_eval.exits.classifiers import ClassifierOptions, ExitClassifiers, make_classifier
from dynamax_lm_eval.exits.confidences import CONFIDENCES, resolve_confidence
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.files import file_checksum
from dynamax_lm_eval.models.fingerprint import files_fingerprint, model_fingerprint
from dynamax_lm_eval.types import ClassifierKind, ConfidenceName

EXITS = (2, 3, 4)
KINDS = ("mamba", "hybrid", "ffn", "calm")
HIDDEN = 32


def exits_config(model: Any = None, **changes: Any) -> ExitConfig:
    """What a checkpoint for the tiny Llama says of itself."""
    model = model or tiny_model("llama")
    identity = BackboneIdentity("tiny", "main", "llama", HIDDEN, LAYERS, model_fingerprint(model))
    options = ClassifierOptions(mamba_state=5, mamba_expand=0.75, mamba_kernel=3, hybrid_expand=0.5)
    config = ExitConfig(identity, EXITS, KINDS, "silu", options)
    return replace(config, **changes)


def varied_classifiers(config: ExitConfig | None = None) -> ExitClassifiers:
    """Classifiers whose confidences differ from token to token, as after training."""
    torch.manual_seed(7)
    classifiers = (config or exits_config()).build(3)
    with torch.no_grad():
        for kind in classifiers.kinds:
            for layer in classifiers.exit_layers:
                classifiers.at(kind, layer).out_proj.weight.mul_(3)
    return classifiers.requires_grad_(False).eval()


CLASSIFIERS = varied_classifiers()


def engine_with_exits(family: str = "llama") -> Engine:
    return Engine(TransformerBackbone(tiny_model(family), max_length=256), CLASSIFIERS)


def classifier_policy(kind: str, **changes: Any) -> ExitPolicy:
    policy = ExitPolicy(LAYERS, EXITS, (0.5,) * len(EXITS), confidence="classifier", classifier=kind)  # type: ignore[arg-type]
    return replace(policy, **changes)


def separated(policy: ExitPolicy, family: str = "llama") -> ExitPolicy:
    return separated_policy(tiny_model(family), policy, PROMPTS[0], classifiers=CLASSIFIERS)


@pytest.mark.parametrize("lengths", [[1, 7, 16, 3, 9], [4, 8], [1, 1, 1], [2], [23]])
@pytest.mark.parametrize("with_state", [False, True])
def test_scan_and_convolution_equal_the_recurrence(lengths: Sequence[int], with_state: bool) -> None:
    """Chunks shorter and longer than rows, rows shorter than the convolution's window, several groups."""
    torch.manual_seed(1)
    shape = MixerShape(heads=6, head_dim=5, groups=3, state=4, kernel=4)
    rows = RaggedRows(lengths, chunk=4)
    total = sum(lengths)
    inputs, dt, decay = torch.randn(total, shape.channels), torch.rand(total, 6), -3 * torch.rand(6)
    weight, bias = torch.randn(shape.channels, 4), torch.randn(shape.channels)
    state = torch.randn(len(lengths), 6, 5, 4) if with_state else None
    window = torch.randn(len(lengths), 3, shape.channels) if with_state else None
    scanned, after = selective_scan(inputs, dt, decay, shape, rows, None if state is None else state.clone())
    convolved, last = causal_conv(inputs, weight, bias, rows, window)
    assert after is not None
    start = 0
    for row, length in enumerate(lengths):
        current = torch.zeros(6, 5, 4) if state is None else state[row]
        seen = list(torch.zeros(3, shape.channels) if window is None else window[row])
        for t in range(start, start + length):
            x, b, c = (part.squeeze(0) for part in shape.split(inputs[t : t + 1]))
            b, c = b.repeat_interleave(2, 0), c.repeat_interleave(2, 0)
            current = (dt[t] * decay).exp()[:, None, None] * current + (dt[t][:, None] * x)[..., None] * b[:, None]
            torch.testing.assert_close(scanned[t], (current * c[:, None]).sum(-1), rtol=1e-4, atol=1e-5)
            seen.append(inputs[t])
            expected = sum(seen[len(seen) - 4 + k] * weight[:, k] for k in range(4)) + bias
            torch.testing.assert_close(convolved[t], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after[row], current, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last[row], torch.stack(seen[-3:]))
        start += length


def test_the_scan_that_is_differentiated_equals_the_other() -> None:
    torch.manual_seed(2)
    shape = MixerShape(4, 3, 2, 5, 4)
    rows = RaggedRows([9, 1, 14], chunk=4)
    inputs, dt, decay = torch.randn(24, shape.channels), torch.rand(24, 4), -torch.rand(4)
    with torch.no_grad():
        plain, _ = selective_scan(inputs, dt, decay, shape, rows, None)
    differentiated, after = selective_scan(inputs.requires_grad_(), dt, decay, shape, rows, None)
    assert after is None
    torch.testing.assert_close(differentiated, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_parallel_equals_recurrent(kind: str) -> None:
    """A classifier over whole rows, in two parts, and token by token."""
    classifier = CLASSIFIERS.at(kind, 3)
    hidden = torch.randn(11, HIDDEN)
    whole, _ = classifier(hidden, RaggedRows([7, 4]), None)
    for sizes in ([1] * 7, [2, 4, 1], [6, 1]):
        state, parts, start = None, [], 0
        for size in sizes:
            logits, state = classifier(hidden[start : start + size], RaggedRows([size]), state)
            parts.append(logits)
            start += size
        torch.testing.assert_close(torch.cat(parts), whole[:7], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("final_block", [False, True])
@pytest.mark.parametrize("mode", ["recompute", "copy", "skip"])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_through_classifiers_equals_the_reference(kind: str, mode: Any, final_block: bool) -> None:
    model = tiny_model("llama")
    policy = separated(classifier_policy(kind, state_mode=mode, final_block=final_block))
    prompts = PROMPTS[:4]
    expected = [reference_generate(model, policy, prompt, NEW_TOKENS, CLASSIFIERS) for prompt in prompts]
    assert is_separated(*(row for _, row in expected))
    results = run_generate(engine_with_exits(), [policy] * 4, prompts, max_rows=2)
    for (tokens, row), result in zip(expected, results, strict=True):
        assert result.tokens == tokens
        assert list(result.trace.exit_layers) == row.layers[result.trace.prompt_tokens :]
    assert {layer for _, row in expected for layer in row.layers} > {LAYERS}


@pytest.mark.parametrize("scope", ["generated", "all"])
@pytest.mark.parametrize("warmup", [16, 0, 3])
@pytest.mark.parametrize("final_block", [False, True])
@pytest.mark.parametrize("kind", RECURRENT)
def test_scoring_through_recurrent_classifiers_equals_feeding_one_by_one(
    kind: str, scope: Any, warmup: int, final_block: bool
) -> None:
    model = tiny_model("mistral")
    policy = classifier_policy(kind, exit_scope=scope, classifier_warmup=warmup, final_block=final_block)
    policy = separated(policy, "mistral")
    pairs = [(prompt, random_ids(9, 70 + i)) for i, prompt in enumerate(PROMPTS)]
    results = run_score(engine_with_exits("mistral"), policy, pairs, 3)
    for (context, continuation), result in zip(pairs, results, strict=True):
        expected, row = reference_score(model, policy, context, continuation, CLASSIFIERS)
        assert is_separated(row)
        assert [line[0] for line in result.log_probs] == pytest.approx(expected, abs=1e-4)
        first = 1 if scope == "all" else len(context)
        assert list(result.trace.exit_layers) == row.layers[first:]


@pytest.mark.parametrize("confidence", ["softmax", "entropy", "state"])
def test_final_block_with_training_free_confidences(confidence: Any) -> None:
    model = tiny_model("qwen3")
    policy = ExitPolicy(LAYERS, EXITS, (0.5,) * 3, confidence=confidence, final_block=True)
    policy = separated_policy(model, policy, PROMPTS[0])
    engine = Engine(TransformerBackbone(model, max_length=256))
    expected = [reference_generate(model, policy, prompt, NEW_TOKENS) for prompt in PROMPTS[:3]]
    for (tokens, row), result in zip(expected, run_generate(engine, [policy] * 3, PROMPTS[:3], 3), strict=True):
        assert result.tokens == tokens
        assert list(result.trace.exit_layers) == row.layers[result.trace.prompt_tokens :]


def test_rows_of_one_batch_may_use_different_confidences() -> None:
    policies = [separated(classifier_policy(kind)) for kind in KINDS]
    policies.append(separated(classifier_policy("mamba", final_block=True, state_mode="skip")))
    for name in ("softmax", "entropy", "state"):
        policies.append(separated(ExitPolicy(LAYERS, EXITS, (0.5,) * 3, confidence=name)))  # type: ignore[arg-type]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(policies))]
    alone = [
        run_generate(engine_with_exits(), [policy], [prompt], 1)[0]
        for policy, prompt in zip(policies, prompts, strict=True)
    ]
    assert run_generate(engine_with_exits(), policies, prompts, len(policies)) == alone


def test_threshold_1_evaluates_no_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    for layer in EXITS:
        monkeypatch.setattr(CLASSIFIERS.at("mamba", layer), "forward", lambda *_, layer=layer: calls.append(layer))
    run_generate(engine_with_exits(), [classifier_policy("mamba", thresholds=(1.0,) * 3)], PROMPTS[:1], 1)
    assert calls == []


@pytest.mark.parametrize(("kind", "macs"), [("calm", 64), ("ffn", 32 * 128 + 128 * 2)])
def test_macs_of_stateless_classifiers_are_their_weights(kind: str, macs: int) -> None:
    assert CLASSIFIERS.at(kind, 2).macs == macs


def test_macs_of_a_mamba_classifier_by_hand() -> None:
    # D=32, inner 24, N=5, K=3, one head of 24: in_proj, conv, recurrence, out_proj.
    assert CLASSIFIERS.at("mamba", 2).macs == 32 * (24 + 24 + 10 + 1) + 34 * 3 + 3 * 24 * 5 + 24 * 2


def test_macs_of_a_hybrid_classifier_by_hand() -> None:
    # The mixer as above; then inner and D beside each other to 0.5 D = 16, and 16 to 2.
    mixer, decision = 32 * (24 + 24 + 10 + 1) + 34 * 3 + 3 * 24 * 5, (24 + 32) * 16 + 16 * 2
    assert CLASSIFIERS.at("hybrid", 2).macs == mixer + decision
    assert CLASSIFIERS.at("hybrid", 2).cost.paper_weights == 32 * (24 + 24 + 10 + 1) + decision


@pytest.mark.parametrize("kind", RECURRENT)
def test_compute_of_classifiers_warm_up_and_final_block(kind: str) -> None:
    """One row by hand: a prompt of 5 tokens, then tokens that left at 2, at 4 and not at all."""
    cost = engine_with_exits().backbone.cost
    costs = {layer: EvaluationCost(macs, 2 * macs) for layer, macs in {2: 100, 3: 10, 4: 1}.items()}
    trace = Trace(5, 8, 4, (2, 4, LAYERS), generated=True)
    policy = classifier_policy(kind, final_block=True, classifier_warmup=3)
    record = account(trace, policy.cost_terms(5, costs), cost)
    assert record.classifier_macs == 3 * 111 + 100 + 111 + 111
    blocks = [block.at for block in cost.blocks]
    left_at = [(5, (1, 2, 6)), (6, (1, 2, 3, 4, 6)), (7, tuple(range(1, 7)))]
    assert record.block_macs == sum(blocks[b - 1](position) for position, ran in left_at for b in ran)
    skipped = [3, 4, 5, 5]  # by the first token and by the second; block 6 wrote its own state
    assert record.recompute_macs == sum(cost.blocks[b - 1].state_recompute for b in skipped)
    weights = 2 * record.classifier_macs
    assert record.paper_spent == pytest.approx(3 + 5 + 6 + 4 / 6 + weights / cost.mean_block_weights)
    calm = account(trace, classifier_policy("calm").cost_terms(5, costs), cost)
    assert calm.classifier_macs == 100 + 111 + 111


def test_in_the_papers_table_a_linear_classifier_is_free() -> None:
    assert CLASSIFIERS.at("calm", 2).cost == EvaluationCost(64, 0)
    assert CLASSIFIERS.at("ffn", 2).cost.paper_weights == CLASSIFIERS.at("ffn", 2).macs
    assert CLASSIFIERS.at("mamba", 2).cost.paper_weights == 32 * (24 + 24 + 10 + 1) + 24 * 2


def test_without_eligible_tokens_there_is_no_reduction() -> None:
    """Also where prompts warmed a classifier, which costs something."""
    trace = Trace(5, 5, 1, (), generated=True)
    costs = dict.fromkeys(EXITS, EvaluationCost(100, 100))
    record = account(trace, classifier_policy("mamba").cost_terms(5, costs), engine_with_exits().backbone.cost)
    assert record.classifier_macs == 3 * 5 * 100
    assert record.compute_reduction == record.compute_reduction_paper == 1
    assert record.compute_reduction_total < 1


def test_round_trip(tmp_path: Path) -> None:
    config = exits_config(final_block=True, top_k=3)
    checkpoint.save(tmp_path, config, CLASSIFIERS)
    opened = ExitCheckpoint.open(tmp_path)
    assert opened.config == config
    loaded = opened.load()
    for name, tensor in CLASSIFIERS.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    checkpoint.save(tmp_path / "other", config, config.build(seed=99))
    assert opened.fingerprint() != ExitCheckpoint.open(tmp_path / "other").fingerprint()


def test_checkpoints_from_before_a_size_was_added_are_read(tmp_path: Path) -> None:
    config = exits_config(classifiers=("mamba", "calm"), options=ClassifierOptions(mamba_state=5))
    checkpoint.save(tmp_path, config, varied_classifiers(config))
    options = {"mamba_state": 5, "mamba_expand": 0.25, "mamba_kernel": 4, "ffn_expand": 4.0}
    set_config(tmp_path, options=options)
    opened = ExitCheckpoint.open(tmp_path)
    assert opened.config == config
    assert opened.load().kinds == ("mamba", "calm")


def test_every_kind_and_every_confidence_is_in_its_table() -> None:
    assert set(TABLE) == set(get_args(ClassifierKind))
    assert set(CONFIDENCES) == set(get_args(ConfidenceName))
    assert {kind for kind, classifier in TABLE.items() if classifier.recurrent} == set(RECURRENT)
    sizes = {name for classifier in TABLE.values() for name in classifier.sizes}
    assert sizes == set(ClassifierOptions.__dataclass_fields__)
    named = resolve_confidence("classifier", "hybrid")
    assert named is resolve_confidence("classifier", "hybrid"), "policies share it"
    assert (named.name, named.recurrent, named.reads_lm_head) == ("hybrid", True, False)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, exits_config(), CLASSIFIERS)
    opened = ExitCheckpoint.open(tmp_path)
    opened.check_fits("llama", HIDDEN, LAYERS)
    with pytest.raises(UserError, match="hidden size is 32 there and 64 here"):
        opened.check_fits("llama", 64, LAYERS)
    with pytest.raises(UserError, match="number of blocks is 6 there and 8 here"):
        opened.check_fits("llama", HIDDEN, 8)
    with pytest.raises(UserError, match="architecture is 'llama' there and 'mistral' here"):
        opened.check_fits("mistral", HIDDEN, LAYERS)
    with pytest.raises(UserError, match=r"trained for other weights.*exits_check=false"):
        opened.check_fingerprint("0" * 64)
    opened.check_fingerprint(model_fingerprint(tiny_model("llama")))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be used"),
        (lambda folder: (folder / "config.json").write_text('{"format": "other"}'), "not an exit checkpoint"),
        (lambda folder: set_config(folder, format_version=99), "format_version is 99"),
        (lambda folder: set_config(folder, exit_layers=[3, 2, 4]), "are not rising numbers"),
        (lambda folder: set_config(folder, exit_layers=[2, 6]), "are not rising numbers"),
        (lambda folder: set_config(folder, classifiers=[]), "are not some of calm, ffn, mamba, hybrid"),
        (lambda folder: set_config(folder, activation="swoosh"), "activation 'swoosh' is unknown"),
        (lambda folder: set_config(folder, exit_layers=[2, 3]), "exits.safetensors cannot be used"),
        (lambda folder: (folder / "exits.safetensors").write_bytes(b"1234"), "exits.safetensors cannot be used"),
        (lambda folder: (folder / "exits.safetensors").unlink(), "exits.safetensors cannot be used"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    checkpoint.save(tmp_path, exits_config(), CLASSIFIERS)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        ExitCheckpoint.open(tmp_path).load()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["by_kind.calm.3.out_proj.weight", "adapters.2.up.bias"])
def test_exits_that_are_not_finite_are_refused_by_name(tmp_path: Path, name: str, value: float) -> None:
    config = exits_config(adapter="affine")
    checkpoint.save(tmp_path, config, config.build(), dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "exits.safetensors")
    tensors[name].view(-1)[1] = value
    save_file(tensors, tmp_path / "exits.safetensors")
    set_config(tmp_path, weights_checksum=file_checksum(tmp_path / "exits.safetensors"))
    message = re.escape(f"exits={str(tmp_path)!r}: exits.safetensors cannot be used: {name} (1 of ")
    with pytest.raises(UserError, match=message):
        ExitCheckpoint.open(tmp_path).load()


def test_one_changed_weight_makes_other_exits_and_another_dtype_does_not(tmp_path: Path) -> None:
    classifiers = exits_config().build(3).to(torch.bfloat16)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        checkpoint.save(tmp_path, exits_config(), classifiers, dtype=dtype)
        found.append(ExitCheckpoint.open(tmp_path).fingerprint())
    tensors = load_file(tmp_path / "exits.safetensors")
    tensors["by_kind.ffn.3.in_proj.weight"][70, 5] *= 1.0001
    save_file(tensors, tmp_path / "exits.safetensors")
    found.append(ExitCheckpoint.open(tmp_path).fingerprint())
    assert found[0] == found[1] != found[2]


def set_config(folder: Path, **changes: Any) -> None:
    """Changes a checkpoint by hand: without a checksum nothing vouches for its content."""
    file = folder / "config.json"
    data = json.loads(file.read_text())
    del data["checksum"]
    file.write_text(json.dumps({**data, **changes}))


def test_the_fingerprint_of_files_is_that_of_the_weights_in_any_dtype(tmp_path: Path) -> None:
    model = copy.deepcopy(tiny_model("qwen2")).to(torch.bfloat16)
    expected = model_fingerprint(model)
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype).save_pretrained(tmp_path / str(dtype))
        assert files_fingerprint(str(tmp_path / str(dtype)), {}) == expected
    assert model_fingerprint(tiny_model("qwen3")) != expected
    assert files_fingerprint("nobody/nothing", {}) is None


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_do_not_depend_on_the_other_kinds(kind: str) -> None:
    alone = ExitClassifiers((kind,), EXITS, HIDDEN, "silu", ClassifierOptions(), seed=5)
    together = ExitClassifiers(KINDS, EXITS, HIDDEN, "silu", ClassifierOptions(), seed=5)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(together.state_dict()[name], tensor)


def test_classifier_sizes_follow_the_options() -> None:
    small = make_classifier("mamba", 576, "silu", ClassifierOptions())
    large = make_classifier("mamba", 576, "silu", ClassifierOptions(mamba_state=128, mamba_expand=2))
    assert small.macs == 193_952  # a twentieth of a block of SmolLM2
    assert large.macs > 9 * small.macs
    hybrid = make_classifier("hybrid", 576, "silu", ClassifierOptions())
    assert hybrid.macs == small.macs - 144 * 2 + (144 + 576) * 144 + 144 * 2
    with pytest.raises(UserError, match="mamba_state must be at least 1, got 0"):
        ClassifierOptions(mamba_state=0)
    with pytest.raises(UserError, match="hybrid_expand must be a finite number above 0, got 0"):
        ClassifierOptions(hybrid_expand=0)


def test_lengths_of_rows_are_found_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that finishes frees its line for the next, whose state begins anew."""
    engine = engine_with_exits()
    policy = separated(classifier_policy("mamba"))
    together = run_generate(engine, [policy] * len(PROMPTS), PROMPTS, 2)
    alone = [run_generate(engine, [policy], [prompt], 1)[0] for prompt in PROMPTS]
    assert together == alone
    assert np.any([layer < LAYERS for result in alone for layer in result.trace.exit_layers])

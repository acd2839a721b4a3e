"""The engine against transformers, and against early exit written a second time (``reference``)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, LAYERS, MAMBAS, TRANSFORMERS, random_ids, tiny_model
from reference import reference_generate, reference_score

from dynamax_lm_eval.backbones import TransformerBackbone, make_backbone
from dynamax_lm_eval.backbones.transformer import attention
from dynamax_lm_eval.backbones.transformer.deferred_kv import DeferredKV
from dynamax_lm_eval.backbones.transformer.forward_pass import TransformerPass
from dynamax_lm_eval.backbones.transformer.fused_llama import FusedLlamaBlock
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate_all
from dynamax_lm_eval.engine.parity import check_against_model, check_state_recompute, checked_engine
from dynamax_lm_eval.engine.requests import Generation, GenerationRequest, Scoring, ScoringRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.engine.scoring import score_all
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy

FULL = ExitPolicy(LAYERS)
PROMPTS = [random_ids(length, seed) for seed, length in enumerate((13, 4, 9, 1, 7))]
NEW_TOKENS = 8
MODES = ("recompute", "copy", "skip")


#: Families of blocks that differ in kind: K and V apart, rotary embedding and window by layer, K and V fused, Mamba.
KINDS_OF_BLOCKS = ("llama", "gemma3", "gpt_neox", *MAMBAS)


def with_modes(*families: str) -> Any:
    """Families with each of their state modes; copy is refused on Gemma 3 and on Mamba, which has tests of its own.

    Of a family whose kind of block another one has too, all modes but the first are slow.
    """
    pairs = [
        pytest.param(
            family, mode, marks=[pytest.mark.slow] if family not in KINDS_OF_BLOCKS and mode != MODES[0] else []
        )
        for family in families
        for mode in MODES
        if mode != "copy" or not (family == "gemma3" or "mamba" in family)
    ]
    return pytest.mark.parametrize(("family", "mode"), pairs)


def engine_for(family: str, *dtype: torch.dtype) -> Engine:
    return Engine(make_backbone(tiny_model(family, *dtype), max_length=256))


def run_generate(
    engine: Engine, policies: list[ExitPolicy], prompts: list[list[int]], max_rows: int
) -> list[Generation]:
    requests = [
        GenerationRequest(prompt, NEW_TOKENS, policy, Sampler(), lambda _: False)
        for prompt, policy in zip(prompts, policies, strict=True)
    ]
    return generate_all(engine, requests, max_rows)


def run_score(
    engine: Engine, policy: ExitPolicy, pairs: list[tuple[list[int], list[int]]], max_rows: int
) -> list[Scoring]:
    requests = [
        ScoringRequest([*context, *continuation[:-1]], len(context), [[t] for t in continuation], policy)
        for context, continuation in pairs
    ]
    return score_all(engine, requests, max_rows)


@torch.no_grad()
def model_scores(model: Any, context: list[int], continuation: list[int]) -> tuple[list[float], list[int]]:
    """Log-probabilities of a continuation by transformers' own forward, and the most probable tokens there."""
    logits = model(torch.tensor([[*context, *continuation[:-1]]])).logits[0, len(context) - 1 :]
    scores = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])[:, 0]
    return scores.tolist(), logits.argmax(-1).tolist()


def separated_policies(
    model: Any, policy: ExitPolicy, prompt: list[int], quantile: float = 0.5, classifiers: Any = None
) -> Iterator[ExitPolicy]:
    """The policy with thresholds at which some tokens exit; those farthest from the prompt's confidences first."""
    never_exits = replace(policy, thresholds=(0.9999,) * len(policy.exit_layers))
    _, never = reference_generate(model, never_exits, prompt, 12, classifiers)
    values = sorted(value + 0.9999 for value in never.confidences)
    middle = values[int(quantile * len(values)) :]
    gaps = [(b - a, (a + b) / 2) for a, b in itertools.pairwise(middle)]
    for _, threshold in sorted(gaps[: len(gaps) // 2 + 1], reverse=True):
        yield replace(policy, thresholds=(threshold,) * len(policy.exit_layers))


def separated_policy(*args: Any, **kwargs: Any) -> ExitPolicy:
    """The policy with thresholds at which no token of the prompt is within rounding of deciding otherwise."""
    return next(separated_policies(*args, **kwargs))


def is_separated(*rows: Any, by: float = 1e-5) -> bool:
    return all(abs(value) > by for row in rows for value in row.confidences)


@pytest.mark.parametrize("family", FAMILIES)
def test_exits_off_generates_what_transformers_generates(family: str) -> None:
    model = tiny_model(family)
    results = run_generate(engine_for(family), [FULL] * len(PROMPTS), PROMPTS, max_rows=3)
    for prompt, result in zip(PROMPTS, results, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert result.tokens == expected[0, len(prompt) :].tolist()
        assert set(result.trace.exit_layers) == {LAYERS}
        assert len(result.trace.exit_layers) == NEW_TOKENS - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_exits_off_scores_what_transformers_scores(family: str) -> None:
    model = tiny_model(family)
    pairs = [(prompt, random_ids(6, 50 + i)) for i, prompt in enumerate(PROMPTS)]
    for (context, continuation), result in zip(pairs, run_score(engine_for(family), FULL, pairs, 3), strict=True):
        expected, greedy = model_scores(model, context, continuation)
        assert [line[0] for line in result.log_probs] == pytest.approx(expected, abs=1e-4)
        assert result.greedy_tokens == greedy


@with_modes(*TRANSFORMERS, *MAMBAS)
def test_generation_equals_the_reference(family: str, mode: Any) -> None:
    model = tiny_model(family)
    exited = 0
    for confidence in ("softmax", "entropy", "state"):
        policy = ExitPolicy(LAYERS, (2, 3, 5), (0.5,) * 3, confidence=confidence, state_mode=mode)  # type: ignore[arg-type]
        policy = separated_policy(model, policy, PROMPTS[0])
        expected = [reference_generate(model, policy, prompt, NEW_TOKENS) for prompt in PROMPTS[:3]]
        assert is_separated(*(row for _, row in expected))
        results = run_generate(engine_for(family), [policy] * 3, PROMPTS[:3], max_rows=2)
        for (tokens, row), result in zip(expected, results, strict=True):
            assert result.tokens == tokens
            assert list(result.trace.exit_layers) == row.layers[result.trace.prompt_tokens :]
            exited += sum(layer < LAYERS for layer in row.layers)
    assert exited > 0


@pytest.mark.parametrize("scope", ["generated", "all"])
@with_modes("llama", "mistral", "qwen3", "gpt_neox", "gemma3", *MAMBAS)
def test_scoring_in_parallel_equals_feeding_one_by_one(family: str, mode: Any, scope: Any) -> None:
    model = tiny_model(family)
    pairs = [(prompt, random_ids(9, 70 + i)) for i, prompt in enumerate(PROMPTS)]
    exited = 0
    for confidence in ("softmax", "entropy", "state"):
        policy = ExitPolicy(
            LAYERS,
            (2, 3, 5),
            (0.5,) * 3,
            confidence=confidence,
            state_mode=mode,
            exit_scope=scope,  # type: ignore[arg-type]
        )
        # Of this many tokens, some are next to almost any threshold.
        for candidate in separated_policies(model, policy, PROMPTS[0]):
            expected = [reference_score(model, candidate, *pair) for pair in pairs]
            if is_separated(*(row for _, row in expected), by=3e-5):
                break
        else:
            pytest.fail("every threshold is next to a confidence")
        for (scores, row), result in zip(expected, run_score(engine_for(family), candidate, pairs, 3), strict=True):
            first = candidate.first_eligible_position(result.trace.prompt_tokens)
            assert list(result.trace.exit_layers) == row.layers[first:]
            assert [line[0] for line in result.log_probs] == pytest.approx(scores, abs=1e-4)
            exited += sum(layer < LAYERS for layer in row.layers)
    assert exited > 0


#: The first block, one in the middle, those right behind an exit, and the last one: with exits at 2 and 5.
PRUNED = ((1, 4), (1,), (3,), (6,), (3, 4, 6))


@pytest.mark.parametrize("pruned", PRUNED)
@with_modes("llama", "mistral", "phi3", *MAMBAS)
def test_prompts_that_exit_and_pruned_blocks_follow_the_reference(
    family: str, mode: Any, pruned: tuple[int, ...]
) -> None:
    model = tiny_model(family)
    policy = ExitPolicy(LAYERS, (2, 5), (0.5, 0.5), state_mode=mode, exit_scope="all", pruned_blocks=frozenset(pruned))
    policy = separated_policy(model, policy, PROMPTS[0])
    expected = [reference_generate(model, policy, prompt, NEW_TOKENS) for prompt in PROMPTS[:3]]
    assert is_separated(*(row for _, row in expected))
    results = run_generate(engine_for(family), [policy] * 3, PROMPTS[:3], max_rows=2)
    for (tokens, row), result in zip(expected, results, strict=True):
        assert result.tokens == tokens
        assert list(result.trace.exit_layers) == row.layers[1:]
    assert any(layer < LAYERS for _, row in expected for layer in row.layers[:4]), "a prompt token left"


@pytest.mark.parametrize("decay", [None, 4.0])
def test_thresholds_per_exit_and_decay_follow_the_reference(decay: float | None) -> None:
    model = tiny_model("llama")
    policy = ExitPolicy(LAYERS, (1, 3, 4), (1.0, 0.3, 0.15), threshold_decay=decay)
    tokens, row = reference_generate(model, policy, PROMPTS[0], NEW_TOKENS)
    assert is_separated(row)
    result = run_generate(engine_for("llama"), [policy], PROMPTS[:1], 1)[0]
    assert result.tokens == tokens
    assert list(result.trace.exit_layers) == row.layers[len(PROMPTS[0]) :]
    assert 1 not in row.layers, "threshold 1 never exits"


@pytest.mark.parametrize(("family", "third_mode"), [("llama", "copy"), ("mamba2", "recompute")])
def test_rows_do_not_depend_on_who_shares_the_batch(family: str, third_mode: Any) -> None:
    """Different policies in one batch give each row what it gets alone."""
    model, engine = tiny_model(family), engine_for(family)
    base = ExitPolicy(LAYERS, (2, 3, 5), (0.5,) * 3)
    policies = [
        separated_policy(model, replace(base, state_mode="skip"), PROMPTS[0]),
        FULL,
        separated_policy(model, replace(base, state_mode=third_mode, confidence="state"), PROMPTS[0]),
        replace(FULL, pruned_blocks=frozenset({4, 5})),
        separated_policy(model, replace(base, confidence="entropy", pruned_blocks=frozenset({4})), PROMPTS[0]),
    ]
    together = run_generate(engine, policies, PROMPTS, max_rows=5)
    few = run_generate(engine, policies, PROMPTS, max_rows=2)
    for i, policy in enumerate(policies):
        alone = run_generate(engine, [policy], [PROMPTS[i]], max_rows=1)[0]
        assert together[i] == alone
        assert few[i] == alone
        tokens, _ = reference_generate(model, policy, PROMPTS[i], NEW_TOKENS)
        assert alone.tokens == tokens


def test_threshold_one_is_the_backbone_and_evaluates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_for("qwen2")
    policy = ExitPolicy(LAYERS, (2, 4), (1.0, 1.0))

    def forbidden(*_: Any) -> None:
        raise AssertionError("an exit was evaluated")

    expected = run_generate(engine, [FULL] * 2, PROMPTS[:2], 2)
    monkeypatch.setattr("dynamax_lm_eval.exits.confidences.softmax.SoftmaxConfidence.score", forbidden)
    assert run_generate(engine, [policy] * 2, PROMPTS[:2], 2) == expected


def test_pruning_equals_a_model_without_the_blocks() -> None:
    import copy

    model = tiny_model("mistral")
    smaller = copy.deepcopy(model)
    smaller.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(smaller.model.layers) if i not in (3, 4))
    for i, layer in enumerate(smaller.model.layers):
        layer.self_attn.layer_idx = i
    smaller.config.num_hidden_layers = LAYERS - 2
    policy = replace(FULL, pruned_blocks=frozenset({4, 5}))
    for prompt, result in zip(PROMPTS, run_generate(engine_for("mistral"), [policy] * 5, PROMPTS, 2), strict=True):
        expected = smaller.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert result.tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("mode", MODES)
def test_blocks_are_really_skipped(mode: Any) -> None:
    """The number of tokens that each block sees is the number of tokens that ran it, pruning included."""
    model = tiny_model("llama")
    policy = ExitPolicy(LAYERS, (2, 3), (0.5,) * 2, state_mode=mode, pruned_blocks=frozenset({5}))
    policy = separated_policy(model, policy, PROMPTS[0])
    seen = [0] * (LAYERS + 1)
    hooks = [
        layer.register_forward_hook(
            lambda _, args, __, block=block: seen.__setitem__(block, seen[block] + args[0].shape[1])
        )
        for block, layer in enumerate(model.model.layers, start=1)
    ]
    try:
        results = run_generate(engine_for("llama"), [policy] * 3, PROMPTS[:3], 2)
    finally:
        for hook in hooks:
            hook.remove()
    prompts = sum(len(prompt) for prompt in PROMPTS[:3])
    layers = [layer for result in results for layer in result.trace.exit_layers]
    assert min(layers) < LAYERS
    for block in range(1, LAYERS + 1):
        ran = 0 if block == 5 else prompts + sum(layer >= block for layer in layers)
        assert seen[block] == ran


def test_several_last_tokens_share_one_row() -> None:
    engine = engine_for("llama")
    context, last = PROMPTS[0], [5, 9, 11]
    [found] = score_all(engine, [ScoringRequest([*context, 7], len(context), [[7], last], FULL)], 1)
    alone = run_score(engine, FULL, [(context, [7, token]) for token in last], 3)
    assert found.log_probs[1] == pytest.approx([result.log_probs[1][0] for result in alone], abs=1e-4)


def test_long_rows_are_cut_into_query_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of windows and gaps are made for a few queries at a time; the size does not matter."""
    pairs = [(random_ids(40, 1), random_ids(23, 2))]
    policy = ExitPolicy(LAYERS, (2, 4), (0.1, 0.1), state_mode="skip")
    for family in ("mistral", "gemma3"):
        whole = run_score(engine_for(family), policy, pairs, 1)
        monkeypatch.setattr(attention, "_QUERY_CHUNK", 7)
        assert run_score(engine_for(family), policy, pairs, 1)[0].log_probs == [
            pytest.approx(line, abs=1e-4) for line in whole[0].log_probs
        ]
        monkeypatch.undo()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_half_precision_stays_near_full_precision(family: str, dtype: torch.dtype) -> None:
    """With every token leaving at the first exit, scores differ from float32 by rounding only."""
    policy = ExitPolicy(LAYERS, (3,), (0.0,), confidence="state")
    pairs = [(prompt, random_ids(6, 50 + i)) for i, prompt in enumerate(PROMPTS)]
    # A calm model: with the wide weights of the other tests, rounding grows from block to block.
    models = [calm_model(family, kind) for kind in (torch.float32, dtype)]
    full, half = (run_score(Engine(TransformerBackbone(model, 256)), policy, pairs, 3) for model in models)
    for ours, exact in zip(half, full, strict=True):
        assert ours.trace == exact.trace
        assert set(ours.trace.exit_layers) == {3}
        values = [line[0] for line in ours.log_probs]
        assert values == pytest.approx([line[0] for line in exact.log_probs], abs=0.08)


def calm_model(family: str, dtype: torch.dtype) -> Any:
    import copy

    model = copy.deepcopy(tiny_model(family))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 0.3
    return model.to(dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_cuda_gives_what_the_cpu_gives(family: str, mode: Any) -> None:
    import copy

    model = tiny_model(family)
    policy = separated_policy(model, ExitPolicy(LAYERS, (2, 3, 5), (0.5,) * 3, state_mode=mode), PROMPTS[0])
    on_gpu = Engine(TransformerBackbone(copy.deepcopy(model).cuda(), max_length=256))
    expected = run_generate(engine_for(family), [policy] * 3, PROMPTS[:3], 2)
    assert run_generate(on_gpu, [policy] * 3, PROMPTS[:3], 2) == expected


def test_copy_is_refused_between_different_rotary_settings() -> None:
    policy = ExitPolicy(LAYERS, (2,), (0.5,), state_mode="copy")
    with pytest.raises(UserError, match="state_mode=copy is not possible on Gemma3"):
        engine_for("gemma3").check_policy(policy)
    engine_for("llama").check_policy(policy)


class TestSelfCheck:
    """What the layer loop does not compute is refused by name at load."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_accepts(self, family: str) -> None:
        engine = engine_for(family)
        check_against_model(engine, tiny_model(family))
        check_state_recompute(engine)

    def test_refuses_scaled_embeddings(self) -> None:
        import transformers as hf

        torch.manual_seed(0)
        config = hf.GraniteConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            embedding_multiplier=12.0,
        )
        model = hf.GraniteForCausalLM(config).eval()
        with pytest.raises(UserError, match="GraniteForCausalLM is not supported"):
            check_against_model(Engine(TransformerBackbone(model)), model)

    def test_refuses_soft_capped_attention(self) -> None:
        import transformers as hf

        config = hf.Gemma2Config(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
        model = hf.Gemma2ForCausalLM(config).eval()
        with pytest.raises(UserError, match="softcap"):
            check_against_model(Engine(TransformerBackbone(model)), model)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_sees_small_errors_in_every_dtype(self, family: str, dtype: torch.dtype) -> None:
        import copy

        model = tiny_model(family, dtype)
        scaled = copy.deepcopy(model)
        scaled.get_output_embeddings().weight.data *= 1.05
        check_against_model(Engine(make_backbone(model, 256)), model)
        with pytest.raises(UserError, match="more than rounding explains"):
            check_against_model(Engine(make_backbone(model, 256)), scaled)

    def test_counts_the_window_that_the_blocks_use(self) -> None:
        import copy

        for family, windows in (("mistral", [5] * 6), ("gemma3", [5, 5, None] * 2), ("qwen2", [None] * 6)):
            engine = engine_for(family)
            check_against_model(engine, tiny_model(family))
            assert [block.window for block in engine.backbone.cost.blocks] == windows
        # Converted checkpoints carry windows in their configuration that a Llama never looks at.
        model = copy.deepcopy(tiny_model("llama"))
        model.config.sliding_window = 5
        engine = Engine(TransformerBackbone(model, 256))
        check_against_model(engine, model)
        assert [block.window for block in engine.backbone.cost.blocks] == [None] * 6

    def test_refuses_by_name_what_fails_on_the_way(self) -> None:
        import transformers as hf

        sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
        stablelm = hf.StableLmForCausalLM(hf.StableLmConfig(**sizes)).eval()
        with pytest.raises(UserError, match="StableLmForCausalLM is not supported: it cannot be used block by block"):
            checked_engine(stablelm, ExitPolicy(2), 64)
        phi = hf.PhiForCausalLM(hf.PhiConfig(**sizes)).eval()
        checked_engine(phi, ExitPolicy(2), 64)
        exits = ExitPolicy(2, (1,), (0.5,))
        checked_engine(phi, replace(exits, state_mode="skip"), 64)
        with pytest.raises(UserError, match=r"skip and copy may work|use state_mode=skip or copy"):
            checked_engine(phi, exits, 64)

    def test_refuses_learned_positions(self) -> None:
        import transformers as hf

        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)).eval()
        with pytest.raises(UserError, match="GPT2LMHeadModel"):
            TransformerBackbone(model)

    def test_refuses_a_wrong_projection(self) -> None:
        engine = engine_for("phi3")
        block = engine.backbone.blocks[1]  # type: ignore[attr-defined]
        wrong = replace(block, project=lambda h, c, s: tuple(2 * x for x in block.project(h, c, s)))
        engine.backbone.blocks[1] = wrong  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="block 2"):
            check_state_recompute(engine)

    def test_refuses_a_wrong_projection_of_a_lean_block(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = FusedLlamaBlock.states
        monkeypatch.setattr(FusedLlamaBlock, "states", lambda *args: tuple(2 * x for x in right(*args)))
        with pytest.raises(UserError, match="block 1"):
            check_state_recompute(engine_for("llama"))

    def test_refuses_weights_that_are_not_finite(self) -> None:
        import copy

        model = copy.deepcopy(tiny_model("llama"))
        model.model.layers[0].mlp.up_proj.weight.data.fill_(float("nan"))
        with pytest.raises(UserError, match="not finite"):
            check_against_model(Engine(TransformerBackbone(model)), model)

    def test_refuses_rope_that_depends_on_the_longest_row(self) -> None:
        import transformers as hf

        config = hf.LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        )
        model = hf.LlamaForCausalLM(config).eval()
        with pytest.raises(UserError, match="max_length="):
            TransformerBackbone(model, max_length=128)
        TransformerBackbone(model, max_length=32)

    def test_leaves_the_model_as_it_was(self) -> None:
        model = tiny_model("llama")
        model.config._attn_implementation = "sdpa"
        check_against_model(engine_for("llama"), model)
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("scope", ["generated", "all"])
def test_states_are_recomputed_only_where_a_later_token_needs_them(scope: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """K and V of a token that left: once per block, and never after the row's last token that goes there."""
    model = tiny_model("llama")
    engine = engine_for("llama")
    policy = ExitPolicy(LAYERS, (2, 4), (0.5,) * 2, exit_scope=scope)
    policy = separated_policy(model, policy, PROMPTS[0])
    recomputed = [0] * (LAYERS + 1)
    project = TransformerPass.project

    def count(run: TransformerPass, block: int, hidden: torch.Tensor, rotary: Any) -> Any:
        recomputed[block] += hidden.shape[1]
        return project(run, block, hidden, rotary)

    monkeypatch.setattr(TransformerPass, "project", count)
    (result,) = run_generate(engine, [policy], PROMPTS[:1], 1)
    layers = [LAYERS] * (result.trace.fed_tokens - len(result.trace.exit_layers)) + list(result.trace.exit_layers)
    prompt = len(PROMPTS[0])
    for block in range(1, LAYERS + 1):
        reached = [position for position, layer in enumerate(layers) if layer >= block]
        last = max(reached)
        # A pass takes the whole prompt at once, so whoever left in it counts for any of its tokens.
        needed = [p for p, layer in enumerate(layers) if layer < block and (p < last or (last < prompt and p < prompt))]
        assert recomputed[block] == len(needed)
    assert 0 < sum(recomputed) <= sum(LAYERS - layer for layer in layers)


@pytest.mark.parametrize("changes", [{"pruned_blocks": frozenset({6})}, {"final_block": True}])
def test_nothing_stays_owed_to_blocks_that_are_given_nothing(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that left are forgotten once the last block that gets their states has them, while their row goes on."""
    policy = ExitPolicy(LAYERS, (2,), (0.0,), confidence="state", exit_scope="all", **changes)
    owing: list[int] = []
    add = DeferredKV.add

    def count(owed: DeferredKV, *given: Any) -> None:
        add(owed, *given)
        owing.append(len(owed))

    monkeypatch.setattr(DeferredKV, "add", count)
    # Position 0 goes on, so the prompt's states are needed at once; those of generated tokens, which all leave, never.
    run_generate(engine_for("llama"), [policy], PROMPTS[:1], 1)
    assert owing == [len(PROMPTS[0]) - 1, *range(1, NEW_TOKENS)]
    owing.clear()
    run_generate(engine_for("llama"), [replace(policy, exit_layers=(5,))], PROMPTS[:1], 1)
    assert owing == []

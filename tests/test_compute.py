"""The cost model against transformers' own arithmetic, and the ledger against worked examples."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf
from helpers import LAYERS, MAMBAS, TRANSFORMERS, random_ids, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from dynamax_lm_eval.backbones import MambaBackbone, TransformerBackbone, make_backbone
from dynamax_lm_eval.compute.accounting import ComputeRecord, account, exit_histogram, merge, reduction_stderr
from dynamax_lm_eval.compute.cost import BackboneCost, BlockCost, ExitCost
from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.exits.policy import ExitPolicy

NONE = frozenset[int]()


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_block_macs_equal_counted_flops_of_a_decoding_step(family: str) -> None:
    """One token through transformers' eager attention: 2 FLOPs per MAC."""
    model = tiny_model(family)
    before, model.config._attn_implementation = model.config._attn_implementation, "eager"
    cost = make_backbone(model, max_length=64).cost
    try:
        for context in (3, 11):
            cache = hf.DynamicCache(config=model.config)
            ids = torch.tensor([random_ids(context + 1, 0)])
            with torch.no_grad():
                model(ids[:, :context], past_key_values=cache)
                with FlopCounterMode(display=False) as counter:
                    model(ids[:, context:], past_key_values=cache)
            # The families turn positions into angles by a small matrix product, which is not counted as compute.
            rotary = sum(
                sum(counts.values()) for name, counts in counter.flop_counts.items() if name.endswith("rotary_emb")
            )
            expected = sum(block.at(context) for block in cost.blocks) + cost.lm_head
            assert (counter.get_total_flops() - rotary) == 2 * expected
    finally:
        model.config._attn_implementation = before


@pytest.mark.parametrize("family", MAMBAS)
def test_projections_of_mamba_equal_counted_flops(family: str) -> None:
    """What torch counts of a step: all but the convolution and the element-wise part of the recurrence."""
    model = tiny_model(family)
    cost = MambaBackbone(model).cost
    ids, cache = torch.tensor([random_ids(6, 0)]), hf.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], cache_params=cache)
        with FlopCounterMode(display=False) as counter:
            model(ids[:, 5:], cache_params=cache)
    # A step reads the state out by a product: the third H * P * N of the recurrence. The convolution is depthwise.
    kernel, state = model.config.conv_kernel, model.config.state_size
    counts = counter.flop_counts["Global"]
    convolved = sum(count for operator, count in counts.items() if "convolution" in str(operator))
    read = LAYERS * 64 * state
    expected = sum(block.weights for block in cost.blocks) + cost.lm_head + read
    assert counter.get_total_flops() - convolved == 2 * expected
    channels = 64 + (2 * 2 * state if family == "mamba2" else 0)
    assert cost.blocks[0].recurrence == channels * kernel + 3 * 64 * state


def test_figures_of_codestral_mamba_7b() -> None:
    """Exact MACs by hand, and how far the paper's 9/26 of a block is from them."""
    with torch.device("meta"):
        model = hf.Mamba2ForCausalLM(hf.Mamba2Config(num_hidden_layers=2, tie_word_embeddings=False))
    cost = MambaBackbone(model).cost
    block, d, inner, groups_states, heads = cost.blocks[0], 4096, 8192, 8 * 128, 128
    assert block.weights == d * (2 * inner + 2 * groups_states + heads) + inner * d
    conv, ssm = (inner + 2 * groups_states) * 4, inner * 128
    assert block.recurrence == conv + 3 * ssm
    assert block.at(0) == block.at(10_000) == block.weights + block.recurrence
    assert block.state_recompute == d * (inner + 2 * groups_states + heads) + conv + 2 * ssm
    assert block.paper_recompute == 9 / 26
    assert block.state_recompute / block.at(0) == pytest.approx(0.396, abs=0.001)
    assert (block.state_recompute - conv - 2 * ssm) / block.weights == pytest.approx(0.388, abs=0.001)
    assert cost.lm_head == d * 32768


def test_figures_of_mistral_7b() -> None:
    """State recompute is exactly 1/26 of a block's weights on Mistral 7B, an LM-head read 0.6 blocks."""
    with torch.device("meta"):
        model = hf.MistralForCausalLM(
            hf.MistralConfig(
                vocab_size=32768,
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=2,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
                sliding_window=None,
            )
        )
    cost = TransformerBackbone(model).cost
    block = cost.blocks[0]
    assert block.weights == 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336)
    assert block.state_recompute * 26 == block.weights
    assert cost.lm_head / cost.mean_block_weights == pytest.approx(0.615, abs=0.001)


def test_figures_of_smollm2_135m() -> None:
    """1/16 of a block for state recompute, and 8 blocks for an LM-head read."""
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=49152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=2,
                num_attention_heads=9,
                num_key_value_heads=3,
                tie_word_embeddings=True,
            )
        )
    cost = TransformerBackbone(model).cost
    assert cost.blocks[0].state_recompute * 16 == cost.blocks[0].weights
    assert cost.lm_head == 8 * cost.blocks[0].weights


COST = BackboneCost(
    (
        BlockCost(weights=100, per_position=6, window=None, state_recompute=10),
        BlockCost(weights=200, per_position=10, window=2, state_recompute=20),
        BlockCost(weights=300, per_position=6, window=None, state_recompute=30),
        BlockCost(weights=400, per_position=10, window=2, state_recompute=40),
    ),
    lm_head=1000,
)


def exit_cost(**changes: object) -> ExitCost:
    base = ExitCost(
        evaluated_layers=(1, 3),
        classifier_macs=(0, 0),
        reads_lm_head=False,
        recomputes_state=False,
        pruned_blocks=NONE,
        first_eligible=2,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


#: Two prompt tokens, three generated: positions 2 and 3 were fed, one left after block 1, one ran through.
TRACE = Trace(prompt_tokens=2, fed_tokens=4, num_output_tokens=3, exit_layers=(1, 4), generated=True)


def blocks_at(position: int, *blocks: int) -> int:
    return sum(COST.blocks[block - 1].at(position) for block in blocks)


def test_block_cost_by_hand() -> None:
    assert COST.blocks[0].at(4) == 100 + 2 * 3 * 5
    assert COST.blocks[1].at(0) == 200 + 2 * 5 * 1
    assert COST.blocks[1].at(4) == 200 + 2 * 5 * 2, "the window bounds the context"


def test_vectorised_block_macs_equal_the_sum_over_blocks() -> None:
    rng = np.random.default_rng(0)
    positions, layers = rng.integers(0, 9, 50), rng.integers(0, 5, 50)
    for pruned in (NONE, frozenset({2}), frozenset({1, 4})):
        expected = [
            blocks_at(p, *(b for b in range(1, layer + 1) if b not in pruned))
            for p, layer in zip(positions.tolist(), layers.tolist(), strict=True)
        ]
        assert COST.block_macs(positions, layers, pruned).tolist() == expected


def test_account_of_a_copying_run() -> None:
    record = account(TRACE, exit_cost(), COST)
    assert record.full_macs == blocks_at(2, 1, 2, 3, 4) + blocks_at(3, 1, 2, 3, 4)
    assert record.block_macs == blocks_at(2, 1) + blocks_at(3, 1, 2, 3, 4)
    assert record.exit_macs == 0
    assert record.compute_reduction == record.full_macs / record.block_macs
    prompt = blocks_at(0, 1, 2, 3, 4) + blocks_at(1, 1, 2, 3, 4)
    assert record.full_total_macs == prompt + record.full_macs + 3 * 1000
    assert record.total_macs == prompt + record.block_macs + 3 * 1000
    assert (record.paper_full, record.paper_spent) == (8.0, 5.0)
    assert record.mean_exit_layer == 2.5
    assert exit_histogram(record) == {"1": 1, "4": 1}
    assert (record.eligible_tokens, record.generated_tokens, record.prompt_tokens) == (2, 3, 2)


def test_account_of_recompute() -> None:
    record = account(TRACE, exit_cost(recomputes_state=True), COST)
    assert record.recompute_macs == 20 + 30 + 40
    assert record.paper_spent == pytest.approx(5 + 3 / 6)


def test_account_of_lm_head_reads() -> None:
    """The first token is evaluated once, and that read gives its token; the second twice, and neither does."""
    record = account(TRACE, exit_cost(reads_lm_head=True), COST)
    assert record.lm_head_macs == 2 * 1000
    assert record.paper_spent == pytest.approx(5 + 2 * 1000 / 250)
    # The last token exits at 3: two evaluations, one of them its own.
    late = replace(TRACE, exit_layers=(1, 3))
    assert account(late, exit_cost(reads_lm_head=True), COST).lm_head_macs == 1000


def test_prompt_tokens_that_exit_pay_for_all_their_reads() -> None:
    trace = Trace(prompt_tokens=4, fed_tokens=4, num_output_tokens=1, exit_layers=(1, 3, 1), generated=True)
    record = account(trace, exit_cost(reads_lm_head=True, first_eligible=1), COST)
    assert record.lm_head_macs == (1 + 2 + 0) * 1000, "only the last prompt token gives a token"


def test_account_of_classifiers() -> None:
    record = account(TRACE, exit_cost(classifier_macs=(7, 11), classifier_paper_weights=(5, 6)), COST)
    assert record.classifier_macs == 7 + (7 + 11)
    assert record.paper_spent == pytest.approx(5 + (5 + 5 + 6) / 250)


def test_pruned_blocks_are_in_the_numerator_only() -> None:
    trace = replace(TRACE, exit_layers=(4, 4))
    record = account(trace, exit_cost(pruned_blocks=frozenset({3}), recomputes_state=True), COST)
    assert record.full_macs == blocks_at(2, 1, 2, 3, 4) + blocks_at(3, 1, 2, 3, 4)
    assert record.spent_macs == blocks_at(2, 1, 2, 4) + blocks_at(3, 1, 2, 4)
    assert record.full_total_macs - record.total_macs == 4 * 300 + 2 * 3 * (1 + 2 + 3 + 4)


def test_a_full_run_is_exactly_one_and_no_eligible_tokens_too() -> None:
    full = account(replace(TRACE, exit_layers=(4, 4)), exit_cost(evaluated_layers=(), classifier_macs=()), COST)
    assert full.compute_reduction == full.compute_reduction_total == full.compute_reduction_paper == 1.0
    empty = account(Trace(2, 2, 1, (), True), exit_cost(), COST)
    assert empty.compute_reduction == 1.0
    assert empty.eligible_tokens == 0
    assert empty.mean_exit_layer is None


def test_records_add_up_and_travel_as_json() -> None:
    records = [account(replace(TRACE, exit_layers=layers), exit_cost(), COST) for layers in ((1, 4), (3, 3), (1, 1))]
    total = ComputeRecord.sum(records)
    assert total.full_macs == sum(record.full_macs for record in records)
    assert total.exit_layers == [[1, 4], [3, 3], [1, 1]]
    assert ComputeRecord.from_json(total.to_json()) == total


def test_windows_of_one_text_are_one_response() -> None:
    record = merge([account(TRACE, exit_cost(), COST)] * 2)
    assert record.responses == 1
    assert record.exit_layers == [[1, 4, 1, 4]]
    assert record.full_macs == 2 * account(TRACE, exit_cost(), COST).full_macs


def test_stderr_of_the_ratio_agrees_with_resampling() -> None:
    rng = random.Random(1)
    records = []
    for _ in range(300):
        spent = rng.randint(50, 150)
        full = int(spent * rng.uniform(1.0, 2.0))
        records.append(ComputeRecord(full_macs=full, block_macs=spent, eligible_tokens=1))
    estimate = reduction_stderr([records])
    draws = [ComputeRecord.sum(rng.choices(records, k=len(records))).compute_reduction for _ in range(400)]
    assert estimate == pytest.approx(float(np.std(draws)), rel=0.15)
    assert reduction_stderr([records[:1]]) is None


def test_stderr_of_a_group_leaves_out_how_its_tasks_differ() -> None:
    """Two tasks of unlike levels, 200 documents each, drawn again and again: the spread of the ratio is known."""
    rng = np.random.default_rng(2)
    means, n = (1.05, 1.25), 200

    def drawn(times: int) -> tuple[np.ndarray, np.ndarray]:
        spent = rng.uniform(0.8e6, 1.2e6, (times, 2, n))
        return spent * rng.normal(np.reshape(means, (2, 1)), 0.05, (times, 2, n)), spent

    full, spent = drawn(4000)
    spread = float(np.std(full.sum((1, 2)) / spent.sum((1, 2))))
    estimates = []
    for full_macs, spent_macs in zip(*drawn(20), strict=True):
        tasks = [
            [ComputeRecord(full_macs=int(a), block_macs=int(b)) for a, b in zip(*pair, strict=True)]
            for pair in zip(full_macs, spent_macs, strict=True)
        ]
        estimates.append(reduction_stderr(tasks))
    assert np.mean(estimates) == pytest.approx(spread, rel=0.05)
    pooled = reduction_stderr([[*tasks[0], *tasks[1]]])
    assert pooled is not None and pooled > 1.5 * spread, "documents of all tasks in one heap"
    assert reduction_stderr([tasks[0], tasks[1][:1]]) is None, "one document says nothing of its task's spread"


class TestPolicy:
    def test_decay_follows_calm(self) -> None:
        policy = ExitPolicy(LAYERS, (2, 3), (0.5, 1.0), threshold_decay=4.0)
        values = policy.effective_thresholds(np.asarray([-1, 0, 5]), max_steps=10)
        assert np.isinf(values[0]).all(), "not eligible"
        assert values[1, 0] == pytest.approx(0.9 * 0.5 + 0.1)
        assert values[2, 0] == pytest.approx(0.45 + 0.1 * np.exp(-2.0))
        assert np.isinf(values[:, 1]).all(), "1 never exits, whatever the decay"

    def test_active_exits_leave_out_threshold_one(self) -> None:
        assert ExitPolicy(LAYERS, (2, 3, 4), (0.5, 1.0, 0.0)).active_exits == (2, 4)


def test_records_are_plain_data() -> None:
    assert ComputeRecord.from_json(json.loads(json.dumps(ComputeRecord(exit_layers=[[1]]).to_json()))).exit_layers == [
        [1]
    ]

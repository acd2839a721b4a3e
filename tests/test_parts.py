"""Small parts by themselves: room in the caches, confidences, sampling, stop strings."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from conftest import tiny_model, train_tokenizer
from torch import nn
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from dynamax_lm_eval.backbones.transformer import attention
from dynamax_lm_eval.backbones.transformer.attention import AttentionPlan, ragged_attention
from dynamax_lm_eval.backbones.transformer.kv_cache import AttentionStates, FreeList
from dynamax_lm_eval.engine.sampling import Sampler, request_seed
from dynamax_lm_eval.exits.confidences.entropy import entropy_confidence
from dynamax_lm_eval.exits.confidences.softmax import softmax_margin
from dynamax_lm_eval.exits.confidences.state import state_similarity
from dynamax_lm_eval.harness.stopping import StopStrings
from dynamax_lm_eval.models.fingerprint import weights_fingerprint


def test_room_never_overlaps_and_is_whole_again_at_the_end() -> None:
    rng = random.Random(0)
    room, held = FreeList(100), {}
    for _ in range(2000):
        if held and rng.random() < 0.5:
            start = rng.choice(list(held))
            room.free(start, held.pop(start))
        else:
            length = rng.randint(1, 30)
            start = room.allocate(length)
            if start is not None:
                places = {place for s, n in held.items() for place in range(s, s + n)}
                assert not places.intersection(range(start, start + length))
                assert start + length <= 100
                held[start] = length
    for start, length in held.items():
        room.free(start, length)
    assert room.allocate(100) == 0


def test_a_reused_place_forgets_that_its_token_had_left() -> None:
    states = AttentionStates(num_layers=4, capacity=8)
    slot = states.allocate_row(8)
    assert slot == 0
    states.layer_of[3] = 2
    states.free_row(slot)
    assert states.allocate_row(8) == 0
    assert (states.layer_of == 4).all()
    assert states.allocate_row(1) is None


def test_plan_masks_by_position_window_and_gap() -> None:
    """Two rows at places 0.. and 10..; the second has gaps, a window of 3 and a hidden place."""
    starts, positions = np.asarray([0, 0, 10, 10]), np.asarray([0, 1, 2, 5])
    plan = AttentionPlan(starts, positions, np.asarray([14]), torch.device("cpu"))
    first, second = plan.segments(3)
    assert first.causal
    assert (first.queries, first.places) == (slice(0, 2), slice(0, 2))
    assert (second.queries, second.places) == (slice(2, 4), slice(10, 16))
    assert second.mask is not None
    seen = [np.flatnonzero(row).tolist() for row in second.mask.numpy()]
    assert seen == [[0, 1, 2], [3, 5]]
    (alone,) = AttentionPlan(np.asarray([10]), np.asarray([5]), None, torch.device("cpu")).segments(3)
    assert (alone.places, alone.mask) == (slice(13, 16), None)


def test_confidences_by_definition() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 11)
    p = logits.softmax(-1)
    top = p.sort(descending=True).values
    torch.testing.assert_close(softmax_margin(logits), top[:, 0] - top[:, 1])
    torch.testing.assert_close(entropy_confidence(logits), 1 + (p * p.log()).sum(-1) / math.log(11))
    assert entropy_confidence(torch.zeros(1, 7)).item() == pytest.approx(0, abs=1e-6)
    a, b = torch.randn(5, 8), torch.randn(5, 8)
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    torch.testing.assert_close(state_similarity(a, b), cosine.clamp(min=0))


def test_sampling_follows_the_distribution_and_reproduces() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    sampler = Sampler(do_sample=True, seed=3)
    draws = [sampler.next_token([1], probabilities.log()) for _ in range(4000)]
    counts = torch.bincount(torch.tensor(draws), minlength=6) / len(draws)
    assert counts[probabilities == 0].sum() == 0
    assert torch.allclose(counts, probabilities, atol=0.03)
    again = Sampler(do_sample=True, seed=3)
    assert [again.next_token([1], probabilities.log()) for _ in range(50)] == draws[:50]


def test_request_seeds_differ_by_run_request_and_repeat() -> None:
    seeds = {request_seed(*key) for key in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))}
    assert len(seeds) == 4
    assert request_seed(0, "a", 0) == request_seed(0, "a", 0)


def test_processors_see_prompt_and_generated_tokens() -> None:
    sampler = Sampler(LogitsProcessorList([RepetitionPenaltyLogitsProcessor(100.0)]))
    logits = torch.tensor([1.0, 5.0, 4.0, 3.0])
    assert not sampler.is_plain_greedy
    assert sampler.next_token([1, 2], logits) == 3


def test_stop_strings_end_a_generation() -> None:
    tokenizer = train_tokenizer()
    stop = StopStrings(tokenizer, ["\n", "river"], frozenset({2}))
    ids = tokenizer.encode("on the river Seine", add_special_tokens=False)
    ends = [n for n in range(1, len(ids) + 1) if stop(ids[:n])]
    assert tokenizer.decode(ids[: ends[0]]).endswith("river")
    assert stop([5, 2])
    assert not stop(tokenizer.encode("time", add_special_tokens=False))


@pytest.mark.parametrize("stops", [["\n"], ["er", "the "], ["\n\n", "Seine"], ["é"], ["never there"], []])
def test_stop_strings_are_found_without_decoding_every_token(stops: list[str]) -> None:
    """As the harness looks for them: each in the text of the last tokens, at every step."""
    tokenizer = train_tokenizer()
    rng = random.Random(0)
    text = "the river\n\nSeine, a fox jumps over time é nobody knows the answer"
    ids = tokenizer.encode(text, add_special_tokens=False)
    stop = StopStrings(tokenizer, stops, frozenset({2}))
    for _ in range(40):
        generated: list[int] = []
        for token in [rng.choice(ids) for _ in range(60)]:
            generated.append(token)
            lengths = [len(tokenizer.encode(word, add_special_tokens=False)) + 2 for word in stops]
            found = any(
                word in tokenizer.decode(generated[-length:]) for word, length in zip(stops, lengths, strict=True)
            )
            assert stop(generated) == found
            if found:
                break


def test_tokens_that_cannot_end_a_stop_string_are_decoded_once() -> None:
    tokenizer = train_tokenizer()
    decoded: list[list[int]] = []

    class Counting:
        encode = staticmethod(tokenizer.encode)

        @staticmethod
        def decode(ids: list[int]) -> str:
            decoded.append(ids)
            text: str = tokenizer.decode(ids)
            return text

    stop = StopStrings(Counting(), ["\n\n", "~"], frozenset({2}))
    ids = tokenizer.encode("the river Seine jumps over the river", add_special_tokens=False)
    for end in range(1, len(ids) + 1):
        assert not stop(ids[:end])
    assert sorted(decoded) == [[i] for i in sorted(set(ids))], "each kind of token alone, and never a text"


def test_fingerprint_tells_weights_apart() -> None:
    import copy

    model = tiny_model("llama")
    other = copy.deepcopy(model)
    assert weights_fingerprint(model) == weights_fingerprint(other)
    other.model.layers[3].mlp.down_proj.weight.data *= 1.01
    assert weights_fingerprint(model) != weights_fingerprint(other)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("hidden", [None, [1, 4, 21, 23]])
@pytest.mark.parametrize(
    "rows", [[(0, [4]), (2, [2]), (3, [5])], [(1, [3]), (2, [3])], [(2, [6]), (0, [0, 1, 2]), (3, [4])]]
)
def test_rows_that_decode_together_attend_as_each_alone(
    window: int | None,
    hidden: list[int] | None,
    rows: list[tuple[int, list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """(row, positions fed); four rows of ten places, with gaps between those in flight and prompts among them."""
    monkeypatch.setattr(attention, "_MOST_PADDING", 9)
    torch.manual_seed(0)
    key, value = torch.randn(2, 45, 2, 8)
    starts = np.asarray([10 * row for row, positions in rows for _ in positions])
    positions = np.asarray([position for _, fed in rows for position in fed])
    query = torch.randn(1, 6, len(starts), 8)
    places = None if hidden is None else np.asarray(hidden)
    plans = [AttentionPlan(starts, positions, places, torch.device("cpu"), row_stride) for row_stride in (10, None)]
    together, apart = (
        ragged_attention(nn.Module(), query, key, value, None, sliding_window=window, plan=plan)[0] for plan in plans
    )
    assert plans[0].decoding(window) is not None
    assert plans[1].decoding(window) is None
    assert torch.allclose(together, apart, atol=1e-6)


def test_rows_of_very_different_lengths_are_not_padded() -> None:
    starts, positions = np.asarray([0, 100, 200]), np.asarray([90, 1, 1])
    assert AttentionPlan(starts, positions, None, torch.device("cpu"), 100).decoding(None) is None

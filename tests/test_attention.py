"""Attention of ragged rows: masks, chunks of queries, and rows that decode together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import LAYERS, random_ids
from helpers_engine import engine_for, run_score
from torch import nn

from dynamax_lm_eval.backbones.transformer import attention
from dynamax_lm_eval.backbones.transformer.attention import AttentionPlan, ragged_attention
from dynamax_lm_eval.exits.policy import ExitPolicy


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


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("hidden", [None, [1, 4, 21, 23]])
@pytest.mark.parametrize(
    "rows", [[(0, [4]), (2, [2]), (3, [5])], [(1, [3]), (2, [3])], [(2, [6]), (0, [0, 1, 2]), (3, [4])]]
)
def test_rows_that_decode_together_attend_as_each_alone(
    window: int | None,
    hidden: list[int] | None,
    rows: list[tuple[int, list[int]]],
    copied: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """(row, positions fed); rows of ten places, with gaps between those in flight and prompts among them."""
    monkeypatch.setattr(attention, "_MOST_PADDING", 9)
    if copied:  # the last one lies far away, so that a view of all would be mostly of others
        rows = [(40 if row == max(r for r, _ in rows) else row, fed) for row, fed in rows]
    torch.manual_seed(0)
    key, value = torch.randn(2, 415, 2, 8)
    starts = np.asarray([10 * row for row, positions in rows for _ in positions])
    positions = np.asarray([position for _, fed in rows for position in fed])
    query = torch.randn(1, 6, len(starts), 8)
    places = None if hidden is None else np.asarray(hidden)
    plans = [AttentionPlan(starts, positions, places, torch.device("cpu"), row_stride) for row_stride in (10, None)]
    together, apart = (
        ragged_attention(nn.Module(), query, key, value, None, sliding_window=window, plan=plan)[0] for plan in plans
    )
    decoding = plans[0].decoding(window)
    assert decoding is not None
    assert (decoding.copied is not None) == copied
    assert plans[1].decoding(window) is None
    assert torch.allclose(together, apart, atol=1e-6)


def test_rows_of_very_different_lengths_are_not_padded_and_long_ones_not_copied() -> None:
    far, long = np.asarray([0, 40_000]), np.asarray([3000, 3000])
    assert AttentionPlan(far, long, None, torch.device("cpu"), 4000).decoding(None) is None
    assert AttentionPlan(far, long // 2, None, torch.device("cpu"), 4000).decoding(None) is not None
    starts, positions = np.asarray([0, 100, 200]), np.asarray([90, 1, 1])
    assert AttentionPlan(starts, positions, None, torch.device("cpu"), 100).decoding(None) is None

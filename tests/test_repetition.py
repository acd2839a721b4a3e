"""Generations that end in a loop are recognised."""

from __future__ import annotations

import pytest

from dynamax_lm_eval.compute.repetition import ends_in_repetition


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, *[9] * 16], True),
        ([1, 2, 3, *[9] * 15], False),
        ([1, *[7, 8] * 8], True),
        ([1, *[7, 8] * 8, 2], True),  # then a stop string
        ([1, *[7, 8] * 8, 2, 3], False),
        ([*[4, 5, 6, 7, 8] * 3, 4], True),
        ([*range(8)] * 3, True),
        ([*range(9)] * 3, False),  # longer than the longest n-gram
        ([*range(8)] * 2, False),  # twice is not three times
        ([*[1, 1, 2] * 6], True),
        ([*range(100)], False),
        ([], False),
    ],
)
def test_repetition(tokens: list[int], expected: bool) -> None:
    assert ends_in_repetition(tokens, 8, 16) == expected


def test_repetition_can_be_switched_off() -> None:
    assert not ends_in_repetition([9] * 100, 0, 16)

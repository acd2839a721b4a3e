"""Whether a generation ends in repetition: a number that says that its cheap tokens are worth nothing."""

from __future__ import annotations

from collections.abc import Sequence


def ends_in_repetition(tokens: Sequence[int], max_ngram: int, min_tokens: int) -> bool:
    """Returns whether generated tokens end in an n-gram that repeats.

    The last tokens, or those before the very last one (a stop string's, say), are one n-gram of 1 to ``max_ngram``
    tokens at least three times in a row, over at least ``min_tokens`` tokens; the first of them may be cut. Lists
    whose items are longer, and texts that repeat with changes, are not found. ``max_ngram`` 0 finds nothing.
    """
    for end in (len(tokens), len(tokens) - 1):
        for n in range(1, max_ngram + 1):
            span = max(min_tokens, 3 * n)
            if end >= span and all(tokens[i] == tokens[i - n] for i in range(end - span + n, end)):
                return True
    return False

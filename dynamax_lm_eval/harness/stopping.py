"""When a generation is over: end tokens and stop strings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any


class StopStrings:
    """Tells when a generation is over: an end token, or a stop string among the last tokens.

    A stop string of k tokens is looked for in the text of the last k + 2 tokens, as the harness does. What was not
    there before ends in the last token, so nothing is decoded unless that token has the last character of a
    stop string. Stateless, for any number of requests.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._by_length: dict[int, list[str]] = defaultdict(list)
        for stop in stops:
            length = len(tokenizer.encode(stop, add_special_tokens=False)) + 2
            self._by_length[length].append(stop)
        # Bytes of other characters, and spaces, can belong to text that a token alone does not show.
        self._last_characters = {stop[-1:] for stop in stops}
        self._every_token_may_end = not all(stop.isascii() and stop[-1:].strip(" ") for stop in stops)
        self._may_end: dict[int, bool] = {}

    def __call__(self, generated: list[int]) -> bool:
        """Says whether the generation ends with the last of these tokens."""
        last = generated[-1]
        if last in self._eos_ids:
            return True
        if last not in self._may_end:
            text = "" if self._every_token_may_end else self._tokenizer.decode([last])
            self._may_end[last] = self._every_token_may_end or any(c in text for c in self._last_characters)
        if not self._may_end[last]:
            return False
        for length, stops in self._by_length.items():
            text = self._tokenizer.decode(generated[-length:])
            if any(stop in text for stop in stops):
                return True
        return False

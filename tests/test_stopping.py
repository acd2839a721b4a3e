"""Stop strings are found where the harness would find them, without decoding every token."""

from __future__ import annotations

import random

import pytest
from helpers import train_tokenizer

from dynamax_lm_eval.harness.stopping import StopStrings


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

"""Slots of the K/V cache: no two rows share one, and none is lost."""

from __future__ import annotations

import random

from dynamax_lm_eval.backbones.transformer.kv_cache import AttentionStates, FreeList


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

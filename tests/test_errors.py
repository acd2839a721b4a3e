"""What messages say of settings that differ."""

from __future__ import annotations

from dynamax_lm_eval.errors import changed_settings


def test_names_come_first_and_hashes_are_short() -> None:
    before = {"config": "ab" * 32, "dtype": "float32", "weights": {"head": "cd" * 32}, "same": 1}
    now = {"config": "12" * 32, "dtype": "bfloat16", "weights": {"head": "34" * 32}, "same": 1}
    expected = "dtype ('float32', now 'bfloat16'), weights: head ('cdcdcdcdcdcd', now '343434343434'), "
    assert changed_settings(before, now) == expected + "config ('abababababab', now '121212121212')"

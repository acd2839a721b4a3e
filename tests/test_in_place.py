"""States of Mamba-2 that are moved on where they lie, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import LAYERS, tiny_model
from helpers_engine import NEW_TOKENS, PROMPTS, engine_for, is_separated, run_generate, separated_policies
from reference import reference_generate

from dynamax_lm_eval.backbones.mamba import in_place, ssm
from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.backbones.mamba.ssm import MixerShape
from dynamax_lm_eval.exits.policy import ExitPolicy


@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 5], [64, 2]])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_scan_in_place_is_the_scan(groups: int, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    shape, rows, lines = MixerShape(8, 4, groups, 6, 4), RaggedRows(lengths), [7, 0, 4][: len(lengths)]
    inputs = torch.rand(sum(lengths), shape.channels, generator=generator) - 0.5
    dt, decay = torch.rand(sum(lengths), 8, generator=generator), -torch.rand(8, generator=generator) - 0.1
    before = torch.randn(9, 8, 4, 6, generator=generator)
    table = before.clone()
    read = in_place.scan_in_place(inputs, dt, decay, shape, rows, table, lines)
    expected, after = ssm.selective_scan(inputs, dt, decay, shape, rows, before[lines].clone())
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(table[lines], after, rtol=1e-4, atol=1e-5)
    others = [line for line in range(9) if line not in lines]
    assert torch.equal(table[others], before[others])


@pytest.mark.parametrize("mode", ["recompute", "skip"])
def test_a_model_with_large_states_generates_what_the_reference_generates(
    mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("mamba2")
    policy = ExitPolicy(LAYERS, (2, 3, 5), (0.5,) * 3, confidence="state", state_mode=mode)
    for candidate in separated_policies(model, policy, PROMPTS[0]):
        expected = [reference_generate(model, candidate, prompt, NEW_TOKENS) for prompt in PROMPTS]
        if is_separated(*(row for _, row in expected)):
            break
    else:
        pytest.fail("every threshold is next to a confidence")
    scans: list[list[int]] = []
    scan = in_place.scan_in_place

    def noting(*args: Any) -> torch.Tensor:
        scans.append(args[4].lengths.tolist())
        return scan(*args)

    monkeypatch.setattr(in_place, "_LARGE", 1)
    monkeypatch.setattr(in_place, "scan_in_place", noting)
    for rows_in_flight in (None, 5):
        results = run_generate(engine_for("mamba2"), [candidate] * len(PROMPTS), PROMPTS, 2, rows_in_flight)
        for (tokens, row), result in zip(expected, results, strict=True):
            assert result.tokens == tokens
            assert list(result.trace.exit_layers) == row.layers[result.trace.prompt_tokens :]
    assert {1, max(map(len, PROMPTS))} <= {length for lengths in scans for length in lengths}

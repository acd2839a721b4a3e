"""The kernels of mamba-ssm as they are released, called as the package calls them, against plain torch.

Only where their sources and Triton's interpreter are at hand: ``make kernels``.
"""

from __future__ import annotations

import os

import pytest
import torch
from helpers import LAYERS, MAMBAS, tiny_model
from helpers_engine import PROMPTS, KernelsOnCpu, engine_for, run_generate, separated_policy

from dynamax_lm_eval.backbones import MambaBackbone
from dynamax_lm_eval.backbones.mamba import ssm
from dynamax_lm_eval.backbones.mamba.kernels import ScanKernels
from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.backbones.mamba.ssm import MixerShape
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.parity import check_against_model
from dynamax_lm_eval.exits.policy import ExitPolicy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("KERNEL_SOURCES" not in os.environ, reason="needs the sources of mamba-ssm: make kernels"),
]


@pytest.fixture(scope="module")
def kernels() -> ScanKernels:
    from kernel_sources import load

    combined, update = load()
    return KernelsOnCpu(combined.mamba_chunk_scan_combined, update.selective_state_update)


def inputs_of(shape: MixerShape, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, MixerShape]:
    generator = torch.Generator().manual_seed(0)
    inputs, dt = (torch.rand(tokens, n, generator=generator) for n in (shape.channels, shape.heads))
    return inputs - 0.5, dt, -torch.rand(shape.heads, generator=generator) - 0.1, shape


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("state", [6, 16])
def test_a_step_of_mamba_2(kernels: ScanKernels, groups: int, state: int) -> None:
    shape = MixerShape(heads=4, head_dim=8, groups=groups, state=state, kernel=4)
    rows, given = RaggedRows([1] * 3), inputs_of(shape, 3)
    before = torch.randn(3, 4, 8, state, generator=torch.Generator().manual_seed(1))
    ours, after = ssm.selective_scan(*given, rows, before.clone())
    theirs, moved = ssm.selective_scan(*given, rows, before.clone(), kernels)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved, after, rtol=1e-4, atol=1e-5)


def test_a_step_of_mamba(kernels: ScanKernels) -> None:
    generator = torch.Generator().manual_seed(0)
    x, dt = torch.randn(3, 12, generator=generator), torch.rand(3, 12, generator=generator)
    decay = -torch.rand(12, 6, generator=generator) - 0.1
    b, c = torch.randn(3, 6, generator=generator), torch.randn(3, 6, generator=generator)
    before, rows = torch.randn(3, 12, 6, generator=generator), RaggedRows([1] * 3)
    ours, after = ssm.channel_scan(x, dt, decay, b, c, rows, before.clone())
    theirs, moved = ssm.channel_scan(x, dt, decay, b, c, rows, before.clone(), kernels)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[5, 1, 9], [3]])
def test_chunks_of_new_rows(kernels: ScanKernels, lengths: list[int]) -> None:
    shape = MixerShape(heads=4, head_dim=8, groups=2, state=16, kernel=4)
    rows, given = RaggedRows(lengths), inputs_of(shape, sum(lengths))
    ours, after = ssm.selective_scan(*given, rows, None)
    theirs, moved = ssm.selective_scan(*given, rows, None, kernels)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[5, 1, 9, 1], [3, 2]])
def test_rows_that_go_on(kernels: ScanKernels, lengths: list[int]) -> None:
    """Some with one token, and some with several."""
    shape = MixerShape(heads=4, head_dim=8, groups=2, state=16, kernel=4)
    rows, given = RaggedRows(lengths), inputs_of(shape, sum(lengths))
    before = torch.randn(len(lengths), 4, 8, 16, generator=torch.Generator().manual_seed(1))
    ours, after = ssm.selective_scan(*given, rows, before.clone())
    theirs, moved = ssm.selective_scan(*given, rows, before.clone(), kernels)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MAMBAS)
def test_a_model_loads_and_generates(family: str, kernels: ScanKernels) -> None:
    model = tiny_model(family)
    backbone = MambaBackbone(model)
    for block in backbone.blocks:
        block.mixer.kernels = kernels
    check_against_model(Engine(backbone), model)
    policy = separated_policy(model, ExitPolicy(LAYERS, (2, 3, 5), (0.5,) * 3), PROMPTS[0])
    expected = run_generate(engine_for(family), [policy] * 2, PROMPTS[:2], 2)
    assert run_generate(Engine(backbone), [policy] * 2, PROMPTS[:2], 2) == expected

"""The kernels of mamba-ssm and causal-conv1d as they are released, called as the package calls them, on a CPU.

Only where their sources and Triton's interpreter are at hand: ``make kernels``.
"""

from __future__ import annotations

import copy
import importlib
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LAYERS, MAMBAS, random_ids, tiny_model
from helpers_engine import (
    NEW_TOKENS,
    PROMPTS,
    KernelsOnCpu,
    classifier_policy,
    drained,
    exits_config,
    run_generate,
    run_score,
    separated_policy,
    varied_classifiers,
)
from reference import reference_generate, reference_score

from dynamax_lm_eval.backbones import MambaBackbone
from dynamax_lm_eval.backbones.mamba import kernels as found
from dynamax_lm_eval.backbones.mamba import norms
from dynamax_lm_eval.backbones.mamba.constants import ScanConstants
from dynamax_lm_eval.backbones.mamba.groups import KernelRows
from dynamax_lm_eval.backbones.mamba.kernels import StepSizes
from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.backbones.mamba.ssm import MixerShape, MixerState, causal_conv, channel_scan, selective_scan
from dynamax_lm_eval.backbones.mamba.state_cache import lines_of
from dynamax_lm_eval.engine import parity, prefixes
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate
from dynamax_lm_eval.engine.parity import check_against_model
from dynamax_lm_eval.engine.requests import GenerationRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.exits.policy import ExitPolicy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("KERNEL_SOURCES" not in os.environ, reason="needs the sources of mamba-ssm: make kernels"),
]

INFINITE = (0.0, float("inf"))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kernels() -> KernelsOnCpu:
    from kernel_sources import load

    return load()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def constants_of(shape: MixerShape) -> ScanConstants:
    return ScanConstants(
        conv_weight=torch.randn(shape.channels, shape.kernel) / 2,
        conv_bias=torch.randn(shape.channels),
        dt_bias=torch.randn(shape.heads),
        decay=-torch.rand(shape.heads) - 0.1,
        skip=torch.randn(shape.heads),
    )


def expected_scan(
    mixed: torch.Tensor, dt: torch.Tensor, shape: MixerShape, constants: ScanConstants, limits: Any, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """By plain torch, with the skip term, in float32."""
    steps = F.softplus(dt.float() + constants.dt_bias).clamp(*limits)
    read, after = selective_scan(mixed, steps, constants.decay, shape, *rest)
    assert after is not None
    return read + shape.split(mixed.float())[0] * constants.skip.unsqueeze(-1), after


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Within what rounding to ``dtype`` explains."""
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * float(theirs.detach().abs().max())
    assert float((ours.float() - theirs).detach().abs().max()) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limits", [INFINITE, (0.2, 0.6)])
@pytest.mark.parametrize(("groups", "state"), [(1, 6), (2, 16), (4, 16)])
def test_a_step_of_mamba_2(kernels: KernelsOnCpu, groups: int, state: int, limits: Any, dtype: torch.dtype) -> None:
    """In place, on lines in any order, with inputs in their own dtype and states in float32."""
    shape = MixerShape(heads=4, head_dim=8, groups=groups, state=state, kernel=4)
    constants, lines = constants_of(shape), torch.tensor([5, 0, 3])
    mixed, dt = torch.randn(3, shape.channels).to(dtype), torch.randn(3, shape.heads).to(dtype)
    table = torch.randn(7, 4, 8, state)
    read, after = expected_scan(mixed, dt, shape, constants, limits, RaggedRows([1] * 3), table[lines].clone())
    expected = table.index_copy(0, lines, after)
    x, b, c = shape.split(mixed)
    output = kernels.step(table, lines.int(), x, StepSizes.of(dt, constants.dt_bias, limits), constants, b, c)
    assert output.dtype == dtype
    assert_near(output, read, dtype)
    assert_near(table, expected)
    others = [1, 2, 4, 6]
    assert torch.equal(table[others], expected[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_mamba(kernels: KernelsOnCpu, dtype: torch.dtype) -> None:
    inner, state, lines = 12, 6, torch.tensor([2, 4, 1])
    constants = ScanConstants(
        torch.empty(inner, 4), None, torch.randn(inner), -torch.rand(inner, state) - 0.1, torch.randn(inner)
    )
    x, dt = torch.randn(2, 3, inner).to(dtype)
    b, c = torch.randn(2, 3, state).to(dtype)
    table = torch.randn(6, inner, state)
    steps = F.softplus(dt.float() + constants.dt_bias)
    read, after = channel_scan(x, steps, constants.decay, b, c, RaggedRows([1] * 3), table[lines].clone())
    expected = table.index_copy(0, lines, after)
    output = kernels.step(table, lines.int(), x, StepSizes.of(dt, constants.dt_bias), constants, b, c)
    assert_near(output, read + x.float() * constants.skip, dtype)
    assert_near(table, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limits", [INFINITE, (0.2, 0.6)])
@pytest.mark.parametrize(("lengths", "groups"), [([5, 1, 9], 2), ([3], 1), ([255, 2, 4], 4)])
def test_new_rows(kernels: KernelsOnCpu, lengths: list[int], groups: int, limits: Any, dtype: torch.dtype) -> None:
    """Side by side, also where a row begins in one chunk and ends in the next; states stay in float32."""
    shape = MixerShape(heads=4, head_dim=8, groups=groups, state=16, kernel=4)
    rows, constants = RaggedRows(lengths), constants_of(shape)
    mixed = torch.randn(sum(lengths), shape.channels).to(dtype)
    dt = torch.randn(sum(lengths), shape.heads).to(dtype)
    read, after = expected_scan(mixed, dt, shape, constants, limits, rows, None)
    x, b, c = shape.split(mixed)
    steps = StepSizes.of(dt, constants.dt_bias, limits)
    output, moved = kernels.new_rows(x, steps, constants, b, c, *rows.bounds)
    assert (output.dtype, moved.dtype) == (dtype, torch.float32)
    assert_near(output, read, dtype)
    assert_near(moved, after, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limits", [INFINITE, (0.2, 0.6)])
def test_rows_that_have_a_past(kernels: KernelsOnCpu, limits: Any, dtype: torch.dtype) -> None:
    shape, lengths = MixerShape(heads=4, head_dim=8, groups=2, state=16, kernel=4), [5, 2, 7]
    constants, states = constants_of(shape), torch.randn(3, 4, 8, 16)
    mixed, dt = torch.randn(14, shape.channels).to(dtype), torch.randn(14, shape.heads).to(dtype)
    read, after = expected_scan(mixed, dt, shape, constants, limits, RaggedRows(lengths), states.clone())
    padded = torch.tensor([[*range(a, b), *[14] * (7 + a - b)] for a, b in ((0, 5), (5, 7), (7, 14))])
    x, b, c = shape.split(mixed[padded.clamp(max=13)])
    steps = StepSizes.of(dt, constants.dt_bias, limits).with_none().at(padded.flatten())
    steps = steps._replace(dt=steps.dt.unflatten(0, (3, 7)))
    output, moved = kernels.go_on(x, steps, constants, b, c, states)
    assert moved.dtype == torch.float32
    assert_near(output[padded < 14], read, dtype)
    assert_near(moved, after, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[5, 1, 9], [2, 2]])
def test_convolution(kernels: KernelsOnCpu, lengths: list[int], dtype: torch.dtype) -> None:
    """Of a slice of a projection's output, side by side; then one token more, by lines of a table."""
    shape = MixerShape(heads=2, head_dim=8, groups=1, state=4, kernel=4)
    constants, rows, conv = constants_of(shape), RaggedRows(lengths), kernels.conv
    assert conv is not None
    inputs = torch.randn(sum(lengths), 8 + shape.channels + 3).to(dtype)[:, 8:-3]
    weights = constants.conv_weight, constants.conv_bias
    expected, after = causal_conv(inputs.float(), *weights, rows, None)
    assert_near(conv.rows(inputs, rows.bounds.row_of, constants), F.silu(expected), dtype)
    lines = torch.tensor([4, 1, 2])[: len(lengths)]
    table = torch.randn(5, 3, shape.channels).to(dtype)
    table[lines] = after.to(dtype)
    before, new = table.clone(), torch.randn(len(lengths), shape.channels + 5).to(dtype)[:, 5:]
    expected, after = causal_conv(new.float(), *weights, RaggedRows([1] * len(lengths)), after)
    assert_near(conv.step(new, table, lines.int(), constants), F.silu(expected), dtype)
    assert torch.equal(table, before.index_copy(0, lines, after.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_norm(kernels: KernelsOnCpu, dtype: torch.dtype) -> None:
    module = tiny_model("mamba2").backbone.layers[0].mixer.norm  # of two groups
    x, gate = torch.randn(5, 64).to(dtype), torch.randn(5, 99).to(dtype)[:, 3:67]
    norm = norms.recognised(module, gated=True)
    assert norm is not None
    ours = kernels.norm(x, gate, module.weight, *norm)
    assert ours.dtype == dtype
    assert_near(ours, module(x.float(), gate.float()), dtype)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "IEEE"), (torch.bfloat16, "TF32")])
def test_precision_of_products(
    kernels: KernelsOnCpu, dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the released kernels ask of float32 products; those of narrower types have no such choice."""
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    knobs = importlib.import_module("triton.knobs").language
    asked, dot = set(), builder.create_dot

    def recorded(self: Any, a: Any, b: Any, c: Any, input_precision: Any, *rest: Any) -> Any:
        if str(a.dtype.scalar) == "fp32":
            asked.add(input_precision.name)
        return dot(self, a, b, c, input_precision, *rest)

    monkeypatch.setattr(builder, "create_dot", recorded)
    shape = MixerShape(heads=2, head_dim=8, groups=1, state=16, kernel=4)
    constants, rows = constants_of(shape), RaggedRows([5])
    x, b, c = shape.split(torch.randn(5, shape.channels).to(dtype))
    steps = StepSizes.of(torch.randn(5, 2).to(dtype), constants.dt_bias)
    kernels.new_rows(x, steps, constants, b, c, *rows.bounds)
    assert asked == {precision}
    assert knobs.fp32_default is None
    with knobs.scope():
        assert found._keep_float32()
        assert os.environ["TRITON_F32_DEFAULT"] == knobs.fp32_default == "ieee"


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that the interpreter is done with sooner, and that rows are longer than."""
    monkeypatch.setattr(found, "_CHUNK", 8)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("with_conv", [True, False])
@pytest.mark.parametrize("family", MAMBAS)
@pytest.mark.parametrize(
    ("lengths", "new"),
    [
        ([1, 1, 1], [0, 1, 0]),
        ([5, 1, 9], [1, 1, 1]),
        ([2, 1, 3], [0, 0, 0]),
        ([5, 1, 9, 2, 7, 1], [0, 1, 1, 0, 0, 0]),
    ],
)
def test_rows_of_every_kind_in_one_pass(
    kernels: KernelsOnCpu, lengths: list[int], new: list[int], family: str, with_conv: bool
) -> None:
    """A mixer by kernels and by torch: the same read-outs, and the same lines of the table, in float32."""
    mixer = MambaBackbone(tiny_model(family)).blocks[0].mixer
    used = kernels if with_conv else replace(kernels, conv=None)
    numbers, is_new = np.array([3, 0, 1, 5, 2, 7])[: len(lengths)], np.array(new, dtype=bool)
    table = MixerState(*(torch.randn_like(part) for part in mixer.new_state(9, CPU)))
    for part in table:
        part[numbers[is_new]] = 0
    lines = torch.from_numpy(numbers)
    with torch.inference_mode():
        gate, update = mixer.project(torch.randn(sum(lengths), 32))
        state = None if is_new.all() else MixerState(*(part[lines] for part in table))
        read, after = mixer.advance(update, RaggedRows(lengths), state)
        assert after is not None
        expected = MixerState(*(part.index_copy(0, lines, own) for part, own in zip(table, after, strict=True)))
        output = mixer.output(read, gate)
        mixer.kernels = used
        rows = KernelRows(RaggedRows(lengths), numbers, lines_of(numbers, CPU), is_new)
        by_kernels = mixer.advance_in_place(update, rows, table)
        assert_near(by_kernels, read)
        assert_near(mixer.output(by_kernels, gate), output)
    for ours, theirs in zip(table, expected, strict=True):
        assert_near(ours, theirs)


def engine_by(kernels: KernelsOnCpu, model: Any, *classifiers: Any) -> Engine:
    backbone = MambaBackbone(model)
    for block in backbone.blocks:
        block.mixer.kernels = kernels
    return Engine(backbone, *classifiers)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("family", MAMBAS)
def test_a_model_loads(family: str, kernels: KernelsOnCpu) -> None:
    model = tiny_model(family)
    check_against_model(engine_by(kernels, model), model)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("family", MAMBAS)
def test_rounding_is_no_worse_than_the_models_own(family: str, kernels: KernelsOnCpu) -> None:
    """In bfloat16 both are compared with the model in float32."""
    model, text = tiny_model(family, torch.bfloat16), PROMPTS[0]
    with torch.no_grad():
        theirs = model(torch.tensor([text])).logits[0]
        exact = copy.deepcopy(model).float()(torch.tensor([text])).logits[0]
        ours = parity._fed(engine_by(kernels, model), [text], [parity._all_at_once([text])])
    assert (ours - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean()


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("mode", ["recompute", "skip"])
@pytest.mark.parametrize("family", MAMBAS)
def test_a_model_generates_and_scores(family: str, mode: Any, kernels: KernelsOnCpu) -> None:
    """The texts and exits of the reference, prompts joining while others decode."""
    model = tiny_model(family)
    policy = separated_policy(model, ExitPolicy(LAYERS, (2, 3, 5), (0.5,) * 3, state_mode=mode), PROMPTS[0])
    expected = [reference_generate(model, policy, prompt, NEW_TOKENS) for prompt in PROMPTS[:3]]
    engine = engine_by(kernels, model)
    for (tokens, row), result in zip(expected, run_generate(engine, [policy] * 3, PROMPTS[:3], 2), strict=True):
        assert result.tokens == tokens
        assert list(result.trace.exit_layers) == row.layers[result.trace.prompt_tokens :]
    pairs = [(PROMPTS[0], random_ids(5, 70)), (PROMPTS[1], random_ids(3, 71))]
    for pair, scored in zip(pairs, run_score(engine, policy, pairs, 2), strict=True):
        scores, _ = reference_score(model, policy, *pair)
        assert [line[0] for line in scored.log_probs] == pytest.approx(scores, abs=1e-4)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("family", MAMBAS)
def test_kept_prefixes(family: str, kernels: KernelsOnCpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go on from a shared beginning with several tokens, beside new ones and ones that decode."""
    monkeypatch.setattr(prefixes, "MIN_SAVED_TOKENS", 1)
    model = tiny_model(family)
    preamble = random_ids(11, 1)
    prompts = [[*preamble, *random_ids(n, n)] for n in (6, 2, 1)] + [random_ids(6, 99)]
    policy = separated_policy(model, ExitPolicy(LAYERS, (2, 4), (0.5,) * 2), prompts[0])
    requests = [GenerationRequest(prompt, 4, policy, Sampler(), lambda _: False) for prompt in prompts]
    results, runs = drained(generate(engine_by(kernels, model), requests, 2), len(prompts))
    assert runs
    for prompt, result in zip(prompts, results, strict=True):
        assert result.tokens == reference_generate(model, policy, prompt, 4)[0]


@pytest.mark.usefixtures("short_chunks")
def test_classifiers(kernels: KernelsOnCpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the exits of a Mamba-2 whose own scans run by kernels too."""
    monkeypatch.setattr(found, "find", lambda *_: kernels)
    model = tiny_model("mamba2")
    classifiers = varied_classifiers(exits_config(options=replace(exits_config().options, mamba_state=4)))
    policy = separated_policy(model, classifier_policy("mamba"), PROMPTS[0], classifiers=classifiers)
    results = run_generate(Engine(MambaBackbone(model), classifiers), [policy] * 2, PROMPTS[:2], 2)
    for prompt, result in zip(PROMPTS, results, strict=False):
        tokens, row = reference_generate(model, policy, prompt, NEW_TOKENS, classifiers)
        assert result.tokens == tokens
        assert list(result.trace.exit_layers) == row.layers[result.trace.prompt_tokens :]

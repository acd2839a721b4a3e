"""Generation and scoring on a device that says it is a GPU: the same as on the CPU, whatever the blocks and exits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cudalike import counting, cuda_like, on_cuda
from helpers import FAMILIES, LAYERS, random_ids, tiny_model
from helpers_engine import (
    CLASSIFIERS,
    EXITS,
    FULL,
    MODES,
    NEW_TOKENS,
    PROMPTS,
    run_generate,
    run_score,
    separated_policy,
    varied_classifiers,
)
from transformers import AutoModelForCausalLM

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.backbones.transformer import varlen
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.parity import check_against_model, checked_engine
from dynamax_lm_eval.exits.classifiers import exit_probability
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.models.aliases import shipped_backbones

PAIRS = [(random_ids(9, 1), random_ids(6, 2)), (random_ids(3, 3), random_ids(8, 4)), (random_ids(12, 5), [5, 9])]
#: Confidences, and kinds of trained ones.
CONFIDENCES: dict[str, dict[str, Any]] = {
    "softmax": {"confidence": "softmax"},
    "state": {"confidence": "state"},
    **{kind: {"confidence": "classifier", "classifier": kind} for kind in ("calm", "ffn", "mamba")},
}
#: What is not slow: a family of every kind of block, and confidences of every kind and all state modes with attention.
_FAST = {
    *((family, "state", "recompute") for family in ("mistral", "gemma3", "mamba")),
    *(("llama", name, "recompute") for name in ("softmax", "calm", "mamba")),
    *(("llama", "state", mode) for mode in MODES),
    ("mamba2", "mamba", "recompute"),
    ("mamba2", "state", "skip"),
}
GRID = [
    pytest.param(*point, marks=[] if point in _FAST else [pytest.mark.slow])
    for point in ((family, name, mode) for family in FAMILIES for name in CONFIDENCES for mode in MODES)
    if point[2] != "copy" or not (point[0] == "gemma3" or "mamba" in point[0])
    if point[2] != "copy_previous" or point[0] in ("llama", "mistral", "qwen2", "qwen3")
]


@pytest.fixture
def ragged_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets the kernel of ragged rows take float32, in which results can be compared; a GPU's takes half precision."""
    monkeypatch.setattr(varlen, "_DTYPES", (torch.float32,))
    varlen.is_available.cache_clear()
    yield
    varlen.is_available.cache_clear()


def engines(family: str) -> tuple[Engine, Engine]:
    """The engine on the CPU and on what says it is a GPU, in whose context this is called."""
    model = tiny_model(family)
    on_cpu = Engine(make_backbone(model, max_length=256), CLASSIFIERS)
    return on_cpu, Engine(make_backbone(on_cuda(model), max_length=256), on_cuda(CLASSIFIERS))


def policy_for(family: str, confidence: str, mode: Any) -> ExitPolicy:
    policy = ExitPolicy(LAYERS, EXITS, (0.5,) * len(EXITS), state_mode=mode, **CONFIDENCES[confidence])
    return separated_policy(tiny_model(family), policy, PROMPTS[0], classifiers=CLASSIFIERS)


def assert_same(family: str, policy: ExitPolicy) -> None:
    with cuda_like():
        ours, theirs = engines(family)
        expected = run_generate(ours, [policy] * len(PROMPTS), PROMPTS, 3)
        assert run_generate(theirs, [policy] * len(PROMPTS), PROMPTS, 3) == expected
        # Rows that wait at exits, where blocks can go on by themselves.
        assert run_generate(theirs, [policy] * len(PROMPTS), PROMPTS, 2, len(PROMPTS)) == expected
        everywhere = replace(policy, exit_scope="all")
        for scored, wanted in zip(*(run_score(e, everywhere, PAIRS, 3) for e in (theirs, ours)), strict=True):
            assert scored.trace == wanted.trace
            for line, wanted_line in zip(scored.log_probs, wanted.log_probs, strict=True):
                assert line == pytest.approx(wanted_line, abs=1e-4)


@pytest.mark.parametrize(("family", "confidence", "mode"), GRID)
def test_as_on_the_cpu(family: str, confidence: str, mode: str) -> None:
    assert_same(family, policy_for(family, confidence, mode))


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("llama", "recompute"),
        ("mistral", "recompute"),
        pytest.param("mistral", "copy", marks=pytest.mark.slow),
        pytest.param("gemma3", "recompute", marks=pytest.mark.slow),
        pytest.param("llama", "skip", marks=pytest.mark.slow),
        pytest.param("qwen2", "recompute", marks=pytest.mark.slow),
        pytest.param("qwen3", "recompute", marks=pytest.mark.slow),
        pytest.param("gpt_neox", "recompute", marks=pytest.mark.slow),
        pytest.param("phi3", "recompute", marks=pytest.mark.slow),
    ],
)
def test_the_kernel_of_ragged_rows(family: str, mode: str, ragged_kernel: None) -> None:
    """Prompts, decoding rows, windows, gaps of tokens that left, and rows that begin with a prefix of others."""
    policy = policy_for(family, "state", mode)
    assert_same(family, policy)
    shared = random_ids(80, 6)
    prompts = [[*shared, *prompt] for prompt in PROMPTS[:3]]
    with cuda_like():
        ours, theirs = engines(family)
        expected = run_generate(ours, [ExitPolicy(LAYERS)] * 3, prompts, 3)
        with counting() as counts:
            results = run_generate(theirs, [ExitPolicy(LAYERS)] * 3, prompts, 3)
        assert [result.tokens for result in results] == [result.tokens for result in expected]
        assert counts.launches["_varlen_attn"] > 0
        assert counts.launches["scaled_dot_product_attention"] == 0


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt_neox", "mamba2"))]
)
def test_the_self_check_passes(family: str) -> None:
    with cuda_like():
        model = on_cuda(tiny_model(family))
        policy = ExitPolicy(LAYERS, (2, 4), (0.5, 0.5))
        engine = checked_engine(model, policy, 256)
        assert engine.recomputes_states
        check_against_model(engine, model)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_stacked_weights_are_the_models(family: str) -> None:
    """Modules, state_dict and a second backbone of the same model see what they saw before, in the same memory."""
    original, ids = tiny_model(family), torch.tensor([PROMPTS[0]])
    with cuda_like(), torch.no_grad():
        model = on_cuda(original)
        first, second = (make_backbone(model, max_length=256) for _ in range(2))
        attention = model.model.layers[0].self_attn
        modules = (attention.q_proj, attention.k_proj, attention.v_proj)
        assert len({module.weight.untyped_storage().data_ptr() for module in modules}) == 1
        assert attention.q_proj.weight.untyped_storage().nbytes() == sum(m.weight.nbytes for m in modules)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.cpu(), original.state_dict()[name]), name
        logits = model(input_ids=ids.to("cuda:0")).logits.cpu()
        assert torch.allclose(logits, original(input_ids=ids).logits, atol=1e-5)
        results = [run_generate(Engine(b), [ExitPolicy(LAYERS)], PROMPTS[:1], 1) for b in (first, second)]
        assert results[0] == results[1]
        # Whoever changes a weight afterwards is followed.
        attention.q_proj.weight = torch.nn.Parameter(torch.zeros_like(attention.q_proj.weight), requires_grad=False)
        again = run_generate(Engine(first), [ExitPolicy(LAYERS)], PROMPTS[:1], 1)
    changed = tiny_model.__wrapped__(family)
    changed.model.layers[0].self_attn.q_proj.weight.data.zero_()
    expected = run_generate(Engine(make_backbone(changed, max_length=256)), [ExitPolicy(LAYERS)], PROMPTS[:1], 1)
    assert [result.tokens for result in again] == [result.tokens for result in expected]


@pytest.mark.parametrize("part", ["q_proj", "k_norm"])
def test_hooks_are_called(part: str) -> None:
    """Whoever watches a module that is computed with others sees it run; then each is computed by itself."""
    calls: list[int] = []
    with cuda_like():
        ours, theirs = engines("qwen3")
        attention = theirs.backbone.model.model.layers[1].self_attn
        attention.get_submodule(part).register_forward_hook(lambda *_: calls.append(1))
        results = [run_generate(engine, [FULL], PROMPTS[:1], 1) for engine in (ours, theirs)]
    assert results[0] == results[1]
    assert len(calls) == NEW_TOKENS


def test_rows_attend_under_masks_where_there_is_no_kernel(
    ragged_kernel: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise NotImplementedError("not on this device")

    monkeypatch.setattr(varlen, "_kernel", missing)
    with caplog.at_level("INFO", logger=varlen.__name__), cuda_like(), counting() as counts:
        ours, theirs = engines("mistral")
        results = [run_generate(engine, [FULL] * 3, PROMPTS[:3], 3) for engine in (ours, theirs)]
    assert results[0] == results[1]
    assert counts.launches["scaled_dot_product_attention"] > 0
    assert [record.message for record in caplog.records if "not on this device" in record.message]


def test_feed_forward_classifiers_read_their_weights_in_the_dtype_of_the_backbone() -> None:
    """On a GPU; their confidences change by rounding, those of the others not at all, and on a CPU nothing does."""
    classifiers = varied_classifiers()
    classifiers.narrow(torch.bfloat16)
    assert {parameter.dtype for parameter in classifiers.parameters()} == {torch.float32}
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    with cuda_like(), torch.inference_mode():
        moved = on_cuda(classifiers)
        moved.narrow(torch.bfloat16)
        for kind in ("ffn", "calm"):
            before = exit_probability(classifiers.at(kind, 3)(hidden)[0])
            after = exit_probability(moved.at(kind, 3)(hidden.to("cuda:0"))[0]).cpu()
            assert torch.allclose(after, before, atol=2e-2 if kind == "ffn" else 1e-6)
        narrowed = {name for name, parameter in moved.named_parameters() if parameter.dtype == torch.bfloat16}
    assert narrowed == {f"by_kind.ffn.{layer}.in_proj.{part}" for layer in EXITS for part in ("weight", "bias")}


def test_the_self_check_explains_the_rounding_of_half_precision() -> None:
    """On trained weights; norms, sums and attention round in other places than those of the model's own forward."""
    model = AutoModelForCausalLM.from_pretrained(shipped_backbones()["tiny-llama"], dtype=torch.bfloat16).eval()
    depth = model.config.num_hidden_layers
    with cuda_like():
        varlen.is_available.cache_clear()
        engine = checked_engine(on_cuda(model), ExitPolicy(depth, (2, depth - 1), (0.5, 0.5)), 256)
    varlen.is_available.cache_clear()
    assert engine.backbone.rung == "fused"
    assert engine.recomputes_states

"""Segments on a GPU, with stand-ins for its graphs: what they replay, when they end, and what failures cost.

Nothing of this has run on a GPU but for the last test, which waits for one.
"""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cudalike import counting, cuda_like, on_cuda
from helpers import LAYERS, tiny_model
from helpers_engine import (
    CLASSIFIERS,
    FULL,
    PROMPTS,
    drained,
    run_generate,
    separated_policy,
)
from helpers_segments import NOT_ALL, Collected, ReplayedGraphs, engine_of, fed, passes_of, policy_of
from test_learned_states import exits_for, learned_policy

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.backbones import segments as static
from dynamax_lm_eval.backbones.transformer import varlen
from dynamax_lm_eval.engine.batch import FlatBatch
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate
from dynamax_lm_eval.engine.requests import GenerationRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.exits.policy import ExitPolicy


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[ReplayedGraphs]]:
    """Stand-ins for graphs, and the kernel of ragged rows in float32, in which results can be compared."""
    monkeypatch.setattr(static, "Graphs", ReplayedGraphs)
    monkeypatch.setattr(ReplayedGraphs, "captures", 0)
    monkeypatch.setattr(ReplayedGraphs, "replays", 0)
    ReplayedGraphs.alive.clear()
    static._warn.cache_clear()
    monkeypatch.setattr(varlen, "_DTYPES", (torch.float32,))
    varlen.is_available.cache_clear()
    yield ReplayedGraphs
    varlen.is_available.cache_clear()


GPU_CASES = [
    ("llama", "recompute", "calm", "kernel"),
    ("llama", "copy", "state", "kernel"),
    ("mistral", "recompute", "state", "kernel"),
    pytest.param("mistral", "recompute", "mamba", "no kernel", marks=pytest.mark.slow),
    pytest.param("qwen3", "recompute", "ffn", "kernel", marks=pytest.mark.slow),
    pytest.param("mamba2", "recompute", "state", "kernel", marks=pytest.mark.slow),
    ("mamba2", "recompute", "ffn", "no kernel"),
    pytest.param("mamba2", "skip", "state", "kernel", marks=pytest.mark.slow),
    ("mamba", "recompute", "state", "kernel"),
    pytest.param("mamba", "recompute", "state", "no kernel", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "mode", "confidence", "kernels"), GPU_CASES)
def test_replays_ask_the_same_of_the_same_memory(
    family: str, mode: str, confidence: str, kernels: str, graphs: type[ReplayedGraphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Capturable: the stand-ins compare every replay with the first, pointers and numbers included."""
    has_kernels = kernels == "kernel"
    if not has_kernels:
        monkeypatch.setattr(varlen, "_DTYPES", ())
    policy = separated_policy(tiny_model(family), policy_of(confidence, mode), PROMPTS[0], classifiers=CLASSIFIERS)
    block_by_block = Engine(make_backbone(tiny_model(family), max_length=256), CLASSIFIERS)
    expected = run_generate(block_by_block, [policy] * 5, PROMPTS, 3)
    with cuda_like(), counting() as counts:
        engine = engine_of(family, on_gpu=True, kernels=has_kernels and "mamba" in family)
        for args in ((3,), (2, 5)):
            assert run_generate(engine, [policy] * 5, PROMPTS, *args) == expected
    assert set(passes_of(engine)) <= NOT_ALL
    assert graphs.replays > graphs.captures > 0
    assert not counts.blocking_uploads
    if "mamba" not in family and has_kernels:
        assert counts.launches["scaled_dot_product_attention"] == 0
    assert len(graphs.alive) == 0


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_replays_of_learned_states(family: str, graphs: type[ReplayedGraphs]) -> None:
    """One graph for all tokens that left at the same exits, whichever left where."""
    exits = exits_for(family, "linear")
    policy = separated_policy(tiny_model(family), learned_policy(), PROMPTS[0], classifiers=exits)
    expected = run_generate(Engine(make_backbone(tiny_model(family), max_length=256), exits), [policy] * 5, PROMPTS, 3)
    with cuda_like(), counting() as counts:
        engine = Engine(make_backbone(on_cuda(tiny_model(family)), max_length=256), on_cuda(exits))
        engine.use_segments(True)
        for args in ((3,), (2, 5)):
            assert run_generate(engine, [policy] * 5, PROMPTS, *args) == expected
    assert set(passes_of(engine)) <= NOT_ALL
    assert graphs.replays > graphs.captures > 0
    assert not counts.blocking_uploads


def test_stand_ins_notice_what_a_graph_would_not_follow() -> None:
    with cuda_like():
        on_device, grown = torch.zeros(3, device="cuda:0"), [torch.zeros(3, device="cuda:0")]
        numbers = iter(range(9))
        asking = {
            "shapes": lambda: on_device[: next(numbers)] + 1,
            "numbers": lambda: on_device + next(numbers),
            "memory": lambda: grown.append(grown[-1] + 1),
            "an upload": lambda: torch.zeros(3).to("cuda:0"),
            "a read": lambda: on_device.sum().item(),
        }
        for function in asking.values():
            replay = ReplayedGraphs(on_device.device).capture(function)
            with pytest.raises(AssertionError):
                repeated(replay)
        replay = ReplayedGraphs(on_device.device).capture(lambda: on_device.add_(on_device * 2))
        repeated(replay)


def repeated(function: Callable[[], Any]) -> None:
    for _ in range(3):
        function()


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_graphs_end_with_the_states(family: str, graphs: type[ReplayedGraphs]) -> None:
    """At once, with the memory that they refer to, and not when Python collects garbage."""
    alive: list[int] = []

    def noting(_: list[int]) -> bool:
        alive.append(len(graphs.alive))
        return False

    gc.collect()
    gc.disable()
    try:
        with cuda_like():
            engine = engine_of(family, on_gpu=True)
            requests = [GenerationRequest(prompt, 8, FULL, Sampler(), noting) for prompt in PROMPTS[:2]]
            running = generate(engine, requests, 2)
            assert len(drained(running, 2)[0]) == 2
            del running
            alive.append(len(graphs.alive))
    finally:
        gc.enable()
    assert max(alive) > 0
    assert alive[-1] == 0


@pytest.mark.parametrize("family", ["llama", "mamba2"])
@pytest.mark.parametrize("failure", ["capture", "replay"])
def test_what_cannot_be_replayed_runs_without_a_graph(
    family: str, failure: str, graphs: type[ReplayedGraphs], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def refused(*_: Any) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    recorded = static._Recorded._record

    def other(self: Any) -> None:
        recorded(self)
        self._output.hidden.add_(100)

    if failure == "capture":
        monkeypatch.setattr(ReplayedGraphs, "capture", refused)
    else:
        monkeypatch.setattr(static._Recorded, "_record", other)
    policy = separated_policy(tiny_model(family), policy_of("state", "recompute"), PROMPTS[0])
    expected = run_generate(Engine(make_backbone(tiny_model(family), max_length=256)), [policy] * 5, PROMPTS, 3)
    with caplog.at_level("WARNING", logger=static.__name__), cuda_like():
        engine = engine_of(family, on_gpu=True)
        assert run_generate(engine, [policy] * 5, PROMPTS, 3) == expected
    assert passes_of(engine)["static"] > 0
    messages = [record.message for record in caplog.records if "without a CUDA graph" in record.message]
    if failure == "capture":
        assert len(messages) == 1 and "not permitted when stream" in messages[0]
    else:
        assert len(messages) == 1 and "a replay differs" in messages[0]
        assert graphs.replays == graphs.captures


def test_tables_that_grow_are_followed(graphs: type[ReplayedGraphs]) -> None:
    """Rows that join later get lines in other memory; what was captured before is captured anew."""
    with cuda_like():
        engine = engine_of("mamba2", on_gpu=True)
        states = engine.new_states(0)
        first = states.allocate_row(8)
        assert first is not None
        alone = []
        for position in range(9):
            if position == 4:
                rows = [states.allocate_row(8) for _ in range(5)]
                assert None not in rows
            engine.forward(FlatBatch.build([fed([7], position, first, FULL)]), states, Collected())
            alone.append(graphs.captures)
        found = [part.values[first].clone() for part in states.backbone.of(LAYERS)]  # type: ignore[attr-defined]
    assert alone == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    block_by_block = Engine(make_backbone(tiny_model("mamba2"), max_length=256))
    states = block_by_block.new_states(0)
    slot = states.allocate_row(8)
    assert slot is not None
    block_by_block.forward(FlatBatch.build([fed([7] * 9, 0, slot, FULL)]), states, Collected())
    for part, expected in zip(found, states.backbone.of(LAYERS), strict=True):  # type: ignore[attr-defined]
        assert torch.allclose(part, expected[slot], atol=1e-5)


class Cuda:
    """In place of the parts of ``torch.cuda`` that record graphs: notes what is asked of them, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.current = "main"
        own = inspect.signature(torch.cuda.graph.__init__)
        patch.setattr(torch.cuda, "Stream", lambda _: self.stream("side"))
        patch.setattr(torch.cuda, "current_stream", lambda _: self.stream(self.current))
        patch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "current", stream.name))
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        patch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: self.asked.append("replay")))
        patch.setattr(torch.cuda, "stream", self.on)

        def graph(*args: Any, **kwargs: Any) -> Any:
            given = own.bind(None, *args, **kwargs).arguments
            assert (given["pool"], given["stream"].name, given["capture_error_mode"]) == (
                "pool",
                "side",
                "thread_local",
            )
            return self.on(given["stream"])

        patch.setattr(torch.cuda, "graph", graph)

    def stream(self, name: str) -> Any:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.asked.append(f"{name} waits for {other.name}"))

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before  # as torch: not after an exception


def test_what_graphs_ask_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the signatures of the installed release; that CUDA answers can only be seen on a GPU."""
    cuda = Cuda(monkeypatch)
    graphs = static.Graphs(torch.device("cuda", 0))
    result = static.SegmentOutput(torch.zeros(1), torch.zeros(1))

    def running() -> static.SegmentOutput:
        cuda.asked.append(f"runs on {cuda.current}")
        return result

    assert graphs.warm_up(running) is result
    assert cuda.asked == ["side waits for main", "runs on side", "main waits for side"]
    cuda.asked.clear()
    graphs.capture(running)()
    assert cuda.asked == ["runs on side", "replay"]

    def failing() -> None:
        raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.capture(failing)
    assert cuda.current == "main"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "mamba2", "mamba"])
def test_graphs_of_a_gpu(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """All are captured, and replay what they captured; in float32 answers are those of block by block."""
    captures: list[Any] = []
    capture = static.Graphs.capture

    def noting(graphs: static.Graphs, function: Callable[[], None]) -> Callable[[], None]:
        captures.append(capture(graphs, function))
        return captures[-1]  # type: ignore[no-any-return]

    monkeypatch.setattr(static.Graphs, "capture", noting)
    static._warn.cache_clear()
    policy = separated_policy(tiny_model(family), policy_of("state", "recompute"), PROMPTS[0])
    model = copy.deepcopy(tiny_model(family)).to("cuda", dtype)
    engine, block_by_block = (Engine(make_backbone(model, max_length=256)) for _ in range(2))
    engine.use_segments(True)
    expected = run_generate(block_by_block, [policy] * 5, PROMPTS, 3)
    with caplog.at_level("WARNING", logger=static.__name__):
        found = run_generate(engine, [policy] * 5, PROMPTS, 3)
    assert captures and passes_of(engine)["static"] > 0
    assert [record.message for record in caplog.records] == []
    if dtype == torch.float32:
        assert found == expected


@pytest.mark.parametrize(
    ("confidence", "family", "kernels"),
    [
        ("state", "llama", False),
        ("mamba", "mamba2", True),
        pytest.param("mamba", "llama", False, marks=pytest.mark.slow),
        pytest.param("state", "mamba2", True, marks=pytest.mark.slow),
        pytest.param("state", "mamba", True, marks=pytest.mark.slow),
    ],
)
def test_drafts_are_verified_as_on_the_cpu(
    confidence: str, family: str, kernels: bool, graphs: type[ReplayedGraphs]
) -> None:
    """On what says it is a GPU, in segments where rows feed one token, and by stand-ins for kernels."""
    policy = replace(policy_of(confidence, "recompute"), verify_tokens=3)
    plain = Engine(make_backbone(tiny_model(family), max_length=256), CLASSIFIERS)
    expected = run_generate(plain, [policy] * len(PROMPTS), PROMPTS, 3)
    with cuda_like():
        engine = engine_of(family, on_gpu=True, kernels=kernels)
        found = run_generate(engine, [policy] * len(PROMPTS), PROMPTS, 3)
    full = run_generate(plain, [ExitPolicy(LAYERS)] * len(PROMPTS), PROMPTS, 3)
    assert [r.tokens for r in found] == [r.tokens for r in expected] == [r.tokens for r in full]
    assert any(result.trace.verified and result.trace.verified.drafts for result in found)
    assert [result.trace for result in found] == [result.trace for result in expected]
    assert passes_of(engine)["static"]

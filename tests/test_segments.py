"""Blocks up to an exit in one call on places that stay where they are: the same answers, and what a graph would need.

The graphs are stand-ins (``graph_stand_ins``); nothing of this has run on a GPU.
"""

from __future__ import annotations

import copy
import gc
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cudalike import counting, cuda_like, on_cuda
from graph_stand_ins import ReplayedGraphs
from helpers import LAYERS, random_ids, tiny_model
from helpers_engine import (
    CLASSIFIERS,
    FULL,
    PROMPTS,
    classifier_policy,
    drained,
    reference_of_all,
    run_generate,
    run_score,
    separated_policy,
)
from helpers_harness import dynamax, generation_requests
from kernel_stand_ins import STAND_INS
from torch import Tensor

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.backbones import segments as static
from dynamax_lm_eval.backbones.base import IntArray
from dynamax_lm_eval.backbones.segments import bucket
from dynamax_lm_eval.backbones.transformer import varlen
from dynamax_lm_eval.engine.batch import FlatBatch, RowInput
from dynamax_lm_eval.engine.engine import Engine, RowStates
from dynamax_lm_eval.engine.generation import generate
from dynamax_lm_eval.engine.requests import GenerationRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.harness import describe

#: Families with state modes of theirs, and confidences: trained ones of each kind, and one that reads two states.
CASES = [
    ("llama", "recompute"), ("llama", "copy"), ("llama", "skip"), ("mistral", "recompute"), ("qwen3", "recompute"),
    ("mamba2", "recompute"), ("mamba2", "skip"), ("mamba", "recompute"),
]  # fmt: skip
CONFIDENCES = [("state", False), ("calm", True), ("ffn", False), ("mamba", True)]
#: What kept passes from segments that may keep some of any generation.
NOT_ALL = {"static", "prompts in the same pass", "rows of which more than 4 tokens left"}


def engine_of(family: str, on_gpu: bool = False, kernels: bool = False) -> Engine:
    """An engine whose blocks run in segments."""
    model = tiny_model(family)
    backbone: Any = make_backbone(on_cuda(model) if on_gpu else model, max_length=256)
    if kernels:
        for block in backbone.blocks:
            block.mixer.kernels = STAND_INS
    engine = Engine(backbone, on_cuda(CLASSIFIERS) if on_gpu else CLASSIFIERS)
    engine.use_segments(True)
    return engine


def passes_of(engine: Engine) -> Counter[str]:
    assert engine.segments is not None
    return engine.segments.passes


def policy_of(confidence: str, mode: Any, final_block: bool = False) -> ExitPolicy:
    if confidence == "state":
        return ExitPolicy(LAYERS, (2, 3, 5), (0.5,) * 3, confidence="state", state_mode=mode, final_block=final_block)
    return classifier_policy(confidence, state_mode=mode, final_block=final_block)


@pytest.mark.parametrize(("confidence", "final_block"), CONFIDENCES)
@pytest.mark.parametrize(("family", "mode"), CASES)
def test_answers_are_those_of_the_reference(family: str, mode: str, confidence: str, final_block: bool) -> None:
    """Alone, in batches, and with rows that wait at exits; what segments cannot do is counted with its reason."""
    policy, expected = reference_of_all(family, policy_of(confidence, mode, final_block))
    engine = engine_of(family)
    for max_rows, rows_in_flight in ((1, None), (3, None), (2, 5)):
        results = run_generate(engine, [policy] * len(PROMPTS), PROMPTS, max_rows, rows_in_flight)
        for (tokens, row), result in zip(expected, results, strict=True):
            assert result.tokens == tokens
            assert list(result.trace.exit_layers) == row.layers[result.trace.prompt_tokens :]
    passes = passes_of(engine)
    if (family, mode) == ("llama", "skip"):
        assert set(passes) == {"state_mode=skip", "prompts in the same pass"}
    else:
        assert set(passes) <= NOT_ALL
        assert passes["static"] > 0.8 * passes.total()
    # A text that is fed at once leaves at the same layers as token by token.
    pairs = [(PROMPTS[i], expected[i][0]) for i in range(3)]
    for scored, result in zip(run_score(engine, policy, pairs, 2), results, strict=False):
        assert scored.trace.exit_layers == result.trace.exit_layers


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_rows_of_different_policies(family: str) -> None:
    """Scopes, pruned blocks, a shared prefix and rows without exits in one batch; rows wait at exits."""
    model, engine = tiny_model(family), engine_of(family)
    shared = random_ids(80, 3)
    pairs: list[tuple[ExitPolicy, list[int]]] = [(FULL, shared + random_ids(3, 40))]
    for i, kind in enumerate(("mamba", "calm", "ffn")):
        for scope in ("generated", "all"):
            policy = classifier_policy(kind, exit_scope=scope, pruned_blocks=frozenset({4} if i else ()))
            policy = separated_policy(model, policy, PROMPTS[0], classifiers=CLASSIFIERS)
            pairs += [(policy, shared + random_ids(2 + i, 50 + i)), (policy, random_ids(1 + 4 * i, 60 + i))]
    block_by_block = Engine(engine.backbone, CLASSIFIERS)
    alone = [run_generate(block_by_block, [policy], [prompt], 1)[0] for policy, prompt in pairs]
    requests = [GenerationRequest(prompt, 8, policy, Sampler(), lambda _: False) for policy, prompt in pairs]
    for max_rows, rows_in_flight in ((13, None), (3, 8), (1, None)):
        together, prefixes = drained(generate(engine, requests, max_rows, rows_in_flight=rows_in_flight), len(requests))
        assert prefixes
        for a, b in zip(alone, together, strict=True):
            assert (a.tokens, a.trace) == (b.tokens, b.trace)
    passes = passes_of(engine)
    assert passes["static"] > 0 and passes["rows that prune different blocks"] > 0
    assert set(passes) <= NOT_ALL | {"rows that prune different blocks"}


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
    ("mistral", "recompute", "mamba", "no kernel"),
    ("qwen3", "recompute", "ffn", "kernel"),
    ("mamba2", "recompute", "state", "kernel"),
    ("mamba2", "recompute", "ffn", "no kernel"),
    ("mamba2", "skip", "state", "kernel"),
    ("mamba", "recompute", "state", "kernel"),
    ("mamba", "recompute", "state", "no kernel"),
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
        assert messages and all("a replay differs by" in message for message in messages)
        assert graphs.replays == graphs.captures


class Collected:
    """Takes logits and keeps none."""

    def reduce(self, tokens: IntArray, logits: Tensor) -> Tensor:
        return logits

    def store(self, tokens: IntArray, reduced: Tensor) -> None:
        pass


def fed(ids: list[int], position: int, slot: int, policy: ExitPolicy) -> RowInput:
    return RowInput(ids, position, slot, 1, 8, policy)


@pytest.mark.parametrize("family", ["llama", "mamba2", "mamba"])
def test_places_without_a_token_change_no_row(family: str) -> None:
    """Three rows of four go on, on four places; one leaves and goes deep in the next pass, with places of its own."""
    engine = engine_of(family)
    states = engine.new_states(4 * 12, row_stride=12)
    slots = [slot for slot in (states.allocate_row(12) for _ in range(4)) if slot is not None]
    prompts = [fed(random_ids(3 + i, i), 0, slot, FULL) for i, slot in enumerate(slots)]
    engine.forward(FlatBatch.build(prompts), states, Collected())
    leaving, staying = (ExitPolicy(LAYERS, (2,), (value,), confidence="state") for value in (0.0, 0.9999))
    for step in range(4):
        if step == 1:
            before = states_of(states)  # the places have been taken by four tokens
        policies = [leaving if step == 1 else staying, *[FULL] * (3 if step == 0 else 2)]
        rows = [fed([5 + step], 3 + i + step, slots[i], policy) for i, policy in enumerate(policies)]
        engine.forward(FlatBatch.build(rows), states, Collected())
    assert passes_of(engine) == {"static": 4}
    scratch = getattr(states.backbone, "scratch_slot", None), getattr(states.backbone, "scratch_line", None)
    written = {place for place in scratch if place is not None}
    for i in range(3):
        written |= {slots[i]} if "mamba" in family else {slots[i] + 3 + i + step for step in (1, 2, 3)}
    for old, new in zip(before, states_of(states), strict=True):
        changed = {int(line) for line in np.flatnonzero((old != new).flatten(1).any(1))}
        assert changed == written


def states_of(states: RowStates) -> list[Tensor]:
    """Copies of all that blocks keep, one line for each row, or token of one."""
    kept: Any = states.backbone
    if hasattr(kept, "keys"):
        return [cache.clone() for cache in (*kept.keys, *kept.values) if cache is not None]
    return [part.clone() for block in range(1, LAYERS + 1) for part in kept.of(block)]


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
    result = SegmentOutput(torch.zeros(1), torch.zeros(1))

    def running() -> SegmentOutput:
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


def test_reasons_are_counted() -> None:
    """Hooks, autocast, other blocks, and processes that share them keep passes from segments, not from being right."""
    hooked = engine_of("llama")
    model: Any = tiny_model("llama")
    handle = model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: None)
    try:
        run_generate(hooked, [FULL] * 2, PROMPTS[:2], 2)
    finally:
        handle.remove()
    assert set(passes_of(hooked)) == {"blocks that are hooked, adapted or quantised"}
    narrow = Engine(make_backbone(model, max_length=256), autocast_dtype=torch.bfloat16)
    narrow.use_segments(True)
    run_generate(narrow, [FULL] * 2, PROMPTS[:2], 2)
    assert set(passes_of(narrow)) == {"autocast"}
    shared = engine_of("llama")
    shared.use_segments(True, "blocks that several processes share")
    run_generate(shared, [FULL] * 2, PROMPTS[:2], 2)
    assert set(passes_of(shared)) == {"blocks that several processes share"}
    replayed = engine_of("gpt_neox")
    run_generate(replayed, [FULL] * 2, PROMPTS[:2], 2)
    assert set(passes_of(replayed)) == {"blocks of a kind that runs one by one"}
    for engine in (hooked, narrow, shared, replayed):
        engine.use_segments(None)
        assert engine.segments is None  # on a CPU


def test_without_a_kernel_keys_are_copied_only_where_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "Graphs", ReplayedGraphs)
    with cuda_like():
        varlen.is_available.cache_clear()
        engine = engine_of("llama", on_gpu=True)
        engine.use_segments(None)
        run_generate(engine, [FULL] * 2, PROMPTS[:2], 2)
    assert set(passes_of(engine)) == {"no kernel of ragged rows"}


def test_the_argument_and_the_result_file(model_folder: Any) -> None:
    requests = generation_requests(["The quick", "A lazy", "The", "brown fox jumps"])
    exits = {"threshold": 0.1, "exit_layers": [2, 4], "batch_size": 2}
    answers = []
    for choice in ("auto", True, "false"):
        lm = dynamax(model_folder, static_segments=choice, **exits)
        answers.append(lm.generate_until(requests, disable_tqdm=True))
        counted = describe.run_settings(lm)["static_segments"]
        assert (counted is None) == (choice is not True)
    assert answers[0] == answers[1] == answers[2]
    lm.use_policy(replace(lm.args, static_segments=True))
    assert lm.generate_until(requests, disable_tqdm=True) == answers[0]
    assert describe.run_settings(lm)["static_segments"]["static"] > 0


def test_places_are_powers_of_two() -> None:
    assert [bucket(count) for count in (0, 1, 2, 3, 4, 5, 8, 9)] == [0, 1, 2, 4, 4, 8, 8, 16]

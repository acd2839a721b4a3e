"""Engines whose blocks run in segments, and what stands for CUDA graphs on a device that computes on the CPU.

What was captured runs again. Every replay has to ask the device for the same operations on the same memory, with the
same numbers, as the first one, and nothing of the host: whatever differed, a real graph would do as it was captured.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

from cudalike import counting, on_cuda
from helpers import LAYERS, tiny_model
from helpers_engine import CLASSIFIERS, classifier_policy
from kernel_stand_ins import STAND_INS
from torch import Tensor

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.backbones.base import IntArray
from dynamax_lm_eval.engine.batch import RowInput
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.exits.policy import ExitPolicy


class ReplayedGraph:
    """What was captured."""

    def __init__(self, function: Callable[[], Any]) -> None:
        # A graph keeps nobody alive who made it.
        self._function = weakref.WeakMethod(function) if hasattr(function, "__self__") else lambda: function
        self._calls: list[str] | None = None
        self.replays = 0

    def replay(self) -> None:
        with counting(calls=True) as counts:
            self._function()()
        assert not counts.uploads and not counts.blocking_uploads and not counts.read_backs, counts
        if self._calls is None:
            self._calls = counts.calls
        assert counts.calls and counts.calls == self._calls
        self.replays += 1


class ReplayedGraphs:
    """What stands for ``segments.Graphs``."""

    #: All that were captured, as long as they are there.
    alive: ClassVar[weakref.WeakSet[ReplayedGraph]] = weakref.WeakSet()
    captures: ClassVar[int] = 0
    replays: ClassVar[int] = 0

    def __init__(self, device: Any) -> None:
        assert device.type == "cuda"

    def warm_up(self, function: Callable[[], Any]) -> Any:
        return function()

    def capture(self, function: Callable[[], Any]) -> Callable[[], None]:
        graph = ReplayedGraph(function)
        self.alive.add(graph)
        ReplayedGraphs.captures += 1

        def replay() -> None:
            ReplayedGraphs.replays += 1
            graph.replay()

        return replay


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


class Collected:
    """Takes logits and keeps none."""

    def reduce(self, tokens: IntArray, logits: Tensor) -> Tensor:
        return logits

    def store(self, tokens: IntArray, reduced: Tensor) -> None:
        pass


def fed(ids: list[int], position: int, slot: int, policy: ExitPolicy) -> RowInput:
    return RowInput(ids, position, slot, 1, 8, policy)

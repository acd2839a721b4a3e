"""In place of CUDA graphs, on the device that computes on the CPU (``cudalike``): what was captured runs again.

Every replay has to ask the device for the same operations on the same memory, with the same numbers, as the first one,
and nothing of the host: whatever differed, a real graph would do as it was when it was captured.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

from cudalike import counting


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

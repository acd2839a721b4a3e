"""Runs of blocks between two exits on tensors that stay where they are, which a GPU replays as CUDA graphs.

A segment is called with a bucket of places for tokens in flight and one for tokens that left: their hidden states, and
numbers that say where their states stand. Places that no token takes write to a slot of the states that no row owns.
What blocks do there is the business of the backbones; nothing here knows any.

Between copying values into the places and reading results, a segment asks the device the same operations on the same
memory every time, and nothing of the host: no copies, no waiting, no pinned memory. That is what
``torch/cuda/graphs.py`` and the CUDA documentation ask of a capture; ``tests/test_segments.py`` holds it on a device
that computes on the CPU. It was not yet run on a GPU, nor were the few lines of :class:`Graphs`.

n places of tokens in flight, m of tokens that left, D hidden.
"""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.learned import MappedProject, StateMaps, mapped_by_place

logger = logging.getLogger(__name__)

#: Most places of a segment: the operations on more tokens take longer than starting them.
MOST_PLACES = 256
#: Most graphs of one set of states: each holds what it needs to start its operations.
_MOST_GRAPHS = 256
#: By how much the first replay may differ from the same operations one by one, relative to the largest value.
_TOLERANCE = 1e-2


def bucket(count: int) -> int:
    """Returns how many places ``count`` tokens are given: 0 or the next power of 2."""
    return 1 << (count - 1).bit_length() if count else 0


def as_words(values: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Returns 32-bit numbers as 64-bit ones of the same bytes, half as many (rounded up)."""
    return np.append(values, np.zeros(len(values) % 2, dtype=np.int32)).view(np.int64)


@dataclass
class SegmentUse:
    """That passes in which every row has one token run in segments, and how many did."""

    #: Also where a GPU has no kernel of ragged rows, so that keys are copied.
    everywhere: bool = False
    #: Why no pass does, in a few words.
    against: str | None = None
    #: Passes with rows of one token: ``static`` for those that ran in segments, else what kept them from it.
    passes: Counter[str] = field(default_factory=Counter)


class SegmentOutput(NamedTuple):
    """What a segment makes of the tokens in flight."""

    before: Tensor  # (1, n, D) what its last block was given; only until another segment runs
    hidden: Tensor  # (1, n, D)


class Places:
    """The tensors that segments are called with."""

    def __init__(self, like: Tensor, num_tokens: int, left_like: Tensor | None, num_left: int, num_numbers: int):
        """
        Args:
            like: (1, .., D) a tensor as the hidden states of tokens in flight.
            num_tokens: n.
            left_like: (.., D) a tensor as the hidden states of tokens that left; None where m is 0.
            num_left: m.
            num_numbers: all numbers, of which the first m say which of the tokens that left take the m places.
        """
        self.hidden = like.new_zeros(1, num_tokens, like.shape[-1])
        self.left = None if left_like is None else left_like.new_zeros(1, num_left, left_like.shape[-1])
        self.numbers = torch.zeros(num_numbers, dtype=torch.int64, device=like.device)
        self._given: npt.NDArray[np.int64] | None = None

    def fill(self, hidden: Tensor, left: Tensor | None, numbers: npt.NDArray[np.int64]) -> None:
        """Copies hidden states (1, up to n, D) and numbers in, and the tokens of ``left`` (.., D) that they name."""
        self.hidden[:, : hidden.shape[1]].copy_(hidden)
        if self._given is None or not np.array_equal(numbers, self._given):
            self._given, given = numbers, torch.from_numpy(numbers)
            if self.numbers.device.type == "cuda":
                # New pinned memory every time: torch does not give it out again before the copy is done.
                self.numbers.copy_(given.pin_memory(), non_blocking=True)
            else:
                self.numbers.copy_(given)
        if self.left is not None:
            assert left is not None
            torch.index_select(left, 0, self.numbers[: self.left.shape[1]], out=self.left[0])


class Segment(ABC):
    """A run of blocks on places, which keeps alive and refers to nothing but tensors and modules."""

    @abstractmethod
    def run(self) -> SegmentOutput:
        """Runs the blocks on what the places hold; the output is the segment's own."""

    def save(self) -> Callable[[], None]:
        """Returns a function that undoes what :meth:`run` does to states, where doing it twice is not as once."""
        return lambda: None


#: Gives how a block (1-based) projects the tokens that left, from their places; None: as ever.
StaticMaps = Callable[[int], MappedProject | None]


@dataclass(frozen=True)
class StaticCall:
    """What a segment is run with in one pass."""

    key: Hashable  # what tells its segment from others with the same places
    storage: Hashable  # what changes where the states' tensors are others
    num_tokens: int  # n
    num_left: int  # m
    numbers: Sequence[npt.NDArray[np.int64]]  # the first m: which of the tokens that left take the m places
    make: Callable[[Places, StaticMaps], Segment]
    #: The exits at which tokens left whose states are learned, 0 where they are recomputed; the last m numbers say
    #: which of them it is for each place. Empty: all are recomputed.
    learned_from: tuple[int, ...] = ()

    def with_origins(self, learned_from: npt.NDArray[np.int64]) -> StaticCall:
        """Returns the call with the exits (..,) at which all deferred tokens left to be learned; 0: recomputed."""
        origins = learned_from[self.numbers[0]]
        layers = tuple(np.unique(origins).tolist())
        return replace(self, numbers=[*self.numbers, origins], learned_from=layers)


class Graphs:
    """CUDA graphs that share memory; the only lines that ask CUDA for them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], SegmentOutput]) -> SegmentOutput:
        """Runs a function for the first time, on the stream on which it will be captured: libraries allocate then."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Records what a function asks of the device, which does none of it, and returns what replays it."""
        graph: Any = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        try:
            # Other threads of the process may allocate meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                function()
        except BaseException:
            torch.cuda.set_stream(current)  # torch does not leave the stream where a capture fails
            raise
        replay: Callable[[], None] = graph.replay
        return replay


class _Recorded:
    """A segment, which is captured when it is used for the second time."""

    def __init__(self, segment: Segment, storage: Hashable) -> None:
        self.storage = storage
        self._segment = segment
        self._output: SegmentOutput | None = None  # of replays; not in the graphs' memory, which others overwrite
        self._replay: Callable[[], None] | None = None
        self._may_capture = True

    @property
    def is_next_captured(self) -> bool:
        """Whether the next use captures it."""
        return self._may_capture and self._output is not None and self._replay is None

    def run(self, graphs: Graphs | None, count: int) -> SegmentOutput:
        """Runs it; ``graphs``: None where there are none, or no more; ``count``: of the places that tokens take."""
        if self._replay is not None:
            return self._replayed(self._replay)
        if graphs is None or not self._may_capture:
            return self._segment.run()
        if self._output is None:
            output = graphs.warm_up(self._segment.run)
            self._output = SegmentOutput(*map(torch.empty_like, output))
            return output
        try:
            replay = graphs.capture(self._record)
        except Exception as error:
            self._may_capture = False
            _warn(f"it could not be captured ({' '.join(str(error).split())[:200]})")
            return self._segment.run()
        return self._compared(replay, count)

    def _record(self) -> None:
        assert self._output is not None
        for place, value in zip(self._output, self._segment.run(), strict=True):
            place.copy_(value)

    def _replayed(self, replay: Callable[[], None]) -> SegmentOutput:
        assert self._output is not None
        replay()
        return SegmentOutput(self._output.before, self._output.hidden.clone())

    def _compared(self, replay: Callable[[], None], count: int) -> SegmentOutput:
        """Runs the segment without its graph, and keeps the graph if that gives the same."""
        restore = self._segment.save()
        replayed = self._replayed(replay).hidden[:, :count].float()
        restore()
        output = self._segment.run()
        hidden = output.hidden[:, :count].float()
        difference, largest = (float(values.abs().max()) for values in (replayed - hidden, hidden))
        if difference <= _TOLERANCE * largest:
            self._replay = replay
        else:
            self._may_capture = False
            _warn("a replay differs from the same operations one by one")
            logger.debug("A replay differs by %g where values reach %g", difference, largest)
        return output


@functools.cache
def _warn(reason: str) -> None:
    """Says once why a segment is not replayed."""
    logger.warning("A segment of blocks runs without a CUDA graph: %s", reason)


class StaticSegments:
    """The segments, places and graphs of one set of states; they end with it."""

    def __init__(self, use: SegmentUse) -> None:
        self.use = use
        self._places: dict[Hashable, Places] = {}
        self._segments: dict[Hashable, _Recorded] = {}
        self._reasons: dict[tuple[int, ...], str | None] = {}
        self._graphs: Graphs | None = None
        self._num_graphs = 0

    def reason_against(self, blocks: tuple[int, ...], find: Callable[[tuple[int, ...]], str | None]) -> str | None:
        """Returns what ``find`` says against running these blocks in a segment, asked once; None: nothing."""
        if blocks not in self._reasons:
            self._reasons[blocks] = find(blocks)
        return self._reasons[blocks]

    def run(self, call: StaticCall, hidden: Tensor, left: Tensor | None, maps: StateMaps) -> SegmentOutput:
        """Runs a segment on tokens in flight (1, up to n, D) and on some of ``left`` (.., D).

        ``maps``: those of learned states, the same in all calls.
        """
        numbers = np.concatenate(call.numbers)
        left = left if call.num_left else None
        sizes = call.num_tokens, call.num_left, len(numbers)
        kind = sizes, hidden.shape[-1], hidden.dtype, hidden.device, None if left is None else left.dtype
        places = self._places.get(kind)
        if places is None:
            places = self._places[kind] = Places(hidden, call.num_tokens, left, call.num_left, len(numbers))
        places.fill(hidden, left, numbers)
        key = call.key, kind, call.learned_from
        recorded = self._segments.get(key)
        if recorded is None or recorded.storage != call.storage:
            origins = places.numbers[len(numbers) - call.num_left :]
            mapped = partial(mapped_by_place, maps, call.learned_from, origins)
            recorded = self._segments[key] = _Recorded(call.make(places, mapped), call.storage)
        output = recorded.run(self._graphs_for(recorded, hidden.device), hidden.shape[1])
        return SegmentOutput(*(part[:, : hidden.shape[1]] for part in output))

    def _graphs_for(self, recorded: _Recorded, device: torch.device) -> Graphs | None:
        if device.type != "cuda" or self._num_graphs >= _MOST_GRAPHS:
            return None
        self._num_graphs += recorded.is_next_captured
        if self._graphs is None:
            self._graphs = Graphs(device)
        return self._graphs

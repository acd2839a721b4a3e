"""The clock against the full model's in one run: the same requests answered by both, in turns.

Machines are busy or hot at times, so what is compared is run side by side: blocks of requests, each answered by both,
and who begins alternates. Ratios are taken block by block. Knows how to generate; knows no texts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dynamax_lm_eval.engine.prefixes import PrefixRun
from dynamax_lm_eval.engine.requests import Generation, GenerationRequest
from dynamax_lm_eval.exits.policy import ExitPolicy

#: Blocks of requests: enough for a median, and each long enough to be timed.
_BLOCKS = 8

Run = Callable[[Sequence[GenerationRequest]], Generator[tuple[int, Generation], None, list[PrefixRun]]]


@dataclass
class SpeedLog:
    """What blocks of requests took, of the run and of the full model."""

    pairs: list[tuple[float, float]] = field(default_factory=list)
    #: Requests, and those of them that both answered alike.
    requests: int = 0
    same: int = 0

    def to_json(self) -> dict[str, Any]:
        """Returns what a result file says."""
        ratios = [full / own for own, full in self.pairs]
        return {
            "realised_speedup": statistics.median(ratios),
            "ratios": ratios,
            "requests": self.requests,
            "same_texts": self.same / self.requests,
        }


def paired(
    requests: Sequence[GenerationRequest],
    at_least: int,
    run: Run,
    clock: Callable[[], float],
    log: SpeedLog,
) -> Generator[tuple[int, Generation], None, list[PrefixRun]]:
    """Yields and returns what ``run`` does, of all requests, and logs how long the full model takes for them.

    Args:
        requests: what to generate.
        at_least: requests of a block: as many as run side by side.
        run: generates for some of them; called with those under their own policies, and with those of the full model.
        clock: tells the time in seconds.
        log: gets the times.
    """
    depth = requests[0].policy.num_layers
    size = max(at_least, -(-len(requests) // _BLOCKS))
    prefixes: list[PrefixRun] = []
    for number, first in enumerate(range(0, len(requests), size)):
        block = requests[first : first + size]
        # A sampler's random stream goes on from where it is, so each run has one of its own.
        whole = [replace(r, policy=ExitPolicy(depth), sampler=replace(r.sampler)) for r in block]
        seconds: dict[bool, float] = {}
        found: dict[bool, dict[int, Generation]] = {}
        for is_own in (True, False) if number % 2 == 0 else (False, True):
            start = clock()
            found[is_own], runs = _drained(run(block if is_own else whole))
            seconds[is_own] = clock() - start
            if is_own:
                prefixes += runs
        log.pairs.append((seconds[True], seconds[False]))
        log.requests += len(block)
        log.same += sum(found[True][i].tokens == found[False][i].tokens for i in range(len(block)))
        for index, generation in found[True].items():
            yield first + index, generation
    return prefixes


def _drained(
    running: Generator[tuple[int, Generation], None, list[PrefixRun]],
) -> tuple[dict[int, Generation], list[PrefixRun]]:
    found: dict[int, Generation] = {}
    while True:
        try:
            index, generation = next(running)
        except StopIteration as end:
            return found, end.value
        found[index] = generation

"""Which threshold makes drafts fastest, measured on some documents of a task before all of them run.

What exits draft does not change a text, so only the clock decides. Candidates and the full model answer the same blocks
of documents in turns, and the ratio of their times is taken block by block. Knows thresholds and seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

#: Documents that are tried, in blocks of which each gives one ratio.
DOCUMENTS = 32
_BLOCKS = 4
#: Below the first hardly any draft stands, and above the last there are hardly any.
CANDIDATES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
#: The full model.
OFF = 1.0


@dataclass(frozen=True)
class Fastest:
    """What was measured.

    Attributes:
        threshold: of the largest speed-up; ``OFF`` where none is above 1.
        speedups: of each candidate: the median over blocks of the full model's seconds over its own.
        documents: how many were tried.
    """

    threshold: float
    speedups: dict[float, float]
    documents: int

    def to_json(self) -> dict[str, Any]:
        speedups = {f"{threshold:g}": value for threshold, value in self.speedups.items()}
        return {"threshold": self.threshold, "speedups": speedups, "documents": self.documents}


def find_fastest(
    documents: Sequence[Any],
    run: Callable[[float, Sequence[int]], None],
    clock: Callable[[], float] = time.perf_counter,
) -> Fastest:
    """Tries all candidates.

    Args:
        documents: that of every request.
        run: answers some requests at a threshold; the answers are not needed.
        clock: tells the time in seconds.
    """
    names = list(dict.fromkeys(documents))
    tried = names[:: max(1, len(names) // DOCUMENTS)][:DOCUMENTS]
    size = -(-len(tried) // _BLOCKS)
    seconds: dict[float, list[float]] = {threshold: [] for threshold in (OFF, *CANDIDATES)}
    for number, start in enumerate(range(0, len(tried), size)):
        block = set(tried[start : start + size])
        requests = [i for i, document in enumerate(documents) if document in block]
        if number == 0:
            run(OFF, requests[:1])  # what only a first run takes is nobody's
        for threshold in sorted(seconds, reverse=bool(number % 2)):
            began = clock()
            run(threshold, requests)
            seconds[threshold].append(clock() - began)
    speedups = {
        threshold: statistics.median(full / own for full, own in zip(seconds[OFF], seconds[threshold], strict=True))
        for threshold in CANDIDATES
    }
    best = max(speedups, key=lambda threshold: speedups[threshold])
    return Fastest(best if speedups[best] > 1 else OFF, speedups, len(tried))

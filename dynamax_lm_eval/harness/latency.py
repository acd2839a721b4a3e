"""How long generations took, request by request, and their percentiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_PERCENTILES = (50, 90, 99)


class Latency(NamedTuple):
    """One generation.

    Attributes:
        first_token: seconds from when its prompt began to run to its first token; waiting for a place is left out.
        per_token: seconds per token after the first; None where there are none.
    """

    first_token: float
    per_token: float | None


def summary(
    by_task: Mapping[str, Sequence[Latency]], batch_size: Any, rows_in_flight: int | None
) -> dict[str, Any] | None:
    """Returns mean and percentiles in milliseconds, of all and by task, with what they depend on.

    None without any generation.
    """
    every = [latency for found in by_task.values() for latency in found]
    if not every:
        return None
    depends = {"batch_size": batch_size, "rows_in_flight": rows_in_flight}
    return {**_of_requests(every), **depends, "by_task": {name: _of_requests(found) for name, found in by_task.items()}}


def _of_requests(latencies: Sequence[Latency]) -> dict[str, Any]:
    later = [latency.per_token for latency in latencies if latency.per_token is not None]
    return {
        "requests": len(latencies),
        "time_to_first_token_ms": _of([latency.first_token for latency in latencies]),
        "time_per_output_token_ms": _of(later) if later else None,
    }


def _of(seconds: Sequence[float]) -> dict[str, float]:
    milliseconds = 1e3 * np.asarray(seconds)
    found = {"mean": float(milliseconds.mean())}
    return found | {f"p{p}": float(np.percentile(milliseconds, p)) for p in _PERCENTILES}

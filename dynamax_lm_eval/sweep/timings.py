"""Time, latency and energy of single points: measured where points are answered one after the other."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.sweep.files import POINT, POINT_NAME, check_results, point_folder
from dynamax_lm_eval.sweep.model import SweepPoint

logger = logging.getLogger(__name__)

#: Parts of ``compute.overall`` that say what answering took. Points that are answered together share them.
_PARTS = (
    *("physical", "seconds", "seconds_total", "fed_tokens_in_seconds", "fed_tokens_per_second"),
    *("latency", "energy", "peak_memory_bytes"),
)

#: The timing of a point that has none of its own.
NONE: Mapping[str, Any] = {}


def before(folder: Path, point: SweepPoint, asked: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns what is known of a point's timing before it is answered; None: it is measured now.

    Answers that are there already took their time in an earlier run. Where that run finished the point, its result file
    says what they took, if it asked for the same documents (``asked``); where it was stopped on the way, nobody knows.
    """
    if len(point.store) == 0:
        return None
    home = point_folder(folder, point.point.name)
    try:
        done = POINT.read(home / POINT_NAME) if (home / POINT_NAME).is_file() else None
        if done is not None and done["answers"] == len(point.store) and _documents(done["asked"]) == _documents(asked):
            check_results(home, done["checksums"])
            overall = json.loads((home / done["results"]).read_text(encoding="utf-8"))["compute"]["overall"]
            return {name: overall[name] for name in _PARTS if name in overall}
    except UserError:
        pass  # its results are damaged and are made anew
    logger.warning(
        "Point %s goes on from %d answers of an earlier run, so no time is known; remove %s to measure it",
        point.point.name,
        len(point.store),
        home,
    )
    return NONE


def _documents(asked: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in asked.items() if name != "recorded"}


def put(results: dict[str, Any], timing: Mapping[str, Any] | None) -> None:
    """Leaves in results what was measured (``timing``: None), or puts there what is known instead."""
    overall = results["compute"]["overall"]
    if timing is None:
        return
    for name in _PARTS:
        overall.pop(name, None)
    overall.update(timing)

"""What a sweep is going to do: the documents of its tasks, what each point has to answer, and that in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm_eval.tasks import TaskManager

from dynamax_lm_eval.files import checksum
from dynamax_lm_eval.harness import describe
from dynamax_lm_eval.harness.documents import naming_tasks
from dynamax_lm_eval.harness.evaluate import document_hashes, one_of_many_evaluations
from dynamax_lm_eval.sweep.grid import Point
from dynamax_lm_eval.sweep.options import SweepOptions

#: Grows with what a finished point says of its run (the few-shot draw came with 2, for certificates): one that says
#: less is evaluated again, from the answers that it has.
_RECORDED = 2


def plan(
    lm: Any, options: SweepOptions, points: Sequence[Point], done: int, documents: Mapping[str, Mapping[str, Documents]]
) -> str:
    """Returns what is answered, by what, and where it is written.

    Args:
        lm: the model.
        options: of the sweep.
        points: those of this process.
        done: how many of them are finished.
        documents: as :func:`documents_of` returns them.
    """
    lines = len({point.series for point in points})
    counts = {leaf: found.number for group in documents.values() for leaf, found in group.items()}
    tasks = ", ".join(f"{count} of {leaf}" for leaf, count in counts.items())
    already = f" ({done} done already)" if done else ""
    return (
        f"Sweep of {describe.loaded_model(lm)}: {len(points)} points in {lines} lines{already}; documents: {tasks}; "
        f"{options.batch_size} sequences at once; writing to {options.output}"
    )


class Documents(NamedTuple):
    """The documents of a task: how many they are, and a checksum of them."""

    number: int
    checksum: str


def documents_of(options: SweepOptions, manager: TaskManager) -> dict[str, dict[str, Documents]]:
    """Returns the documents of each task, by the names of ``--tasks``, of which some may be groups."""
    samples = options.samples_given
    found = {}
    for name in options.task_names:
        with naming_tasks(), one_of_many_evaluations():
            tasks = manager.load([name])["tasks"]
        hashes = {leaf: document_hashes(task, options.limit, (samples or {}).get(leaf)) for leaf, task in tasks.items()}
        found[name] = {leaf: Documents(len(those), checksum(those)) for leaf, those in hashes.items()}
    return found


def asked_of(options: SweepOptions, point: Point, documents: Mapping[str, Mapping[str, Documents]]) -> dict[str, Any]:
    """Returns what a point must have answered, and recorded, to be finished.

    The documents are part of it: the data of a task may change between two runs, and points that answered different
    ones cannot be compared.
    """
    samples = options.samples_given
    leaves = {leaf: found.checksum for name in point.tasks for leaf, found in documents[name].items()}
    asked: dict[str, Any] = {
        "tasks": list(point.tasks),
        "limit": options.limit,
        "recorded": _RECORDED,
        "documents": dict(sorted(leaves.items())),
    }
    return asked if samples is None else {**asked, "samples": samples}

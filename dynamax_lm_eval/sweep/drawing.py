"""Which documents a sweep answers that takes some at random: the first ones of a sorted task are no sample of it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
from lm_eval.tasks import TaskManager

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.files import checksum
from dynamax_lm_eval.harness.documents import naming_tasks
from dynamax_lm_eval.sweep.options import SweepOptions

logger = logging.getLogger(__name__)


def with_drawn_documents(options: SweepOptions, manager: TaskManager) -> SweepOptions:
    """Returns options that name documents of each task, ``limit`` of them drawn by the seed ``draw``, if that is given.

    A task's draw depends on the seed and the task's name alone, and a larger one holds a smaller one.

    Raises:
        UserError: documents are to be drawn from a group of tasks.
    """
    if options.draw is None:
        return options
    samples: dict[str, list[int]] = {}
    for name in options.task_names:
        with naming_tasks():
            tasks = manager.load([name])["tasks"]
        if list(tasks) != [name]:
            raise UserError(f"--draw takes documents of tasks, and {name} is a group of {', '.join(tasks)}; name those")
        count = len(tasks[name].eval_docs)
        order = np.random.default_rng([options.draw, int(checksum(name)[:8], 16)]).permutation(count)
        samples[name] = sorted(order[: options.limit].tolist())
        logger.info("%s: %d of %d documents, drawn by seed %d", name, len(samples[name]), count, options.draw)
    return replace(options, limit=None, draw=None, samples=json.dumps(samples))

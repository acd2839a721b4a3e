"""Models, requests, options and results as the harness and the commands have them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from helpers import TASKS
from helpers_engine import exits_config, varied_classifiers
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, processors

from dynamax_lm_eval.calibration.options import CalibrateOptions
from dynamax_lm_eval.exits import checkpoint
from dynamax_lm_eval.lm import DynamaxLM
from dynamax_lm_eval.models.fingerprint import files_fingerprint
from dynamax_lm_eval.sweep.files import finished_points
from dynamax_lm_eval.sweep.options import SweepOptions
from dynamax_lm_eval.sweep.results import PointResult, TaskResults

EXIT_ARGS = {"threshold": 0.1, "exit_layers": [2, 4]}


def dynamax(folder: Path, **args: Any) -> DynamaxLM:
    return DynamaxLM(str(folder), **{"threshold": 1, "batch_size": 3, "device": "cpu", **args})


def evaluate(lm: Any, manager: TaskManager, *tasks: str, **options: Any) -> Any:
    return lm_eval.simple_evaluate(lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options)


def responses(results: Any, task: str) -> list[Any]:
    return [sample["resps"] for sample in sorted(results["samples"][task], key=lambda s: s["doc_id"])]


def add_post_processor(folder: Path) -> None:
    """From now on the tokenizer in a model's folder puts a BOS before every text; its class and length stay."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))


def generation_requests(contexts: list[str], **kwargs: Any) -> list[Instance]:
    options = {"until": ["\n"], "max_gen_toks": 8, **kwargs}
    return [instance("generate_until", (context, options), i, ("t", i, 1)) for i, context in enumerate(contexts)]


def instance(
    kind: str, arguments: tuple[Any, ...], index: int = 0, place: tuple[str | None, int | None, int] = (None, None, 1)
) -> Instance:
    """A request as the harness makes it; ``place``: its task, the number of its document, and how often it is asked.

    0.5.0.dev1 takes the place in fields of their own, and an empty context before a whole text.
    """
    if any(field.name == "doc_id" and field.kw_only for field in fields(Instance)):
        task, document, repeats = place
        if kind == "loglikelihood_rolling":
            arguments = ("", *arguments)
        apart: Any = {"task_name": task, "doc_id": document, "repeats": repeats}
        return Instance(kind, {}, arguments, idx=index, **apart)
    return Instance(kind, {}, arguments, index, place)  # type: ignore[arg-type]


def save_exits(model_folder: Path, folder: Path, **changes: Any) -> Path:
    fingerprint = changes.pop("fingerprint", None) or files_fingerprint(str(model_folder), {})
    config = exits_config(**changes)
    identity = replace(config.backbone, id=str(model_folder), fingerprint=fingerprint)
    config = replace(config, backbone=identity)
    checkpoint.save(folder, config, varied_classifiers(config))
    return folder


def exit_model(folder: Path, **args: Any) -> DynamaxLM:
    return DynamaxLM(str(folder), **{"threshold": 0.6, "batch_size": 3, "device": "cpu", **args})


def numbers(answers: Sequence[Any]) -> list[float]:
    """The log-likelihoods of whole texts; 0.5.0.dev1 gives each with False beside it."""
    return [answer[0] if isinstance(answer, (list, tuple)) else answer for answer in answers]


def sweep_options(model_folder: Path, output: Path, **changed: Any) -> SweepOptions:
    given: dict[str, Any] = {
        "backbone": str(model_folder),
        "tasks": "tiny_generate,tiny_choice",
        "output": str(output),
        "thresholds": "0.3,0.6",
        "confidences": "state",
        "state_modes": "recompute,skip",
        "prune": "1",
        "include_path": str(TASKS),
        "device": "cpu",
        "batch_size": 5,
    }
    return SweepOptions(**{**given, **changed})


def results_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Per point: the tasks' results without what differs between runs."""
    found = {}
    for point in finished_points(folder):
        data = json.loads((point["folder"] / point["results"]).read_text())
        found[point["point"]] = data["results"]
    return found


def calibrate_options(model_folder: Path, exits: Path, output: Path, **changed: Any) -> CalibrateOptions:
    given: dict[str, Any] = {
        "backbone": str(model_folder),
        "tasks": "tiny_generate",
        "output": str(output),
        "thresholds": "0.2,0.5,0.9",
        "confidence": "calm",
        "tolerance": 0.99,  # random exits lose nearly everything
        "level": 0.9,
        "model_args": f"exits={exits}",
        "include_path": str(TASKS),
        "device": "cpu",
        "batch_size": 5,
    }
    return CalibrateOptions(**{**given, **changed})


def run_calibrated(
    model_folder: Path,
    exits: Path,
    threshold: str,
    samples: Any = None,
    task: str = "tiny_generate",
    seeds: Any = None,
    **args: Any,
) -> Any:
    lm = DynamaxLM(backbone=str(model_folder), exits=str(exits), threshold=threshold, device="cpu", **args)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return lm_eval.simple_evaluate(
        lm, tasks=[task], task_manager=manager, samples=samples, bootstrap_iters=0, **(seeds or {})
    )


# Statistics on points that are made by hand.


def point(name: str, series: str, scores: Sequence[float], reduction: float, kind: str = "exits") -> PointResult:
    """Documents that cost 100 MACs at full depth and save by the same factor."""
    spent = 100 / reduction
    macs = {"eligible_full": 100, "eligible": spent, "total_full": 100, "total": spent}
    return PointResult(
        name=name,
        kind=kind,
        series=series,
        x=reduction,
        policy={},
        scores={"acc,none": (float(np.mean(scores)), 0.0)},
        compute={"compute_reduction": reduction, "degenerate_rate": 0.0},
        samples=[{"acc": score, "macs": macs} for score in scores],
        answers=[],
        pieces=[],
    )


def made_results(n: int = 40) -> TaskResults:
    """The full model is right everywhere; exits lose a tenth at 1.5, and pruning half at 1.25."""
    right = [1.0] * n
    return TaskResults(
        "b",
        "t",
        [
            point("full", "full model", right, 1.0, "full"),
            point("e", "calm, skip", [0.0] * (n // 10) + [1.0] * (n - n // 10), 1.5),
            point("p", "pruning, deepest", [0.0, 1.0] * (n // 2), 1.25, "pruning"),
        ],
    )

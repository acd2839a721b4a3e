"""What a training says of itself while it runs: lines of ``training.jsonl``, and numbers for trackers."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dynamax_lm_eval.files import naming, write_text
from dynamax_lm_eval.training.options import TrainingOptions
from dynamax_lm_eval.training.trainer import StepReport

LOG_NAME = "training.jsonl"
#: Name for trackers; some make a folder of it in the output.
TRACKED = "dynamax-exits"


def is_own_log(log: Path) -> bool:
    """Returns whether a ``training.jsonl`` is a training's.

    It is where it begins with a line as :func:`write_step` writes it, whole or cut short.
    """
    first, *others = log.read_bytes().split(b"\n")
    names = {item.name for item in fields(StepReport)}
    try:
        return names <= set(json.loads(first))
    except (ValueError, TypeError):
        return not others and first.startswith(b'{"step": ')


def cut_log(log: Path, step: int) -> None:
    """Drops what was logged after the step from which training goes on."""
    lines = log.read_bytes().split(b"\n") if log.exists() and step else []
    kept = [line.decode("utf-8") for line in lines if _logged_step(line) <= step]
    with naming(log):
        write_text(log, "".join(f"{line}\n" for line in kept))


def _logged_step(line: bytes) -> float:
    """Returns the step of a line, or infinity where it is none."""
    try:
        return int(json.loads(line.decode("utf-8"))["step"])
    except (ValueError, TypeError, KeyError):  # a line that a kill cut short
        return float("inf")


def write_step(log: Path, report: StepReport, speed: float, accelerator: Any) -> None:
    """Writes a step to the log, and tells the trackers of it."""
    line = {**report.__dict__, "tokens_per_second": round(speed, 1), "time": time.time()}
    with naming(log), log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    flat = {"learning_rate": report.learning_rate, "tokens_per_second": speed}
    for kind, losses in report.losses.items():
        flat[f"{kind}/gradient_norm"] = report.gradient_norms[kind]
        for i, loss in enumerate(losses):
            flat[f"{kind}/loss_{i}"] = loss
            flat[f"{kind}/accuracy_{i}"] = report.accuracies[kind][i]
    accelerator.log(flat, step=report.step)


def held_out_numbers(results: dict[str, Any]) -> dict[str, float]:
    """Returns the quality of each classifier, for trackers; nothing where only one label occurred."""
    return {
        f"held_out/{kind}/exit_{layer}/{name}": quality[name]
        for kind, measured in results["classifiers"].items()
        for layer, quality in measured["exits"].items()
        for name in ("auroc", "expected_calibration_error")
        if quality[name] is not None
    }


#: AUROC on held-out text below which a classifier is hardly better than chance.
_CHANCE = 0.55


def near_chance(evaluation: Mapping[str, Any]) -> list[str]:
    """Returns the classifiers that tell right exits from wrong ones hardly better than chance, with their AUROC."""
    return [
        f"{kind} at exit layer {layer} ({quality['auroc']:.3f})"
        for kind, measured in evaluation["classifiers"].items()
        for layer, quality in measured["exits"].items()
        if quality["auroc"] is not None and quality["auroc"] < _CHANCE
    ]


def plan(
    options: TrainingOptions, num_layers: int, exit_layers: Sequence[int], dtype: object, device: object, folder: Path
) -> str:
    """Returns what is going to be trained, on what and for how long, and where it is written."""
    resumed = " (or what is left of them)" if (folder / LOG_NAME).exists() else ""
    return (
        f"Training {', '.join(options.kinds)} of {options.backbone} ({num_layers} blocks, {dtype} on {device}), exits "
        f"after blocks {', '.join(map(str, exit_layers))}: {options.steps} steps{resumed} of {options.batch_tokens} "
        f"tokens of {options.dataset}, then {options.eval_tokens} held-out tokens; writing to {folder}"
    )


def accuracy_line(report: StepReport) -> str:
    """Returns the accuracies of all exits, kind by kind."""
    return ", ".join(
        f"{kind} {'/'.join(f'{value:.2f}' for value in values)}" for kind, values in report.accuracies.items()
    )

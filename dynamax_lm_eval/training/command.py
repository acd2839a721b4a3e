"""``dynamax-lm-eval train``: from options to a checkpoint, through loading, the loop, and the evaluation."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import time
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import dynamax_lm_eval
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import checkpoint
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint, ExitConfig
from dynamax_lm_eval.files import naming, write_text
from dynamax_lm_eval.frozen import text as data
from dynamax_lm_eval.frozen.model import FrozenBackbone, _read_config, load_backbone
from dynamax_lm_eval.frozen.observe import observe
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.locks import locked
from dynamax_lm_eval.training import evaluation, state
from dynamax_lm_eval.training.batches import MicroBatches, Position
from dynamax_lm_eval.training.card import model_card
from dynamax_lm_eval.training.generated import generated_documents
from dynamax_lm_eval.training.options import SELF_DATASET, RunOptions, TrainingOptions
from dynamax_lm_eval.training.trainer import Processes, StepReport, Throughput, Trainer

logger = logging.getLogger(__name__)

_LOG_NAME, _STATE_NAME = "training.jsonl", "state"
#: Name for trackers; some make a folder of it in the output.
_TRACKED = "dynamax-exits"


def train(options: TrainingOptions, run: RunOptions) -> ExitCheckpoint | None:
    """Trains exits and writes their checkpoint; returns it on the main process, None on the others.

    Raises:
        UserError: an option cannot be honoured, the output folder holds something else, or another process writes
            there.
    """
    with ExitStack() as held:
        return _train(options, run, held)


def _train(options: TrainingOptions, run: RunOptions, held: ExitStack) -> ExitCheckpoint | None:
    config = _read_config(options, run)
    exit_layers = options.resolve_exit_layers(int(config.get_text_config().num_hidden_layers))
    found = None
    if run.output is not None:
        found = _take_output(Path(run.output).expanduser(), run, held)

    accelerator = _accelerator(run)
    backbone = load_backbone(options, run, accelerator.device)
    folder = (
        Path(run.output).expanduser()
        if run.output
        else checkpoint.default_folder(options.backbone, backbone.identity.fingerprint)
    )
    if run.output is None:
        found = _take_output(folder, run, held)
    if options.micro_batches % accelerator.num_processes:
        raise UserError(
            f"--batch_tokens={options.batch_tokens} is {options.micro_batches} micro-batches, which cannot be shared "
            f"by {accelerator.num_processes} processes; lower --micro_batch_tokens or raise --batch_tokens"
        )
    documents, held_out = _data(options, backbone)
    accelerator.wait_for_everyone()  # every process has looked at the folder before one writes there
    if run.push_to_hub and accelerator.is_main_process:
        _create_repository(run.push_to_hub, run.private)
    if run.overwrite and accelerator.is_main_process:
        _clear(folder)
    exits = ExitConfig(
        backbone=backbone.identity,
        exit_layers=exit_layers,
        classifiers=options.kinds,
        activation=backbone.activation,
        options=options.classifier_options,
        final_block=options.final_block,
        adapter=options.adapter,
        top_k=options.top_k,
    )
    classifiers = exits.build(options.seed).to(accelerator.device)
    frozen = FrozenPass(backbone.engine.backbone, exit_layers, options.final_block, options.top_k)
    trainer = Trainer(
        frozen,
        classifiers,
        options,
        Processes(
            accelerator.process_index, accelerator.num_processes, lambda t: accelerator.reduce(t, reduction="sum")
        ),
    )
    seconds = _loop(trainer, options, run, documents, folder, accelerator, backbone.identity.fingerprint, found)
    if not accelerator.is_main_process:
        accelerator.end_training()
        return None

    dtype = getattr(torch, run.save_dtype)
    with torch.no_grad():
        for parameter in classifiers.parameters():
            parameter.copy_(parameter.to(dtype))
    measured = observe(frozen, classifiers.eval(), held_out, options.micro_batch_tokens)
    results = evaluation.report(measured, exits, classifiers, backbone.engine.backbone.cost)
    accelerator.log(_held_out_numbers(results), step=options.steps)
    accelerator.end_training()
    done = options.steps * options.batch_tokens
    summary = {
        "options": options.to_json(),
        "tokens": done,
        "steps": options.steps,
        "seconds": seconds,
        "tokens_per_second": done / max(seconds, 1e-9),
        "processes": accelerator.num_processes,
        "dtype": backbone.dtype,
        "hardware": _hardware(accelerator.device),
        "versions": {
            "dynamax-lm-eval": dynamax_lm_eval.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    exits = replace(exits, training=summary)
    evaluation.plot_curves(results, folder / "curve.png")
    files = {
        "evaluation.json": json.dumps(results, indent=1) + "\n",
        checkpoint.CARD_NAME: model_card(exits, results, run.card_note),
    }
    saved = checkpoint.save(folder, exits, classifiers, files, dtype)
    shutil.rmtree(folder / _STATE_NAME, ignore_errors=True)
    logger.info("Wrote exits to %s", folder)
    if run.push_to_hub:
        _push(folder, run.push_to_hub)
    return saved


def _loop(
    trainer: Trainer,
    options: TrainingOptions,
    run: RunOptions,
    documents: data.Documents,
    folder: Path,
    accelerator: Any,
    fingerprint: str,
    found: tuple[Path, state.Progress] | None,
) -> float:
    """All optimiser steps that are left; returns the seconds of training, those before a resume included.

    ``found``: the state to go on from.
    """
    first, earlier, position = 0, 0.0, Position()
    identity = {
        **options.to_json(),
        "backbone_fingerprint": fingerprint,
        "backbone_dtype": str(trainer.frozen.dtype),
        "device_type": accelerator.device.type,
    }
    if found is not None:
        path, progress = found
        state.check_same(progress.options, identity)
        state.load(path, trainer.classifiers, trainer.optimizer)
        first, earlier, position = progress.step, progress.seconds, Position(**progress.data)
        logger.info("Going on after step %d of %d", first, options.steps)
    batches = MicroBatches(documents, options.micro_batch_tokens, options.seq_len, position)
    main = accelerator.is_main_process
    log = folder / _LOG_NAME
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        _cut_log(log, first)
    clock = Throughput()
    with tqdm(
        total=options.steps * options.batch_tokens,
        initial=first * options.batch_tokens,
        unit="tok",
        unit_scale=True,
        desc="training exits",
        disable=None if main else True,
    ) as bar:
        for number in range(first, options.steps):
            report = trainer.step(number, batches)
            speed = clock.add(options.batch_tokens)
            bar.update(options.batch_tokens)
            last = number + 1 == options.steps
            if main and (report.step % run.log_steps == 0 or last):
                bar.set_postfix_str(_accuracy_line(report), refresh=False)
                _log(log, report, speed, accelerator)
            if main and report.step % run.save_steps == 0:
                progress = state.Progress(report.step, batches.position.to_json(), identity, earlier + clock.seconds)
                state.save(folder / _STATE_NAME, progress, trainer.classifiers, trainer.optimizer)
    return earlier + clock.seconds


def _data(options: TrainingOptions, backbone: FrozenBackbone) -> tuple[data.Documents, list[list[int]]]:
    """Training documents, and the rows of held-out text."""

    def source(dataset: str, held_out: bool = False) -> data.Documents:
        if dataset == SELF_DATASET:
            return generated_documents(backbone.engine, backbone.tokenizer, options)
        return data.text_documents(options, dataset, backbone.tokenizer, held_out)

    documents = source(options.dataset)
    if options.eval_dataset is not None:
        rows, _ = data.held_out(source(options.eval_dataset, True), options.eval_tokens, options.seq_len)
        return documents, rows
    rows, count = data.held_out(documents, options.eval_tokens, options.seq_len)
    return data.without_first(documents, count), rows


def _accelerator(run: RunOptions) -> Any:
    from accelerate import Accelerator

    if run.device == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    trackers = None if run.report_to == "none" else [name.strip() for name in run.report_to.split(",")]
    try:
        accelerator = Accelerator(log_with=trackers, project_dir=run.output or ".")
    except (ValueError, ImportError) as error:
        raise UserError(f"--report_to {run.report_to}: {' '.join(str(error).split())}") from error
    # accelerate leaves out what is not installed without a word that users see.
    missing = {str(name) for name in trackers or ()} - {
        str(getattr(name, "value", name)) for name in accelerator.log_with
    }
    if missing - {"all"}:
        raise UserError(
            f"--report_to {run.report_to}: {', '.join(sorted(missing))} is not installed; run: pip install ..."
        )
    if trackers:
        accelerator.init_trackers(_TRACKED)
    return accelerator


def _take_output(folder: Path, run: RunOptions, held: ExitStack) -> tuple[Path, state.Progress] | None:
    """Holds the folder until ``held`` closes and looks at it; returns the state to go on from, if any.

    The processes of one launcher share the lock of the first.
    """
    if int(os.environ.get("RANK", "0")) == 0:
        held.enter_context(locked(folder))
    _check_output(folder, run)
    return state.latest(folder / _STATE_NAME) if run.resume else None


def _check_output(folder: Path, run: RunOptions) -> None:
    """Refuses to write over what somebody trained, or over files that no training wrote."""
    finished = (folder / checkpoint.CONFIG_NAME).exists()
    begun = state.is_begun(folder / _STATE_NAME)
    if folder.exists() and not _is_own(folder):
        names = sorted(path.name for path in folder.iterdir())[:3] if folder.is_dir() else []
        raise UserError(
            f"--output {folder} is no folder of a training, and holds other files ({', '.join(names)}, ...); choose "
            "another one"
            if names
            else f"--output {folder} is a file; choose a folder"
        )
    if run.overwrite:
        return
    if finished:
        raise UserError(f"{folder} already holds trained exits; choose another --output, or add --overwrite")
    if begun and not run.resume:
        raise UserError(f"{folder} holds a training that was not finished; add --resume to go on, or --overwrite")


def _is_own(folder: Path) -> bool:
    """Whether all that is written over in a folder is a training's: the folder is empty, or a training began there."""
    if not folder.is_dir():
        return False
    if all(path.name.startswith(".") or path.name == _TRACKED for path in folder.iterdir()):
        return True
    log = folder / _LOG_NAME
    if state.is_begun(folder / _STATE_NAME) or (log.is_file() and _is_own_log(log)):
        return True
    try:
        checkpoint.FORMAT.read(folder / checkpoint.CONFIG_NAME)
    except UserError:
        return False
    return True


def _is_own_log(log: Path) -> bool:
    """Whether a ``training.jsonl`` is empty, or begins with a line as :func:`_log` writes it, whole or cut short."""
    first, *others = log.read_bytes().split(b"\n")
    names = {item.name for item in fields(StepReport)}
    try:
        return not first or names <= set(json.loads(first))
    except (ValueError, TypeError):
        return not others and first.startswith(b'{"step": ')


def _clear(folder: Path) -> None:
    """Removes what an earlier training left, once everything else was found to be in order."""
    shutil.rmtree(folder / _STATE_NAME, ignore_errors=True)
    (folder / checkpoint.CONFIG_NAME).unlink(missing_ok=True)


def _cut_log(log: Path, step: int) -> None:
    """Drops what was logged after the step from which training goes on."""
    lines = log.read_bytes().split(b"\n") if log.exists() and step else []
    kept = [line.decode("utf-8") for line in lines if _logged_step(line) <= step]
    with naming(log):
        write_text(log, "".join(f"{line}\n" for line in kept))


def _logged_step(line: bytes) -> float:
    try:
        return int(json.loads(line.decode("utf-8"))["step"])
    except (ValueError, TypeError, KeyError):  # a line that a kill cut short
        return float("inf")


def _log(log: Path, report: StepReport, speed: float, accelerator: Any) -> None:
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


def _held_out_numbers(results: dict[str, Any]) -> dict[str, float]:
    """The quality of each classifier, for trackers; nothing where only one label occurred."""
    return {
        f"held_out/{kind}/exit_{layer}/{name}": quality[name]
        for kind, found in results["classifiers"].items()
        for layer, quality in found["exits"].items()
        for name in ("auroc", "expected_calibration_error")
        if quality[name] is not None
    }


def _accuracy_line(report: StepReport) -> str:
    """Accuracy of every exit, kind by kind."""
    return ", ".join(
        f"{kind} {'/'.join(f'{value:.2f}' for value in values)}" for kind, values in report.accuracies.items()
    )


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def _push(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    try:
        url = HfApi().upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=["state/*", ".*"])
    except (OSError, ValueError) as error:
        raise UserError(
            f"the exits are trained and in {folder}, but could not be uploaded ({' '.join(str(error).split())}); try "
            f"again with: hf upload {repository} {folder}"
        ) from error
    logger.info("Pushed to %s", url)


def _create_repository(repository: str, private: bool) -> None:
    """Before training, so that a wrong name or token does not show at its end only."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, private=private, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--push_to_hub {repository!r}: {' '.join(str(error).split())}") from error

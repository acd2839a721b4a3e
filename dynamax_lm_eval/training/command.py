"""``dynamax-lm-eval train``: from options to a checkpoint, through loading, the loop, and the evaluation."""

from __future__ import annotations

import itertools
import json
import logging
import os
import platform
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers

import dynamax_lm_eval
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import checkpoint, lookup
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint, ExitConfig
from dynamax_lm_eval.exits.classifiers import ExitClassifiers
from dynamax_lm_eval.exits.resolve import default_state_mode
from dynamax_lm_eval.frozen.model import FrozenBackbone, load_backbone, read_config, read_structure
from dynamax_lm_eval.frozen.observe import observe
from dynamax_lm_eval.frozen.options import HELD_OUT_SEED, TextSource
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.frozen.text import (
    Documents,
    HeldOut,
    check_files,
    held_out,
    text_documents,
    without_first,
)
from dynamax_lm_eval.training import confirming, evaluation, hub, lora, platt, state, state_maps
from dynamax_lm_eval.training.answers import Prompt, answers, documents_used, mixed, pool_documents
from dynamax_lm_eval.training.batches import Answer, MicroBatches
from dynamax_lm_eval.training.card import model_card
from dynamax_lm_eval.training.curve import measured_curves
from dynamax_lm_eval.training.generated import generated_documents
from dynamax_lm_eval.training.init import start_from
from dynamax_lm_eval.training.log import (
    LOG_NAME,
    TRACKED,
    accuracy_line,
    cut_log,
    held_out_numbers,
    near_chance,
    plan,
    write_step,
)
from dynamax_lm_eval.training.loop import Loop
from dynamax_lm_eval.training.options import SELF_DATASET, RunOptions, TrainingOptions
from dynamax_lm_eval.training.output import STATE_NAME, clear, take_output
from dynamax_lm_eval.training.read_outs import ReadOuts, lora_report, read_outs
from dynamax_lm_eval.training.trainer import Processes, StepReport, Trainer
from dynamax_lm_eval.types import LabelKind

logger = logging.getLogger(__name__)


def train(options: TrainingOptions, run: RunOptions, prompts: Sequence[Prompt] | None = None) -> ExitCheckpoint | None:
    """Trains exits and writes their checkpoint; returns it on the main process, None on the others.

    ``prompts``: those that ``options.prompts`` names.

    Raises:
        UserError: an option cannot be honoured, the output folder holds something else, or another process writes
            there.
    """
    with ExitStack() as held:
        return _train(options, run, prompts or (), held)


def _train(
    options: TrainingOptions, run: RunOptions, prompts: Sequence[Prompt], held: ExitStack
) -> ExitCheckpoint | None:
    """Trains while ``held`` holds the output folder."""
    reading = options.reading(run)
    config = read_config(reading)
    exit_layers = options.resolve_exit_layers(int(config.get_text_config().num_hidden_layers))
    lora.check(options, run, read_structure(reading, config) if options.lora is not None else None)
    if options.prompts is not None and not prompts:
        raise UserError(f"--prompts {options.prompts}: its prompts have to be given; call harness.prompts.train")
    if options.dataset != SELF_DATASET:
        check_files(options.source)
    check_files(options.eval_source)
    earlier = None if options.init is None else lookup.open_exits(options.init)
    resumed = None
    if run.output is not None:
        resumed = take_output(Path(run.output).expanduser(), run, held)

    accelerator = _accelerator(run)
    backbone = load_backbone(reading, accelerator.device)
    folder = (
        Path(run.output).expanduser()
        if run.output
        else lookup.default_folder(options.backbone, backbone.identity.fingerprint)
    )
    if run.output is None:
        resumed = take_output(folder, run, held)
    if options.micro_batches % accelerator.num_processes:
        raise UserError(
            f"--batch_tokens={options.batch_tokens} is {options.micro_batches} micro-batches, which cannot be shared "
            f"by {accelerator.num_processes} processes; lower --micro_batch_tokens or raise --batch_tokens"
        )
    accelerator.wait_for_everyone()  # every process has looked at the folder before one writes there
    if run.push_to_hub and accelerator.is_main_process:
        hub.create_repository(run.push_to_hub, run.private)
    if run.overwrite and accelerator.is_main_process:
        clear(folder)
    if accelerator.is_main_process:
        logger.info(
            plan(options, backbone.identity.num_layers, exit_layers, backbone.dtype, accelerator.device, folder)
        )
    with accelerator.main_process_first():  # one writes what the backbone generates, the others read it
        text = _data(options, backbone, prompts, folder)
    processes = Processes(
        accelerator.process_index, accelerator.num_processes, lambda t: accelerator.reduce(t, reduction="sum")
    )
    original: ReadOuts | None = None
    if options.lora is not None:
        frozen = FrozenPass(backbone.engine.backbone, exit_layers, options.final_block, options.top_k)
        if accelerator.is_main_process:
            original = read_outs(frozen, text.held_out.rows, options.micro_batch_tokens)
        identity = _identity(options, backbone, accelerator)
        tuning = lora.LoraTrainer(frozen, options, processes)
        tuned = lora.tune(tuning, text.documents, run, folder, identity, accelerator.is_main_process)
        accelerator.wait_for_everyone()
        del frozen, tuning, backbone  # two of them may not fit
        # From here on the backbone is what an evaluation has that names the adapters.
        backbone = load_backbone(replace(reading, peft=str(tuned)), accelerator.device)
    exits = _exit_config(options, backbone, exit_layers)
    frozen = FrozenPass(
        backbone.engine.backbone, exit_layers, exits.final_block, exits.top_k, exits.label, exits.label_final_block
    )
    exits = replace(exits, states=state_maps.make_options(frozen, options.states))
    classifiers = exits.build(options.seed)
    if earlier is not None:
        start_from(earlier, exits, classifiers)
    classifiers.to(accelerator.device)
    trainer = Trainer(frozen, classifiers, options, processes)
    identity = _identity(options, backbone, accelerator)
    seconds = _loop(trainer, options, run, text.documents, folder, accelerator, identity, resumed)
    if not accelerator.is_main_process:
        accelerator.end_training()
        return None

    scalings = platt.calibrate(frozen, classifiers.eval(), text.calibration) if options.calibrate else None
    dtype = getattr(torch, run.save_dtype)
    with torch.no_grad():
        for parameter in classifiers.parameters():
            parameter.copy_(parameter.to(dtype))
    measured = observe(
        frozen, classifiers.eval(), text.held_out.rows, options.micro_batch_tokens, two_best=exits.confirms
    )
    engine, mode = Engine(backbone.engine.backbone, classifiers), default_state_mode(exits)
    curves = measured_curves(engine, text.held_out, exits, mode, options.curve_tokens)
    results = evaluation.report(
        measured, text.held_out.document, exits, classifiers, engine.backbone.cost, mode, curves
    )
    if original is not None:
        after = read_outs(frozen, text.held_out.rows, options.micro_batch_tokens)
        results["lora"] = lora_report(original, after, exit_layers, text.held_out.rows, backbone.tokenizer)
    if exits.states is not None:
        results["states"] = state_maps.explained(frozen, classifiers, text.held_out.rows)
    if scalings is not None:
        results["calibration"] = platt.report(scalings, measured, exit_layers)
    if exits.confirms:
        results["confirmers"] = confirming.report(measured, classifiers)
    if poor := near_chance(results):
        logger.warning(
            "On held-out text these tell right exits from wrong ones hardly better than chance (AUROC): %s. More "
            "tokens, a higher --learning_rate, other exit layers or --adapter affine may help",
            ", ".join(poor),
        )
    accelerator.log(held_out_numbers(results), step=options.steps)
    accelerator.end_training()
    summary = _summary(options, backbone, seconds, accelerator)
    exits = replace(exits, training=summary | ({"prompt_documents": text.used} if text.used else {}))
    saved = _save(folder, exits, classifiers, results, run)
    if run.push_to_hub:
        hub.push(folder, run.push_to_hub)
    return saved


def _identity(options: TrainingOptions, backbone: FrozenBackbone, accelerator: Any) -> dict[str, Any]:
    """Returns what the weights of a training depend on."""
    return {
        **options.to_json(),
        "backbone_fingerprint": backbone.identity.fingerprint,
        "backbone_dtype": f"torch.{backbone.dtype}",
        "device_type": accelerator.device.type,
    }


def _exit_config(options: TrainingOptions, backbone: FrozenBackbone, exit_layers: tuple[int, ...]) -> ExitConfig:
    """Returns what the checkpoint will say of its exits, without the training."""
    return ExitConfig(
        backbone=backbone.identity,
        exit_layers=exit_layers,
        classifiers=options.kinds,
        activation=backbone.activation,
        options=options.classifier_options,
        final_block=options.final_block,
        adapter=options.adapter,
        confirms=options.calibrate and not options.final_block,
        top_k=options.top_k,
        label=cast(LabelKind, options.label),
        label_final_block=options.label_final_block,
    )


def _save(
    folder: Path, exits: ExitConfig, classifiers: ExitClassifiers, results: dict[str, Any], run: RunOptions
) -> ExitCheckpoint:
    """Writes the checkpoint with what was measured on held-out text; the states of the training go."""
    evaluation.plot_curves(results, folder / "curve.png")
    files = {
        "evaluation.json": json.dumps(results, indent=1) + "\n",
        checkpoint.CARD_NAME: model_card(exits, results, run.card_note, run.card_license),
    }
    saved = checkpoint.save(folder, exits, classifiers, files, getattr(torch, run.save_dtype))
    shutil.rmtree(folder / STATE_NAME, ignore_errors=True)
    logger.info("Wrote exits to %s", folder)
    return saved


def _loop(
    trainer: Trainer,
    options: TrainingOptions,
    run: RunOptions,
    documents: Documents,
    folder: Path,
    accelerator: Any,
    identity: dict[str, Any],
    resumed: tuple[Path, state.Progress] | None,
) -> float:
    """Runs all optimiser steps that are left; returns the seconds of training, those before a resume included.

    ``identity`` is what the weights depend on, ``resumed`` the state to go on from.
    """
    main = accelerator.is_main_process
    classifiers, states = trainer.classifiers, folder / STATE_NAME
    loop = Loop("exits", options.steps, options, run, states, identity, classifiers, trainer.optimizer, main)
    loop.resume(resumed)
    batches = MicroBatches(documents, options.micro_batch_tokens, options.seq_len, loop.position)
    if resumed is None and classifiers.states is not None:
        state_maps.fit(
            trainer.frozen,
            classifiers,
            lambda: MicroBatches(documents, options.micro_batch_tokens, options.seq_len),
            options.states_micro_batches,
            trainer.processes,
        )
        if main:  # a training that is killed goes on behind the fit
            loop.save(0, loop.position, 0.0)
    log = folder / LOG_NAME
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        cut_log(log, loop.first)

    def tell(report: StepReport, speed: float) -> str:
        write_step(log, report, speed, accelerator)
        return accuracy_line(report)

    return loop.go(trainer.step, batches, tell)


class _Text(NamedTuple):
    """The text of a training."""

    documents: Documents  # to train on
    held_out: HeldOut  # of the evaluation
    calibration: list[list[list[int]]]  # batches of rows that are in neither
    used: list[str]  # documents of tasks that are among what is trained on


def _data(options: TrainingOptions, backbone: FrozenBackbone, prompts: Sequence[Prompt], folder: Path) -> _Text:
    """Returns the text to train on, to calibrate on and to evaluate on."""
    used: list[str] = []

    def read(source: TextSource, seed: int) -> Documents:
        if source.dataset == SELF_DATASET:
            return generated_documents(backbone.engine, backbone.tokenizer, replace(options, seed=seed))
        return text_documents(source, backbone.tokenizer)

    pool: Sequence[Answer] = ()
    if options.writes_answers:
        state_folder, identity = folder / STATE_NAME, backbone.identity.fingerprint
        pool = answers(state_folder, backbone.engine, backbone.tokenizer, options, prompts, identity)
        used = documents_used(pool, prompts, options.seed)

    def in_order_of(seed: int) -> Documents:
        source = replace(options.source, seed=seed)
        if not options.writes_answers:
            return read(source, seed)
        own = pool_documents(pool, seed)
        return mixed(own, read(source, seed), options.self_share, options.seq_len) if options.self_share < 1 else own

    documents = in_order_of(options.seed)
    asked = (options.eval_tokens, options.seq_len, options.eval_documents)
    if options.eval_source is not None:
        evaluated = held_out(read(options.eval_source, HELD_OUT_SEED), *asked)
    else:
        order = in_order_of(HELD_OUT_SEED)
        evaluated = held_out(order, *asked)
        documents = without_first(documents, evaluated.read, drawn_from=order)
    if not options.calibrate:
        return _Text(documents, evaluated, [], used)
    batches = MicroBatches(documents, options.micro_batch_tokens, options.seq_len)
    calibration = list(itertools.islice(batches, options.calibrate_micro_batches))
    remedy = "lower --calibrate_tokens, or add --calibrate false"
    if batches.position.epoch:
        raise UserError(
            f"there are fewer than --calibrate_tokens={options.calibrate_tokens} tokens of text beside those of the "
            f"evaluation; {remedy}"
        )
    documents = without_first(documents, batches.position.document + 1, remedy, "the evaluation and the calibration")
    return _Text(documents, evaluated, calibration, used)


def _accelerator(run: RunOptions) -> Any:
    """Returns accelerate's ``Accelerator`` with the trackers; raises UserError where one is not installed."""
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
        accelerator.init_trackers(TRACKED)
    return accelerator


def _summary(options: TrainingOptions, backbone: FrozenBackbone, seconds: float, accelerator: Any) -> dict[str, Any]:
    """Returns what a checkpoint says of its training."""
    tokens = options.steps * options.batch_tokens
    return {
        "options": options.to_json(),
        "tokens": tokens,
        "steps": options.steps,
        "seconds": seconds,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "processes": accelerator.num_processes,
        "dtype": backbone.dtype,
        "hardware": _hardware(accelerator.device),
        "versions": {
            "dynamax-lm-eval": dynamax_lm_eval.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _hardware(device: torch.device) -> str:
    """Returns the name of the GPU, or the number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"

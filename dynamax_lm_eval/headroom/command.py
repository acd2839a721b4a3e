"""``dynamax-lm-eval headroom``: whether early exit is worth training for a model, from one look at it.

Knows the order of work: load, read out every layer, let an oracle choose, run its choices through the engine.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dynamax_lm_eval.compute.accounting import exit_histogram
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import lookup
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.exits.resolve import default_exit_layers, default_state_mode, policy_of_exits, resolve_thresholds
from dynamax_lm_eval.files import JsonFormat, check_writable
from dynamax_lm_eval.harness import describe
from dynamax_lm_eval.headroom.errors import ErrorsByDocument
from dynamax_lm_eval.headroom.fitting import fitted_adapters
from dynamax_lm_eval.headroom.forced import Measured, forced_policies, measure
from dynamax_lm_eval.headroom.options import NO_EXITS, HeadroomOptions
from dynamax_lm_eval.headroom.oracle import allowed_errors, exit_macs, oracle_exits
from dynamax_lm_eval.headroom.reading import Reading, ReadOut, read, settled
from dynamax_lm_eval.headroom.summary import plot, share_at, table, verdict
from dynamax_lm_eval.headroom.text import Row, positions, rows_of
from dynamax_lm_eval.lm import DynamaxLM
from dynamax_lm_eval.measure.output import check_output
from dynamax_lm_eval.models.source import ModelSource
from dynamax_lm_eval.sweep.command import load_tasks
from dynamax_lm_eval.types import StateMode

logger = logging.getLogger(__name__)

FORMAT = JsonFormat(
    name="dynamax-headroom",
    version=1,
    what="a file of dynamax-lm-eval headroom",
    remedy="make it: dynamax-lm-eval headroom --backbone ...",
)
JSON_NAME, PLOT_NAME = "headroom.json", "headroom.png"
#: Shares of tokens that answer as the full model does, for which an oracle chooses.
AGREEMENTS = (1.0, 0.95)


@dataclass(frozen=True)
class _Subject:
    """The loaded model with everything that is looked at."""

    lm: DynamaxLM
    exits: ExitCheckpoint | None
    layers: tuple[int, ...]  # from which an oracle may choose
    few: tuple[int, ...]  # those of the exits, or else the default ones
    state_mode: StateMode
    rows: list[Row]
    errors: ErrorsByDocument

    @property
    def few_name(self) -> str:
        return "default" if self.exits is None else "exits"

    @property
    def state_mode_of_exits(self) -> StateMode:
        """What tokens leave behind at the exits at hand: what these have learned, unless another mode was asked for."""
        if self.exits is None or self.state_mode != "recompute":
            return self.state_mode
        return default_state_mode(self.exits.config)


def command(options: HeadroomOptions) -> str:
    """Measures and writes; returns the tables, the files and the verdict, as text.

    Raises:
        UserError: as :func:`headroom` does.
    """
    result = headroom(options)
    folder = Path(options.output).expanduser()
    return f"{table(result)}\n{folder / JSON_NAME}\n{folder / PLOT_NAME}\n{result['verdict']['line']}\n"


def headroom(options: HeadroomOptions) -> dict[str, Any]:
    """Measures and writes the folder of the result; returns the content of its JSON file.

    Raises:
        UserError: an option cannot be honoured, there is too little text, or the files exist.
    """
    folder = Path(options.output).expanduser()
    if not folder.is_dir():
        check_writable(folder, "--output: the folder", "choose another")
    check_output(folder / JSON_NAME, options.overwrite, folder / PLOT_NAME)
    subject, fit_rows = _load(options)
    logger.info(_plan(subject, fit_rows, options))
    result = _measured(subject, fit_rows, options)
    result["verdict"] = verdict(result)
    plot(result, folder / PLOT_NAME)
    FORMAT.write(folder / JSON_NAME, result)
    return result


def _plan(subject: _Subject, fit_rows: Sequence[Row], options: HeadroomOptions) -> str:
    """Returns what is going to be measured, and where it is written."""
    tokens = sum(row.num_eligible for row in subject.rows)
    fitting = f", read-outs fitted on {sum(row.num_eligible for row in fit_rows)} others" if fit_rows else ""
    return (
        f"Headroom of {describe.loaded_model(subject.lm)}: {tokens} tokens of {options.tasks or options.source.dataset}"
        f"{fitting}, exits after blocks {subject.layers[0]} to {subject.layers[-1]}; writing to {options.output}"
    )


def _load(options: HeadroomOptions) -> tuple[_Subject, list[Row]]:
    """Returns what is looked at, and the rows that adapters are fitted on (none: no adapters are)."""
    files = options.task_files
    source = ModelSource(options.backbone, dict(options.model_arguments), None)
    layers = options.layers(source.num_layers)
    exits = _find_exits(options, source)
    few = default_exit_layers(source.num_layers) if exits is None else exits.config.exit_layers
    if exits is not None:
        for thresholds in options.exit_thresholds:
            resolve_thresholds(thresholds, few)
    manager = None if files is None else load_tasks(files)
    given = {
        **options.model_arguments,
        "state_mode": options.state_mode,
        "batch_size": options.batch_size,
        "threshold": 0.5,  # exits are looked at where something may leave
    }
    if exits is None:
        given |= {"confidence": "state", "exit_layers": list(layers)}
    else:
        given |= {"exits": str(exits.path)}
    lm = DynamaxLM(backbone=options.backbone, **given)
    rows, fit_rows = rows_of(lm, manager, options)
    return _Subject(lm, exits, layers, few, lm.policy.state_mode, rows, ErrorsByDocument(rows)), fit_rows


def _find_exits(options: HeadroomOptions, source: ModelSource) -> ExitCheckpoint | None:
    """Returns the exits that were named, or else those that a run of the backbone would find."""
    if options.exits == NO_EXITS:
        return None
    fingerprints = source.read_fingerprints()
    current, former = (None, ()) if fingerprints is None else (fingerprints.current, fingerprints.former)
    if options.exits is not None:
        exits = lookup.open_exits(options.exits)
    elif (found := lookup.find(options.backbone, current, former)) is not None:
        exits = found
    elif options.classifier is not None:
        raise UserError(f"--classifier {options.classifier}: there are no exits for {options.backbone!r}; remove it")
    else:
        return None
    exits.check_fits(source.config.model_type, None, source.num_layers)
    if options.classifier is not None and options.classifier not in exits.config.classifiers:
        raise UserError(
            f"--classifier {options.classifier} is not among these exits, which have "
            f"{', '.join(exits.config.classifiers)}"
        )
    return exits


def _measured(subject: _Subject, fit_rows: list[Row], options: HeadroomOptions) -> dict[str, Any]:
    """Returns everything but the verdict, as JSON data."""
    lm, rows = subject.lm, subject.rows
    backbone = lm.engine.backbone
    every = tuple(sorted({*subject.layers, *subject.few}))
    backbone.check_state_mode(subject.state_mode, every)
    read_outs = [ReadOut("none", every)]
    engines = {"none": lm.engine}
    if fit_rows:
        fitted = fitted_adapters(backbone, fit_rows, every, options.ridge)
        read_outs.append(ReadOut("fitted", every, fitted, "affine"))
        engines["fitted"] = Engine(backbone, fitted)
    if subject.exits is not None:
        config = subject.exits.config
        read_outs.append(
            ReadOut("exits", config.exit_layers, lm.engine.classifiers, config.adapter, config.final_block)
        )
        engines["exits"] = lm.engine
    reading = read(backbone, rows, read_outs)
    full = ExitPolicy(backbone.num_layers)
    again = measure(lm.engine, rows, [full] * len(rows), options.batch_size, "full model, once more")
    oracles = [
        point
        for read_out in read_outs
        for name, layers in _sets(subject, read_out)
        for point in _oracles(subject, engines[read_out.name], reading, read_out, name, layers, options)
    ]
    return {
        "backbone": options.backbone,
        "fingerprint": lm.backbone_fingerprint(),
        "num_layers": backbone.num_layers,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "state_mode": subject.state_mode,
        "state_mode_of_exits": subject.state_mode_of_exits,
        "seed": options.seed,
        "text": {
            **_text_of(options),
            "documents": subject.errors.documents,
            "rows": len(rows),
            "tokens": len(reading.best),
            "fitted_on": sum(row.num_eligible for row in fit_rows),
        },
        "exit_layers": {"every": list(subject.layers), subject.few_name: list(subject.few)},
        "read_outs": {read_out.name: _read_out(read_out, reading, subject.errors) for read_out in read_outs},
        # In nats; a model that knows nothing has the chance's.
        "full_model": {
            "loss": None if math.isnan(reading.loss) else reading.loss,
            "entropy": reading.entropy,
            "chance": math.log(backbone.vocab_size),
        },
        "full_model_again": float((again.best == reading.best).mean()),
        "oracles": oracles,
        "exits": None if subject.exits is None else _exits(subject, reading, read_outs[-1], oracles, options),
    }


def _text_of(options: HeadroomOptions) -> dict[str, Any]:
    if options.tasks is None:
        return {"dataset": options.source.dataset, "seq_len": options.seq_len, "documents_asked": options.documents}
    return {"tasks": options.tasks, "limit": options.limit, "num_fewshot": options.num_fewshot}


def _sets(subject: _Subject, read_out: ReadOut) -> list[tuple[str, tuple[int, ...]]]:
    """Returns the sets of layers from which an oracle may choose with these read-outs, by name."""
    few = (subject.few_name, subject.few)
    return [few] if read_out.name == "exits" else [("every", subject.layers), few]


def _read_out(read_out: ReadOut, reading: Reading, errors: ErrorsByDocument) -> dict[str, Any]:
    agrees = reading.agrees[read_out.name]
    from_there = settled(agrees)

    def by_layer(values: Any) -> dict[str, Any]:
        return {str(layer): value for layer, value in zip(read_out.layers, values, strict=True)}

    adapters = [read_out.adapter_at(layer) for layer in read_out.layers]
    macs = [0 if adapter is None else adapter.macs for adapter in adapters]
    return {
        "adapter": read_out.adapter,
        "final_block": read_out.final_block,
        "adapter_macs": {str(layer): count for layer, count in zip(read_out.layers, macs, strict=True)},
        "agreement": by_layer(agrees.mean(1).tolist()),
        "agreement_stderr": by_layer(map(errors.stderr, agrees)),
        "settled": by_layer(from_there.mean(1).tolist()),
        "settled_stderr": by_layer(map(errors.stderr, from_there)),
    }


def _policy(subject: _Subject, read_out: ReadOut, layers: tuple[int, ...]) -> ExitPolicy:
    """Returns a policy with exits after ``layers`` whose confidence costs nothing."""
    return ExitPolicy(
        subject.lm.engine.backbone.num_layers,
        layers,
        (0.5,) * len(layers),
        confidence="state",
        state_mode=subject.state_mode_of_exits if read_out.name == "exits" else subject.state_mode,
        final_block=read_out.final_block,
        adapter=read_out.adapter,
    )


def _oracles(
    subject: _Subject,
    engine: Engine,
    reading: Reading,
    read_out: ReadOut,
    name: str,
    layers: tuple[int, ...],
    options: HeadroomOptions,
) -> list[dict[str, Any]]:
    """Returns what oracles reach with these read-outs and layers, and what is left of it with states left behind."""
    policy = _policy(subject, read_out, layers)
    agrees = reading.agrees[read_out.name][[read_out.layers.index(layer) for layer in layers]]
    macs = exit_macs(engine, policy, positions(subject.rows))
    points = []
    for agreement in AGREEMENTS:
        left = oracle_exits(agrees, macs, allowed_errors(agreement, len(reading.best)))
        chosen = np.asarray([*layers, policy.num_layers])[left]
        shown = f"oracle: {read_out.name}, {name}, {agreement:g}"
        policies = forced_policies(policy, subject.rows, chosen)
        measured = measure(engine, subject.rows, policies, options.batch_size, shown)
        assert np.array_equal(measured.layers, chosen), "tokens leave where they are told to"
        points.append(
            {
                "read_out": read_out.name,
                "exit_layers": name,
                "agreement_asked": agreement,
                **_outcome(reading, agrees, left, measured, subject.errors),
            }
        )
    return points


def _outcome(reading: Reading, agrees: Any, left: Any, measured: Measured, errors: ErrorsByDocument) -> dict[str, Any]:
    """Returns compute and agreement of tokens that left at exits ``left`` (T,), with both kinds of states."""
    full_depth_states = np.vstack([agrees, np.ones((1, agrees.shape[1]), dtype=np.bool_)])[left, np.arange(len(left))]
    left_behind = measured.best == reading.best
    early = left < len(agrees)
    record = measured.record
    # Of those that were right where they left, with the full model's states.
    right_early = early & full_depth_states
    return {
        "compute_reduction": record.compute_reduction,
        "saving": 1 - 1 / record.compute_reduction,
        "share_leaving": float(early.mean()),
        "mean_exit_layer": record.mean_exit_layer,
        "exit_histogram": exit_histogram(record),
        "macs": {
            name: getattr(record, f"{name}_macs")
            for name in ("full", "block", "recompute", "adapter", "classifier", "lm_head")
        },
        "agreement": {"full_depth_states": float(full_depth_states.mean()), "left_behind": float(left_behind.mean())},
        "kept_of_leaving": float(left_behind[right_early].mean()) if right_early.any() else None,
        "stderr": {
            "share_leaving": errors.stderr(early),
            "full_depth_states": errors.stderr(full_depth_states),
            "left_behind": errors.stderr(left_behind),
            "kept_of_leaving": errors.stderr(left_behind, right_early),
        },
    }


def _exits(
    subject: _Subject,
    reading: Reading,
    read_out: ReadOut,
    oracles: Sequence[Mapping[str, Any]],
    options: HeadroomOptions,
) -> dict[str, Any]:
    """Returns what the exits at hand reach at some thresholds, measured, beside an oracle of the same agreement."""
    assert subject.exits is not None
    config, engine = subject.exits.config, subject.lm.engine
    kind = options.classifier or config.classifiers[0]
    agrees, mode = reading.agrees[read_out.name], subject.state_mode_of_exits
    layers = np.asarray([*config.exit_layers, config.backbone.num_layers])
    oracle = _policy(subject, read_out, config.exit_layers)
    macs = exit_macs(engine, oracle, positions(subject.rows))
    tokens = np.arange(len(reading.best))
    points = []
    for given in options.exit_thresholds:
        thresholds = resolve_thresholds(given, config.exit_layers)
        policy = replace(policy_of_exits(config, kind, 0.5, state_mode=mode), thresholds=thresholds)
        shown = f"{kind}, threshold {'+'.join(f'{value:g}' for value in given)}"
        measured = measure(engine, subject.rows, [policy] * len(subject.rows), options.batch_size, shown)
        left = np.searchsorted(layers, measured.layers)
        point = _outcome(reading, agrees, left, measured, subject.errors)
        errors = round((1 - point["agreement"]["full_depth_states"]) * len(tokens))
        best = macs[oracle_exits(agrees, macs, errors), tokens].sum()
        saved = 1 - float(best) / point["macs"]["full"]
        share = point["saving"] / saved if saved > 0 else None
        points.append({"thresholds": list(thresholds), **point, "share_of_oracle": share})
    at = AGREEMENTS[-1]
    (best_saving,) = [
        point["saving"] for point in oracles if point["read_out"] == read_out.name and point["agreement_asked"] == at
    ]
    return {"classifier": kind, "points": points, "share_of_oracle": share_at(points, at, best_saving)}

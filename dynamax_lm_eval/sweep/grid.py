"""The grid of points that the options of a sweep mean, on a backbone with these exits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import mean
from typing import Any, cast

from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.checkpoint import ExitConfig
from dynamax_lm_eval.exits.resolve import default_state_mode, preset_state_mode
from dynamax_lm_eval.sweep import baselines
from dynamax_lm_eval.sweep.options import (
    CASCADE,
    KINDS,
    VERIFIED,
    SweepOptions,
    items_of,
    name_of,
    proposing,
    shown_name,
    whole_number,
)
from dynamax_lm_eval.types import AUTO, VERIFY, PruneScope, StateMode


@dataclass(frozen=True)
class Point:
    """One policy of the grid.

    Attributes:
        name: of its folder; tells it from all others of the sweep.
        kind: ``full``, ``exits``, ``static``, ``verified``, ``pruning``, or ``noise`` (the full model once more).
        series: points of one series differ in one number only and are joined in plots.
        x: that number: the threshold (the mean of several), the exit layer, or how many blocks are pruned.
        args: the model arguments that it stands for.
        tasks: those that are answered under it, as ``--tasks`` names them.
    """

    name: str
    kind: str
    series: str
    x: float
    args: DynamaxArgs
    tasks: tuple[str, ...] = ()


def confidences_of(options: SweepOptions, kinds: Sequence[str]) -> list[str]:
    """Returns the confidences that are named, else all ``kinds`` of the trained exits, else ``softmax``."""
    if options.confidences is None:
        return list(kinds) or ["softmax"]
    return list(dict.fromkeys(items_of(options.confidences)))


def grid(
    options: SweepOptions,
    full: DynamaxArgs,
    exits: ExitConfig | None,
    recurrent_backbone: bool = False,
    folder: str | None = None,
) -> list[Point]:
    """Returns all points, the full model first.

    Args:
        options: of the sweep.
        full: the arguments of the full model, with everything that all points share.
        exits: the trained exits at hand, if any.
        recurrent_backbone: some blocks keep a recurrent state.
        folder: of these exits, by which static exits name them; None: static exits use none.

    Raises:
        UserError: an option names something that does not exist.
    """
    every_task = tuple(options.task_names)
    points = [Point("full", "full", "full model", 1.0, full, every_task)]
    confidences = confidences_of(options, () if exits is None else exits.classifiers)
    modes = items_of(options.state_modes)
    verified = {"verify": True, "verify_tokens": options.verify_tokens}
    for (confidence, propose), mode in product(proposing(confidences, options.propose), modes):
        name, _, kind = confidence.partition(":")
        is_kind = name in (*KINDS, CASCADE)
        arguments: dict[str, Any] = {"confidence": "classifier" if name in KINDS else name}
        if is_kind:
            arguments |= {"classifier": kind or name, "propose": propose}
            if propose is not None:
                arguments["confirm"] = options.confirm
            confidence = shown_name(confidence, propose, options.confirm)
        elif exits is None or full.exits is None or not exits.serves_every_confidence:
            arguments["exits"] = None
        uses_exits = is_kind or arguments.get("exits", full.exits) is not None
        if mode == AUTO:
            preset = preset_state_mode(full.preset, recurrent_backbone)
            mode = preset or default_state_mode(exits if uses_exits else None)
        series = f"{confidence}, {mode}"
        for threshold, tasks in options.thresholds_by_task().items():
            changed: dict[str, Any] = {**arguments, "state_mode": mode, "threshold": threshold}
            if mode == VERIFY:
                changed |= {"state_mode": None, **verified}
            name = f"{confidence}-{mode}-{name_of(threshold)}"
            own_series = series if len(threshold) == 1 else f"{series}, per exit"
            kind = VERIFIED if mode == VERIFY else "exits"
            points.append(Point(name, kind, own_series, mean(threshold), replace(full, **changed), tasks))
    for layer in sorted({whole_number("verify_at", text) for text in items_of(options.verify_at)}):
        changed = {"exit_layers": (layer,), "threshold": (0.0,), "confidence": "state", **verified}
        args = replace(full, **changed)
        points.append(Point(f"verify-at-{layer}", VERIFIED, "drafts at one exit", layer, args, every_task))
    static_layers = [whole_number("static_exits", text) for text in items_of(options.static_exits)]
    served = folder is not None and exits is not None and exits.serves_every_confidence
    usual = preset_state_mode(full.preset, recurrent_backbone) or default_state_mode(exits if served else None)
    states = [usual if mode == AUTO else cast(StateMode, mode) for mode in modes if mode != VERIFY]
    if static_layers and not states:
        raise UserError("--static_exits leave states behind, so --state_modes needs another one beside verify")
    scope = full.prune_scope if options.prune_scope is None else cast(PruneScope, options.prune_scope)
    counts = [whole_number("prune", text) for text in items_of(options.prune)]
    for name in ("prune_profile", "prune_adapter"):
        if getattr(options, name) is not None and not counts:
            raise UserError(f"--{name} has no effect without --prune; add it, or remove --{name}")
    for found in (
        *baselines.static_exits(full, static_layers, states, folder if served else None),
        *baselines.pruned_models(full, counts, scope, options.prune_profile, options.prune_adapter),
    ):
        points.append(Point(*found, every_task))
    return points

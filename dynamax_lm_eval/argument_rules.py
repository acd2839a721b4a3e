"""Which model arguments go together: every one of them is honoured, or refused with the reason.

Knows parsed arguments by name, of which defaults are missing; knows no backbone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamax_lm_eval.errors import UserError

#: What the user wrote for arguments that have other names here.
_AS_GIVEN = {"fastest": "threshold=speed"}


def check_given(parsed: Mapping[str, Any], passed_on: Mapping[str, Any]) -> None:
    """Raises UserError where arguments that the user gave exclude each other, or one has no effect beside the others.

    ``parsed``: ours; ``passed_on``: those of the harness's ``HFLM``.
    """
    if not parsed.get("exits_check", True) and "exits" not in parsed:
        raise UserError("exits_check=false has no effect without exits=: exits are looked up by the weights they fit")
    _check_threshold_source(parsed)
    if passed_on.get("tp_plan") is not None and "target_latency_ms" in parsed:
        raise UserError("tp_plan and target_latency_ms exclude each other: processes would measure different times")
    if passed_on.get("tp_plan") is not None and parsed.get("fastest"):
        raise UserError("tp_plan and threshold=speed exclude each other: processes would measure different times")
    _check_prompt_exit(parsed)
    _check_pruning(parsed.get("prune_strategy"), parsed.get("prune_profile"), parsed.get("prune_layers", 0))
    if parsed.get("prune_adapter") is not None and not parsed.get("prune_layers"):
        raise UserError("prune_adapter has no effect without prune_layers; add it, or remove prune_adapter")
    if parsed.get("prune_scope") == "generated" and not parsed.get("prune_layers"):
        raise UserError("prune_scope=generated has no effect without prune_layers; add it, or remove prune_scope")
    _check_rows_in_flight(parsed, passed_on.get("batch_size", 1))
    _check_verify(parsed)


def changed(given: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments with others in their place; a new source of thresholds takes the place of the former one."""
    sources = {"threshold", "target_reduction", "target_latency_ms"}
    former = {*sources, "budget"} if sources & set(others) else set()
    return {**{name: value for name, value in given.items() if name not in former}, **others}


def check_full_prompt(arguments: Mapping[str, Any]) -> None:
    """Raises UserError where the prompt is to run all blocks, and some of its tokens are to leave."""
    if arguments.get("prune_scope") != "generated" or not arguments.get("prune_layers"):
        return
    for name, leaves in {
        "exit_scope=all": arguments.get("exit_scope") == "all",
        "prompt_exit_layer": arguments.get("prompt_exit_layer") is not None,
    }.items():
        if leaves:
            raise UserError(f"prune_scope=generated and {name} exclude each other: the prompt is to run at full depth")


def _check_prompt_exit(parsed: Mapping[str, Any]) -> None:
    """Prompt tokens leave at one layer, or where a confidence lets them."""
    layer, keep = parsed.get("prompt_exit_layer"), parsed.get("prompt_exit_keep")
    if layer is None and keep is not None:
        raise UserError("prompt_exit_keep has no effect without prompt_exit_layer; add it, or remove prompt_exit_keep")
    if keep == 0:
        raise UserError("prompt_exit_keep must be at least 1: the last prompt token gives the first logits")
    if layer is not None and parsed.get("exit_scope") == "all":
        raise UserError("prompt_exit_layer and exit_scope=all exclude each other: both let prompt tokens leave")
    check_first_token(layer, parsed.get("state_mode"))
    if layer is not None and (parsed.get("final_block") or parsed.get("preset")):
        raise UserError("prompt_exit_layer and final_block exclude each other; remove one of them")


def check_first_token(prompt_exit_layer: int | None, state_mode: str | None) -> None:
    """Raises UserError where a row's first token would leave states that it cannot have."""
    if prompt_exit_layer is not None and state_mode == "copy_previous":
        raise UserError(
            "prompt_exit_layer and state_mode=copy_previous exclude each other: a row's first token would have no "
            "states to take over; use another state_mode"
        )


def _check_pruning(strategy: str | None, profile: str | None, layers: int | tuple[int, ...]) -> None:
    """Raises UserError where these arguments do not go together."""
    if strategy == "angular" and profile is None:
        raise UserError(
            "prune_strategy=angular needs prune_profile=, a file of block distances; make it: dynamax-lm-eval "
            "prune-profile --backbone ..."
        )
    if profile is not None and strategy != "angular":
        raise UserError("prune_profile has no effect without prune_strategy=angular; add it, or remove prune_profile")
    if strategy is not None and (not isinstance(layers, int) or layers == 0):
        raise UserError(f"prune_strategy={strategy} needs prune_layers=N, the number of blocks that it chooses")


def _check_verify(parsed: Mapping[str, Any]) -> None:
    """What is verified is the full model's text, so nothing may change that, and nothing can be lost by it."""
    if parsed.get("fastest") and not parsed.get("verify"):
        raise UserError("threshold=speed needs verify=true: without it a lower threshold is always faster, and worse")
    if parsed.get("fastest") and parsed.get("measure_speed"):
        raise UserError("threshold=speed and measure_speed exclude each other: what is tried is timed already")
    if not parsed.get("verify"):
        if "verify_tokens" in parsed:
            raise UserError("verify_tokens has no effect without verify=true; add it, or remove verify_tokens")
        return
    needless = {
        "state_mode": "tokens that left run the blocks that they skipped, so no state stands in for theirs",
        "rows_in_flight": "a row's drafts go on with the row",
        "certificate": "a certificate bounds a loss, and there is none",
        "target_reduction": "nothing is saved that could be held",
        "target_latency_ms": "thresholds that move are for answers that stand",
    }
    changing = {
        "prune_layers": bool(parsed.get("prune_layers")),
        "prompt_exit_layer": parsed.get("prompt_exit_layer") is not None,
        "exit_scope=all": parsed.get("exit_scope") == "all",
        "final_block": bool(parsed.get("final_block")),
        "preset": parsed.get("preset") is not None,
    }
    for name, reason in needless.items():
        if parsed.get(name) is not None:
            raise UserError(f"verify=true and {name} exclude each other: {reason}; remove one of them")
    for name, given in changing.items():
        if given:
            raise UserError(
                f"verify=true and {name} exclude each other: the full model, whose text it gives, has nothing of that "
                "kind; remove one of them"
            )


def _check_rows_in_flight(parsed: Mapping[str, Any], batch_size: Any) -> None:
    """Rows wait at exits for batches of a known size, and with rebatching only."""
    rows = parsed.get("rows_in_flight")
    if rows is None:
        return
    if not parsed.get("rebatch", True):
        raise UserError("rows_in_flight has no effect with rebatch=false; remove one of them")
    if not str(batch_size).isdecimal() or not 1 < int(batch_size) <= rows:
        raise UserError(f"rows_in_flight={rows} needs a batch_size from 2 to that many rows, got {batch_size}")


def _check_threshold_source(parsed: Mapping[str, Any]) -> None:
    """Thresholds come from one place: the user, a certificate, or a budget."""
    sources = ("threshold", "certificate", "target_reduction", "target_latency_ms", "fastest")
    given = [_AS_GIVEN.get(name, name) for name in sources if name in parsed]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} each decide the threshold; give one of them")
    if parsed.get("certificate_any_task") and "certificate" not in parsed:
        raise UserError("certificate_any_task has no effect without threshold=calibrated or a certificate's file")
    if "budget" in parsed and "target_reduction" not in parsed:
        raise UserError(f"budget={parsed['budget']} needs target_reduction, the budget; add it, or remove budget")
    budget = next((name for name in sources[2:] if name in parsed), None)
    if budget is not None and "threshold_decay" in parsed:
        raise UserError(f"threshold_decay and {budget} both move the threshold; remove one of them")

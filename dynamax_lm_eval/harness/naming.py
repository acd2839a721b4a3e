"""What an evaluated operating point is called: the backbone by a public name, and a label for how tokens leave.

Readers of results tell models by ``model_name``, so an early exit needs a name that is not the full model's. Knows
policies and arguments; knows no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lm_eval.utils import sanitize_model_name, simple_parse_args_string

from dynamax_lm_eval.config import SPEED, DynamaxArgs
from dynamax_lm_eval.exits.checkpoint import ExitConfig
from dynamax_lm_eval.exits.policy import DEFAULT_VERIFY_TOKENS, DEFAULT_WARMUP, ExitPolicy
from dynamax_lm_eval.exits.resolve import default_confirm, default_exit_layers, resolve_pruned_blocks
from dynamax_lm_eval.files import checksum
from dynamax_lm_eval.models import aliases
from dynamax_lm_eval.types import VERIFY

#: The label of a run in which no token leaves and no block is pruned.
FULL = "full"
#: Hex digits of a checksum in a label.
_DIGITS = 6
#: What a label says in words.
_SAID = frozenset(
    {"thresholds", "confidence", "classifier", "propose", "state_mode", "pruned_blocks", "prompt_exit_layer"}
)


def label(
    policy: ExitPolicy,
    args: DynamaxArgs,
    exits: ExitConfig | None,
    exits_fingerprint: str | None,
    is_shipped: bool = False,
) -> str:
    """Returns a short name of an operating point, the same for the same settings and another for any others.

    It says the confidence, the state mode and the thresholds (or the budget), then what else is unusual: the layer at
    which prompts leave, how many blocks are pruned, and, where anything differs from a run that names nothing more, a
    checksum of that: ``mamba-recompute-0.8``, ``calm-verify-0.6``, ``prune4``,
    ``calm-learned-0.9-prompt18-1f2e3d``.

    Args:
        policy: of the run.
        args: what it was made of.
        exits: the trained exits at hand.
        exits_fingerprint: of their weights.
        is_shipped: they come with the package. Others change with every training, so they count.
    """
    parts: list[str] = []
    target = next((f"{name[7:]}{value:g}" for name, value in _targets(args).items() if value is not None), None)
    target = SPEED if args.fastest else target
    if policy.active_exits or target is not None:
        values = policy.thresholds[:1] if len(set(policy.thresholds)) == 1 else policy.thresholds
        parts += [_confidence(policy), VERIFY if policy.drafts else policy.state_mode]
        parts.append(target or "+".join(f"{value:g}" for value in values))
    if policy.prompt_exit_layer is not None:
        parts += [*([] if parts else [policy.state_mode]), f"prompt{policy.prompt_exit_layer}"]
    if policy.pruned_blocks:
        parts.append(f"prune{len(policy.pruned_blocks)}")
    if not parts:
        penalty = args.repetition_penalty
        return FULL if penalty is None else f"{FULL}-{checksum({'repetition_penalty': penalty})[:_DIGITS]}"
    unusual = _unusual(policy, args, exits)
    if exits is not None and not is_shipped and (args.exits is not None or policy.active_exits or target is not None):
        unusual["exits"] = exits_fingerprint
    return "-".join([*parts, checksum(unusual)[:_DIGITS]] if unusual else parts)


def _confidence(policy: ExitPolicy) -> str:
    if policy.propose is None:
        return policy.classifier or policy.confidence
    return f"{policy.confidence}-{policy.classifier}-{policy.propose:g}"


def _targets(args: DynamaxArgs) -> dict[str, float | None]:
    return {"target_reduction": args.target_reduction, "target_latency_ms": args.target_latency_ms}


def _unusual(policy: ExitPolicy, args: DynamaxArgs, exits: ExitConfig | None) -> dict[str, Any]:
    """Returns the settings that are not those of a run which asks for what the label says alone."""
    layers = default_exit_layers(policy.num_layers) if exits is None else exits.exit_layers
    deepest = resolve_pruned_blocks(len(policy.pruned_blocks), policy.num_layers)
    usual = ExitPolicy(
        policy.num_layers,
        exit_layers=layers,
        thresholds=(policy.thresholds[0] if policy.thresholds else 1.0,) * len(layers),
        confidence=policy.confidence,
        classifier=policy.classifier,
        propose=policy.propose,
        confirm=default_confirm(exits) if policy.propose is not None else "read_out",
        state_mode=policy.state_mode,
        pruned_blocks=deepest,
        final_block=exits is not None and exits.final_block,
        adapter=exits.adapter if exits is not None and not exits.final_block else "none",
        verify_tokens=DEFAULT_VERIFY_TOKENS if policy.drafts else None,
    ).describe()
    if policy.prompt_exit_layer is not None:
        usual["prompt_exit_keep"] = DEFAULT_WARMUP
    found = {name: value for name, value in policy.describe().items() if value != usual.get(name) and name not in _SAID}
    if policy.propose is not None and policy.vocab_subset is None and policy.confirm != default_confirm(exits):
        found["confirm"] = policy.confirm
    if policy.pruned_blocks and policy.pruned_blocks != deepest:
        found["pruned_blocks"] = sorted(policy.pruned_blocks)
    if not policy.active_exits:
        # Nothing is evaluated, so it does not matter where and how.
        for name in ("exit_layers", "adapter", "final_block", "classifier_warmup", "threshold_decay", "verify_tokens"):
            found.pop(name, None)
        found.pop("above_threshold", None)
    if args.repetition_penalty is not None:
        found["repetition_penalty"] = args.repetition_penalty
    if args.budget is not None:
        found["budget"] = args.budget
    return found


def model_name(backbone: str, peft: str | None, point: str) -> str:
    """Returns the name of an operating point for readers of results: ``organisation/backbone@label``.

    Args:
        backbone: as the user named it.
        peft: its adapters, where it has some.
        point: its label; the full model goes by the backbone's name alone.
    """
    name = aliases.public_name(backbone)
    if peft is not None:
        name = f"{name}+{Path(peft).name}"
    return name if point == FULL else f"{name}@{point}"


def name_tracker(tracker: Any, name: str) -> None:
    """Lets the harness's tracker write results under a name, and into a folder of that name."""
    config = tracker.general_config_tracker
    config.model_name, config.model_name_sanitized = name, sanitize_model_name(name)


def shown_arguments(given: Any, args: DynamaxArgs) -> dict[str, Any]:
    """Returns the arguments of a run for its result file, the backbone under our name for it.

    Readers take ``pretrained`` for the model's name where they find it, and so would not tell operating points apart.

    Args:
        given: what the harness was given, text or values by name; nothing where it was given a model.
        args: what that means.
    """
    if not given:
        return _changed_arguments(args)
    values = simple_parse_args_string(given) if isinstance(given, str) else dict(given)
    backbone = values.pop("pretrained", None)
    return {"backbone": args.backbone if backbone is None else backbone, **values}


def restore_arguments(given: Any, backbone: str | None) -> None:
    """Makes the harness's arguments say ``backbone`` again, as the user did: it prints them above the results.

    Args:
        given: what the harness was given; changed in place.
        backbone: as it was given; None: by its other name.
    """
    if backbone is not None and isinstance(given, dict) and "pretrained" in given:
        others = {name: value for name, value in given.items() if name != "pretrained"}
        given.clear()
        given.update({"backbone": backbone, **others})


def _changed_arguments(args: DynamaxArgs) -> dict[str, Any]:
    """Returns the arguments that are not at their defaults, as a run would be given them."""
    found = {item.name: getattr(args, item.name) for item in fields(args)}
    defaults = {item.name: item.default for item in fields(args)}
    found = {name: value for name, value in found.items() if name == "threshold" or value != defaults[name]}
    return {name: _written(value) for name, value in found.items() if value is not None}


def _written(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    return value[0] if len(value) == 1 else list(value)


def without_home(value: Any) -> Any:
    """Returns JSON data whose texts say ``~`` in place of the home folder."""
    try:
        home = str(Path.home())
    except RuntimeError:  # there is none
        return value
    if isinstance(value, str):
        return "~" if value == home else value.replace(f"{home}/", "~/")
    if isinstance(value, Mapping):
        return {name: without_home(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_home(item) for item in value]
    return value

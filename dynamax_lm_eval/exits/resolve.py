"""From arguments to a policy: which exits, thresholds and pruned blocks a run has on a backbone.

Knows arguments, the configuration of trained exits and a number of blocks; knows no weights.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from dynamax_lm_eval import argument_rules
from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.checkpoint import ExitConfig
from dynamax_lm_eval.exits.classifiers import CLASSIFIERS
from dynamax_lm_eval.exits.confidences import CONFIDENCES, CascadeConfidence, LogitsConfidence
from dynamax_lm_eval.exits.policy import DEFAULT_VERIFY_TOKENS, DEFAULT_WARMUP, ExitPolicy
from dynamax_lm_eval.exits.prune_adapters import PruneAdapters
from dynamax_lm_eval.exits.pruning import PruneProfile
from dynamax_lm_eval.models.loading import copy_is_impossible
from dynamax_lm_eval.types import DEFAULT_PROPOSE, ClassifierKind, ConfidenceName, Confirm, Preset, StateMode

logger = logging.getLogger(__name__)

#: What tokens leave behind under a preset on blocks that attend.
PRESET_STATE_MODES: dict[Preset, StateMode] = {"paper": "copy", "thesis": "copy_previous"}


def resolve_policy(
    args: DynamaxArgs, num_layers: int, exits: ExitConfig | None = None, recurrent_backbone: bool = False
) -> ExitPolicy:
    """Returns the policy that arguments mean for a backbone; its notes, which are logged, say what was left out.

    Args:
        args: what the user asked for.
        num_layers: blocks of the backbone.
        exits: the trained exits at hand.
        recurrent_backbone: some blocks keep a recurrent state; decides what ``preset=paper`` leaves behind, and
            excludes ``copy``.

    Raises:
        UserError: layers or blocks lie outside the backbone or contradict each other, thresholds do
            not match the exits, or the exits are not what was asked for.
    """
    argument_rules.check_full_prompt(vars(args))
    pruned = pruned_blocks(args, num_layers)
    confidence: ConfidenceName = args.confidence or ("classifier" if exits is not None else "softmax")
    classifier, final_block = _resolve_exits(args, confidence, exits)
    if args.exit_layers is None and exits is not None:
        exit_layers = exits.exit_layers
    else:
        exit_layers = resolve_exit_layers(args.exit_layers, num_layers, final_block)
    notes: tuple[str, ...] = ()
    if args.exit_layers is None and (dropped := sorted(pruned.intersection(exit_layers))):
        exit_layers = tuple(layer for layer in exit_layers if layer not in pruned)
        if any(threshold < 1 for threshold in args.threshold):
            notes = (
                f"default exits {dropped} end with pruned blocks and are left out; exits are at {list(exit_layers)}",
            )
    state_mode = _state_mode(args, recurrent_backbone, exits)
    argument_rules.check_first_token(args.prompt_exit_layer, state_mode)
    policy = ExitPolicy(
        num_layers=num_layers,
        exit_layers=exit_layers,
        thresholds=resolve_thresholds(args.threshold, exit_layers),
        confidence=confidence,
        state_mode=state_mode,
        pruned_blocks=pruned,
        prune_scope=args.prune_scope if pruned else "all",
        prune_adapter=_prune_adapter(args, num_layers, pruned),
        exit_scope=args.exit_scope,
        threshold_decay=args.threshold_decay,
        classifier=classifier,
        classifier_warmup=DEFAULT_WARMUP if args.classifier_warmup is None else args.classifier_warmup,
        final_block=final_block,
        prompt_exit_layer=_prompt_exit_layer(args, num_layers, final_block),
        prompt_exit_keep=DEFAULT_WARMUP if args.prompt_exit_keep is None else args.prompt_exit_keep,
        adapter=exits.adapter if exits is not None else "none",
        vocab_subset=_vocab_subset(args, confidence),
        propose=_propose(args, confidence, final_block),
        confirm=_confirm(args, confidence, exits),
        above_threshold=args.preset == "thesis",
        verify_tokens=_verify_tokens(args, final_block),
        notes=notes,
    )
    _check_active(policy, exits, recurrent_backbone)
    for note in notes:
        logger.warning("%s", note)
    return policy


def policy_of_exits(exits: ExitConfig, kind: str, threshold: float, **settings: Any) -> ExitPolicy:
    """Returns the policy with one threshold at all layers of trained exits, and their classifiers of this kind.

    ``settings``: other attributes of the policy.
    """
    return ExitPolicy(
        num_layers=exits.backbone.num_layers,
        exit_layers=exits.exit_layers,
        thresholds=(threshold,) * len(exits.exit_layers),
        confidence="classifier",
        classifier=cast(ClassifierKind, kind),
        final_block=exits.final_block,
        adapter=exits.adapter,
        **settings,
    )


def default_exit_layers(num_layers: int) -> tuple[int, ...]:
    """floor(L/2 + i*L/8) for i = 0..3 (16, 20, 24, 28 of 32), without duplicates and below L."""
    layers = {num_layers * (4 + i) // 8 for i in range(4)}
    return tuple(sorted(layer for layer in layers if 1 <= layer < num_layers))


def resolve_exit_layers(
    requested: tuple[int, ...] | None, num_layers: int, final_block: bool = False
) -> tuple[int, ...]:
    """Returns the exit layers for a backbone of ``num_layers`` blocks.

    Raises:
        UserError: a layer is outside 1..L-1 (an exit at L is no exit; with the final block, one at L-1 neither).
    """
    last = num_layers - 2 if final_block else num_layers - 1
    if requested is None:
        return tuple(layer for layer in default_exit_layers(num_layers) if layer <= last)
    for layer in requested:
        if not 1 <= layer <= last:
            why = " with final_block" if final_block else ""
            raise UserError(
                f"exit_layers must lie in 1..{last} for this backbone of {num_layers} blocks{why}, got {layer}"
            )
    return requested


def resolve_thresholds(threshold: tuple[float, ...], exit_layers: tuple[int, ...]) -> tuple[float, ...]:
    """Returns one threshold per exit layer.

    Raises:
        UserError: a list was given whose length is not the number of exit layers.
    """
    if len(threshold) == 1:
        return threshold * len(exit_layers)
    if len(threshold) != len(exit_layers):
        raise UserError(
            f"threshold has {len(threshold)} values but there are {len(exit_layers)} exit layers "
            f"{list(exit_layers)}; give one number, or one per exit layer"
        )
    return threshold


def pruned_blocks(args: DynamaxArgs, num_layers: int) -> frozenset[int]:
    """Returns the blocks (1-based) that a run disables on a backbone of ``num_layers`` blocks.

    Raises:
        UserError: there are no such blocks, or the profile is of another backbone.
    """
    if args.prune_strategy != "angular":
        return resolve_pruned_blocks(args.prune_layers, num_layers)
    assert args.prune_profile is not None and isinstance(args.prune_layers, int)
    profile = PruneProfile.load(Path(args.prune_profile).expanduser())
    if profile.num_layers != num_layers:
        raise UserError(
            f"prune_profile={args.prune_profile!r} is of {profile.backbone!r} with {profile.num_layers} blocks; this "
            f"backbone has {num_layers}; make one: dynamax-lm-eval prune-profile --backbone ..."
        )
    return profile.blocks(args.prune_layers)


def _prune_adapter(args: DynamaxArgs, num_layers: int, pruned: frozenset[int]) -> str | None:
    """Returns the fingerprint of the adapter that a pruned model is read out through, if it has one."""
    if args.prune_adapter is None:
        return None
    if args.prompt_exit_layer is not None or any(threshold < 1 for threshold in args.threshold):
        raise UserError(
            "prune_adapter and early exits exclude each other: it is fitted to models in which every token runs to "
            "the end; add threshold=1, or remove prune_adapter"
        )
    path = Path(args.prune_adapter).expanduser()
    fitted = PruneAdapters.open(path)
    if fitted.num_layers != num_layers:
        raise UserError(
            f"prune_adapter={args.prune_adapter!r} is of {fitted.backbone!r} with {fitted.num_layers} blocks; this "
            f"backbone has {num_layers}; fit one: dynamax-lm-eval prune-profile --backbone ... --fit_adapters N"
        )
    return fitted.fingerprint_for(pruned, path)


def resolve_pruned_blocks(requested: int | tuple[int, ...], num_layers: int) -> frozenset[int]:
    """Returns the disabled blocks (1-based); N means the N blocks just before the last one.

    Raises:
        UserError: a block does not exist, or none would be left to run besides the last.
    """
    if isinstance(requested, int):
        if requested > num_layers - 2 and requested > 0:
            raise UserError(
                f"prune_layers={requested} must be at most {max(num_layers - 2, 0)} "
                f"for this backbone of {num_layers} blocks"
            )
        return frozenset(range(num_layers - requested, num_layers))
    for block in requested:
        if not 1 <= block <= num_layers:
            raise UserError(f"prune_layers names block {block}; this backbone has blocks 1..{num_layers}")
    if len(requested) >= num_layers:
        raise UserError(f"prune_layers disables all {num_layers} blocks; leave at least one")
    return frozenset(requested)


def _resolve_exits(
    args: DynamaxArgs, confidence: ConfidenceName, exits: ExitConfig | None
) -> tuple[ClassifierKind | None, bool]:
    """Returns the kind of classifier, if one gives the confidence, and whether block L runs after an exit."""
    final_block = bool(args.final_block)
    if confidence in ("classifier", "cascade") and exits is not None:
        classifier = _choose_classifier(args, exits)
        _check_final_block(args, exits)
        _check_trained_layers(args, exits)
        return classifier, exits.final_block
    if all(threshold >= 1 for threshold in args.threshold):
        return None, final_block  # the plain backbone: nothing is evaluated, whatever would have been
    if args.classifier is not None or args.classifier_warmup is not None:
        name = "classifier" if args.classifier is not None else "classifier_warmup"
        raise UserError(f"{name} needs confidence=classifier and trained exits; this run uses {confidence}")
    if args.exits is not None and confidence not in ("classifier", "cascade"):
        if exits is None or not exits.serves_every_confidence:
            raise UserError(
                f"exits={args.exits!r} has no effect with confidence={confidence}: these exits have no adapters and no "
                "state maps; remove one of them"
            )
        # Their adapters correct the read-outs of training-free confidences as well, and their maps give states.
        _check_trained_layers(args, exits)
        if final_block and exits.adapter != "none":
            raise UserError("final_block and exit adapters exclude each other; remove final_block or exits")
    return None, final_block


def _prompt_exit_layer(args: DynamaxArgs, num_layers: int, final_block: bool) -> int | None:
    layer = args.prompt_exit_layer
    if layer is None:
        return None
    if not 1 <= layer < num_layers:
        raise UserError(
            f"prompt_exit_layer must lie in 1..{num_layers - 1} for this backbone of {num_layers} blocks, got {layer}"
        )
    if final_block:
        raise UserError("prompt_exit_layer is not possible with exits that were trained with a final block")
    return layer


def _verify_tokens(args: DynamaxArgs, final_block: bool) -> int | None:
    if not args.verify:
        return None
    if final_block:
        raise UserError(
            "verify is not possible with exits that were trained with a final block: what such an exit reads out is no "
            "hidden state that the blocks could go on from; choose other exits"
        )
    return DEFAULT_VERIFY_TOKENS if args.verify_tokens is None else args.verify_tokens


def _propose(args: DynamaxArgs, confidence: ConfidenceName, final_block: bool) -> float | None:
    if confidence != "cascade":
        if args.propose is not None:
            raise UserError(f"propose needs confidence=cascade; this run uses {confidence}")
        return None
    if final_block:
        raise UserError(
            "cascade and final_block exclude each other: what confirms an exit there is not what gives its token"
        )
    return DEFAULT_PROPOSE if args.propose is None else args.propose


def _confirm(args: DynamaxArgs, confidence: ConfidenceName, exits: ExitConfig | None) -> Confirm:
    if confidence != "cascade" and args.confirm is not None:
        raise UserError(f"confirm needs confidence=cascade; this run uses {confidence}")
    if args.confirm == "fitted" and args.vocab_subset is not None:
        raise UserError("confirm=fitted reads the whole vocabulary; remove vocab_subset, or use confirm=read_out")
    if args.confirm == "fitted" and not (exits is not None and exits.confirms):
        raise UserError(
            "confirm=fitted needs exits with confirmers, and these have none; train them (dynamax-lm-eval train fits "
            "some with --calibrate true), or use confirm=read_out"
        )
    if confidence != "cascade":
        return "read_out"
    return args.confirm or default_confirm(exits, args.vocab_subset)


def default_confirm(exits: ExitConfig | None, vocab_subset: int | None = None) -> Confirm:
    """Returns what confirms a cascade's proposals unless a run asks for something."""
    return "fitted" if exits is not None and exits.confirms and vocab_subset is None else "read_out"


def _vocab_subset(args: DynamaxArgs, confidence: ConfidenceName) -> int | None:
    if args.vocab_subset is None or all(threshold >= 1 for threshold in args.threshold):
        return None
    if not args.verify and not issubclass(CONFIDENCES[confidence], LogitsConfidence | CascadeConfidence):
        raise UserError(
            "vocab_subset needs confidence=softmax, entropy or cascade, which read the LM head, or verify=true; this "
            f"run uses {confidence}"
        )
    return args.vocab_subset


def _state_mode(args: DynamaxArgs, recurrent_backbone: bool, exits: ExitConfig | None) -> StateMode:
    if args.state_mode == "learned" and exits is None and args.confidence not in (None, "classifier", "cascade"):
        raise UserError(
            f"state_mode=learned: confidence={args.confidence} uses trained exits and their state maps only where they "
            "are named; add exits=FOLDER (`dynamax-lm-eval exits` lists them), or use state_mode=recompute"
        )
    if args.state_mode == "learned" and (exits is None or exits.states is None):
        raise UserError(
            "state_mode=learned needs exits with state maps, and these have none; train them: dynamax-lm-eval train "
            "--states linear, or use state_mode=recompute"
        )
    if args.verify:
        return "recompute"  # of no effect: no token leaves for good
    if args.state_mode is not None:
        return args.state_mode
    return preset_state_mode(args.preset, recurrent_backbone) or default_state_mode(exits)


def preset_state_mode(preset: Preset | None, recurrent_backbone: bool) -> StateMode | None:
    """Returns what a run leaves behind under a preset, unless it asks for something; None without one."""
    if preset is None:
        return None
    return "skip" if recurrent_backbone else PRESET_STATE_MODES[preset]


def default_state_mode(exits: ExitConfig | None) -> StateMode:
    """Returns what a run leaves behind that asks for nothing: what the exits have learned, else what is recomputed."""
    return "recompute" if exits is None or exits.states is None else "learned"


def _choose_classifier(args: DynamaxArgs, exits: ExitConfig) -> ClassifierKind:
    kind = cast(ClassifierKind, args.classifier or exits.classifiers[0])
    if kind not in exits.classifiers:
        raise UserError(f"classifier={kind} is not among the trained exits, which have {', '.join(exits.classifiers)}")
    if args.classifier_warmup is not None and not CLASSIFIERS[kind].recurrent:
        raise UserError(f"classifier_warmup has no effect with classifier={kind}, which carries no state; remove it")
    if args.classifier_warmup is not None and args.exit_scope == "all":
        raise UserError("classifier_warmup has no effect with exit_scope=all, where prompts are evaluated; remove it")
    return kind


def _check_final_block(args: DynamaxArgs, exits: ExitConfig) -> None:
    """Raises UserError where the run asks for a final block unlike that of the exits: they work as trained only."""
    if args.final_block is not None and args.final_block != exits.final_block:
        given, trained = str(args.final_block).lower(), str(exits.final_block).lower()
        source = f"preset={args.preset} sets final_block=true" if args.preset else f"final_block={given}"
        raise UserError(
            f"{source}, but these exits were trained with final_block={trained}; "
            "leave it out, or train others (dynamax-lm-eval train --final_block)"
        )


def _check_trained_layers(args: DynamaxArgs, exits: ExitConfig) -> None:
    missing = sorted(set(args.exit_layers or ()) - set(exits.exit_layers))
    if missing:
        raise UserError(
            f"exit_layers {missing} have no trained classifier; there are some at {list(exits.exit_layers)}"
        )


def _check_active(policy: ExitPolicy, exits: ExitConfig | None, recurrent_backbone: bool) -> None:
    """Raises UserError where tokens could exit and something that they need is missing."""
    if not policy.used_exits:
        return
    if recurrent_backbone and policy.state_mode in ("copy", "copy_previous"):
        raise UserError(copy_is_impossible("this backbone", policy.state_mode))
    if policy.state_mode == "learned" and exits is not None:
        known = {*exits.exit_layers, policy.num_layers - 1}
        if unknown := sorted({*policy.used_exits} - known):
            raise UserError(
                f"state_mode=learned: these exits have maps for states after {list(exits.exit_layers)} blocks and none "
                f"after {unknown}; choose one of theirs, or add state_mode=recompute"
            )
    if policy.active_exits and policy.confidence in ("classifier", "cascade") and exits is None:
        raise UserError(
            f"confidence={policy.confidence} needs exits that were trained for this backbone, and none are known; name "
            "them with exits=, or train them: dynamax-lm-eval train --backbone ..."
        )
    at_pruned = sorted(policy.pruned_blocks.intersection(policy.used_exits))
    if at_pruned:
        raise UserError(
            f"exit_layers {at_pruned} end with a pruned block, so there is nothing new to decide on; "
            "choose other exit_layers or prune_layers"
        )

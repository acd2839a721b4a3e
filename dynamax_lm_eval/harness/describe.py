"""What result files and caches say of a run: every setting that decides an answer, and how it came about."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Callable, Iterable
from typing import Any

import torch

import dynamax_lm_eval
from dynamax_lm_eval.backbones import SLOW_RUNGS
from dynamax_lm_eval.compute.cost import PAPER_MAMBA_RECOMPUTE
from dynamax_lm_eval.compute.thesis import ThesisFormula
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.exits.lookup import is_shipped
from dynamax_lm_eval.harness import naming
from dynamax_lm_eval.models.identity import config_fingerprint, generation_settings

#: Packages whose versions decide what is computed.
_PACKAGES = ("torch", "transformers", "lm_eval", "accelerate")

logger = logging.getLogger(__name__)


def identity(lm: Any) -> dict[str, Any]:
    """Returns everything that decides what a model answers: weights, dtype, tokenizer, policy; not batch or device."""
    return {
        "weights": lm.weights,
        "config": config_fingerprint(lm.model.config),
        "dtype": str(lm.model.dtype),
        "mixed_precision_dtype": str(lm.mixed_precision_dtype),
        "softmax_dtype": str(lm.softmax_dtype),
        "tokenizer": lm.tokenizer_content,
        "add_bos_token": lm.add_bos_token,
        "max_length": lm.max_length,
        "truncation": lm.truncation,
        "prefix_token_id": lm.prefix_token_id,
        "think_end_token": lm.think_end_token,
        "generation_config": generation_settings(lm.model.generation_config),
        "repetition_penalty": lm.args.repetition_penalty,
        "exits": lm.exits_fingerprint,
        "policy": lm.policy.describe(),
        "degenerate": [lm.args.degenerate_ngram, lm.args.degenerate_tokens],
    }


def run_settings(lm: Any) -> dict[str, Any]:
    """Returns the section ``config.dynamax`` of a result file."""
    backbone, exits = lm.engine.backbone, lm.exits
    segments = lm.engine.segments
    policy = lm.policy.describe()
    if lm.budget.has_budget:
        policy["thresholds"] = None  # they are in the budget's trajectory
    return {
        "label": _label(lm),
        "version": dynamax_lm_eval.__version__,
        "backbone": lm.args.backbone,
        "backbone_name": naming.model_name(lm.args.backbone, lm.peft_adapters, naming.FULL),
        "resolved_backbone": getattr(lm.model, "name_or_path", None),
        "revision": lm.revision,
        "exits": str(exits.path) if exits is not None else None,
        "exits_fingerprint": lm.exits_fingerprint,
        "exits_config": _exits_config(exits) if exits is not None else None,
        "exits_trained_on_documents": lm.trained_on,
        "preset": lm.args.preset,
        "preset_sets": _preset_sets(lm),
        "policy": policy,
        "policy_note": "; ".join(lm.policy.notes) or None,
        "budget": lm.budget.describe(),
        "certificate": lm.certified.describe() if lm.certified is not None else None,
        "confidence_chosen_by": "user" if lm.args.confidence is not None else "default",
        "repetition_penalty": lm.args.repetition_penalty,
        "exits_check": lm.args.exits_check,
        "degenerate_ngram": lm.args.degenerate_ngram,
        "degenerate_tokens": lm.args.degenerate_tokens,
        "prefix_caching": lm.args.prefix_caching,
        "rebatch": lm.args.rebatch,
        "mamba_kernels": backbone.scans_by,
        "device": _device(backbone.device),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "batch_size": lm.batch_size,
        "rows_in_flight": lm.args.rows_in_flight,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "runs_as": backbone.rung,
        "runs_as_note": SLOW_RUNGS.get(backbone.rung),
        "static_segments": dict(segments.passes) if segments is not None else None,
        "cost_source": backbone.cost.source,
        "lm_head_read_in_blocks": backbone.cost.lm_head / backbone.cost.mean_block_weights,
    }


def _label(lm: Any) -> str:
    exits = lm.exits
    if exits is None:
        return naming.label(lm.policy, lm.args, None, None)
    return naming.label(lm.policy, lm.args, exits.config, lm.exits_fingerprint, is_shipped(exits))


def loaded_model(lm: Any) -> str:
    """Returns in a few words which backbone is loaded, and how."""
    backbone = lm.engine.backbone
    dtype = str(lm.mixed_precision_dtype or lm.model.dtype).removeprefix("torch.")
    return f"{lm.args.backbone} ({lm.policy.num_layers} blocks, run as {backbone.rung}, {dtype} on {backbone.device})"


def _place(exits: ExitCheckpoint) -> str:
    """Returns where exits lie, in few words."""
    return f"the package for {exits.path.name}" if is_shipped(exits) else str(exits.path)


def announce(lm: Any) -> None:
    """Logs in one line what runs: backbone, dtype, device, exits and where they come from, policy."""
    policy, parts = lm.policy, [loaded_model(lm)]
    if policy.active_exits or lm.budget.has_budget:
        confidence = policy.classifier or policy.confidence
        if policy.propose is not None:
            confirms = {"fitted": "a regression on both", "read_out": "the read-out"}[policy.confirm]
            confidence = f"cascade:{confidence} (proposes from {policy.propose:g}, {confirms} confirms)"
        source = "no trained exits" if lm.exits is None else f"those in {_place(lm.exits)}"
        threshold = "by budget" if lm.budget.has_budget else "+".join(f"{value:g}" for value in policy.thresholds)
        if not lm.budget.has_budget and len(set(policy.thresholds)) == 1:
            threshold = f"{policy.thresholds[0]:g}"
        mode = "verified" if policy.drafts else policy.state_mode
        parts.append(f"exits after blocks {', '.join(map(str, policy.exit_layers))} ({source})")
        parts.append(f"confidence {confidence}, threshold {threshold}, states {mode}")
    else:
        parts.append("no exits")
    if policy.pruned_blocks:
        parts.append(f"without blocks {', '.join(map(str, sorted(policy.pruned_blocks)))}")
    logger.info("; ".join(parts))


def _device(device: torch.device) -> str:
    """Returns the name of the device that a run was on."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def thesis_formula(lm: Any) -> ThesisFormula | None:
    """Returns how ``compute_reduction_thesis`` is made of a run; None on blocks of several kinds."""
    cost, policy = lm.engine.backbone.cost, lm.policy
    kinds = {block.paper_recompute for block in cost.blocks}
    if len(kinds) > 1:
        return None
    return ThesisFormula(
        num_layers=cost.num_layers,
        is_mamba=kinds == {PAPER_MAMBA_RECOMPUTE},
        recomputes_state=policy.state_mode in ("recompute", "learned"),
        num_pruned=len(policy.pruned_blocks),
    )


def warn_of_read_cost(lm: Any) -> None:
    """Warns where confidences read the LM head and nobody asked for that."""
    if lm.args.confidence is None and lm.exits is None and lm.policy.active_exits:
        cost = lm.engine.backbone.cost
        logger.warning(
            "No trained exits are known for this backbone and no confidence was named, so this run uses "
            "confidence=softmax. Each of its LM-head reads costs as much as %.1f blocks here, so compute_reduction "
            "can fall below 1; confidence=state costs nothing",
            cost.lm_head / cost.mean_block_weights,
        )


def _exits_config(exits: ExitCheckpoint) -> dict[str, Any]:
    """Returns what exits say of themselves; of the documents that they were trained on only how many there are."""
    config = exits.config.to_json()
    training = dict(config["training"])
    if "prompt_documents" in training:
        training["prompt_documents"] = len(training["prompt_documents"])
    return {**config, "training": training}


def documents_trained_on(
    exits: ExitCheckpoint | None, tasks: Iterable[str], documents: Callable[[str], list[str]]
) -> dict[str, int]:
    """Returns how many documents of each task that is evaluated the exits were trained on; warns where there are any.

    ``documents``: gives the hashes of those of a task that are evaluated.
    """
    if exits is None or not exits.config.training.get("prompt_documents"):
        return {}
    found = {name: exits.trained_on(documents(name)) for name in tasks}
    if some := {name: count for name, count in found.items() if count}:
        seen = ", ".join(f"{count} of {name}" for name, count in some.items())
        logger.warning("The exits were trained on answers to documents that are evaluated here: %s", seen)
    return found


def needs_tasks(lm: Any) -> str | None:
    """Returns the part of a run that needs to know which tasks are evaluated; None where none does."""
    if lm.certified is not None:
        return "a certificate"
    return "a budget" if lm.budget.has_budget else None


def _preset_sets(lm: Any) -> dict[str, Any] | None:
    """Returns what the preset decided, so that the result file tells it from what the user gave."""
    if lm.args.preset is None:
        return None
    return {
        "final_block": lm.policy.final_block,
        "state_mode": lm.policy.state_mode,
        "repetition_penalty": lm.args.repetition_penalty,
        **({"prune_scope": lm.args.prune_scope, "above_threshold": True} if lm.args.preset == "thesis" else {}),
    }

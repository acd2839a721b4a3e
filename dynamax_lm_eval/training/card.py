"""The model card of an exit checkpoint: what it is for, how it was trained, how good it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynamax_lm_eval.exits.checkpoint import ExitConfig
from dynamax_lm_eval.models.aliases import HUB_ALIASES, SMOLLM2_GGUF
from dynamax_lm_eval.training.log import near_chance
from dynamax_lm_eval.training.options import TrainingOptions, mixture


def model_card(
    config: ExitConfig, evaluation: dict[str, Any], note: str | None = None, license_id: str | None = None
) -> str:
    """Returns Markdown with the Hub's metadata block.

    Args:
        config: of the exits.
        evaluation: of their quality.
        note: stands beside what is said of the text.
        license_id: of the exits, as the Hub writes it; None: not said.
    """
    backbone, training = config.backbone, config.training
    base = {**HUB_ALIASES, SMOLLM2_GGUF: HUB_ALIASES["smollm2"]}.get(backbone.id, backbone.id)
    kinds = ", ".join(f"`{kind}`" for kind in config.classifiers)
    text = mixture(str(training["options"]["dataset"]))[1]
    tuned = evaluation.get("lora")
    lines = [
        "---",
        "library_name: dynamax-lm-eval",
        *([f"base_model: {base}"] if _is_hub_id(base) else []),
        *([f"license: {license_id}"] if license_id else []),
        *([f"datasets: [{text}]"] if _is_hub_dataset(text) else []),
        "tags: [early-exit, dynamax]",
        "---",
        "",
        f"# Exits for {backbone.id}",
        "",
        f"Early-exit classifiers ({kinds}) after blocks {list(config.exit_layers)} of {backbone.num_layers}, for use "
        "with dynamax-lm-eval, which follows [DYNAMAX](https://arxiv.org/abs/2504.20922):",
        "",
        f"    lm_eval --model dynamax --model_args backbone={backbone.id},{'peft=THIS_FOLDER/lora,' if tuned else ''}"
        "exits=THIS_FOLDER,threshold=0.8 --tasks ...",
        "",
        f"They fit the weights with fingerprint `{backbone.fingerprint[:12]}` (revision {backbone.revision}) only. "
        f"Label: {_label(config)}. Final block: "
        f"{'on' if config.final_block else 'off'}. Read-out adapters: {config.adapter}. State of exited tokens: "
        f"{'recomputed' if config.states is None else f'learned ({config.states.kind})'}.",
        "",
        "## Training",
        "",
        f"{training['tokens']:,} tokens of `{training['options']['dataset']}`{_prompts(training)}, "
        f"{training['steps']} steps, "
        f"{training['seconds']:.0f} s, {training['tokens_per_second']:.0f} tokens/s on {training['hardware']}; "
        f"backbone in {training['dtype']}.{_init(training)}",
        *(["", note] if note else []),
        *(_lora(tuned, training["options"]) if tuned else []),
        "",
        "For another model, or for the same one in other weights:",
        "",
        f"    dynamax-lm-eval train --backbone MODEL {_command(training['options'])}",
        "",
        "## Held-out quality",
        "",
        f"On {evaluation['tokens']:,} tokens of {evaluation['documents']:,} documents that were not trained on. AUROC "
        'of "exit" against the label, with its standard error over documents:',
        "",
        "| kind | " + " | ".join(f"exit {layer}" for layer in config.exit_layers) + " | MACs per evaluation |",
        "| --- |" + " --- |" * (len(config.exit_layers) + 1),
    ]
    for kind, measured in evaluation["classifiers"].items():
        cells = " | ".join(_number(found["auroc"], found["auroc_stderr"]) for found in measured["exits"].values())
        macs = ", ".join(f"{value:,}" for value in sorted(set(measured["macs_per_evaluation"].values())))
        lines.append(f"| {kind} | {cells} | {macs} |")
    if poor := near_chance(evaluation):
        lines += ["", f"Hardly better than chance (AUROC): {', '.join(poor)}."]
    lines += [
        "",
        "The same among the tokens that reach an exit where the threshold is 0.8, with the share of tokens that do:",
        "",
        "| kind | " + " | ".join(f"exit {layer}" for layer in config.exit_layers) + " |",
        "| --- |" + " --- |" * len(config.exit_layers),
    ]
    for kind, measured in evaluation["classifiers"].items():
        reached = [found["reaching"]["0.8"] for found in measured["exits"].values()]
        cells = " | ".join(f"{_number(some['auroc'])} ({100 * some['share']:.0f} %)" for some in reached)
        lines.append(f"| {kind} | {cells} |")
    curves = [point for measured in evaluation["classifiers"].values() for point in measured["curve"]]
    documents = max((point["documents"] for point in curves), default=0)
    lines += [
        *_calibration(config, evaluation),
        *confirmers(config, evaluation.get("confirmers")),
        "",
        f"What a threshold does to {documents:,} of these documents, run by the engine (agreement: share of tokens "
        "whose best token is that of the full model, with its standard error over documents):",
        "",
        "| kind | threshold | tokens that exit | agreement | compute_reduction |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind, measured in evaluation["classifiers"].items():
        for point in measured["curve"]:
            if point["threshold"] in (0.5, 0.7, 0.8, 0.9, 0.95):
                lines.append(
                    f"| {kind} | {point['threshold']} | {point['share_exiting']:.3f} | "
                    f"{_number(point['agreement'], point['agreement_stderr'])} | "
                    f"{point['compute_reduction']:.3f} |"
                )
    return "\n".join(lines) + "\n"


def _calibration(config: ExitConfig, evaluation: Mapping[str, Any]) -> list[str]:
    """Returns the lines on calibrated confidences; none where they were not."""
    if (done := evaluation.get("calibration")) is None:
        return []
    lines = [
        "",
        "Confidences are calibrated on other text (Platt scaling, in the weights). Expected calibration error on the "
        "tokens above, without and with it:",
        "",
        "| kind | " + " | ".join(f"exit {layer}" for layer in config.exit_layers) + " |",
        "| --- |" + " --- |" * len(config.exit_layers),
    ]
    for kind, by_exit in done.items():
        cells = []
        for layer, scaling in by_exit.items():
            error = evaluation["classifiers"][kind]["exits"][layer]["expected_calibration_error"]
            before = error if scaling is None else scaling["expected_calibration_error_before"]
            cells.append(f"{before:.3f} to {error:.3f}")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def confirmers(config: ExitConfig, measured: Mapping[str, Any] | None, where: str = "the tokens above") -> list[str]:
    """Returns the lines on what confirms a cascade's proposals; ``measured``: on what ``where`` calls, if it is."""
    if measured is None:
        return []
    lines = [
        "",
        "With `confidence=cascade` the read-out confirms what a classifier proposes, by a regression on both. AUROC on "
        f"{where}:",
        "",
        "| | " + " | ".join(f"exit {layer}" for layer in config.exit_layers) + " |",
        "| --- |" + " --- |" * len(config.exit_layers),
    ]
    for name, by_exit in measured.items():
        shown = "read-out alone" if name == "read_out" else f"read-out and {name}"
        lines.append(f"| {shown} | {' | '.join(_number(by_exit[str(layer)]) for layer in config.exit_layers)} |")
    return lines


def _lora(tuned: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Returns what LoRA did to the backbone; the full model of all that follows is the tuned one."""
    bits, agreement = tuned["bits_per_byte"], tuned["agreement_of_exit"]
    return [
        "",
        f"The backbone runs under LoRA of rank {options['lora']}, in the folder `lora`, trained on "
        f"{options['lora_tokens']:,} tokens of the same text so that its exits agree sooner with the model as it was. "
        f"On the held-out text that model has {bits['original']:.3f} bits per byte, the tuned one {bits['tuned']:.3f}, "
        f"and their best tokens agree at {tuned['agreement_at_full_depth']:.3f} of the places. What follows is about "
        "the tuned model. Share of plain read-outs that agree with the full model:",
        "",
        "| exit | original model | tuned model | tuned exit with original model |",
        "| --- | --- | --- | --- |",
        *(
            f"| {layer} | {found['before']:.3f} | {found['after']:.3f} | {found['after_with_original']:.3f} |"
            for layer, found in agreement.items()
        ),
    ]


def _command(options: dict[str, Any]) -> str:
    """Returns the options that decide what is trained, where they are not the defaults."""
    defaults = {item.name: item.default for item in dataclasses.fields(TrainingOptions)}
    own = {"backbone", "dataset", "eval_dataset", "init", "prompts_documents", "prompts_metadata"}
    given = [f"--{name} {value}" for name, value in options.items() if name not in own and value != defaults.get(name)]
    return " ".join(["--dataset TEXT", *given])


def _prompts(training: Mapping[str, Any]) -> str:
    """Returns in words what the backbone was asked, where it wrote some of the text."""
    tasks, documents = training["options"].get("prompts"), training.get("prompt_documents", ())
    return f" (self: its answers to {len(documents):,} documents of {tasks})" if tasks else ""


def _init(training: Mapping[str, Any]) -> str:
    earlier = training["options"].get("init")
    return f" The training went on from other exits: {earlier}." if earlier else ""


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _is_hub_dataset(name: str) -> bool:
    is_file = name.endswith((".txt", ".jsonl", ".gz", ".parquet")) or "*" in name
    return _is_hub_id(name) and not is_file


def _label(config: ExitConfig) -> str:
    """Returns what makes an exit right."""
    one, other = ("exit", "full model") if config.label == "exit_in_full" else ("full model", "exit")
    among = "the most probable token" if config.top_k == 1 else f"among the {config.top_k} most probable tokens"
    text = f"the {one}'s best token is {among} of the {other}"
    return text if config.label_final_block else f"{text}, whose read-out leaves the last block out"


def _number(value: float | None, stderr: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"

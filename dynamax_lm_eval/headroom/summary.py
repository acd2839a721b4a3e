"""What was found, for people: tables, a picture, and one line that says whether early exit is worth training.

Knows the content of the JSON file; measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from dynamax_lm_eval.files import naming

#: Savings of an oracle (1 - 1 / compute_reduction) from which exits are worth training, and below which they are not.
WORTH, HOPELESS = 0.15, 0.05
#: Agreement that the states left behind may take from an oracle before the verdict is no better than "perhaps".
MOST_LOST = 0.2
#: Documents below which the line says on how few the verdict rests: standard errors over fewer are rough themselves.
FEW_DOCUMENTS = 30
#: Share of log V (the loss of a model that knows nothing) from which the full model is near chance.
NEAR_CHANCE = 0.9
#: Agreement that the verdict is about.
JUDGED = 0.95
#: The share of tokens whose read-outs are settled that the line names a layer for.
_SHARE = 0.5
_NAMES = {"none": "no adapter", "fitted": "fitted adapters", "exits": "exits at hand"}


def share_at(points: Sequence[Mapping[str, Any]], agreement: float, oracle_saving: float) -> float | None:
    """Returns the share of an oracle's saving that exits reach at an agreement.

    Agreement is that of read-outs where tokens leave, with full-depth states, as for the oracle. Between thresholds
    savings are joined by straight lines, which a mixture of both would reach, from the full model (agreement 1, no
    saving) on; where all thresholds agree more often, the saving is that of the one that saves most. None where the
    oracle saves nothing.
    """
    if oracle_saving <= 0:
        return None
    known = sorted([(1.0, 0.0), *((point["agreement"]["full_depth_states"], point["saving"]) for point in points)])
    agreements, savings = np.asarray(known).T
    if agreement <= agreements[0]:
        return float(savings.max() / oracle_saving)
    return float(np.interp(agreement, agreements, savings) / oracle_saving)


def verdict(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the verdict: a word, the saving that it follows from, and the line.

    Judged is the oracle with few exits (the default ones, or those at hand), the best read-outs that were tried, and an
    agreement of 0.95. Its saving, 1 - 1 / compute_reduction, bounds what any classifier can reach with these exits:

    - at least ``WORTH`` (compute_reduction 1.18): worth training; trained exits may reach a third of it;
    - below ``HOPELESS`` (compute_reduction 1.05): not worth training;
    - between, or where the states that tokens leave behind take more than ``MOST_LOST`` of the agreement: perhaps.

    The line ends in cautions: where the text has fewer than ``FEW_DOCUMENTS`` documents, and where the full model's
    loss or entropy is at least ``NEAR_CHANCE`` of log V. What such a model answers says nothing of a trained one.
    """
    every = _best(result, "every")
    few = _best(result, next(name for name in result["exit_layers"] if name != "every"))
    saving = few["saving"]
    kept = few["agreement"]["left_behind"]
    lost = few["agreement"]["full_depth_states"] - kept
    word = "worth training" if saving >= WORTH else "not worth training" if saving < HOPELESS else "perhaps"
    if word == "worth training" and lost > MOST_LOST:
        word = "perhaps"
    read_out = result["read_outs"][few["read_out"]]["settled"]
    layer = next((layer for layer, share in read_out.items() if share >= _SHARE), list(read_out)[-1])
    layers = ", ".join(map(str, result["exit_layers"][few["exit_layers"]]))
    parts = [
        f"With exits after every layer an oracle would reach {every['compute_reduction']:.2f} "
        f"(at an agreement of {JUDGED:g}; {_NAMES[every['read_out']]}), "
        f"after {layers} {few['compute_reduction']:.2f} ({_NAMES[few['read_out']]})",
        f"read-outs agree from block {layer} on for {read_out[layer]:.0%} of tokens",
        f"{_kept(few):.0%} of the answers of tokens that leave withstand the states left behind ({kept:.0%} of all)",
    ]
    if result["exits"] is not None and (share := result["exits"]["share_of_oracle"]) is not None:
        parts.append(f"the exits at hand reach {share:.2f} of what an oracle saves with them")
    hint = ""
    if saving < WORTH and "fitted" not in result["read_outs"]:
        hint = " (read-outs may agree more often with adapters: --fit_adapters True)"
    cautions = _cautions(result)
    careful = f"; caution: {', and '.join(cautions)}" if cautions else ""
    return {"word": word, "saving": saving, "cautions": cautions, "line": f"{'; '.join(parts)}: {word}{hint}{careful}"}


def _cautions(result: Mapping[str, Any]) -> list[str]:
    """Returns why a verdict may not hold: few documents, or a full model that knows next to nothing."""
    cautions = []
    if (documents := result["text"]["documents"]) < FEW_DOCUMENTS:
        cautions.append(f"{documents} document{'s' * (documents != 1)} only, others may differ")
    full = result["full_model"]
    for name in ("loss", "entropy"):
        if full[name] is not None and full[name] >= NEAR_CHANCE * full["chance"]:
            cautions.append(
                f"the full model is near chance (its {name} is {full[name]:.2f} nats per token, chance is "
                f"{full['chance']:.2f}), as untrained models are"
            )
            break
    return cautions


def table(result: Mapping[str, Any]) -> str:
    """Returns agreement by layer, the oracles, and the exits at hand, as Markdown tables."""
    read_outs = result["read_outs"]
    layers = list(read_outs["none"]["agreement"])
    agreement = [
        [layer]
        + [
            _share(measured[what].get(layer), measured[f"{what}_stderr"].get(layer))
            for what in ("agreement", "settled")
            for measured in read_outs.values()
        ]
        for layer in layers
    ]
    names = [_NAMES[name] for name in read_outs]
    headers = ["layer", *(f"agree, {name}" for name in names), *(f"settled, {name}" for name in names)]
    oracles = [
        [
            _NAMES[point["read_out"]],
            point["exit_layers"],
            point["agreement_asked"],
            *_columns(point),
            _share(point["kept_of_leaving"], point["stderr"]["kept_of_leaving"]),
        ]
        for point in result["oracles"]
    ]
    measured = ["compute_reduction", "leave", "agreement", "with states left behind"]
    tables = [
        _table(agreement, headers),
        _table(oracles, ["oracle", "exit layers", "asked", *measured, "kept, of those that leave"]),
    ]
    if result["exits"] is not None:
        rows = [
            [
                "+".join(f"{value:g}" for value in _shortened(point["thresholds"])),
                *_columns(point),
                point["share_of_oracle"],
            ]
            for point in result["exits"]["points"]
        ]
        tables.append(_table(rows, [f"threshold ({result['exits']['classifier']})", *measured, "share of an oracle"]))
    text = result["text"]
    documents = f"{text['documents']} documents"
    if (asked := text.get("documents_asked", 1)) > 1:
        documents += f" (of each at most a row, or 1/{asked} of the tokens)"
    measured_on = (
        f"{result['backbone']}, {text['tokens']} tokens in {text['rows']} rows, {result['state_mode']}; {documents}, "
        "and in brackets standard errors over these"
    )
    return "\n".join([f"{measured_on}\n", *tables])


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws agreement by layer, and agreement against compute_reduction, as one PNG, written in one step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colors = dict(zip(_NAMES, ("0.45", "tab:blue", "tab:orange"), strict=True))
    for name, measured in result["read_outs"].items():
        layers = [int(layer) for layer in measured["agreement"]]
        left.plot(layers, list(measured["agreement"].values()), "-o", ms=3, color=colors[name], label=_NAMES[name])
        left.plot(layers, list(measured["settled"].values()), "--", lw=1, color=colors[name])
    left.set(xlabel="blocks that have run", ylabel="share of tokens that agree (dashed: from there on)", ylim=(0, 1.02))
    for point in result["oracles"]:
        marker = "*" if point["exit_layers"] == "every" else "D"
        x, color = point["compute_reduction"], colors[point["read_out"]]
        y = point["agreement"]
        right.plot([x, x], [y["full_depth_states"], y["left_behind"]], ":", color=color, lw=1)
        right.plot(x, y["full_depth_states"], marker, color=color, ms=8, mfc="none")
        right.plot(x, y["left_behind"], marker, color=color, ms=8)
    if result["exits"] is not None:
        points = result["exits"]["points"]
        xs = [point["compute_reduction"] for point in points]
        ys = [point["agreement"]["left_behind"] for point in points]
        right.plot(xs, ys, "-o", ms=4, color=colors["exits"], label=f"{result['exits']['classifier']}, by threshold")
        right.legend(frameon=False)
    right.axvline(1, color="0.8", lw=0.8)
    right.set(
        xlabel="compute_reduction",
        ylabel="agreement (hollow: full-depth states)",
        title="oracles: stars, every layer; diamonds, few exits",
    )
    right.title.set_fontsize(9)
    left.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result['backbone']}: what early exit could save", fontsize=11)
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        figure.savefig(partial, dpi=150, format="png")
        partial.replace(path)
    plt.close(figure)


def _best(result: Mapping[str, Any], exit_layers: str) -> Mapping[str, Any]:
    """Returns the oracle with these exits that saves most at the agreement that is judged."""
    points = [
        point
        for point in result["oracles"]
        if point["exit_layers"] == exit_layers and point["agreement_asked"] == JUDGED
    ]
    best: Mapping[str, Any] = max(points, key=lambda point: point["saving"])
    return best


def _kept(point: Mapping[str, Any]) -> float:
    """Returns the share of answers that tokens which leave keep with the states left behind; 1 where none leaves."""
    return 1.0 if point["kept_of_leaving"] is None else float(point["kept_of_leaving"])


def _columns(point: Mapping[str, Any]) -> list[Any]:
    agreement, error = point["agreement"], point["stderr"]
    return [
        point["compute_reduction"],
        _share(point["share_leaving"], error["share_leaving"]),
        _share(agreement["full_depth_states"], error["full_depth_states"]),
        _share(agreement["left_behind"], error["left_behind"]),
    ]


def _share(share: float | None, stderr: float | None) -> str | None:
    """Returns a share with its standard error, as far as there are such."""
    if share is None:
        return None
    return f"{share:.4f}" if stderr is None else f"{share:.4f} ({stderr:.4f})"


def _shortened(thresholds: Sequence[float]) -> Sequence[float]:
    """Returns one number where all are the same."""
    return thresholds[:1] if len(set(thresholds)) == 1 else thresholds


def _table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    return f"{tabulate(rows, headers, tablefmt='github', floatfmt='.4f', missingval='')}\n"

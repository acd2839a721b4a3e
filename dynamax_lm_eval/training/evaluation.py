"""How good trained exits are on held-out text, and what a threshold would do: numbers as JSON, and a plot.

Every held-out token is one prediction. ``predicted`` points assume that each token reaches every exit before its own
with the states of the full model; ``curve`` is what the engine does (:mod:`dynamax_lm_eval.training.curve`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynamax_lm_eval.compute.accounting import ComputeRecord, account
from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.exits.checkpoint import ExitConfig
from dynamax_lm_eval.exits.classifiers import CLASSIFIERS, ExitClassifiers
from dynamax_lm_eval.exits.resolve import policy_of_exits
from dynamax_lm_eval.frozen.observe import BoolArray, FloatArray, IntArray, Observations
from dynamax_lm_eval.types import StateMode

#: Thresholds of the predicted curve.
THRESHOLDS = (*(round(0.05 * i, 2) for i in range(1, 20)), 0.97, 0.99)
#: Thresholds at which precision and recall of "exit" are given.
OPERATING_POINTS = (0.5, 0.7, 0.8, 0.9)
_BINS = 20
_EDGES = np.linspace(0, 1, _BINS + 1)
#: Lines and markers of the kinds in a plot.
_STYLES = (("-", "o"), ("-.", "D"), ("--", "s"), (":", "^"))


def report(
    seen: Observations,
    documents: Sequence[int],
    config: ExitConfig,
    classifiers: ExitClassifiers,
    cost: Any,
    state_mode: StateMode,
    curves: Mapping[str, list[dict[str, float]]],
) -> dict[str, Any]:
    """Returns everything measured, as JSON data: per kind and exit, and the curve of each kind.

    ``documents``: the document that each row is cut from; ``cost`` is the backbone's ``BackboneCost``, ``curves`` what
    the engine measured.
    """
    document = np.asarray(documents, dtype=np.int64)[seen.row]
    by_kind = {}
    for kind, confidences in seen.confidences.items():
        by_kind[kind] = {
            "exits": {
                str(layer): {
                    **exit_quality(confidences[i], seen.within_k[i]),
                    "auroc_stderr": auroc_stderr(confidences[i], seen.within_k[i], document),
                    "reaching": reaching(confidences, seen.within_k, i),
                }
                for i, layer in enumerate(config.exit_layers)
            },
            "macs_per_evaluation": {str(layer): cost.macs for layer, cost in classifiers.costs(kind).items()},
            "curve": curves[kind],
            "predicted": [
                predicted_point(seen, kind, threshold, config, classifiers, cost, state_mode)
                for threshold in THRESHOLDS
            ],
        }
    return {
        "tokens": int(seen.agrees.shape[1]),
        "documents": len(np.unique(document)),
        "top_k": config.top_k,
        "label": config.label,
        "adapter": config.adapter,
        "adapter_macs": {str(layer): macs for layer, macs in classifiers.adapter_macs().items()},
        "state_mode": state_mode,
        "label_share": {str(layer): float(seen.within_k[i].mean()) for i, layer in enumerate(config.exit_layers)},
        "agreement_of_exit": {str(layer): float(seen.agrees[i].mean()) for i, layer in enumerate(config.exit_layers)},
        "classifiers": by_kind,
    }


def exit_quality(confidence: FloatArray, label: BoolArray) -> dict[str, Any]:
    """Returns AUROC, precision and recall of "exit", calibration error and histograms of one exit.

    Both arguments are (T,).

    AUROC is None where all labels are equal; precision is None where nothing exits.
    """
    bins = _bins(confidence)
    counts = np.bincount(bins, minlength=_BINS)
    positives = np.bincount(bins, weights=label, minlength=_BINS)
    points = {}
    for threshold in OPERATING_POINTS:
        exits = confidence >= threshold
        right = int((exits & label).sum())
        points[str(threshold)] = {
            "precision": right / int(exits.sum()) if exits.any() else None,
            "recall": right / int(label.sum()) if label.any() else None,
            "share": float(exits.mean()),
        }
    return {
        "auroc": auroc(confidence, label),
        "label_share": float(label.mean()),
        "expected_calibration_error": calibration_error(confidence, label),
        "thresholds": points,
        "histogram": {"edges": _EDGES.tolist(), "tokens": counts.tolist(), "label_1": positives.astype(int).tolist()},
    }


def reaching(confidences: FloatArray, labels: BoolArray, exit_index: int) -> dict[str, dict[str, Any]]:
    """Returns, by threshold, the share of tokens that no earlier exit lets go, and the AUROC among these.

    Later exits never see the tokens that are easy to tell, which AUROC over all tokens counts. States are the full
    model's. ``confidences`` and ``labels`` are (E, T).
    """
    found = {}
    for threshold in OPERATING_POINTS:
        left = (confidences[:exit_index] < threshold).all(axis=0)
        found[str(threshold)] = {
            "share": float(left.mean()),
            "auroc": auroc(confidences[exit_index, left], labels[exit_index, left]),
        }
    return found


def auroc(confidence: FloatArray, label: BoolArray) -> float | None:
    """Returns the area under the ROC curve of (T,) confidences; None where all labels are equal."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(label, confidence)) if 0 < label.sum() < len(label) else None


def auroc_stderr(confidence: FloatArray, label: BoolArray, document: IntArray) -> float | None:
    """Returns the standard error of AUROC over documents; None for one document, or where all labels are equal.

    The variance of clustered ROC areas (Obuchowski 1997, equations 4 to 7) from the placements of each token among
    those of the other label, summed by document.
    """
    from scipy.stats import rankdata

    _, cluster = np.unique(document, return_inverse=True)
    clusters, counts = int(cluster.max()) + 1, (int(label.sum()), int((~label).sum()))
    if clusters < 2 or not all(counts):
        return None
    ranks = rankdata(confidence)
    placed = np.empty(len(label))
    placed[label] = (ranks[label] - rankdata(confidence[label])) / counts[1]  # share of label 0 below
    placed[~label] = 1 - (ranks[~label] - rankdata(confidence[~label])) / counts[0]  # share of label 1 above
    area = placed[label].mean()
    scaled = (placed - area) / np.where(label, *counts)
    sums = np.bincount(cluster, weights=scaled)
    return float(np.sqrt(clusters / (clusters - 1) * (sums**2).sum()))


def calibration_error(confidence: FloatArray, label: BoolArray) -> float:
    """Returns the expected calibration error of one exit, in 20 bins of equal width; both arguments are (T,)."""
    bins = _bins(confidence)
    positives, sums = (np.bincount(bins, weights=values, minlength=_BINS) for values in (label, confidence))
    return float(np.abs(positives - sums).sum() / len(label))


def _bins(confidence: FloatArray) -> IntArray:
    return np.clip(np.digitize(confidence, _EDGES[1:-1]), 0, _BINS - 1)


def predicted_point(
    seen: Observations,
    kind: str,
    threshold: float,
    config: ExitConfig,
    classifiers: ExitClassifiers,
    cost: Any,
    state_mode: StateMode,
) -> dict[str, float]:
    """Returns the share of tokens that exit, agreement with the full model, and compute_reduction at one threshold."""
    exits = seen.confidences[kind] >= threshold  # (E, T)
    first = np.where(exits.any(0), exits.argmax(0), len(config.exit_layers))
    layers = np.asarray([*config.exit_layers, config.backbone.num_layers])[first]
    policy = policy_of_exits(config, kind, threshold, state_mode=state_mode, exit_scope="all")
    costs = classifiers.costs(kind)
    records, start = [], 0
    for length in seen.lengths:
        trace = Trace(1, length, length, tuple(layers[start + 1 : start + length].tolist()), generated=False)
        records.append(
            account(trace, policy.cost_terms(1, costs, classifiers.adapter_macs(), classifiers.state_map_macs()), cost)
        )
        start += length
    tokens = seen.may_exit
    return {
        "threshold": threshold,
        "share_exiting": float((layers[tokens] < config.backbone.num_layers).mean()),
        "mean_exit_layer": float(layers[tokens].mean()),
        "agreement": float(seen.agrees_or_stays[first, np.arange(len(first))][tokens].mean()),
        "compute_reduction": ComputeRecord.sum(records).compute_reduction,
    }


def plot_curves(evaluation: dict[str, Any], path: Path) -> None:
    """Draws agreement against compute reduction, and ROC quality by exit layer, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    styles = dict(zip(CLASSIFIERS, itertools.cycle(_STYLES), strict=False))
    layers: set[int] = set()
    for kind, measured in evaluation["classifiers"].items():
        line, marker = styles[kind]
        curve = measured["curve"]
        (drawn,) = left.plot(
            [point["compute_reduction"] for point in curve],
            [point["agreement"] for point in curve],
            line,
            marker=marker,
            markersize=4,
            label=kind,
        )
        for i, point in enumerate(curve):
            if i % 3 == 0 or i == len(curve) - 1:
                left.annotate(
                    f"{point['threshold']:g}",
                    (point["compute_reduction"], point["agreement"]),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=7.5,
                    color=drawn.get_color(),
                )
        exits = measured["exits"]
        layers |= {int(layer) for layer in exits}
        right.plot(
            [int(layer) for layer in exits], [e["auroc"] for e in exits.values()], line, marker=marker, label=kind
        )
    left.axvline(1, color="0.7", linewidth=0.8)
    left.set(
        xlabel="compute reduction",
        ylabel="agreement with the full model",
        title="Next tokens by threshold (numbers)",
    )
    right.axhline(0.5, color="0.5", linewidth=1, linestyle=":", label="chance")
    right.set_xticks(sorted(layers))
    right.set(
        xlabel="exit layer",
        ylabel="AUROC",
        title=f"Exits told right from wrong, {evaluation['tokens']:,} held-out tokens",
    )
    for panel in (left, right):
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)

"""``dynamax-lm-eval exit-thresholds``: records what every exit would have said of text, and searches thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from tabulate import tabulate

from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import lookup
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.exits.resolve import default_confirm, default_state_mode, policy_of_exits
from dynamax_lm_eval.frozen.model import FrozenBackbone, load_backbone
from dynamax_lm_eval.frozen.observe import observe
from dynamax_lm_eval.frozen.options import FrozenOptions
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.frozen.text import HeldOut, held_out, text_documents
from dynamax_lm_eval.measure.options import SearchOptions
from dynamax_lm_eval.measure.output import check_output
from dynamax_lm_eval.measure.threshold_search import (
    Floats,
    Recorded,
    ThresholdPath,
    agreement_at,
    best_path,
    exits_at,
    outcome,
)
from dynamax_lm_eval.types import AUTO, StateMode

#: Prices of compute that are tried, in agreement per fraction.
PRICES = np.geomspace(0.02, 20, 60)
#: Thresholds of the curve that uses one at all exits.
SHARED = (*(round(0.02 * i, 2) for i in range(1, 50)), 0.985, 0.99, 0.995)
#: Reductions at which both are compared.
REDUCTIONS = (1.05, 1.1, 1.15, 1.2, 1.3, 1.5)
_DRAWS = 200
#: Documents that can be halved and drawn from.
_FEWEST = 4
#: Tokens that run through the backbone at once.
_AT_ONCE = 2048


def command(options: SearchOptions) -> str:
    """Searches thresholds and writes them; returns what they gain, and the file, as text.

    Raises:
        UserError: as :func:`search` does.
    """
    return f"{table(search(options))}{options.output}\n"


def search(options: SearchOptions) -> ThresholdPath:
    """Records text, searches thresholds in the record, and writes them.

    Raises:
        UserError: an option cannot be honoured, there are no exits, or the file exists.
    """
    output = Path(options.output).expanduser()
    check_output(output, options.overwrite)
    reading = FrozenOptions.of(options)
    loaded = load_backbone(reading)
    identity = loaded.identity
    exits = _open_exits(options, loaded)
    kind = options.classifier or exits.config.classifiers[0]
    if kind not in exits.config.classifiers:
        raise UserError(
            f"--classifier {kind} is not among these exits, which have {', '.join(exits.config.classifiers)}"
        )
    documents = text_documents(reading.source, loaded.tokenizer)
    text = held_out(documents, options.tokens, options.seq_len, options.documents, ("--tokens", "--documents"))
    if text.documents < _FEWEST:
        raise UserError(
            f"--tokens={options.tokens} tokens are of {text.documents} documents, and thresholds are searched in one "
            f"half of them and measured on the other; raise --tokens, or lower --seq_len"
        )
    backbone = loaded.engine.backbone
    state_mode = default_state_mode(exits.config) if options.state_mode == AUTO else cast(StateMode, options.state_mode)
    backbone.check_state_mode(state_mode, exits.config.exit_layers)
    classifiers = exits.load(backbone.device)
    classifiers.narrow(backbone.model.dtype)
    config = exits.config
    frozen = FrozenPass(
        backbone, config.exit_layers, config.final_block, config.top_k, config.label, config.label_final_block
    )
    policy = policy_of_exits(exits.config, kind, 0.5, state_mode=state_mode, exit_scope="all")
    if options.proposals and config.final_block:
        raise UserError("--propose needs exits without a final block, since what confirms there gives no token")
    engine = Engine(backbone, classifiers)
    if options.proposals:
        found = best_cascade(record_cascades(frozen, engine, text, policy, options.proposals), options.seed)
    else:
        found = compared(record(frozen, engine, text, policy), options.seed)
    result = ThresholdPath(
        backbone=identity.id,
        fingerprint=identity.fingerprint,
        scorer=f"cascade:{kind}" if options.proposals else kind,
        state_mode=state_mode,
        exit_layers=list(exits.config.exit_layers),
        tokens=sum(len(row) - 1 for row in text.rows),
        dataset=options.dataset,
        documents=text.documents,
        confirm=default_confirm(config) if options.proposals else None,
        exits=exits.fingerprint(),
        **found,
    )
    result.save(output)
    return result


def _open_exits(options: SearchOptions, loaded: FrozenBackbone) -> ExitCheckpoint:
    """Returns the exits that were named, or else the backbone's; raises UserError without any that fit."""
    identity = loaded.identity
    exits = (
        lookup.open_exits(options.exits)
        if options.exits is not None
        else lookup.find(options.backbone, identity.fingerprint, loaded.former)
    )
    if exits is None:
        raise UserError(f"there are no exits for {options.backbone!r}; name some by --exits, or train them")
    exits.check_fits(identity.model_type, identity.hidden_size, identity.num_layers)
    exits.check_fingerprint(identity.fingerprint, former=loaded.former)
    return exits


def record(frozen: FrozenPass, engine: Engine, text: HeldOut, policy: ExitPolicy) -> Recorded:
    """Returns confidences and agreement of all tokens but each row's first, which may not leave."""
    assert engine.classifiers is not None and policy.classifier is not None
    seen = observe(frozen, engine.classifiers, text.rows, _AT_ONCE)
    tokens = seen.may_exit
    cost, evaluation = exit_costs(engine, policy, int(np.median(seen.lengths)))
    return Recorded(
        confidence=seen.confidences[policy.classifier][:, tokens],
        agrees=seen.agrees_or_stays[:, tokens].astype(np.float64),
        cost=cost,
        evaluation=evaluation,
        document=np.asarray(text.document, dtype=np.int64)[seen.row[tokens]],
    )


def record_cascades(
    frozen: FrozenPass, engine: Engine, text: HeldOut, policy: ExitPolicy, proposals: Sequence[float]
) -> dict[float, Recorded]:
    """Returns what cascades show, by the classifier's confidence from which on they read; ``policy``: its own."""
    assert engine.classifiers is not None and policy.classifier is not None
    seen = observe(frozen, engine.classifiers, text.rows, _AT_ONCE, two_best=True)
    assert seen.two_best is not None
    tokens, length = seen.may_exit, int(np.median(seen.lengths))
    cost, evaluation = exit_costs(engine, policy, length)
    proposed, two_best = seen.confidences[policy.classifier][:, tokens], seen.two_best[:, :, tokens]
    confirmed = two_best[0]
    if len(engine.classifiers.confirmers):
        of_exits = [engine.classifiers.confirmer(policy.classifier, layer) for layer in policy.exit_layers]
        confirmed = np.stack([c.of_arrays(proposed[e], two_best[:, e]) for e, c in enumerate(of_exits)])
    reads = refusal_costs(engine, policy, length)
    document = np.asarray(text.document, dtype=np.int64)[seen.row[tokens]]
    agrees = seen.agrees_or_stays[:, tokens].astype(np.float64)
    return {
        propose: cascade_of(Recorded(proposed, agrees, cost, evaluation, document), confirmed, reads, propose)
        for propose in proposals
    }


def cascade_of(classifier: Recorded, confirmed: Floats, reads: Floats, propose: float) -> Recorded:
    """Returns what a cascade shows.

    Args:
        classifier: what its classifier shows.
        confirmed: (E, N) the probability of the best token of each read-out.
        reads: (E,) what a read that refuses adds.
        propose: the classifier's confidence from which on a token is read out.
    """
    asks = classifier.confidence >= propose
    # Below every threshold, 0 included: nothing lets a token leave that was not proposed.
    return replace(classifier, confidence=np.where(asks, confirmed, -1.0), refused=asks * reads[:, None])


def refusal_costs(engine: Engine, policy: ExitPolicy, length: int) -> Floats:
    """Returns (E,): what a refused read at each exit adds to a token of a row of this length, as a fraction."""
    cascade = replace(policy, confidence="cascade", propose=0.5)
    layers = (policy.num_layers,) * (length - 1)

    def fraction(refused: tuple[int, ...]) -> float:
        trace = Trace(1, length, length, layers, generated=False, refused=refused)
        return 1 / engine.account(trace, cascade).compute_reduction

    none = fraction((0,) * len(layers))
    return np.asarray([fraction((1 << e,) * len(layers)) - none for e in range(len(policy.exit_layers))])


def exit_costs(engine: Engine, policy: ExitPolicy, length: int) -> tuple[Floats, Floats]:
    """Returns (cost, evaluation) of :class:`Recorded`, averaged over the tokens of a row of this length."""
    exits = len(policy.exit_layers)

    def fraction(layer: int, thresholds: tuple[float, ...]) -> float:
        trace = Trace(1, length, length, (layer,) * (length - 1), generated=False)
        return 1 / engine.account(trace, replace(policy, thresholds=thresholds)).compute_reduction

    everywhere = (0.5,) * exits
    stays = fraction(policy.num_layers, everywhere)
    but_one = [fraction(policy.num_layers, (*everywhere[:e], 1.0, *everywhere[e + 1 :])) for e in range(exits)]
    evaluation = stays - np.asarray(but_one)
    asked = np.cumsum(evaluation)
    fractions = [fraction(layer, everywhere) for layer in (*policy.exit_layers, policy.num_layers)]
    return np.asarray(fractions) - np.append(asked, asked[-1]), evaluation


def compared(recorded: Recorded, seed: int, path: list[tuple[float, ...]] | None = None) -> dict[str, Any]:
    """Returns the path, the curve of shared thresholds and the gains, as :class:`ThresholdPath` has them.

    ``path``: of the searched half, where it is known; None: it is searched.
    """
    searched = searched_half(recorded, seed)
    test = recorded.of_documents(~searched)
    path = best_path(recorded.of_documents(searched), PRICES) if path is None else path
    count = len(recorded.confidence)
    shared = [(threshold,) * count for threshold in sorted(SHARED, reverse=True)]
    return {
        "path": [_point(test, thresholds) for thresholds in path],
        "shared": [_point(test, thresholds) for thresholds in shared],
        "gains": _gains(test, path, shared, seed),
    }


def best_cascade(recorded: dict[float, Recorded], seed: int) -> dict[str, Any]:
    """Returns what :func:`compared` does for the best ``propose`` and, as ``proposals``, what each of them is worth.

    The best one agrees most on the searched documents, on average over the reductions that all paths reach there.
    """
    curves, paths = {}, {}
    for propose, of_cascade in recorded.items():
        searched = of_cascade.of_documents(searched_half(of_cascade, seed))
        paths[propose] = best_path(searched, PRICES)
        curve = [outcome(searched, np.asarray(thresholds)) for thresholds in paths[propose]]
        curves[propose] = [agreement_at(curve, 1 / reduction) for reduction in REDUCTIONS]
    reached = np.isfinite(np.asarray(list(curves.values()))).all(axis=0)
    if not reached.any():
        # Where one saves nothing at all, those that reach furthest are compared.
        most = max(np.isfinite(values).sum() for values in curves.values())
        curves = {propose: values for propose, values in curves.items() if np.isfinite(values).sum() == most}
        reached = np.isfinite(np.asarray(list(curves.values()))).all(axis=0)
    best = max(curves, key=lambda propose: float(np.asarray(curves[propose])[reached].sum()))
    results = {propose: compared(of_cascade, seed, paths[propose]) for propose, of_cascade in recorded.items()}
    proposals = [
        {"propose": propose, "compute_reduction": gain["compute_reduction"], "agreement": gain["per_exit"]}
        for propose, result in results.items()
        for gain in result["gains"]
    ]
    return results[best] | {"propose": best, "proposals": proposals}


def searched_half(recorded: Recorded, seed: int) -> npt.NDArray[np.bool_]:
    """Returns which documents are searched, half of them; the others measure."""
    documents = int(recorded.document.max()) + 1
    searched = np.zeros(documents, dtype=np.bool_)
    searched[np.random.default_rng(seed).permutation(documents)[: documents // 2]] = True
    return searched


def _point(recorded: Recorded, thresholds: Sequence[float]) -> dict[str, Any]:
    """Returns thresholds and what they give, as a line of :class:`ThresholdPath`."""
    agreement, fraction = outcome(recorded, np.asarray(thresholds))
    return {"thresholds": list(thresholds), "agreement": agreement, "compute_reduction": 1 / fraction}


def _gains(recorded: Recorded, path: Any, shared: Any, seed: int) -> list[dict[str, float]]:
    """Returns the agreement of both curves at fixed reductions, and the standard error of the gain over documents."""
    sums = [
        np.stack([_by_document(recorded, np.asarray(thresholds)) for thresholds in curve]) for curve in (path, shared)
    ]
    documents = sums[0].shape[2]
    generator = np.random.default_rng(seed)
    draws = [np.ones(documents), *generator.multinomial(documents, np.full(documents, 1 / documents), size=_DRAWS)]
    rows = []
    agreements = np.empty((len(draws), 2, len(REDUCTIONS)))
    for i, weights in enumerate(draws):
        for j, curve in enumerate(sums):
            tokens, right, cost = np.moveaxis(curve @ weights, 1, 0)  # (C,) each
            points = list(zip((right / tokens).tolist(), (cost / tokens).tolist(), strict=True))
            agreements[i, j] = [agreement_at(points, 1 / reduction) for reduction in REDUCTIONS]
    for k, reduction in enumerate(REDUCTIONS):
        per_exit, one = agreements[:, 0, k], agreements[:, 1, k]
        if np.isfinite(per_exit[0] - one[0]):
            rows.append(
                {
                    "compute_reduction": reduction,
                    "per_exit": float(per_exit[0]),
                    "shared": float(one[0]),
                    "gain": float(per_exit[0] - one[0]),
                    "gain_stderr": float(np.nanstd((per_exit - one)[1:], ddof=1)),
                }
            )
    return rows


def _by_document(recorded: Recorded, thresholds: Floats) -> Floats:
    """Returns (3, documents): the tokens of every document, how many of them agree, and their compute."""
    left = exits_at(recorded, thresholds)
    right = recorded.agrees[left, np.arange(len(left))]
    parts = (np.ones(len(left)), right, recorded.cost_of(left, thresholds))
    _, document = np.unique(recorded.document, return_inverse=True)
    return np.stack([np.bincount(document, weights=part) for part in parts])


def table(result: ThresholdPath) -> str:
    """Returns what thresholds per exit gain over one for all, on documents that were not searched."""
    headers = ["compute_reduction", "agreement, per exit", "agreement, shared", "gain", "standard error"]
    rows = [list(gain.values()) for gain in result.gains]
    text = tabulate(rows, headers, tablefmt="github", floatfmt=("g", ".4f", ".4f", ".4f", ".4f"))
    searched = "" if result.documents is None else f" of {result.documents} documents, of which one half was searched"
    tried = sorted({line["propose"] for line in result.proposals})
    proposing = f"propose={result.propose:g}, of {', '.join(f'{value:g}' for value in tried)}\n" if tried else ""
    return (
        f"{text}\n{proposing}{result.tokens} tokens{searched}; standard errors are over documents of the other half\n"
    )

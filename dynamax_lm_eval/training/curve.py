"""What thresholds do to held-out text, measured: the engine runs it under each, with the states that tokens leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dynamax_lm_eval.compute.accounting import ComputeRecord, ratio_stderr
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.requests import ScoringRequest
from dynamax_lm_eval.engine.scoring import score_all
from dynamax_lm_eval.exits.checkpoint import ExitConfig
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.exits.resolve import policy_of_exits
from dynamax_lm_eval.frozen.text import HeldOut
from dynamax_lm_eval.progress import over
from dynamax_lm_eval.types import StateMode

#: Documents that the tokens of the curve are taken from, as far as there are so many.
DOCUMENTS = 40
#: The thresholds at which text is run.
THRESHOLDS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_ROWS_AT_ONCE = 8


def measured_curves(
    engine: Engine, held_out: HeldOut, config: ExitConfig, state_mode: StateMode, num_tokens: int
) -> dict[str, list[dict[str, Any]]]:
    """Returns, for each kind of classifier, what each threshold does to ``num_tokens`` tokens of the text.

    They are the beginnings of ``DOCUMENTS`` documents, of all if there are fewer, each with its share of the tokens.
    All tokens but the first of a row may leave. ``agreement`` is the share of them whose best next token is that of the
    full model, ``agreement_stderr`` its standard error over ``documents``; None for a single one.
    """
    texts, number = beginnings(held_out, num_tokens)
    full, _ = _run(engine, texts, ExitPolicy(config.backbone.num_layers))
    _, of_token = np.unique(np.repeat(number, [len(row) - 2 for row in texts]), return_inverse=True)
    tokens = np.bincount(of_token)
    curves: dict[str, list[dict[str, Any]]] = {}
    for kind in over(config.classifiers, "curves"):
        curves[kind] = []
        for threshold in THRESHOLDS:
            policy = policy_of_exits(config, kind, threshold, state_mode=state_mode, exit_scope="all")
            best, record = _run(engine, texts, policy)
            layers = np.asarray([layer for response in record.exit_layers for layer in response])
            agrees = np.bincount(of_token, weights=best == full)
            curves[kind].append(
                {
                    "threshold": threshold,
                    "share_exiting": float((layers < config.backbone.num_layers).mean()),
                    "mean_exit_layer": float(layers.mean()),
                    "agreement": float((best == full).mean()),
                    "agreement_stderr": ratio_stderr([list(zip(agrees.tolist(), tokens.tolist(), strict=True))]),
                    "documents": len(tokens),
                    "compute_reduction": record.compute_reduction,
                }
            )
    return curves


def beginnings(held_out: HeldOut, num_tokens: int) -> tuple[list[list[int]], list[int]]:
    """Returns rows of about ``num_tokens`` tokens, and the document of each.

    Errors are over documents, and every threshold runs all of these tokens, so a few of many documents say more than
    whole rows of few. Where some documents are shorter than their share, more than ``DOCUMENTS`` are taken.
    """
    share = max(3, -(-num_tokens // min(DOCUMENTS, held_out.documents)))
    rows: list[list[int]] = []
    number: list[int] = []
    taken: dict[int, int] = {}
    for row, document in zip(held_out.rows, held_out.document, strict=True):
        left = min(share - taken.get(document, 0), num_tokens - sum(taken.values()))
        piece = row[: max(0, left)]
        if len(piece) > 2:  # neither the first nor the last token of a row counts
            rows.append(piece)
            number.append(document)
            taken[document] = taken.get(document, 0) + len(piece)
    return rows, number


def _run(engine: Engine, rows: Sequence[Sequence[int]], policy: ExitPolicy) -> tuple[Any, ComputeRecord]:
    """Returns the best next token at every position of rows but their first and last, and what that cost."""
    requests = [ScoringRequest(row[:-1], 1, [[0]] * (len(row) - 1), policy) for row in rows]
    scorings = score_all(engine, requests, _ROWS_AT_ONCE)
    best = np.concatenate([np.asarray(scoring.greedy_tokens[1:], dtype=np.int64) for scoring in scorings])
    return best, ComputeRecord.sum(engine.account(scoring.trace, policy) for scoring in scorings)

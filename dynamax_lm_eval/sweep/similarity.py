"""How much a point's answers are those of the full model on the same documents."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

_WORD = re.compile(r"\w+")


def consistency(full: Sequence[Any], ours: Sequence[Any]) -> dict[str, list[float]]:
    """Returns for each document ``exact`` equality and, for texts, ``token_f1`` and ``rouge_l`` (F-measure).

    Answers that are no texts (chosen continuations) have ``exact`` only, and what is no answer (None) nothing.
    Surrounding white space does not count. The tokens of token_f1 are lower-cased words; two texts without any are
    equal.
    """
    pairs = [(a, b) for a, b in zip(full, ours, strict=True) if a is not None]
    if not pairs or not all(isinstance(text, str) for pair in pairs for text in pair):
        return {"exact": [float(a == b) for a, b in pairs]} if pairs else {}
    scorer = RougeScorer(["rougeL"])
    return {
        "exact": [float(a.strip() == b.strip()) for a, b in pairs],
        "token_f1": [token_f1(a, b) for a, b in pairs],
        "rouge_l": [_rouge_l(scorer, a, b) for a, b in pairs],
    }


def token_f1(a: str, b: str) -> float:
    """Returns the F1 of the two bags of lower-cased words."""
    left, right = Counter(_WORD.findall(a.lower())), Counter(_WORD.findall(b.lower()))
    if not left or not right:
        return float(left == right)
    common = (left & right).total()
    return 2 * common / (left.total() + right.total())


def _rouge_l(scorer: RougeScorer, a: str, b: str) -> float:
    if a.strip() == b.strip():
        return 1.0  # also for texts without words
    return float(scorer.score(a, b)["rougeL"].fmeasure)
